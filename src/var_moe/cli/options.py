"""Options that several commands take: each group is one frozen dataclass, which cyclopts flattens.

A command has ``model: ModelOptions = ModelOptions()`` among its parameters; the fields are then
its options ``--model``, ``--device`` and so on. The class is the one place of their defaults and
of their help. Where the class is ``Searched...``, what is left out is the search's whose results
the command works on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from cyclopts import Parameter

from var_moe.config import MAX_DEGRADATION
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from var_moe.cli.output import StageProgress
    from var_moe.evaluation.speed_setting import SpeedSetting
    from var_moe.models.loading import LoadedModel

Settings = TypeVar("Settings", bound="DataclassInstance")
COMPENSATIONS = ("none", "means", "learned")
Mode = Literal["verified", "plain"] | None
Words = Annotated[list[str] | None, Parameter(consume_multiple=True)]
"""An option that takes several words: ``--policies naee ser``."""
Repeated = Annotated[list[str] | None, Parameter(consume_multiple=False)]
"""An option that is given several times: ``--set a=1 --set b=2``."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SearchedModelOptions:
    """The model and where it runs.

    Args:
        model: demo, a local folder, or a Hub id; by default the search's, or demo.
        device: auto, cpu, cuda, ...
        dtype: auto, float32, bfloat16, float16.
        trust_remote_code: run a Hub model's own code.
    """

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    def load(self, default: str = "demo") -> LoadedModel:
        """Load the model; one of the name `default` where none is given."""
        from var_moe.models.loading import load_model

        return load_model(
            self.model or default,
            device=self.device,
            dtype=self.dtype,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class ModelOptions(SearchedModelOptions):
    """The same where there is no search.

    Args:
        model: demo, a local folder, or a Hub id.
    """

    model: str = "demo"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SearchedTextOptions:
    """The data set.

    Args:
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], a local file, or
            several as a,b,c; by default the search's, or demo.
        text_column: the column of --dataset that holds the text, where that is not clear; the
            same as name::column as the dataset.
    """

    dataset: str | None = None
    text_column: str | None = None

    def named(self, default: str = "demo") -> str:
        """The data set's name with its text column, as result files record it.

        Args:
            default: taken where none is given.

        Raises:
            UsageError: a column without a data set of one's own.
        """
        if self.text_column is None:
            return self.dataset or default
        if self.dataset in (None, "demo"):
            raise UsageError(f"--text_column {self.text_column} needs the --dataset that has it")
        from var_moe.data.text import with_column

        return with_column(self.dataset, self.text_column)


@dataclass(frozen=True, kw_only=True)
class TextOptions(SearchedTextOptions):
    """The data set and its split.

    Args:
        dataset: demo (or demo-postgres, ...), wikitext, a Hub name[:config], a local file, or
            several as a,b,c.
        split: part of the text that is read.
    """

    dataset: str = "demo"
    split: str = "validation"


@dataclass(frozen=True, kw_only=True)
class CalibrationTextOptions(TextOptions):
    """The same, where something is fitted."""

    split: str = "calibration"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What throughput is measured on.

    Args:
        objective: prefill scores text, decode generates after prompts; by default the search's,
            or prefill.
        batch: texts at once; by default the search's, or 8 of 256 tokens (prefill), 1 (decode).
    """

    objective: Literal["prefill", "decode"] | None = None
    batch: int | None = None

    def setting(self, searched: Mapping[str, Any] | None = None) -> SpeedSetting:
        """The setting that is asked for, or that of the search where nothing is.

        Raises:
            UsageError: no such batch.
        """
        from var_moe.evaluation.speed_setting import SpeedSetting

        if self.objective is None and self.batch is None and searched:
            return SpeedSetting.from_dict(searched)
        objective = self.objective or (searched or {}).get("objective", "prefill")
        return SpeedSetting.of(objective, self.batch)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class QuietOptions:
    """How much is said.

    Args:
        quiet: no progress.
    """

    quiet: bool = False

    def begin(
        self, model: str, *datasets: str, output: Path | None, doing: str | None = None
    ) -> None:
        """Refuse names that cannot be, as loading a model takes seconds, and say what begins.

        Args:
            model: its name.
            datasets: their names.
            output: the folder that will be written to, if known.
            doing: what begins; by default that the model is loaded.

        Raises:
            UsageError: says what is missing, or not a folder.
        """
        from var_moe.data.text import check_dataset
        from var_moe.models.loading import check_name
        from var_moe.storage import check_output_folder

        if output is not None:
            check_output_folder(output)
        check_name(model)
        for dataset in datasets:
            check_dataset(dataset)
        self.say(doing or f"loading model {model} ...")

    def say(self, line: str) -> None:
        """Write a line to stderr, unless quiet."""
        self.progress().say(line)

    def progress(self) -> StageProgress:
        """Progress that says nothing where quiet."""
        from var_moe.cli.output import StageProgress

        return StageProgress(quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class RunOptions(QuietOptions):
    """Seed and progress.

    Args:
        seed: of the choice and order of documents, and of all else that is drawn.
    """

    seed: int = 0


def parse_compensation(
    value: str | None, *, folder_only: bool = False
) -> tuple[str | None, Path | None]:
    """The name that a policy is made with, and the folder that it comes from.

    Args:
        value: ``none``, ``means``, ``learned`` (the profile's own), or a folder that
            `var-moe fit-compensation` left; None leaves it to the policy.
        folder_only: refuse a name, as a configuration names its own.

    Raises:
        UsageError: it is neither.
    """
    if value in COMPENSATIONS and folder_only:
        raise UsageError(f"--compensation {value}: the configuration names it; expected a folder")
    if value is None or value in COMPENSATIONS:
        return value, None
    if not Path(value).is_dir():
        raise UsageError(
            f"--compensation {value}: expected {', '.join(COMPENSATIONS)}, or the folder of a "
            "fitted one"
        )
    return "learned", Path(value)


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search was asked; of an unknown one, the demo's."""

    model: str = "demo"
    dataset: str = "demo"
    max_degradation: float = MAX_DEGRADATION
    robust: bool = False
    setting: Mapping[str, Any] | None = None

    @classmethod
    def beside(cls, config: Path) -> Searched:
        """Of the search that left a configuration, as far as the file beside it says so."""
        from var_moe.optimization.results import METADATA_FILE
        from var_moe.storage import entries_of, read_json

        beside = config.parent / METADATA_FILE
        if not beside.is_file():
            return cls()
        metadata = read_json(beside, what="metadata of a search")
        with entries_of(beside):
            known = {**metadata.get("identity", {}), **metadata.get("settings", {})}
        names = ("model", "dataset", "max_degradation", "robust", "setting")
        return cls(**{key: known[key] for key in names if key in known})

    @classmethod
    def of(cls, results: Path) -> Searched:
        """Of a results folder.

        Raises:
            UsageError: no such folder.
        """
        if not results.is_dir():
            raise UsageError(f"{results}: no such folder; expected the results of `var-moe tune`")
        return cls.beside(results / "best_config.json")


def settings_of(kind: type[Settings], options: Mapping[str, Any]) -> Settings:
    """A command's settings, as Python callers have them, from its options of the same names.

    Args:
        kind: the settings' dataclass, where the defaults stand.
        options: None is an option that is not given; what is no field is left out.
    """
    names = {one.name for one in fields(kind)}
    given = {name: value for name, value in options.items() if name in names}
    return kind(**{name: value for name, value in given.items() if value is not None})
