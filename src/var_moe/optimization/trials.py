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
from datetime import datetime
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import Params
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

CONSTRAINT = "degradation"
"""Name of the constraint: degradation - max_degradation, feasible at zero and below."""

UPPER_CONSTRAINT = "degradation_upper"
"""The same with a margin: 95% of the error of a difference between two texts of this size."""

BEAT_SECONDS, LOST_SECONDS = 60.0, 300.0
"""How often a process says that it is at work on a trial, and after what silence it is lost."""

_CLAIM_SECONDS = 10.0  # from a trial's start until its process has said so, at the most

_parsed: WeakKeyDictionary[optuna.Study, dict[int, Evaluation]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Trials:
    """All trials of a study at one moment."""

    trials: list[FrozenTrial]
    known: dict[int, Evaluation]  # parsed before, by trial

    @classmethod
    def of(cls, study: optuna.Study) -> Trials:
        """As they are now."""
        return cls(study.get_trials(deepcopy=False), _parsed.setdefault(study, {}))

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
    def taken(self) -> int:
        """Evaluations that are finished or under way, or have yet to be made again."""
        return len(set(self.numbers.values()))

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The finished ones, by their numbers."""
        finished = []
        for trial in self.trials:
            number = self.numbers.get(trial.number)
            if number is None or EVALUATION not in trial.user_attrs:
                continue
            if trial.state.is_finished():
                finished.append((number, self._evaluation(trial)))
        return [evaluation for _, evaluation in sorted(finished, key=lambda pair: pair[0])]

    def _evaluation(self, trial: FrozenTrial) -> Evaluation:
        if trial.number not in self.known:
            stored, source = trial.user_attrs[EVALUATION], f"trial {trial.number}"
            self.known[trial.number] = Evaluation.from_dict(stored, source=source)
        return self.known[trial.number]

    @property
    def waiting(self) -> bool:
        """Whether a trial waits to be taken, as one that was lost does."""
        return any(trial.state.name == "WAITING" for trial in self.trials)

    @property
    def running(self) -> list[FrozenTrial]:
        """Trials under way."""
        return [trial for trial in self.trials if trial.state.name == "RUNNING"]

    def points(self, *, but: int) -> list[Params]:
        """Points that are evaluated or under way, but for that of a trial."""
        return [
            dict(trial.params)
            for trial in self.trials
            if trial.number != but
            and trial.params
            and (EVALUATION in trial.user_attrs or trial.state.name == "RUNNING")
        ]

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
    """Distances of a trial from the bound, feasible at zero and below."""
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


def close(study: optuna.Study, number: int, evaluation: Evaluation | None) -> None:
    """Close a trial with its evaluation, or without one, unless it is closed."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    with suppress(UpdateFinishedTrialError):
        if evaluation is None or evaluation.failed:
            study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        else:
            study.tell(number, told_value(evaluation), skip_if_finished=True)


_runs: set[str] = set()  # searches at work in this process


def worker(run: str) -> dict[str, Any]:
    """What a trial's `WORKER` says: who is at work on it, and when that was known last."""
    _runs.add(run)
    pid = os.getpid()
    process = {"machine": _machine(), "pid": pid, "started": _started(pid)}
    return {**process, "run": run, "beat": time.time()}


def has_ended(run: str) -> None:
    """Say that a search in this process is over."""
    _runs.discard(run)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether the process of a running trial is gone.

    On its own machine that is known at once; of other machines, when they have said nothing for
    `LOST_SECONDS`.
    """
    told: Mapping[str, Any] | None = trial.user_attrs.get(WORKER)
    if told is None:
        begun = trial.datetime_start
        return begun is None or _age(begun) > _CLAIM_SECONDS
    if told["machine"] == _machine() and told["started"] is not None:
        if told["pid"] == os.getpid() and told["started"] == _started(os.getpid()):
            return str(told["run"]) not in _runs
        return _started(int(told["pid"])) != str(told["started"])
    return bool(time.time() - told["beat"] > LOST_SECONDS)


def _age(begun: datetime) -> float:
    return (datetime.now(begun.tzinfo) - begun).total_seconds()


@cache
def _machine() -> str:
    """Which table of processes a process number belongs to: of a machine, or a container."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return platform.node()


def _started(pid: int) -> str | None:
    """When a process was started, as its system says it; None where there is none, or no telling.

    It tells a process from a later one of the same number.
    """
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # ended, if not yet forgotten
    if os.name != "posix":
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
