"""What stands in fences and code spans of the README and of the pages of docs/."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}

_FENCE = re.compile(r"^ *```(?P<info>[^`\n]*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`]+)`")
_TITLE = re.compile(r'title="([^"]+)"')
_NOT_RUN = re.compile(r"<!-- not run: (.+?) -->\s*\Z", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page.

    ``title`` names the file that it is the content of, or with a folder a file of this project
    that it is a part of. ``not_run`` says why a block can't be run: the comment
    ``<!-- not run: reason -->`` above it.
    """

    page: str
    line: int  # of its first line of code, from 1
    language: str
    title: str | None
    code: str
    not_run: str | None

    @property
    def place(self) -> str:
        """For people."""
        return f"{self.page}:{self.line}"


def blocks(page: str, text: str) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    for match in _FENCE.finditer(text):
        title, reason = _TITLE.search(match["info"]), _NOT_RUN.search(text[: match.start()])
        found.append(
            Block(
                page=page,
                line=text.count("\n", 0, match.start("code")) + 1,
                language=(match["info"].split() or [""])[0],
                title=title and title[1],
                code=dedent(match["code"]),
                not_run=reason and " ".join(reason[1].split()),
            )
        )
    return found


def spans(text: str) -> list[str]:
    """Code spans outside of fences, each on one line."""
    return [" ".join(span.split()) for span in _SPAN.findall(_FENCE.sub("", text))]


def commands(page: str, text: str) -> list[list[str]]:
    """The words of each ``var-moe`` command line of a page, in fences and in code spans."""
    lines = [
        line
        for block in blocks(page, text)
        if block.language in ("", "sh", "bash")
        for line in block.code.replace("\\\n", " ").splitlines()
    ]
    found = []
    for line in [*lines, *spans(text)]:
        for part in re.split(r"[;|>]|&&|\bdo\b", line):
            if part.split()[:1] == ["var-moe"]:
                # "[--robust]" is an option that may be left out; "$seed" stands for a number.
                plain = re.sub(r"\$\w+", "1", re.sub(r"[\[\]]", "", part))
                found.append(shlex.split(plain, comments=True)[1:])
    return found


def options(text: str) -> list[str]:
    """Names of the options that code spans begin with: ``--n_calls 20`` gives ``--n_calls``."""
    names = (re.match(r"--[\w-]+", span) for span in spans(text))
    return [name[0] for name in names if name]
