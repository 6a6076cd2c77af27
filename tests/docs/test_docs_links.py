"""The README's links lead somewhere; those within docs/ are checked by the strict build."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from markdown_blocks import PAGES, ROOT

README = PAGES["README.md"].read_text(encoding="utf-8")
_LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """What GitHub and mkdocs alike call a page's headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    names = (re.sub(r"[^\w\s-]", "", name).strip().lower() for name in _HEADING.findall(text))
    return {re.sub(r"\s+", "-", name) for name in names}


def fault(link: str) -> str | None:
    """What is wrong with a link of the README."""
    place, _, anchor = link.partition("#")
    path = ROOT / place
    if not path.exists():
        return f"no file {place}"
    if anchor and anchor not in anchors(path):
        return f"no heading {anchor} in {place}"
    return None


def test_every_link_of_the_readme_leads_somewhere() -> None:
    links = _LINK.findall(README)
    assert len(links) > 20
    assert {link: why for link in links if (why := fault(link))} == {}


@pytest.mark.parametrize("link", ["docs/nowhere.md", "docs/tuning.md#no-such-heading"])
def test_a_broken_link_is_seen(link: str) -> None:
    assert fault(link)
