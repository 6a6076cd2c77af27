"""The documentation builds without a warning and asks no other server for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from markdown_blocks import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("mkdocs") is None or find_spec("mkdocstrings") is None,
        reason="the documentation needs: pip install -e '.[docs]'",
    ),
]

_FETCHED = re.compile(
    r"""<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=["']?(https?:[^"'\s>]+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        words,
        cwd=ROOT,
        env={**os.environ, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site: Path) -> None:
    sources = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert [str(path) for path in sources if not (site / path.with_suffix(".html")).is_file()] == []


def test_public_names_are_documented(site: Path) -> None:
    """By the place where each is defined, which is its anchor on the page."""
    import var_moe

    page = (site / "api.html").read_text(encoding="utf-8")
    places = var_moe._PLACES.items()
    anchors = {name: f'id="var_moe.{module}.{name}"' for name, module in places}
    assert [name for name, anchor in anchors.items() if anchor not in page] == []


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    found = {
        f"{path.name}: {address}"
        for path in site.rglob("*.html")
        for address in _FETCHED.findall(path.read_text(encoding="utf-8"))
    }
    assert found == set()


def test_the_figure_is_on_its_page(site: Path) -> None:
    assert 'src="images/way-of-a-token.svg"' in (site / "concepts.html").read_text("utf-8")
    assert (site / "images" / "way-of-a-token.svg").is_file()
