"""One search per seed, over one profile, trace and cost model, and what they agree on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from var_moe.config import check_seed
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.compare import Progress
from var_moe.evaluation.paired import degradation
from var_moe.optimization.conclusion import NothingFitsError
from var_moe.optimization.journal import JOURNAL_NAME, STUDY_NAME
from var_moe.optimization.ready import Ready, prepare
from var_moe.optimization.replay_forecast import COST_FILE
from var_moe.optimization.run import tune
from var_moe.optimization.seed_runs import SeedRun, read_runs
from var_moe.optimization.settings import TuneSettings
from var_moe.optimization.stability import STABILITY_FILE, save_stability, stability
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, read_json

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

PLAN_FILE = "seeds.json"
LEAST_SEEDS = 2
_OWN = ("output", "shared", "seed", "resume", "profile")
"""Settings that may differ between a plan and its resumption."""


class NoSeedFitsError(VarMoeError):
    """Nothing kept the bound with any seed."""


@dataclass(frozen=True, kw_only=True)
class SeedPlan:
    """Which seeds are to be run, and which are done; kept in ``seeds.json``."""

    seeds: tuple[int, ...]
    settings: Mapping[str, Any]
    finished: tuple[int, ...] = ()

    def save(self, folder: Path) -> None:
        """Write it, whole or not at all."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "seeds": list(self.seeds),
            "finished": list(self.finished),
            "settings": dict(self.settings),
        }
        atomic_write_json(folder / PLAN_FILE, value)

    @property
    def left(self) -> list[int]:
        """Seeds that are not done."""
        return [seed for seed in self.seeds if seed not in self.finished]

    def done(self, seed: int) -> SeedPlan:
        """The plan when a seed's search is finished."""
        return replace(self, finished=(*self.finished, seed))


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Seeds of several searches.

    Raises:
        UsageError: fewer than two, one twice, or one below 0.
    """
    for seed in seeds:
        check_seed(seed)
    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed in seeds if list(seeds).count(seed) > 1)
        raise UsageError(f"seeds: {twice} is given twice; expected different ones")
    if len(seeds) < LEAST_SEEDS:
        raise UsageError(f"{len(seeds)} seed: a spread over seeds needs at least {LEAST_SEEDS}")
    return tuple(seeds)


def check_repeats(repeats: int) -> int:
    """How many searches with fresh seeds.

    Raises:
        UsageError: fewer than two.
    """
    if repeats < LEAST_SEEDS:
        raise UsageError(f"repeats = {repeats}: a spread over seeds needs at least {LEAST_SEEDS}")
    return repeats


def plan_seeds(
    settings: TuneSettings, *, model: str, seeds: Sequence[int] | None, repeats: int
) -> SeedPlan:
    """What is to be run; with ``settings.resume``, what is left of an earlier plan.

    Args:
        settings: of all searches.
        model: its name.
        seeds: theirs; None draws fresh ones, which the plan records.
        repeats: how many fresh ones; resumed, those that were drawn count.

    Raises:
        UsageError: bad seeds, or the earlier plan was for other settings; names the first.
    """
    given = {name: value for name, value in settings.to_dict().items() if name not in _OWN}
    asked = {"model": model, **given}
    earlier = _earlier(settings.output, asked) if settings.resume else None
    known = earlier.seeds if earlier else ()
    if seeds is None:
        seeds = _fresh(check_repeats(repeats), known)
    finished = tuple(seed for seed in earlier.finished if seed in seeds) if earlier else ()
    return SeedPlan(seeds=check_seeds(seeds), settings=asked, finished=finished)


def _earlier(folder: Path, asked: Mapping[str, Any]) -> SeedPlan | None:
    path = folder / PLAN_FILE
    if not path.is_file():
        return None
    saved = read_json(path, what="plan of seeds")
    if not isinstance(saved, dict) or not {"seeds", "finished", "settings"} <= set(saved):
        raise UsageError(f"{path}: not a plan of seeds; start anew without --resume")
    for name, value in asked.items():
        before = saved["settings"].get(name)
        if before != value:
            raise UsageError(
                f"{path}: begun with {name} = {before!r}, now {value!r}; resume with the same "
                "settings or choose another --output"
            )
    seeds, finished = tuple(saved["seeds"]), tuple(saved["finished"])
    return SeedPlan(seeds=seeds, settings=asked, finished=finished)


def _fresh(count: int, known: Sequence[int]) -> list[int]:
    """So many seeds: those known, then fresh ones."""
    found = list(known[:count])
    while len(found) < count:
        seed = int(np.random.SeedSequence().generate_state(1)[0])
        if seed not in found:
            found.append(seed)
    return found


def run_folder(output: Path, seed: int) -> Path:
    """Where the results of a seed go."""
    return output / f"run_{seed}"


def tune_seeds(
    loaded: LoadedModel,
    settings: TuneSettings,
    plan: SeedPlan,
    *,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda _line: None,
    verbose: bool = True,
) -> dict[str, Any]:
    """Search once per seed of a plan, and write ``stability.json``.

    The profile, the trace and the cost model lie in the output folder and are made once; each
    seed's results go to ``run_<seed>`` in it.

    Args:
        loaded: the model.
        settings: of all searches; `resume` goes on with a plan's unfinished ones.
        plan: see `plan_seeds`.
        progress: called with a stage's name, steps done and in all.
        say: called with each line worth showing.
        verbose: show each search's own progress.

    Returns:
        What ``stability.json`` holds.

    Raises:
        NoSeedFitsError: nothing kept the bound with any seed; the files are written all the same.
    """
    folder = settings.output
    if not settings.resume:  # what an earlier search left there is another machine's, or day's
        (folder / COST_FILE).unlink(missing_ok=True)
        (folder / STABILITY_FILE).unlink(missing_ok=True)
    plan.save(folder)
    settings = replace(settings, shared=folder)
    ready = prepare(loaded, settings, progress=progress, say=say)
    for seed in plan.left:
        place = run_folder(folder, seed)
        begun = any((place / name).is_file() for name in (JOURNAL_NAME, STUDY_NAME))
        own = replace(settings, output=place, seed=seed, resume=settings.resume and begun)
        say(f"seed {seed}: {plan.seeds.index(seed) + 1} of {len(plan.seeds)}")
        try:
            outcome = tune(loaded, own, ready=ready, progress=progress, say=say, verbose=verbose)
            say(f"seed {seed}: {outcome.answer}")
        except NothingFitsError as error:
            say(f"seed {seed}: {error}")
        plan = plan.done(seed)
        plan.save(folder)
    runs = read_runs([run_folder(folder, seed) for seed in plan.seeds])
    report = stability(runs, differences=perplexity_differences(ready, runs))
    path = save_stability(folder, report)
    if not any(row["found"] for row in report["runs"]):
        raise NoSeedFitsError(f"nothing kept the bound with any of the seeds; see {path}")
    return report


def perplexity_differences(ready: Ready, runs: Sequence[SeedRun]) -> list[dict[str, Any]]:
    """PPL(second winner) / PPL(first) - 1 on the documents of the last measurement, paired.

    Winners of one configuration are scored once.
    """
    losses = {}
    known: dict[str, Any] = {}
    for run in runs:
        if run.winner is None:
            continue
        key = repr(run.winner.to_dict())
        if key not in known:
            policy = ready.objective.policy(run.winner)
            known[key] = ready.final.losses(policy, what=f"winner of seed {run.seed}")[0]
        losses[run.seed] = known[key]
    found = []
    for one, other in combinations(losses, 2):
        change = degradation(losses[one], losses[other])
        found.append(
            {
                "seeds": [one, other],
                "perplexity_difference_relative": change.value,
                "standard_error": change.standard_error,
                "documents": change.documents,
            }
        )
    return found
