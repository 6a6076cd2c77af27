"""A search: the study's next trial, its evaluation, and again; then its result.

Every method is a sampler (`optimization.samplers`), every trial lives in an Optuna storage
(`optimization.trial_log`), and any number of processes may run this loop on one study: what is
left is asked of the storage before each evaluation.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.objective_protocol import Objective, bound_of, run_evaluation
from var_moe.optimization.progress import SearchProgress
from var_moe.optimization.results import Evaluation, OptimizationResult, jsonable
from var_moe.optimization.samplers import NothingLeftError, PointSampler
from var_moe.optimization.search_space import (
    Params,
    SearchSpace,
    defaults,
    dimensions,
    is_config_space,
    point_key,
)
from var_moe.optimization.selection import (
    Z_95,
    best_evaluation,
    has_converged,
    highest_score,
    nearest_miss,
)
from var_moe.optimization.trial_log import (
    SearchHeader,
    Storage,
    open_study,
    read_header,
    write_header,
)
from var_moe.optimization.trials import (
    AGAIN,
    BEAT_SECONDS,
    EVALUATION,
    SCORE,
    VOID,
    WORKER,
    Trials,
    has_ended,
    is_lost,
    worker,
)

_LOG = logging.getLogger(__name__)

CONSTRAINT = "degradation"
"""Name of the constraint: degradation - max_degradation, feasible at zero and below."""

UPPER_CONSTRAINT = "degradation_upper"
"""The same with a margin: 95% of the error of a difference between two texts of this size."""

_POLL_SECONDS = 0.5  # between two looks at what other processes have left

OnEvaluation: TypeAlias = Callable[[Evaluation, int, int], None]
ShouldStop: TypeAlias = Callable[[], bool]
SamplerOf: TypeAlias = Callable[[SearchHeader], PointSampler]


@runtime_checkable
class Confirming(Protocol):
    """An objective that can measure a search's best again, on more text and for longer."""

    def confirm(self, result: OptimizationResult, /) -> OptimizationResult:
        """The result with the best configuration as measured again."""
        ...


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """What every search method takes besides its points.

    Args:
        method: name of the method, in the result and in the trial log.
        mode: of the VARConfig in `best_params`; None takes the objective's own, else verified.
        confirm: measure the best again on more text, where the objective can (`Confirming`).
        verbose: progress on stderr.
        resume: go on with the search in the storage, or join it.
        settings: JSON values that decide the results besides the space and the seed (model,
            data, profile); resuming with others is refused by name.
        on_evaluation: called with each new evaluation of this process, how many the search has
            by then, and the total.
        should_stop: asked before each evaluation; True ends the search early.
        count_flag: the command-line option that lowers the number of evaluations.
        count_given: whether the number was asked for: then it also counts for a resumed search,
            which otherwise goes on to the number that it was begun with.
    """

    method: str
    mode: str | None = None
    confirm: bool = True
    verbose: bool = True
    resume: bool = False
    settings: dict[str, Any] | None = None
    on_evaluation: OnEvaluation | None = None
    should_stop: ShouldStop | None = None
    count_flag: str = "--n_calls"
    count_given: bool = False


def run_search(
    objective: Objective,
    space: SearchSpace,
    *,
    storage: Storage,
    sampler_of: SamplerOf,
    total: int,
    seed: int | None,
    options: SearchOptions,
) -> OptimizationResult:
    """Evaluate `total` points in all, together with whoever else is at work on the study.

    Whatever interrupts the search leaves everything finished in the storage and passes through.

    Args:
        objective: what is evaluated.
        space: the search space.
        storage: where the trials are kept.
        sampler_of: the sampler of a search that has begun.
        total: evaluations planned.
        seed: of the search; None draws a fresh one.
        options: see `SearchOptions`.
    """
    started = time.perf_counter()
    bound, mode = bound_of(objective), mode_of(objective, options.mode)
    header = SearchHeader(
        method=options.method,
        seed=seed,
        total=total,
        space={d.name: d.to_dict() for d in dimensions(space)},
        settings=jsonable({"mode": mode, "max_degradation": bound, **(options.settings or {})}),
    )
    # Fails on a wrong mode now rather than after the last evaluation.
    as_best_params(space, defaults(space), mode)
    with open_study(storage, header, resume=options.resume) as (study, begun):
        header = _to_total(study, begun, total) if options.count_given else begun
        before = Trials.of(study).evaluations
        with _Worker(study, sampler_of(header), bound=bound, stop=options.should_stop) as work:
            _evaluate_all(work, objective, header, before, options)
        evaluations = Trials.of(study).evaluations
    result = _result(
        evaluations,
        space,
        header=header,
        bound=bound,
        mode=mode,
        seconds=_seconds(before) + time.perf_counter() - started,
        resumed=len(before),
    )
    if options.confirm and isinstance(objective, Confirming) and is_config_space(space):
        result = objective.confirm(result)
    return result


