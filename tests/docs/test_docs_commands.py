"""Every command line and every option that README and docs name exists."""

from __future__ import annotations

from functools import cache

import pytest
from cyclopts import App, CycloptsError
from markdown_blocks import PAGES, commands, options

from var_moe.cli.main import build_app
from var_moe.cli.words import normalise


@cache
def app_of_all() -> App:
    return build_app()


def fault(words: list[str]) -> str | None:
    """What is wrong with a command line; one that is only a command's name asks for nothing."""
    app = app_of_all()
    if words and not words[0].startswith("-") and words[0] not in app:
        return f"no command {words[0]!r}"
    if len(words) < 2 or "--help" in words:
        return None
    if words[-1].startswith("--") and set(normalise(words[-1:])) <= known_options():
        words = words[:-1]  # the option itself is meant: `var-moe tune --validate`
    try:
        app.parse_args(normalise(words), exit_on_error=False, print_error=False)
    except CycloptsError as error:
        return " ".join(str(error).split())
    return None


@cache
def known_options() -> frozenset[str]:
    """The names of all options of all commands, with underscores."""
    app = app_of_all()
    found = ["--debug", "--help", "--version", "--install_completion"]
    found += ["--json", "--show_config", "--options", "--config"]  # cli/words.py
    for name in app:
        if not name.startswith("-"):
            for argument in app[name].assemble_argument_collection():
                found += argument.names
    return frozenset(normalise(found))


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_parses(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    faults = {" ".join(words): fault(words) for words in commands(page, text)}
    assert {line: why for line, why in faults.items() if why} == {}


@pytest.mark.parametrize("page", PAGES)
def test_every_option_exists(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    assert set(normalise(options(text))) - known_options() == set()


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("var-moe tune --policy naee", True),
        ("var-moe tune --n-calls 20  # with a remark", True),
        ("var-moe tune --dataset a,b,c [--robust]", True),
        ("var-moe certify", True),
        ("var-moe --help", True),
        ("var-moe tune --validate", True),
        ("var-moe tune --valid", False),
        ("var-moe tune --polcy naee", False),
        ("var-moe tune --n_calls many", False),
        ("var-moe tuen", False),
        ("var-moe tuen --seed 1", False),
        ("var-moe tune --method wishing", False),
    ],
)
def test_the_check_finds_what_it_should(line: str, right: bool) -> None:
    (words,) = commands("page", f"text with `{line}` inside")
    assert (fault(words) is None) == right


def test_command_lines_are_found_where_they_stand() -> None:
    text = "`var-moe tune\n--seed 1` and `--robust`\n\n```sh\nfor s in 1 2; do var-moe tune \\\n"
    text += (
        "  --seed $s; done; var-moe stability results/run_*\n```\n\n```python\nvar-moe no\n```\n"
    )
    assert commands("page", text) == [
        ["tune", "--seed", "1"],
        ["stability", "results/run_*"],
        ["tune", "--seed", "1"],
    ]
    assert options(text) == ["--robust"]
