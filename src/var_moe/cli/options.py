"""Options of a command as a YAML file: read for ``--options``, written by ``--show_config``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

from cyclopts import App
from cyclopts.config import Dict

from var_moe.errors import UsageError
from var_moe.storage import expanded


def load_options(path: Path, command: str) -> Dict:
    """The file as a source of a command's options for cyclopts, which names file and wrong key.

    Keys are a command's options, with hyphens or underscores.

    Raises:
        UsageError: no such file, no YAML, no mapping, or a key twice.
    """
    import yaml

    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UsageError(f"{path}: {what}; expected a file with options of a command in YAML")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML ({error})") from None
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        raise UsageError(f"{path}: expected `option: value` in each line")
    data: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in data:
            raise UsageError(f"{path}: {name!r} is given twice, with a hyphen and without")
        data[name] = _read(value)
    # Below the command's name: at the top, options that are called as a command is (--profile)
    # would be taken for that command's.
    return Dict({command: data}, source=str(path), use_commands_as_keys=True)


def _read(value: Any) -> Any:
    if isinstance(value, str):
        return expanded(value)
    return [_read(item) for item in value] if isinstance(value, list) else value


def effective_options(app: App, words: tuple[str, ...]) -> str:
    """All options of a command line, defaults included, as YAML that `load_options` reads.

    Raises:
        UsageError: the words name no command.
    """
    import yaml

    command, bound, _ = app.parse_args(list(words), exit_on_error=False, print_error=False)
    if not words or words[0].startswith("-"):
        raise UsageError("--show_config: expected a command, as in `var-moe tune --show_config`")
    bound.apply_defaults()
    names = option_names(command)
    values = {names[name]: _plain(value) for name, value in bound.arguments.items()}
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    return f"# var-moe {words[0]}\n{text}"


def option_names(command: Callable[..., Any]) -> dict[str, str]:
    """Each parameter's option, without its hyphens: ``from_`` is ``from``."""
    return {name: name.rstrip("_") for name in inspect.signature(command).parameters}


def _plain(value: Any) -> Any:
    if isinstance(value, PurePath):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