def _to_total(study: optuna.Study, header: SearchHeader, total: int) -> SearchHeader:
    """The header with another number of evaluations, where that was asked for."""
    done = Trials.of(study).taken
    if total < done:
        _LOG.warning("%d evaluations are done, more than the %d asked for", done, total)
    if max(total, done) != header.total:
        header = replace(header, total=max(total, done))
        write_header(study, header)
    return header


def mode_of(objective: Objective, asked: str | None) -> str:
    """The mode of VAR that a search is about.

    Raises:
        UsageError: the one asked for is not the one that the objective measures.
    """
    own = getattr(objective, "mode", None)
    if asked is not None and own is not None and asked != own:
        raise UsageError(f"mode = {asked!r}: the objective measures mode {own!r}")
    return str(asked or own or "verified")


def as_best_params(space: SearchSpace, params: Params, mode: str) -> VARConfig | dict[str, Any]:
    """`params` as a VARConfig in `mode`, or as they are in a space of other names."""
    if not is_config_space(space):
        return dict(params)
    return VARConfig.from_dict({**params, "mode": mode})


def _evaluate_all(
    work: _Worker,
    objective: Objective,
    header: SearchHeader,
    before: Sequence[Evaluation],
    options: SearchOptions,
) -> None:
    with SearchProgress(
        total=header.total,
        finished=before,
        verbose=options.verbose,
        count_flag=options.count_flag,
    ) as progress:
        while (claim := work.claim()) is not None:
            try:
                evaluation = run_evaluation(objective, claim.params)
            except BaseException:
                work.give_up(claim)
                raise
            evaluation = evaluation.replace(suggestion_seconds=claim.seconds)
            if not work.finish(claim, evaluation):
                continue
            number = len(Trials.of(work.study).evaluations)
            progress.update(evaluation, number)
            if options.on_evaluation is not None:
                options.on_evaluation(evaluation, number, header.total)


def _seconds(evaluations: Sequence[Evaluation]) -> float:
    return sum(e.seconds + e.suggestion_seconds for e in evaluations)


def _result(
    evaluations: list[Evaluation],
    space: SearchSpace,
    *,
    header: SearchHeader,
    bound: float | None,
    mode: str,
    seconds: float,
    resumed: int,
) -> OptimizationResult:
    best = best_evaluation(evaluations)
    extra: dict[str, Any] = {
        "suggestion_seconds": sum(e.suggestion_seconds for e in evaluations),
        "total": header.total,
        "failed": sum(e.failed for e in evaluations),
        "resumed": resumed,
        "stopped_early": len(evaluations) < header.total,
    }
    miss = nearest_miss(evaluations) if best is None else None
    if miss is not None:
        extra["nearest_miss"] = miss.to_dict()
    if best is not None and best.score is not None:
        params, score = best.params, best.score
    else:
        params, score = defaults(space), highest_score(evaluations)
    return OptimizationResult(
        best_params=as_best_params(space, params, mode),
        best_score=score,
        optimization_time=seconds,
        evaluations=tuple(evaluations),
        converged=has_converged(evaluations),
        method=header.method.partition("-")[0],
        seed=header.seed,
        max_degradation=bound,
        extra=extra,
    )


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """A trial that this process is at work on, its point, and the sampler's seconds."""

    trial: optuna.Trial
    params: Params
    seconds: float


