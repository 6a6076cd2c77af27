"""Every file that a command writes has its place on the page of files."""

from __future__ import annotations

import re

from markdown_blocks import PAGES, ROOT

KINDS = r"[\w-]+\.(?:json|jsonl|csv|html|parquet|safetensors|txt|log)"
TEMPORARY = {"checkpoint.safetensors"}  # gone when its command ends

_CONSTANT = re.compile(r"^[A-Z_, ]*(?:FILE|NAME|CONFIG)\b.* = .*$", re.MULTILINE)
_IN_OUTPUT = re.compile(rf'output / "({KINDS})"')


def written(source: str) -> set[str]:
    """Names of files that a module's constants hold, or that it writes into its output folder."""
    constants = " ".join(_CONSTANT.findall(source))
    return {*re.findall(rf'"({KINDS})"', constants), *_IN_OUTPUT.findall(source)}


def test_every_written_file_is_described() -> None:
    page = PAGES["docs/files.md"].read_text(encoding="utf-8")
    sources = (ROOT / "src" / "var_moe").rglob("*.py")
    names = set().union(*(written(path.read_text(encoding="utf-8")) for path in sources))
    assert len(names) > 30
    assert sorted(name for name in names - TEMPORARY if name not in page) == []


def test_names_are_found_where_they_stand() -> None:
    source = 'TRACE_FOLDER, COST_FILE = "trace", "cost.json"\nNAMES = ("none",)\n'
    source += 'OTHER = "x.json"\nsave(output / "rows.csv", folder / "y.json")\n'
    assert written(source) == {"cost.json", "rows.csv"}
