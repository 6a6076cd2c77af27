"""The work of one process on a study: it takes a trial, evaluates its point, and tells the result.

Any callable that takes a dict of parameters and returns a score can be evaluated. A rich objective
also has ``evaluate(params) -> Evaluation`` and ``max_degradation``: the search then sees the
constraint and the speedup behind the score.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol, TypeAlias, runtime_checkable

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from var_moe.errors import UsageError
from var_moe.optimization.results import FAILED, Evaluation
from var_moe.optimization.samplers import NothingLeftError, PointSampler
from var_moe.optimization.search_space import point_key
from var_moe.optimization.trial_log import read_header
from var_moe.optimization.trials import (
    AGAIN,
    BEAT_SECONDS,
    EVALUATION,
    RUNS,
    SCORE,
    VOID,
    WORKER,
    Trials,
    close,
    constraints,
    is_lost,
    worker,
)

_LOG = logging.getLogger(__name__)

_POLL_SECONDS = 0.5  # between two looks at what other processes have left


@runtime_checkable
class RichObjective(Protocol):
    """An objective that knows its constraint; `create_objective_function` returns one."""

    max_degradation: float

    def __call__(self, params: dict[str, Any], /) -> float:
        """The documented score."""
        ...

    def evaluate(self, params: dict[str, Any], /) -> Evaluation:
        """Everything measured; degradation is required, speedup where it is feasible, and
        predicted_speedup where it is not."""
        ...


Objective: TypeAlias = Callable[[dict[str, Any]], float] | RichObjective


def bound_of(objective: Objective) -> float | None:
    """The rich objective's bound on the degradation; None for a bare callable."""
    if not callable(objective):
        raise UsageError(f"objective_fn = {objective!r}: expected a callable of a dict")
    if not isinstance(objective, RichObjective):
        return None
    bound = float(objective.max_degradation)
    if not math.isfinite(bound) or bound < 0:
        raise UsageError(f"objective_fn.max_degradation = {bound}: expected a number of at least 0")
    return bound


def mode_of(objective: Objective, asked: str | None) -> str:
    """The `mode` of a search's best configuration: the objective's own, else what is asked for.

    Raises:
        UsageError: the one asked for is not the one that the objective measures.
    """
    own = getattr(objective, "mode", None)
    if asked is not None and own is not None and asked != own:
        raise UsageError(f"mode = {asked!r}: the objective measures mode {own!r}")
    return str(asked or own or "verified")


def run_evaluation(objective: Objective, params: Mapping[str, Any]) -> Evaluation:
    """Evaluate one point, its wall time included.

    An exception or a result that is not finite gives a failed Evaluation with the reason.
    What is no `Exception` (KeyboardInterrupt, SystemExit) passes through.
    """
    started = time.perf_counter()
    try:
        evaluation = _evaluate(objective, dict(params))
    except Exception as error:
        _LOG.debug("evaluation of %s failed", dict(params), exc_info=True)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        evaluation = Evaluation(params=dict(params), state=FAILED, error=reason)
    # The point is the one asked for, even if the objective changed its dict.
    return replace(evaluation, params=dict(params), seconds=time.perf_counter() - started)


def _evaluate(objective: Objective, params: dict[str, Any]) -> Evaluation:
    if isinstance(objective, RichObjective):
        return _checked(objective.evaluate(params), bound_of(objective) or 0.0)
    score = objective(params)
    if score is None:
        raise TypeError("the objective returned None; expected a number")
    if not math.isfinite(float(score)):
        raise ValueError(f"score = {float(score)}, which is not finite")
    return Evaluation(params=params, score=float(score))


def _checked(evaluation: Evaluation, bound: float) -> Evaluation:
    """A rich objective's evaluation, failed where what the search needs is not finite."""
    if evaluation.failed:
        return replace(evaluation, score=None, error=evaluation.error or "no reason given")
    feasible = evaluation.degradation is not None and evaluation.degradation <= bound
    for name in ("score", "degradation", *(["speedup"] if feasible else [])):
        value = getattr(evaluation, name)
        if value is None or not math.isfinite(value):
            error = f"{name} = {value}, which is not finite"
            return replace(evaluation, score=None, state=FAILED, error=error)
    return replace(evaluation, feasible=feasible)


