"""The Python of README and docs runs as it stands, page by page from the top."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import pytest
from markdown_blocks import PAGES, ROOT, Block, blocks

BLOCKS = {page: blocks(page, path.read_text(encoding="utf-8")) for page, path in PAGES.items()}
PYTHON = {page: [b for b in found if b.language == "python"] for page, found in BLOCKS.items()}


def run(page: list[Block], folder: Path) -> None:
    """Run a page's blocks in one namespace; those with a title are files of the folder.

    Parts of the project's own files are left to the tests of what they are about.
    """
    names = {"__name__": "__main__"}
    for block in page:
        if block.not_run or "/" in (block.title or ""):
            continue
        if block.title:
            (folder / block.title).write_text(block.code, encoding="utf-8")
            continue
        # Empty lines above, so that a traceback names the page's own line.
        code = "\n" * (block.line - 1) + block.code
        exec(compile(code, block.page, "exec"), names)


@pytest.fixture
def workspace(
    results: Path, small_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """A copy of the results to run in; modules and policies that a page adds go with it."""
    from var_moe.routing import registry

    folder = tmp_path / "workspace"
    copytree(results, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(registry, "_SPECS", dict(registry._SPECS))
    yield folder
    for path in folder.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, found in PYTHON.items() if found])
def test_the_blocks_of_a_page_run(page: str, workspace: Path) -> None:
    run(PYTHON[page], workspace)


def test_blocks_that_are_not_run_are_few_and_say_why() -> None:
    left_out = {b.place: b.not_run for found in PYTHON.values() for b in found if b.not_run}
    for place, reason in left_out.items():
        warnings.warn(f"{place} is not run: {reason}", stacklevel=1)
    assert len(left_out) <= 3, left_out


def test_titles_with_a_folder_name_files_of_the_project() -> None:
    titles = [b.title for found in PYTHON.values() for b in found if "/" in (b.title or "")]
    assert [title for title in titles if not (ROOT / title).is_file()] == []


def test_a_page_is_run_in_order_and_faults_are_seen(tmp_path: Path) -> None:
    text = "```python\nx = 1\n```\n<!-- not run: needs a Hub model -->\n```python\nx = 2\n```\n"
    text += '```python title="one.py"\ny = 2\n```\n```python\nassert x == 2\n```\n'
    found = blocks("page", text)
    assert [(b.line, b.not_run, b.title) for b in found] == [
        (2, None, None),
        (6, "needs a Hub model", None),
        (9, None, "one.py"),
        (12, None, None),
    ]
    with pytest.raises(AssertionError):
        run(found, tmp_path)
    assert (tmp_path / "one.py").read_text() == "y = 2\n"
