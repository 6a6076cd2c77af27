"""Phase 1: Routing Analysis: a profile, and what it says of the hypotheses behind the fast path.

    python experiments/01_routing_analysis.py [--profile FOLDER] [any option of `var-moe profile`]

Profiles the calibration text (``var-moe profile``), or takes a ready profile, and writes
``routing_analysis.json`` into ``--output`` (results/phase1): distribution of the router's entropy,
frequency against entropy, consistency, coverage of the fast path, and each hypothesis' verdict.
"""

import sys
from pathlib import Path

try:
    from var_moe.cli import main
except ModuleNotFoundError as error:
    if error.name != "var_moe":
        raise
    sys.exit("error: var_moe is not installed for this Python: pip install -e . (or make tune)")


def option(words: list[str], name: str) -> str | None:
    """The value of ``--name value`` or ``--name=value``."""
    for at, word in enumerate(words):
        if word == name and at + 1 < len(words):
            return words[at + 1]
        if word.startswith(name + "="):
            return word.partition("=")[2]
    return None


def analyse(folder: Path, output: Path) -> None:
    """Write the analysis of a profile, and say what it found."""
    from var_moe.analysis.hypotheses import FILE, analyse_routing
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.cli.output import make_report
    from var_moe.storage import atomic_write_json

    found = {**analyse_routing(RoutingProfile.load(folder)), "profile_path": str(folder)}
    atomic_write_json(output / FILE, found)
    for row in found["hypotheses"]:
        print(f"{row['name']}, {row['claim']}: {row['verdict']}")
        print(f"    found: {row['evidence']}; asked: {row['test']}")
    print(f"Saved: {output / FILE}")
    make_report(output)


if __name__ == "__main__":
    words = sys.argv[1:]
    output = Path(option(words, "--output") or "results/phase1")
    if option(words, "--output") is None:
        words = ["--output", str(output), *words]
    code = main(["profile", *words])
    if code == 0 and not {"--help", "-h"} & set(words):
        from var_moe.storage import command_line

        with command_line(["python", *sys.argv]):
            analyse(Path(option(words, "--profile") or output), output)
    sys.exit(code)