class Worker:
    """One process's share of a study, as a context manager.

    Optuna numbers trials without gaps and hands each waiting trial to one process. Everything
    else a process writes first and reads then, so that two that chose the same point both notice.
    """

    def __init__(
        self, study: optuna.Study, sampler: PointSampler, objective: Objective, bound: float | None
    ) -> None:
        self.study, self._sampler = study, sampler
        study.sampler = sampler
        self._objective, self._bound = objective, bound
        self._run = uuid.uuid4().hex
        self._nothing_left = False
        self._trial: optuna.Trial | None = None
        self._over = threading.Event()
        self._pulse = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Worker:
        RUNS.add(self._run)
        self._pulse.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._pulse.join()
        RUNS.discard(self._run)

    def evaluations(self, stop: Callable[[], bool]) -> Iterator[Evaluation]:
        """Each evaluation that this process makes, until none is left or it is to ``stop``.

        Where only other processes have something left, it waits for them: what one of them loses
        is evaluated here.
        """
        while not stop():
            now = self._with_lost_requeued()
            if (self._nothing_left or now.taken >= self._total) and not now.waiting:
                if not now.running:
                    return
                time.sleep(_POLL_SECONDS)
                continue
            self._trial = trial = self.study.ask()
            try:
                evaluation = self._evaluated(trial)
            except BaseException:
                close(self.study, trial.number, None)  # whoever goes on makes it again
                raise
            finally:
                self._trial = None
            close(self.study, trial.number, evaluation)
            if evaluation is not None:
                yield evaluation

    def _evaluated(self, trial: optuna.Trial) -> Evaluation | None:
        """Evaluate the trial's point and store the result in it; None if the trial is void.

        It is written before the trial's state: a kill between the two is made good by whoever
        goes on.
        """
        trial.set_user_attr(WORKER, worker(self._run))
        number = Trials.of(self.study).numbers.get(trial.number)
        if number is None or number >= self._total:
            why = "retried already" if number is None else "over the planned number"
            trial.set_user_attr(VOID, why)
            return None
        try:
            params = self._sampler.suggest(trial)
        except NothingLeftError:
            self._nothing_left = True
            trial.set_user_attr(VOID, "no useful point left")
            return None
        if self._taken_meanwhile(trial, params):
            self.study.enqueue_trial({}, user_attrs={AGAIN: trial.number})
            return None
        evaluation = run_evaluation(self._objective, params)
        evaluation = replace(evaluation, suggestion_seconds=self._sampler.seconds)
        stored = evaluation.to_dict()
        try:
            for name, distance in constraints(evaluation, self._bound).items():
                trial.set_constraint(name, distance)
            trial.set_user_attr(SCORE, stored["score"])
            trial.set_user_attr(EVALUATION, stored)
        except UpdateFinishedTrialError:
            _LOG.warning("trial %d was considered lost and is retried", trial.number)
            return None
        return evaluation

    def _taken_meanwhile(self, trial: optuna.Trial, params: Mapping[str, Any]) -> bool:
        """Whether another process took the same point while this one was proposed."""
        before = self._sampler.trials
        if not self._sampler.once or before is None:
            return False
        return point_key(params) in Trials.of(self.study, before.asking).seen - before.seen

    @property
    def _total(self) -> int:
        header = read_header(self.study)
        assert header is not None
        return header.total

    def _with_lost_requeued(self) -> Trials:
        """The trials; those of dead processes are closed, and wait to be retried."""
        now = Trials.of(self.study)
        dead = [trial for trial in now.running if is_lost(trial)]
        for trial in dead:
            stored = trial.user_attrs.get(EVALUATION)
            close(self.study, trial.number, Evaluation.from_dict(stored) if stored else None)
        if dead:
            now = Trials.of(self.study)
        for trial in now.lost:
            # A point that is not complete was never evaluated; it is proposed anew.
            whole = set(trial.params) == {d.name for d in self._sampler.dims}
            again = {AGAIN: trial.number}
            self.study.enqueue_trial(trial.params if whole else {}, user_attrs=again)
        return Trials.of(self.study) if now.lost else now

    def _beat(self) -> None:
        """Say from time to time that this process is still at work."""
        while not self._over.wait(BEAT_SECONDS):
            if (trial := self._trial) is not None:
                with suppress(Exception):  # it may just have ended
                    trial.set_user_attr(WORKER, worker(self._run))
