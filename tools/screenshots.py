"""Pictures of reports, taken in a headless browser: ``python tools/screenshots.py report.html``.

Needs ``pip install playwright`` and Chromium (Debian: ``apt install chromium``).
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Without these, Chromium looks for its maker's servers, and as root refuses to start.
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def browser_path() -> str | None:
    """Where Chromium is, if anywhere."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser_path(), args=list(FLAGS))
        try:
            yield chromium
        finally:
            chromium.close()


@contextmanager
def opened(chromium: Any, page: Path, *, width: int, dark: bool = False) -> Iterator[Any]:
    """A report's page with all its figures drawn.

    Its ``problems`` are what the console complained of and every request for the network.
    """
    context = chromium.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if dark else "light",
        device_scale_factor=1,
    )
    tab = context.new_page()
    problems: list[str] = []

    def said(message: Any) -> None:
        # What a renderer without a GPU says of its own speed is not the page's doing.
        if message.type in ("error", "warning") and "GL Driver Message" not in message.text:
            problems.append(message.text)

    def asked(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            problems.append(f"asks the network for {request.url}")

    tab.on("console", said)
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", asked)
    tab.goto(page.resolve().as_uri())
    if tab.locator("[data-figure]").count():
        tab.wait_for_selector("html[data-drawn]", timeout=60_000, state="attached")
    tab.problems = problems
    try:
        yield tab
    finally:
        context.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--name", help="of the files; the page's folder by default")
    parser.add_argument("--figures", nargs="*", default=[], help="also these figures by themselves")
    parser.add_argument("--widths", type=int, nargs="+", default=[1440, 400])
    parser.add_argument("--top", type=int, help="only so many pixels from the top")
    parser.add_argument("--light", action="store_true", help="the light face only")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    with browser() as chromium:
        for page in given.pages:
            name = given.name or page.resolve().parent.name
            for width in given.widths:
                for dark in (False,) if given.light else (False, True):
                    with opened(chromium, page, width=width, dark=dark) as tab:
                        stem = f"{name}-{width}{'-dark' if dark else ''}"
                        clip = (
                            {"x": 0, "y": 0, "width": width, "height": given.top}
                            if given.top
                            else None
                        )
                        path = given.output / f"{stem}.png"
                        tab.screenshot(path=path, full_page=True, clip=clip)
                        print(path, *tab.problems)
                        for figure in given.figures:
                            shot = given.output / f"{stem}-{figure}.png"
                            tab.locator(f'figure:has([data-figure="{figure}"])').screenshot(
                                path=shot
                            )


if __name__ == "__main__":
    main()
