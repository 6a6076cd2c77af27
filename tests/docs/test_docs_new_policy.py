"""The policy of "Adding a policy" passes the contract tests with the row that the page shows."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from shutil import copy

import pytest
from markdown_blocks import PAGES, ROOT, blocks

pytestmark = pytest.mark.slow

CONTRACT = "tests/routing/test_policies_contract.py"
TABLE = "POLICIES = {\n"


@pytest.fixture
def titled() -> dict[str, str]:
    """The page's blocks that are files or parts of them, by name."""
    page = "docs/adding_a_policy.md"
    found = blocks(page, PAGES[page].read_text(encoding="utf-8"))
    return {block.title: block.code for block in found if block.title}


def contract(titled: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the contract tests, with the page's row in their table, on the page's policy."""
    (folder / "margin.py").write_text(titled["margin.py"], encoding="utf-8")
    copy(ROOT / "tests" / "damages.py", folder)
    tests = (ROOT / CONTRACT).read_text(encoding="utf-8")
    assert tests.count(TABLE) == 1
    tests = tests.replace(TABLE, TABLE + titled[CONTRACT])
    tests = tests.replace("import pytest\n", "import pytest\nfrom margin import MarginPolicy\n", 1)
    (folder / "test_contract.py").write_text(tests, encoding="utf-8")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "margin"]
    return subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=False, timeout=1200
    )


def test_the_policy_of_the_page_holds_the_contract(titled: dict[str, str], tmp_path: Path) -> None:
    done = contract(titled, tmp_path)
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.splitlines()[-1].split()[0]) > 40  # tests passed


def test_a_policy_that_breaks_it_is_caught(titled: dict[str, str], tmp_path: Path) -> None:
    broken = titled["margin.py"].replace("behind <= ", "behind > ")
    assert broken != titled["margin.py"]
    done = contract({**titled, "margin.py": broken}, tmp_path)
    assert done.returncode == 1, done.stdout
