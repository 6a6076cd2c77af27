"""The words that every command takes, read before the command's own.

``--json``, ``--debug``, ``--options FILE`` (or ``--config FILE.yaml``) and ``--show_config``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.errors import UsageError
from var_moe.storage import expanded, jsonable

if TYPE_CHECKING:
    from cyclopts import App
    from cyclopts.config import Dict

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
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            out.append("--" + name[2:].replace("-", "_") + equals + expanded(value))
        else:
            out.append(expanded(argument))
    return out


def load_options(path: Path, command: str) -> Dict:
    """The file as a source of a command's options for cyclopts, which names file and wrong key.

    Keys are a command's options, with hyphens or underscores.

    Raises:
        UsageError: no such file, no YAML, or no mapping.
    """
    import yaml
    from cyclopts.config import Dict

    if not path.is_file():
        raise UsageError(f"{path}: no such file; expected the options of a command in YAML")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(values or {}, Mapping):
        raise UsageError(f"{path}: expected `option: value` in each line")
    data = {str(key).replace("-", "_"): _read(value) for key, value in (values or {}).items()}
    # Below the command's name: at the top, options that are called as a command is (--profile)
    # would be taken for that command's.
    return Dict({command: data}, source=str(path))


def _read(value: Any) -> Any:
    if isinstance(value, str):
        return expanded(value)
    return [_read(item) for item in value] if isinstance(value, list) else value


def effective_options(app: App, words: Sequence[str]) -> str:
    """All options of a command line, defaults included, as YAML that `load_options` reads.

    Raises:
        UsageError: the words name no command.
    """
    import yaml

    _, bound, _ = app.parse_args(list(words), exit_on_error=False, print_error=False)
    if not words or words[0].startswith("-"):
        raise UsageError("--show_config: expected a command, as in `var-moe tune --show_config`")
    bound.apply_defaults()
    values: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        # ``from_`` is ``from``; options that commands share are the fields of a dataclass.
        values |= jsonable(value if is_dataclass(value) else {name.rstrip("_"): value})
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"# var-moe {words[0]}\n{text}"
