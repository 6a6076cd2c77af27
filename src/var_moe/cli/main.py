"""Entry point: parse, run, and turn every error into one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from cyclopts import App, CycloptsError, Parameter, Token, convert

from var_moe import __version__
from var_moe.cli.analyze import analyze
from var_moe.cli.certify import certify
from var_moe.cli.compare import compare
from var_moe.cli.demo import demo
from var_moe.cli.doctor import doctor
from var_moe.cli.evaluate import evaluate
from var_moe.cli.export import export
from var_moe.cli.fit_compensation import fit_compensation
from var_moe.cli.guard import guard
from var_moe.cli.lm_eval import lm_eval
from var_moe.cli.output import run
from var_moe.cli.profile import profile
from var_moe.cli.replay import replay
from var_moe.cli.report import report
from var_moe.cli.trace import trace
from var_moe.cli.tune import tune
from var_moe.cli.words import FORWARDED, Words, effective_options, load_options, read_words
from var_moe.config import check_seed
from var_moe.errors import UsageError, VarMoeError
from var_moe.growing import kept_by
from var_moe.storage import command_line
from var_moe.terminal import steady_streams

INTERRUPTED = 130


def build_app() -> App:
    """The command-line application with its commands."""
    app = App(
        name="var-moe",
        help="Make a Mixture-of-Experts language model faster by running fewer experts per "
        "token, and measure what that costs.",
        help_epilogue="Every command takes `--json` (the result alone on stdout), `--options "
        "FILE.yaml` (its options from a file; words win), `--show-config` (the options that it "
        "would use, as such a file) and `--debug` (tracebacks).",
        version=__version__,
        # Options are documented with underscores; `read_words` makes hyphens work as well.
        default_parameter=Parameter(
            negative=(),
            name_transform=lambda name: name,
            converter=_converted,
            json_list=False,  # a folder may be called [final]
            json_dict=False,
        ),
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # `main` says what is kept
    )
    commands = (tune, certify, guard, profile, evaluate, compare, trace, replay)
    for command in (*commands, analyze, report, export, doctor, demo):
        app.command(command, validator=_check_options)
    app.command(fit_compensation, name="fit-compensation", validator=_check_options)
    app.command(lm_eval, name=FORWARDED, help_flags=(), version_flags=())
    app.register_install_completion_command(name=("--install_completion", "--install-completion"))
    return app


def _converted(kind: Any, tokens: Sequence[Token]) -> Any:
    """A value as cyclopts reads it; where an integer is wanted, it would round 1.5 to 2."""
    if kind is int and "." in tokens[0].value and not float(tokens[0].value).is_integer():
        raise ValueError
    return convert(kind, tokens)


def _check_options(*, seed: int | None = None, **others: object) -> None:
    """What is asked of the options of every command."""
    for one in (seed, *(getattr(value, "seed", None) for value in others.values())):
        check_seed(one)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for a failure, 2 for bad usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with steady_streams() as (stdout, _):
        code = _main(given)
        stdout.flush()
        if stdout.error is None or isinstance(stdout.error, BrokenPipeError):
            return code  # who closes a pipe has read enough
        return _fail(
            f"stdout cannot be written ({stdout.error.strerror}); result files are not affected",
            code or 1,
        )


def _main(given: list[str]) -> int:
    try:
        words = read_words(given)
    except UsageError as error:
        return _fail(str(error), error.exit_code)
    if not words.debug:
        _quiet_libraries()
    try:
        with command_line(["var-moe", *given]):
            return _run(words)
    except CycloptsError as error:
        return _fail(str(error), 2, "see `var-moe --help`")
    except VarMoeError as error:
        if words.debug:
            raise
        return _fail(str(error) + kept_by(error), error.exit_code)
    except KeyboardInterrupt as error:
        return _fail("interrupted" + (kept_by(error) or _what_is_kept(words.rest)), INTERRUPTED)
    except Exception as error:
        if words.debug:
            raise
        if isinstance(error, OSError) and error.filename:
            said = f"{error.filename}: {error.strerror}{kept_by(error)}"
            return _fail(said, 1, "--debug shows where")
        return _fail(f"{type(error).__name__}: {error}{kept_by(error)}", 1, "--debug shows where")


def _run(words: Words) -> int:
    app = build_app()
    if words.options is not None and words.rest:
        app.config = (load_options(words.options, words.rest[0]),)
    if words.show_config:
        print(effective_options(app, words.rest), end="")
        return 0
    return run(
        lambda: app(list(words.rest), exit_on_error=False, print_error=False),
        as_json=words.json,
    )


def _what_is_kept(words: Sequence[str]) -> str:
    command = words[0] if words else ""
    if command in ("profile", "trace", "fit-compensation"):
        return "; the same command goes on where it stopped"
    if command == "certify":
        return "; the same command goes on with the study that was frozen"
    if command == "tune" and not any(word.startswith("--validate") for word in words):
        return "; finished evaluations are saved, go on with --resume"
    return "; nothing was written"


def _fail(message: str, code: int, hint: str = "") -> int:
    line = " ".join(part.strip() for part in message.splitlines() if part.strip())
    print(f"error: {line}" + (f" ({hint})" if hint else ""), file=sys.stderr)
    return code


def _quiet_libraries() -> None:
    """Keep other libraries' progress bars and warnings out of the way of ours."""
    import warnings

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
