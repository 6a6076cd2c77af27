"""The measurement after the search, on text that was not searched on: who wins, and what is said.

A candidate must keep the bound with the one-sided 95% upper bound of its degradation, not with
its point estimate; those that do are timed with more blocks. The one that executes the fewest
pairs wins.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from var_moe.calibration.profile import RoutingProfile
from var_moe.errors import VarMoeError
from var_moe.evaluation.evaluator import Evaluator, measure_by_dataset
from var_moe.evaluation.perplexity import datasets_of
from var_moe.execution.session import Session, routed
from var_moe.optimization.candidate import Candidate
from var_moe.optimization.objective import PolicyObjective
from var_moe.optimization.results import (
    UNFINISHED,
    Evaluation,
    OptimizationResult,
    save_optimization_results,
)
from var_moe.optimization.search_space import Params, stand_in_of
from var_moe.optimization.selection import (
    Z_95,
    FrontPoint,
    Remeasured,
    distinct_evaluations,
    nearest_miss,
    promise,
    to_verify,
    winner,
)
from var_moe.optimization.summary import as_text, best_answer, nearest_answer, summary_parts

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

Closer: TypeAlias = Callable[[list[tuple[Params, float]]], Params | None]
"""From points and the upper bounds of their degradation to another point; None ends it."""


class LastMeasurement:
    """Measures what a search found again, on text that was not searched on.

    Args:
        evaluator: of that text.
        objective: makes the policies, and holds the bound.
        blocks: timed blocks per arm.

    What is measured is kept as it is made, so that a failure of the next one loses none:
    ``candidates`` of the search and of its front, and the policy's ``presets``.
    """

    def __init__(self, evaluator: Evaluator, objective: PolicyObjective, *, blocks: int) -> None:
        self.evaluator, self.objective, self._blocks = evaluator, objective, blocks
        self.candidates: list[Remeasured] = []
        self.presets: list[Remeasured] = []

    @property
    def measured(self) -> list[Remeasured]:
        """All of it."""
        return [*self.candidates, *self.presets]

    @property
    def best(self) -> Remeasured | None:
        """The one that wins by the rule of `selection.winner`; None where none keeps the bound."""
        return winner(self.measured, lambda one: one.standing)

    @property
    def nearest(self) -> Remeasured:
        """What comes nearest to keeping the bound."""
        return min(self.measured, key=lambda one: one.quality.judged.upper)

    def measure(self, config: Candidate, *, name: str, always_time: bool = False) -> Remeasured:
        """Measure one configuration: quality first, throughput where it keeps the bound."""
        evaluator, objective = self.evaluator, self.objective
        quality = evaluator.quality(objective.policy(config), what=f"{name}: perplexity")
        speed = None
        if always_time or quality.judged.upper < objective.max_degradation:
            speed = evaluator.speed(objective.policy(config), blocks=self._blocks)
        return Remeasured(
            name=name,
            config=config,
            quality=quality,
            speed=speed,
            max_degradation=objective.max_degradation,
        )

    def measure_search(
        self, evaluations: Sequence[Evaluation], *, at_most: int, closer: Closer | None = None
    ) -> None:
        """Measure a search's evaluations again until no faster one is likely to keep the bound.

        A candidate's upper bound on the new text is predicted as its degradation in the search
        plus what the upper bounds measured so far, with the same compensation, were above theirs
        (at first: the search's own error). The fastest that is predicted to keep the bound is
        measured next, as long as it is faster than what did so far. Where nothing passes, the
        evaluation with the smallest degradation is measured last. Measurements that are left go
        to what ``closer`` proposes from those made.
        """
        waiting = distinct_evaluations(
            [one for one in evaluations if not one.failed and one.degradation is not None]
        )
        uppers: list[tuple[Params, float]] = []  # of the points that are measured
        above: dict[str | None, list[float]] = defaultdict(list)

        def likely(one: Evaluation) -> bool:
            assert one.degradation is not None
            off = above[stand_in_of(one.params)]
            error = sum(off) / len(off) if off else Z_95 * (one.degradation_se or 0.0)
            return one.degradation + error < self.objective.max_degradation

        def take(params: Params) -> Remeasured:
            name = f"candidate {len(uppers) + 1}"
            measured = self.measure(self.objective.candidate(params), name=name)
            self.candidates.append(measured)
            uppers.append((params, measured.quality.judged.upper))
            return measured

        fastest = -math.inf
        while len(uppers) < at_most:
            fitting = [one for one in waiting if likely(one) and promise(one) > fastest]
            if not fitting:
                break
            # Of equally fast ones, which another compensation makes, the one that costs less.
            chosen = max(fitting, key=lambda one: (promise(one), -(one.degradation or 0.0)))
            waiting.remove(chosen)
            measured = take(chosen.params)
            off = measured.quality.judged.upper - (chosen.degradation or 0.0)
            above[stand_in_of(chosen.params)].append(off)
            if measured.passed:
                fastest = promise(chosen)
        calmest = nearest_miss(waiting)
        if self.best is None and calmest is not None:
            take(calmest.params)
        while closer is not None and len(uppers) < at_most:
            point = closer(uppers)
            if point is None:
                break
            take(point)

    def measure_presets(self) -> None:
        """Measure the policy's presets; one that the search proposed as well takes its figures."""
        for name, config in self.objective.presets().items():
            same = next((one for one in self.candidates if one.config == config), None)
            if same is None:
                self.presets.append(self.measure(config, name=name, always_time=True))
            else:
                self.presets.append(replace(same, name=name))
        known = [one.config for one in self.presets]
        self.candidates = [one for one in self.candidates if one.config not in known]

    def measure_front(self, front: Sequence[FrontPoint]) -> None:
        """Measure points of a front that lie far from what is measured already."""
        known = [one.config for one in self.measured]
        for point in to_verify(front, self.objective.max_degradation):
            config = self.objective.candidate(point.params)
            if config not in known:
                name = f"front ({100 * point.degradation:.2f}%)"
                self.candidates.append(self.measure(config, name=name, always_time=True))

    def by_dataset(self) -> list[dict[str, Any]]:
        """The winner, or what comes nearest, on each of several data sets by itself."""
        if not datasets_of(self.evaluator.documents):
            return []
        chosen = self.best or self.nearest
        policy = self.objective.policy(chosen.config)
        return measure_by_dataset(self.evaluator, policy, what=chosen.name)


@dataclass(frozen=True, kw_only=True)
class TuneOutcome:
    """What `tune` found.

    Args:
        best: the winner, ``best.config`` with its ``best.quality`` and ``best.speed``.
        others: what was measured beside it.
        answer: the answer in a sentence.
        parts: what a command prints.
        result: the search, as the documented API returns it.
        profile: what its policies were calibrated to.
    """

    best: Remeasured
    others: tuple[Remeasured, ...]
    answer: str
    parts: tuple[Any, ...]
    result: OptimizationResult
    profile: RoutingProfile = field(repr=False)

    def policy(
        self, model: LoadedModel, *, backend: str = "auto"
    ) -> AbstractContextManager[Session]:
        """The block in which ``model`` runs as the winner decides; see `routed`.

        Raises:
            UsageError: as `routed` does.
        """
        return routed(model, self.best.config.make(self.profile), backend=backend)


class NothingFitsError(VarMoeError):
    """No configuration keeps the bound; ``parts`` is what would have been printed."""

    def __init__(self, answer: str, parts: Sequence[Any]) -> None:
        super().__init__(answer)
        self.parts = tuple(parts)


def conclude(
    result: OptimizationResult,
    last: LastMeasurement,
    *,
    by_dataset: Sequence[Mapping[str, Any]] = (),
    output: Path,
    notes: Sequence[str] = (),
    metadata: Mapping[str, Any],
) -> TuneOutcome:
    """Choose the answer and write every file; ``by_dataset`` is `LastMeasurement.by_dataset`.

    Raises:
        NothingFitsError: nothing keeps the bound; the files are written all the same, with
            ``nearest_miss.json`` in place of ``best_config.json``.
    """
    best, top_k = last.best, last.evaluator.top_k
    limit = f"{100 * last.objective.max_degradation:g}%"
    extra = {key: value for key, value in result.extra.items() if key != "nearest_miss"}
    if best is None:
        answer = nearest_answer(last.nearest, limit, output)
        extra["nearest_miss"] = last.nearest.to_dict()
        result = replace(result, best_score=last.nearest.score, extra=extra)
    else:
        default = next((one for one in last.presets if one.name == "balanced"), None)
        answer = best_answer(best, default, limit, top_k)
        params = best.config.as_best_params()
        result = replace(result, best_params=params, best_score=best.score, extra=extra)
    metadata = {
        **metadata,
        "remeasured": [one.to_dict() for one in last.measured],
        "by_dataset": list(by_dataset),
        "notes": list(notes),
        "answer": answer,
    }
    others = tuple(one for one in last.measured if one is not best)
    parts = summary_parts(
        best=replace(best, name=f"best ({best.name})") if best else None,
        others=others,
        by_dataset=by_dataset,
        answer=answer,
        notes=notes,
        top_k=top_k,
    )
    save_optimization_results(result, output, metadata=metadata, summary=as_text(parts))
    if best is None:
        raise NothingFitsError(answer, parts)
    return TuneOutcome(
        best=best,
        others=others,
        answer=answer,
        parts=tuple(parts),
        result=result,
        profile=last.objective.profile,
    )


@contextmanager
def unfinished(
    result: OptimizationResult,
    last: LastMeasurement,
    *,
    output: Path,
    metadata: Mapping[str, Any],
) -> Iterator[None]:
    """Around the last measurement: where it fails, the search and what was measured are saved.

    Raises:
        VarMoeError: every evaluation failed, so that there is nothing to measure; or the
            measurement did. In the latter case the search can be resumed for another one.
    """
    try:
        if not result.evaluations:
            raise VarMoeError("the search ended before its first evaluation")
        if all(one.failed for one in result.evaluations):
            raise VarMoeError(
                f"all {result.num_evaluations} evaluations failed, the first with: "
                f"{result.evaluations[0].error}"
            )
        yield
    except BaseException as error:
        why = str(error) or "the last measurement was interrupted"
        rows = [one.to_dict() for one in last.measured]
        saved = replace(result, extra={**result.extra, UNFINISHED: why})
        known = {**metadata, "remeasured": rows, "answer": f"Not finished: {why}"}
        save_optimization_results(saved, output, metadata=known)
        if isinstance(error, VarMoeError) or not isinstance(error, Exception):
            raise
        raise VarMoeError(
            f"the last measurement failed ({type(error).__name__}: {error}); the search is saved "
            f"in {output}, and --resume measures again"
        ) from error
