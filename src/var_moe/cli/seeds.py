"""``var-moe tune --seeds``: one search for each seed, then what they agree on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from var_moe.cli.output import Answer
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.cli.progress import StageProgress
    from var_moe.models.loading import LoadedModel
    from var_moe.optimization.settings import TuneSettings


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Seeds that were given, or how many fresh ones are wanted."""

    given: tuple[int, ...] | None
    repeats: int


def parse_seeds(seeds: str | None, repeats: int | None, seed: int | None) -> Seeds | None:
    """``--seeds 1,2,3`` or ``--repeats 3``; None for one search.

    Raises:
        UsageError: both are given, or one beside ``--seed``, or there are not several seeds.
    """
    if seeds is None and repeats is None:
        return None
    options = {"seeds": seeds, "repeats": repeats, "seed": seed}
    given = [f"--{name}" for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} do not belong together: give one of them")
    from var_moe.optimization.seeds import check_repeats, check_seeds

    if seeds is None:
        return Seeds(given=None, repeats=check_repeats(0 if repeats is None else repeats))
    try:
        numbers = [int(word) for word in seeds.split(",")]
    except ValueError:
        raise UsageError(f"--seeds {seeds!r}: expected numbers with commas, e.g. 1,2,3") from None
    return Seeds(given=check_seeds(numbers), repeats=len(numbers))


def run_seeds(
    loaded: LoadedModel,
    settings: TuneSettings,
    seeds: Seeds,
    *,
    progress: StageProgress,
    quiet: bool,
) -> Answer:
    """Search, print the tables, say where the results are."""
    from var_moe.cli.report import make_report
    from var_moe.cli.stability import print_stability
    from var_moe.optimization.seeds import plan_seeds, tune_seeds
    from var_moe.optimization.stability import STABILITY_FILE

    plan = plan_seeds(settings, model=loaded.name, seeds=seeds.given, repeats=seeds.repeats)
    report = tune_seeds(
        loaded,
        settings,
        plan,
        progress=None if quiet else progress,
        say=(lambda _line: None) if quiet else progress.say,
        verbose=not quiet,
    )
    print_stability(report)
    print(f"Saved: {settings.output / STABILITY_FILE}")
    make_report(settings.output)
    return Answer(report)
