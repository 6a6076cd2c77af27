"""Further manuals for the train split alone, from Debian packages; nothing here is bundled.

The three bundled sources are too small to train on without reading them many times. These
manuals are of the same kind, under licences that allow it, and no text that is judged on
comes from them.

| package                                     | read from            | licence       |
|---------------------------------------------|----------------------|---------------|
| apache2-doc                                 | HTML, English        | Apache-2.0    |
| sqlite3-doc                                 | HTML                 | public domain |
| python-django-doc                           | HTML                 | BSD-3-Clause  |
| python-sqlalchemy-doc                       | .rst                 | MIT           |
| sphinx-doc                                  | .rst                 | BSD-2-Clause  |
| python-{werkzeug,flask,jinja2}-doc          | .rst                 | BSD-3-Clause  |
| perl-doc                                    | pod                  | Artistic/GPL  |
"""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from sources import Block, Page, html_blocks, rst_blocks

SOURCE = "manuals"
HTML = {
    "apache2-doc": Path("/usr/share/doc/apache2-doc/manual/en"),
    "sqlite3-doc": Path("/usr/share/doc/sqlite3"),
    "python-django-doc": Path("/usr/share/doc/python-django-doc/html"),
}
RST = (
    *("python-sqlalchemy-doc", "sphinx-doc", "python-werkzeug-doc", "python-flask-doc"),
    "python-jinja2-doc",
)
# Generated lists, source listings and legal text: no prose to learn from.
DROPPED = re.compile(
    r"genindex|_modules/|search|py-modindex|licen[cs]e|copyright|toc\.html|sitemap"
)
BOILERPLATE_SHARE = 0.02  # a block on more of a package's pages than this is navigation


def installed(package: str) -> list[Path]:
    """The package's files, in order.

    Raises:
        SystemExit: it is not installed.
    """
    found = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"package {package} is not installed: apt-get install {package}")
    return sorted(Path(line) for line in found.stdout.splitlines())


def _without_boilerplate(pages: list[Page]) -> Iterator[Page]:
    """Pages without the blocks that stand on many of them."""
    counts = Counter(text for page in pages for text in {block.text for block in page.blocks})
    limit = max(3, int(BOILERPLATE_SHARE * len(pages)))
    for page in pages:
        blocks = tuple(block for block in page.blocks if counts[block.text] <= limit)
        if blocks:
            yield replace(page, blocks=blocks)


def _html_pages(package: str) -> Iterator[Page]:
    folder, pages = HTML[package], []
    for path in sorted(folder.rglob("*.html")):
        name = str(path.relative_to(folder))
        if not path.is_file() or DROPPED.search(name):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        blocks = tuple(html_blocks(text.replace("¶", "")))
        pages.append(Page(source=SOURCE, name=f"{package}/{name}", blocks=blocks))
    yield from _without_boilerplate(pages)


def _rst_pages(package: str) -> Iterator[Page]:
    for path in installed(package):
        match = re.search(r"/(?:_sources|rst)/(.+?)(?:\.rst|\.txt|\.rst\.txt)$", str(path))
        if match is None or not path.is_file():
            continue
        name = match[1]
        if not DROPPED.search(name):
            blocks = tuple(rst_blocks(path.read_text(encoding="utf-8", errors="replace")))
            yield Page(source=SOURCE, name=f"{package}/{name}", blocks=blocks)


def _pod_pages() -> Iterator[Page]:
    for path in installed("perl-doc"):
        if path.suffix != ".pod":
            continue
        done = subprocess.run(
            ["pod2text", "--width=100", str(path)], capture_output=True, check=True
        )
        text = done.stdout.decode("utf-8", errors="replace")
        paragraphs = (part.strip("\n") for part in re.split(r"\n\s*\n", text))
        blocks = tuple(
            Block(text=part, heading=not part.startswith(" ")) for part in paragraphs if part
        )
        yield Page(source=SOURCE, name=f"perl-doc/{path.stem}", blocks=blocks)


def manual_pages() -> list[Page]:
    """All further manuals, a page per file."""
    pages = [page for package in HTML for page in _html_pages(package)]
    pages += [page for package in RST for page in _rst_pages(package)]
    return [*pages, *_pod_pages()]
