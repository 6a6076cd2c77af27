"""Do certificates hold what they promise? A simulation on resampled document losses.

    OMP_NUM_THREADS=1 python -m benchmarks.certification
    python -m benchmarks.certification --record --profile results/phase3/profile

Pages of recorded losses are drawn with replacement and moved so that the true perplexity ratio is
known. At exactly the bound, the share of studies that certify is the error rate; below it, the
power. The naive way stands beside it: the best of fifty on one text, by its point estimate.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.certification.population import LOSSES_FILE, Recorded
from benchmarks.certification.simulation import Plan, simulate
from benchmarks.certification.tables import markdown

from var_moe.errors import UsageError, VarMoeError
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    atomic_write_text,
    check_output_folder,
    provenance,
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.certification", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/certification"))
    parser.add_argument("--losses", type=Path, default=LOSSES_FILE, help="table of losses")
    parser.add_argument("--studies", type=int, default=Plan.studies, help="per row")
    parser.add_argument("--record", action="store_true", help="record the losses on the demo first")
    parser.add_argument("--profile", type=Path, help="the demo's profile, for --record")
    parser.add_argument("--documents", type=int, default=320, help="about how many are recorded")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Record if asked, simulate, write and print the tables."""
    args = parse(arguments)
    started = time.perf_counter()
    try:
        check_output_folder(args.output)
        if args.studies < 1:
            raise UsageError(f"--studies {args.studies}: expected at least 1")
        if args.record:
            from benchmarks.certification.record import record

            if args.profile is None:
                raise UsageError("--record needs --profile: a profile of the demo model")
            record(args.losses, profile_folder=args.profile, documents=args.documents)
        if not args.losses.is_file():
            raise UsageError(f"{args.losses}: no such table of losses; make it with --record")
        found = simulate(Recorded.load(args.losses), Plan(studies=args.studies))
        found = {"schema_version": SCHEMA_VERSION, **found, "provenance": provenance()}
        atomic_write_json(args.output / "simulation.json", found)
        atomic_write_text(args.output / "simulation.md", markdown(found))
    except VarMoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(markdown(found))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