class _Worker:
    """One process's share of a study: it takes a trial, and tells what came of it.

    Optuna numbers trials without gaps and gives a waiting one to one process alone. Everything
    else is written first and looked at then: of two processes that did the same, both see it.
    """

    def __init__(
        self,
        study: optuna.Study,
        sampler: PointSampler,
        *,
        bound: float | None,
        stop: ShouldStop | None,
    ) -> None:
        self.study, self._sampler, self._bound = study, sampler, bound
        study.sampler = sampler
        self._should_stop = stop
        self._run = uuid.uuid4().hex
        self._nothing_left = False
        self._trial: optuna.Trial | None = None
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> _Worker:
        self._pulse.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._pulse.join()
        has_ended(self._run)

    def claim(self) -> _Claim | None:
        """The next trial, with its point; None where the search is over, or is to stop.

        Where only other processes have something left, it waits for them: what one of them loses
        is evaluated here.
        """
        while self._should_stop is None or not self._should_stop():
            now = self._mended()
            if (self._nothing_left or now.taken >= self._total) and not now.waiting:
                if not now.running:
                    return None
                time.sleep(_POLL_SECONDS)
                continue
            claim = self._ask()
            if claim is not None:
                return claim
        return None

    def finish(self, claim: _Claim, evaluation: Evaluation) -> bool:
        """Tell what came of a trial; False where another process had taken it for lost.

        The evaluation is written before the trial's state: a kill between the two is made good by
        whoever goes on.
        """
        trial = claim.trial
        stored = evaluation.to_dict()
        try:
            for name, distance in _constraints(evaluation, self._bound).items():
                trial.set_constraint(name, distance)
            trial.set_user_attr(SCORE, stored["score"])
            trial.set_user_attr(EVALUATION, stored)
            self._trial = None
            _tell(self.study, trial.number, evaluation)
        except UpdateFinishedTrialError:
            self._trial = None
            _LOG.warning("trial %d was taken for lost and is made again", trial.number)
            return False
        return True

    def give_up(self, claim: _Claim) -> None:
        """Leave a trial to whoever goes on."""
        self._trial = None
        self._fail(claim.trial.number)

    @property
    def _total(self) -> int:
        header = read_header(self.study)
        assert header is not None
        return header.total

    def _mended(self) -> Trials:
        """The trials, those of dead processes closed and waiting to be made again."""
        now = Trials.of(self.study)
        dead = [trial for trial in now.running if is_lost(trial)]
        for trial in dead:
            stored = trial.user_attrs.get(EVALUATION)
            if stored is None:
                self._fail(trial.number)
            else:
                _tell(self.study, trial.number, Evaluation.from_dict(stored))
        if dead:
            now = Trials.of(self.study)
        lost = now.lost
        for trial in lost:
            self._again(trial)
        return Trials.of(self.study) if lost else now

    def _again(self, trial: FrozenTrial) -> None:
        # A point that is not complete was never evaluated; it is proposed anew.
        whole = set(trial.params) == {d.name for d in self._sampler.dims}
        self.study.enqueue_trial(trial.params if whole else {}, user_attrs={AGAIN: trial.number})

    def _ask(self) -> _Claim | None:
        """A trial and its point; None where it turned out to stand for no evaluation."""
        self._trial = trial = self.study.ask()
        try:
            trial.set_user_attr(WORKER, worker(self._run))
            number = Trials.of(self.study).numbers.get(trial.number)
            if number is None:
                self._void(trial, "made again already")
                return None
            if number >= self._total:
                self._void(trial, "one too many")
                return None
            try:
                params = self._sampler.suggest(trial)
            except NothingLeftError:
                self._nothing_left = True
                self._void(trial, "nothing left that is worth it")
                return None
            if self._taken_meanwhile(trial, params):
                self.study.enqueue_trial({}, user_attrs={AGAIN: trial.number})
                self._fail(trial.number)
                return None
        except BaseException:
            self._fail(trial.number)
            raise
        return _Claim(trial=trial, params=params, seconds=self._sampler.seconds)

    def _taken_meanwhile(self, trial: optuna.Trial, params: Params) -> bool:
        """Whether another process took the same point while this one was proposed."""
        request = self._sampler.request
        if not self._sampler.once or request is None:
            return False
        others = Trials.of(self.study).points(but=trial.number)
        return point_key(params) in {point_key(point) for point in others} - request.seen

    def _void(self, trial: optuna.Trial, why: str) -> None:
        trial.set_user_attr(VOID, why)
        self._fail(trial.number)

    def _fail(self, number: int) -> None:
        with suppress(UpdateFinishedTrialError):
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _beat(self) -> None:
        """Say from time to time that this process is still at work."""
        while not self._over.wait(BEAT_SECONDS):
            if (trial := self._trial) is not None:
                with suppress(Exception):  # it may just have ended
                    trial.set_user_attr(WORKER, worker(self._run))


def _constraints(evaluation: Evaluation, bound: float | None) -> dict[str, float]:
    """Distances from the bound, feasible at zero and below."""
    if bound is None or evaluation.failed or evaluation.degradation is None:
        return {}
    distances = {CONSTRAINT: evaluation.degradation - bound}
    # Who wins is decided on other text, by the upper bound there: a search that only minds its
    # own estimate proposes what then fails.
    if evaluation.degradation_se is not None:
        margin = Z_95 * math.sqrt(2) * evaluation.degradation_se
        distances[UPPER_CONSTRAINT] = distances[CONSTRAINT] + margin
    return distances


def told_value(evaluation: Evaluation) -> float:
    """What Optuna maximises: the measured speedup, the predicted one where the bound is broken
    (1.0 where even that is unknown), and a bare callable's score.

    Never the documented score: a Gaussian process standardises all values, and penalties of -100
    would flatten the range that matters.
    """
    if evaluation.feasible is None:
        value = evaluation.score
    elif evaluation.feasible:
        value = evaluation.speedup
    else:
        value = evaluation.predicted_speedup
        if value is None or not math.isfinite(value):
            value = evaluation.speedup
    return value if value is not None and math.isfinite(value) else 1.0


def _tell(study: optuna.Study, number: int, evaluation: Evaluation) -> None:
    if evaluation.failed:
        study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
    else:
        study.tell(number, told_value(evaluation), skip_if_finished=True)
