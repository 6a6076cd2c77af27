"""Every command line and every option that README and docs name exists."""

from __future__ import annotations

from functools import cache

import pytest
from cyclopts import App, CycloptsError
from markdown_blocks import PAGES, commands, options

from var_moe.cli.main import build_app
from var_moe.cli.words import normalise, read_words
from var_moe.errors import UsageError


@cache
def app_of_all() -> App:
    return build_app()


def fault(words: list[str]) -> str | None:
    """What is wrong with a command line.

    Where text only names a command, or a command's option, nothing is asked for.
    """
    app = app_of_all()
    if words and not words[0].startswith("-") and words[0] not in app:
        return f"no command {words[0]!r}"
    if len(words) == 2 and normalise(words)[1] in options_of(words[0]):
        return None
    if len(words) < 2 or "--help" in words:
        return None
    try:
        app.parse_args(read_words(words).rest, exit_on_error=False, print_error=False)
    except (CycloptsError, UsageError) as error:
        return " ".join(str(error).split())
    return None


@cache
def options_of(command: str) -> frozenset[str]:
    """The names of a command's options, with underscores."""
    arguments = app_of_all()[command].assemble_argument_collection()
    return frozenset(normalise([name for argument in arguments for name in argument.names]))


@cache
def known_options() -> frozenset[str]:
    """The names of all options of all commands, with underscores."""
    commands = [name for name in app_of_all() if not name.startswith("-")]
    own = {"--debug", "--help", "--version", "--install_completion"}
    own |= {"--json", "--show_config", "--options", "--config"}  # cli/words.py
    return frozenset(own.union(*(options_of(name) for name in commands)))


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
        ("var-moe tune --policy naee --show-config > naee.yaml", True),
        ("var-moe tune --options naee.yaml --seed 7", True),
        ("var-moe tune --options --seed 7", False),
        ("var-moe tune --seeds", True),
        ("var-moe tune --seed --robust", False),
        ("var-moe report --seeds", False),
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
    text += "  --seed $s; done; var-moe report results/*\n```\n\n```python\nvar-moe no\n```\n"
    assert commands("page", text) == [
        ["tune", "--seed", "1"],
        ["report", "results/*"],
        ["tune", "--seed", "1"],
    ]
    assert options(text) == ["--robust"]
