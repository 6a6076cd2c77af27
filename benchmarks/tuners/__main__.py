"""Search methods compared on the demo over seeds, on the same objective and text.

    OMP_NUM_THREADS=1 python -m benchmarks.tuners --profile results/phase3/profile
    python -m benchmarks.tuners --summary_only

With --prepare_only first, the timing is done at ordinary priority and the rest can be niced.

Random search, TPE, Optuna's GP and scikit-optimize's GP have 50 full evaluations each, replay
has 10. A full evaluation scores a reduced text: the first documents of the (shuffled) search
half of validation. Its speedup is not timed: a cost model, fitted once and kept in the output
folder, predicts it from the pairs that the evaluation executed, so that timing noise decides
nothing; the score is the documented one. Evaluations are kept on disk by configuration and never
run twice; each method is charged the seconds that its evaluations took when they were measured.

A run's final configuration is chosen as `var-moe tune` does: on a sample of the ordering half,
the fastest candidate whose one-sided 95% upper bound of the degradation is below the limit, of at
most eight that are measured there; replay's forecasts propose some of them, also as in `tune`. Then
it is measured on a sample of test. Runs go seed by seed, so that a partial result is balanced; a
killed comparison goes on where it stopped, with the same command.

What the methods get: TPE and both GPs begin with the default, the presets and random points, ten
in all; TPE and Optuna's GP see the bound as a constraint, with a margin for the text's error;
scikit-optimize sees the documented score alone; random search draws from its first point on.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.tuners.setting import LABELS, Setting, run_file
from benchmarks.tuners.summary import write_summary

from var_moe.errors import VarMoeError
from var_moe.storage import check_output_folder

_NUMBERS = {
    "documents": "of each full evaluation",
    "ordering_documents": "that the final configuration is chosen on",
    "test_documents": "that it is measured on last",
    "evaluations": "full evaluations of each method but replay",
    "replay_evaluations": "full evaluations of replay",
    "candidates": "measured again on the ordering text at the most",
    "threads": "of torch",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tuners", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0")
    parser.add_argument("--methods", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/tuners"))
    parser.add_argument("--profile", type=Path, help="a ready profile; by default a fresh one")
    parser.add_argument("--summary_only", action="store_true", help="no run, no model")
    parser.add_argument("--prepare_only", action="store_true", help="cost model and trace, no run")
    for name, text in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(Setting, name), help=text)
    return parser.parse_args(arguments)


def compare(args: argparse.Namespace) -> None:
    """Run what is not finished, seed by seed."""
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"{time.perf_counter() - started:7.0f} s  {line}", flush=True)

    setting = Setting(**{name: getattr(args, name) for name in _NUMBERS})
    jobs = [
        (seed, method)
        for seed in range(args.seeds)
        for method in args.methods
        if not run_file(args.output, method, seed).is_file()
    ]
    say(f"{args.seeds * len(args.methods)} runs, {len(jobs)} to do")
    if not jobs:
        return
    from benchmarks.tuners.bench import prepare
    from benchmarks.tuners.runs import run

    bench = prepare(setting, args.output, profile=args.profile, say=say)
    if args.prepare_only:
        jobs = []
    try:
        for number, (seed, method) in enumerate(jobs, start=1):
            found = run(bench, method, seed)
            say(f"{number}/{len(jobs)}  {_line(found)}")
    finally:
        bench.memo.close()


def _line(found: dict[str, Any]) -> str:
    ordering, test, seconds = found["ordering"], found["test"], found["seconds"]
    verdict = "passed" if found["passed_ordering"] else "nothing passed"
    return (
        f"seed {found['seed']} {LABELS[found['method']]}: ordering {ordering['score']:.3f} "
        f"({verdict}), test {test['score']:.3f} at {100 * test['degradation']:+.2f}%, "
        f"{found['evaluations']} evaluations in {seconds['evaluations_s']:.0f} s, "
        f"suggestions {seconds['suggestions_s']:.1f} s"
    )


def main() -> int:
    """Compare, then write and print the summary of all finished runs."""
    args = parse()
    try:
        check_output_folder(args.output)
        if not args.summary_only:
            compare(args)
        if args.prepare_only:
            return 0
        print(write_summary(args.output))
    except VarMoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
