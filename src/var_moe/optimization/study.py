"""A search: the study's next trial, its evaluation, and again; then its result.

Every method is a sampler (`optimization.samplers`), every trial lives in an Optuna storage
(`optimization.trial_log`), and any number of processes may run this loop on one study: what is
left is asked of the storage before each evaluation.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias, TypedDict, Unpack, runtime_checkable

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial

from var_moe.config import VARConfig, check_seed
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
    close,
    constraints,
    has_ended,
    is_lost,
    worker,
)

_LOG = logging.getLogger(__name__)

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


class SearchOptions(TypedDict, total=False):
    """What every search takes besides its points; all of it may be left out.

    Args:
        seed: a fresh one by default; recorded in the result.
        storage: keeps each finished evaluation: the path of a file, the URL of a database, or a
            storage of Optuna; by default nothing is kept.
        resume: go on with the search in the storage, or join it: several processes can at once.
        mode: of the VARConfig in `best_params`; by default the objective's own, else verified.
        confirm: measure the best again on more text, where the objective can (`Confirming`); so
            by default.
        settings: JSON values that decide the results besides the space and the seed (model,
            data, profile); resuming with others is refused by name.
        on_evaluation: called with each new evaluation of this process, how many the search has
            by then, and the total.
        should_stop: asked before each evaluation; True ends the search early.
    """

    seed: int | None
    storage: Storage
    resume: bool
    mode: str | None
    confirm: bool
    settings: Mapping[str, Any] | None
    on_evaluation: OnEvaluation | None
    should_stop: ShouldStop | None


def run_search(
    objective: Objective,
    space: SearchSpace,
    sampler_of: SamplerOf,
    *,
    method: str,
    total: int,
    total_given: bool = False,
    total_flag: str = "--n_calls",
    own: Mapping[str, Any] | None = None,
    verbose: bool = True,
    **options: Unpack[SearchOptions],
) -> OptimizationResult:
    """Evaluate `total` points in all, together with whoever else is at work on the study.

    Whatever interrupts the search leaves everything finished in the storage and passes through.

    Args:
        objective: what is evaluated.
        space: the search space.
        sampler_of: the sampler of a search that has begun.
        method: its name, in the result and in the trial log.
        total: evaluations planned.
        total_given: whether the number was asked for: then it also counts for a resumed search,
            which otherwise goes on to the number that it was begun with.
        total_flag: the command-line option that lowers the number.
        own: the method's own settings, which decide the results too.
        verbose: progress on stderr.
        options: see `SearchOptions`.
    """
    started = time.perf_counter()
    bound, mode = bound_of(objective), mode_of(objective, options.get("mode"))
    facts = {"mode": mode, "max_degradation": bound, **(own or {})}
    header = SearchHeader(
        method=method,
        seed=check_seed(options.get("seed")),
        total=total,
        space={d.name: d.to_dict() for d in dimensions(space)},
        settings=jsonable({**facts, **(options.get("settings") or {})}),
    )
    # Fails on a wrong mode now rather than after the last evaluation.
    as_best_params(space, defaults(space), mode)
    opened = open_study(options.get("storage"), header, resume=options.get("resume", False))
    with opened as (study, header):
        if total_given:
            header = _to_total(study, header, total)
        before = Trials.of(study).evaluations
        progress = SearchProgress(
            total=header.total, finished=before, verbose=verbose, count_flag=total_flag
        )
        stop = options.get("should_stop")
        with _Worker(study, sampler_of(header), bound=bound, stop=stop) as work, progress:
            for claim in iter(work.claim, None):
                evaluation = work.evaluate(claim, objective)
                if evaluation is None:
                    continue
                number = len(Trials.of(study).evaluations)
                progress.update(evaluation, number)
                if (listener := options.get("on_evaluation")) is not None:
                    listener(evaluation, number, header.total)
        evaluations = Trials.of(study).evaluations
    result = OptimizationResult(
        **_best(evaluations, space, mode),
        optimization_time=time.perf_counter()
        - started
        + sum(e.seconds + e.suggestion_seconds for e in before),
        evaluations=tuple(evaluations),
        converged=has_converged(evaluations),
        method=method.partition("-")[0],
        seed=header.seed,
        max_degradation=bound,
    )
    result.extra.update(
        suggestion_seconds=sum(e.suggestion_seconds for e in evaluations),
        total=header.total,
        failed=sum(e.failed for e in evaluations),
        resumed=len(before),
        stopped_early=len(evaluations) < header.total,
    )
    if options.get("confirm", True) and isinstance(objective, Confirming):
        return objective.confirm(result) if is_config_space(space) else result
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


def _best(evaluations: list[Evaluation], space: SearchSpace, mode: str) -> dict[str, Any]:
    """The best of a result: the winner, or the default and what comes nearest to the bound."""
    best = best_evaluation(evaluations)
    if best is not None:
        return {"best_params": as_best_params(space, best.params, mode), "best_score": best.score}
    miss = nearest_miss(evaluations)
    return {
        "best_params": as_best_params(space, defaults(space), mode),
        "best_score": highest_score(evaluations),
        "extra": {} if miss is None else {"nearest_miss": miss.to_dict()},
    }


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

    def evaluate(self, claim: _Claim, objective: Objective) -> Evaluation | None:
        """Evaluate a trial's point, and tell what came of it.

        The evaluation is written before the trial's state: a kill between the two is made good by
        whoever goes on. None where another process had taken the trial for lost.
        """
        trial = claim.trial
        try:
            evaluation = run_evaluation(objective, claim.params)
        except BaseException:
            self._trial = None
            close(self.study, trial.number, None)  # whoever goes on makes it again
            raise
        evaluation = evaluation.replace(suggestion_seconds=claim.seconds)
        stored = evaluation.to_dict()
        try:
            for name, distance in constraints(evaluation, self._bound).items():
                trial.set_constraint(name, distance)
            trial.set_user_attr(SCORE, stored["score"])
            trial.set_user_attr(EVALUATION, stored)
        except UpdateFinishedTrialError:
            _LOG.warning("trial %d was taken for lost and is made again", trial.number)
            return None
        finally:
            self._trial = None
        close(self.study, trial.number, evaluation)
        return evaluation

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
            close(self.study, trial.number, Evaluation.from_dict(stored) if stored else None)
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
            if number is None or number >= self._total:
                self._void(trial, "made again already" if number is None else "one too many")
                return None
            try:
                params = self._sampler.suggest(trial)
            except NothingLeftError:
                self._nothing_left = True
                self._void(trial, "nothing left that is worth it")
                return None
            if self._taken_meanwhile(trial, params):
                self.study.enqueue_trial({}, user_attrs={AGAIN: trial.number})
                close(self.study, trial.number, None)
                return None
        except BaseException:
            close(self.study, trial.number, None)
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
        close(self.study, trial.number, None)

    def _beat(self) -> None:
        """Say from time to time that this process is still at work."""
        while not self._over.wait(BEAT_SECONDS):
            if (trial := self._trial) is not None:
                with suppress(Exception):  # it may just have ended
                    trial.set_user_attr(WORKER, worker(self._run))
