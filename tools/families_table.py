"""The documentation's table of model families, from the results of the contract suite.

    python -m pytest tests/execution --junitxml results.xml
    python tools/families_table.py results.xml --write docs/families.md

Without ``--write`` the table goes to standard output. Nothing in it is written by hand: a row
says what the results say, and a family that fails a test is shown as failing it.
"""

from __future__ import annotations

import argparse
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "execution")]

from test_backends import BACKENDS  # noqa: E402
from test_router_kinds import KINDS  # noqa: E402

from families import find_families  # noqa: E402

START, END = "<!-- families: tools/families_table.py -->", "<!-- /families -->"
SCORE_NAMES = {"sqrt_softplus": "square root of softplus"}


@dataclass
class Row:
    """What the results say of one family."""

    passed: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # test -> reason
    score: str = ""
    inner: dict[str, bool] = field(default_factory=dict)  # backend -> all passed


def read(paths: list[Path]) -> dict[str, Row]:
    """The rows by family, from JUnit files of `tests/execution`."""
    rows: dict[str, Row] = defaultdict(Row)
    kind_of = {kind.name.replace(" ", "-"): kind.module for kind in KINDS}
    modules = {family.module for family in find_families()}
    for path in paths:
        for case in ElementTree.parse(path).iter("testcase"):
            test, _, parameters = str(case.get("name")).rstrip("]").partition("[")
            suite = str(case.get("classname")).rpartition(".")[2]
            found = [name for name in parameters.split("-") if name in modules]
            found += [module for kind, module in kind_of.items() if parameters.startswith(kind)]
            if found and suite in ("TestFamilies", "TestBackends", "TestRouterKinds"):
                _count(rows[found[0]], case, suite, test, parameters.split("-"))
    return rows


def _count(
    row: Row, case: ElementTree.Element, suite: str, test: str, parameters: list[str]
) -> None:
    skipped = case.find("skipped")
    passed = not any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
    row.passed += passed
    if skipped is not None:
        row.skipped[test] = str(skipped.get("message"))
    elif not passed:
        row.failed.append(f"{test} ({suite.removeprefix('Test').lower()})")
    for backend in set(BACKENDS) & set(parameters) if suite == "TestBackends" else ():
        row.inner[backend] = row.inner.get(backend, True) and passed
    for entry in case.iter("property"):
        if entry.get("name") == "score":
            row.score = SCORE_NAMES.get(str(entry.get("value")), str(entry.get("value")))


def table(rows: dict[str, Row]) -> str:
    """Markdown."""
    kinds = {kind.module: kind.name for kind in KINDS}
    lines = ["| family | router scores | backends | tests passed | remarks |"]
    lines.append("|---|---|---|---|---|")
    for family in find_families():
        row = rows.get(family.module)
        if row is None:
            lines.append(f"| {family.module} | | | 0 | not run |")
            continue
        backends = ["sorted", "grouped_mm"]
        backends += [b for b, good in sorted(row.inner.items()) if good and b not in backends]
        remarks = sorted(set(row.skipped.values()))
        if family.module in kinds:
            remarks.append(f"also K = 8: {kinds[family.module]}")
        remarks += [f"**fails** {test}" for test in sorted(set(row.failed))]
        cells = (
            family.module,
            row.score,
            "" if row.failed else ", ".join(backends),
            str(row.passed),
            "; ".join(remarks),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Put the table between its marks in a Markdown file."""
    page = path.read_text(encoding="utf-8")
    if START not in page or END not in page:
        sys.exit(f"{path}: has no marks {START} and {END}")
    pattern = re.escape(START) + ".*?" + re.escape(END)
    page = re.sub(pattern, lambda _: f"{START}\n{text}\n{END}", page, flags=re.DOTALL)
    path.write_text(page, encoding="utf-8")


def main() -> None:
    """Read the results, print or write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=Path, help="JUnit files of the contract suite")
    parser.add_argument("--write", type=Path, help="Markdown file with the table's marks")
    arguments = parser.parse_args()
    text = table(read(arguments.results))
    if arguments.write:
        write(arguments.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
