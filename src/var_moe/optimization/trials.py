"""What the trials of a study say: which evaluations are finished, under way, lost, or left.

Several processes may work on one study, on one machine or on many, so that nothing is counted in
a process: each asks the trials. Evaluation number i (from 0) is trial number i, unless a trial was
lost with its process: then a later trial takes its number over (`AGAIN`) and its point with it,
so that a search that was interrupted goes on as an unbroken one would.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import Params, point_key
from var_moe.optimization.selection import Z_95

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

# User attributes of a trial.
EVALUATION, SCORE, WORKER = "evaluation", "score", "worker"
AGAIN = "again"
"""The trial whose evaluation this one makes again, as that was lost with its process."""
VOID = "void"
"""Why a trial stands for no evaluation: another process had taken the last one, for instance."""

BEAT_SECONDS, LOST_SECONDS = 60.0, 300.0
"""How often a process says that it is at work on a trial, and after what silence it is lost."""

_CLAIM = timedelta(seconds=10)  # from a trial's start until its process has said so, at the most


@dataclass(frozen=True)
class Trials:
    """All trials of a study at one moment.

    Args:
        study: the study.
        trials: its trials.
        asking: the trial that a point is wanted for, where one is.
    """

    study: optuna.Study
    trials: list[FrozenTrial]
    asking: FrozenTrial | None = None

    @classmethod
    def of(cls, study: optuna.Study, asking: FrozenTrial | None = None) -> Trials:
        """As they are now."""
        return cls(study, study.get_trials(deepcopy=False), asking)

    @cached_property
    def numbers(self) -> dict[int, int]:
        """Trial -> number of its evaluation; a void trial has none, nor a second replacement."""
        numbers: dict[int, int] = {}
        replaced = set()
        count = 0
        for trial in self.trials:
            lost = trial.user_attrs.get(AGAIN)
            if VOID in trial.user_attrs:
                continue
            if lost is None:
                numbers[trial.number] = count
                count += 1
            elif lost in numbers and lost not in replaced:
                numbers[trial.number] = numbers[lost]
                replaced.add(lost)
        return numbers

    @property
    def number(self) -> int:
        """The number of the evaluation that a point is wanted for."""
        assert self.asking is not None
        return self.numbers.get(self.asking.number, self.asking.number)

    @property
    def taken(self) -> int:
        """Evaluations that are finished or under way, or have yet to be made again."""
        return len(set(self.numbers.values()))

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The finished ones, by their numbers."""
        finished = [
            trial
            for trial in self.trials
            if trial.number in self.numbers
            and EVALUATION in trial.user_attrs
            and trial.state.is_finished()
        ]
        return [
            Evaluation.from_dict(trial.user_attrs[EVALUATION], source=f"trial {trial.number}")
            for trial in sorted(finished, key=lambda trial: self.numbers[trial.number])
        ]

    @property
    def waiting(self) -> bool:
        """Whether a trial waits to be taken, as one that was lost does."""
        return any(trial.state.name == "WAITING" for trial in self.trials)

    @property
    def running(self) -> list[FrozenTrial]:
        """Trials under way."""
        return [trial for trial in self.trials if trial.state.name == "RUNNING"]

    @cached_property
    def points(self) -> list[Params]:
        """Points that are evaluated, then those under way, but for the asking trial's."""
        asking = self.asking and self.asking.number
        under_way = [t.params for t in self.running if t.params and t.number != asking]
        return [*(e.params for e in self.evaluations), *under_way]

    @cached_property
    def seen(self) -> set[object]:
        """Their identities."""
        return {point_key(point) for point in self.points}

    @property
    def lost(self) -> list[FrozenTrial]:
        """Trials that ended without an evaluation, and that no other has replaced yet."""
        replaced = {trial.user_attrs.get(AGAIN) for trial in self.trials}
        return [
            trial
            for trial in self.trials
            if trial.state.is_finished()
            and EVALUATION not in trial.user_attrs
            and trial.number in self.numbers
            and trial.number not in replaced
        ]


def constraints(evaluation: Evaluation, bound: float | None) -> dict[str, float]:
    """Distances of a trial from the bound, feasible at zero and below.

    The second one has a margin: who wins is decided on other text, by the upper bound there, and
    a search that only minds its own estimate proposes what then fails.
    """
    if bound is None or evaluation.failed or evaluation.degradation is None:
        return {}
    distance = evaluation.degradation - bound
    if evaluation.degradation_se is None:
        return {"degradation": distance}
    margin = Z_95 * math.sqrt(2) * evaluation.degradation_se  # of a difference between two texts
    return {"degradation": distance, "degradation_upper": distance + margin}


def told_value(evaluation: Evaluation) -> float:
    """What Optuna maximises: the measured speedup, the predicted one where the bound is broken
    (1.0 where even that is unknown), and a bare callable's score.

    Never the documented score: a Gaussian process standardises all values, and penalties of -100
    would flatten the range that matters.
    """
    if evaluation.feasible is None:
        values = [evaluation.score]
    elif evaluation.feasible:
        values = [evaluation.speedup]
    else:
        values = [evaluation.predicted_speedup, evaluation.speedup]
    return next((one for one in values if one is not None and math.isfinite(one)), 1.0)


def close(study: optuna.Study, number: int, evaluation: Evaluation | None) -> None:
    """Close a trial with its evaluation, or without one, unless it is closed."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    with suppress(UpdateFinishedTrialError):
        if evaluation is None or evaluation.failed:
            study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        else:
            study.tell(number, told_value(evaluation), skip_if_finished=True)


RUNS: set[str] = set()
"""Searches at work in this process."""


def worker(run: str) -> dict[str, Any]:
    """What a trial's `WORKER` says: who is at work on it, and when that was known last."""
    pid = os.getpid()
    process = {"machine": _machine(), "pid": pid, "started": _started(pid)}
    return {**process, "run": run, "beat": time.time()}


def is_lost(trial: FrozenTrial) -> bool:
    """Whether the process of a running trial is gone.

    On its own machine that is known at once, by Linux's table of processes; else when it has said
    nothing for `LOST_SECONDS`.
    """
    told: Mapping[str, Any] | None = trial.user_attrs.get(WORKER)
    if told is None:
        begun = trial.datetime_start
        return begun is None or datetime.now(begun.tzinfo) - begun > _CLAIM
    if told["machine"] == _machine() and told["started"] is not None:
        ended = told["pid"] == os.getpid() or _started(told["pid"]) != told["started"]
        return ended and told["run"] not in RUNS
    return bool(time.time() - told["beat"] > LOST_SECONDS)


@cache
def _machine() -> str:
    """Which table of processes a process number belongs to: of a machine, or a container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return platform.node()


def _started(pid: int) -> str | None:
    """When a process was started, which tells it from a later one of the same number.

    None where there is none, and where the system has no such table.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # ended, if not yet forgotten
