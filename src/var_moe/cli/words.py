"""The words that every command takes, read before the command's own.

``--json``, ``--debug``, ``--options FILE`` (or ``--config FILE.yaml``) and ``--show_config``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from var_moe.errors import UsageError
from var_moe.storage import expanded

FORWARDED = "lm-eval"
"""The command whose words are another program's, to be left as they are."""
_YAML = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Words:
    """A command line, apart from what every command takes.

    Args:
        rest: the command and its own words.
        debug: show tracebacks.
        json: print the result alone on stdout, as JSON.
        show_config: print the options that would be used, and end.
        options: file that holds options; words win over it.
    """

    rest: tuple[str, ...]
    debug: bool = False
    json: bool = False
    show_config: bool = False
    options: Path | None = None


def read_words(arguments: Sequence[str]) -> Words:
    """Split a command line.

    Raises:
        UsageError: ``--options`` without a file, or twice.
    """
    if tuple(arguments[:1]) == (FORWARDED,):
        return Words(rest=tuple(arguments))
    words = normalise(arguments)
    switches = {name: f"--{name}" in words for name in ("debug", "json", "show_config")}
    rest: list[str] = []
    files: list[Path] = []
    left = iter([word for word in words if word[2:] not in switches or word[:2] != "--"])
    for word in left:
        name, equals, value = word.partition("=")
        if name not in ("--options", "--config"):
            rest.append(word)
            continue
        if not equals:
            value = next(left, "")
        if name == "--config" and Path(value).suffix.lower() not in _YAML:
            rest += [name, value] if value else [name]  # a VAR configuration
        elif not value or value.startswith("--"):
            raise UsageError(f"{name}: expected a YAML file with options of the command")
        else:
            files.append(Path(value))
    if len(files) > 1:
        raise UsageError(f"--options: expected one file, got {files[0]} and {files[1]}")
    return Words(rest=tuple(rest), options=files[0] if files else None, **switches)


def normalise(arguments: Sequence[str]) -> list[str]:
    """``--max-samples`` and ``--max_samples`` are one option; ``~`` is the home folder.

    A shell knows ``~`` as a word's first sign alone: not in ``--output=~/there``, not in quotes.
    """
    out = []
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + expanded(value)
        else:
            argument = expanded(argument)
        out.append(argument)
    return out
