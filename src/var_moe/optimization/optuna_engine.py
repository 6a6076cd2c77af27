"""Optuna's Gaussian process as the search's model, its journal file as the search's memory.

Optuna is told a speedup, never the documented score: its process standardises all values,
and penalties of -100 would flatten the range that matters. The bound goes in as a
constraint. The score and the whole evaluation are stored beside the value.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from var_moe.errors import UsageError, VarMoeError
from var_moe.optimization.guided import GuidedPlan, is_repeat
from var_moe.optimization.journal import (
    STUDY_NAME,
    MemoryStore,
    SearchHeader,
    Session,
    open_log,
    read_lines,
)
from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import Choice, Params, SearchSpace, dimensions
from var_moe.optimization.selection import Z_95

if TYPE_CHECKING:
    import optuna

_LOG = logging.getLogger(__name__)

_HEADER = "header"
_EVALUATION = "evaluation"
_SCORE = "score"
_STUDY = "var_moe"
CONSTRAINT = "degradation"
"""Name of the constraint: degradation - max_degradation, feasible at zero and below."""

UPPER_CONSTRAINT = "degradation_upper"
"""The same with a margin: 95% of the error of a difference between two texts of this size."""

# Below this many completed evaluations the process has nothing to fit.
_MIN_COMPLETE = 2
# Integers with more values than this are continuous to the process, see `_sampler`.
_FEW_VALUES = 32


def told_value(evaluation: Evaluation) -> float:
    """What Optuna maximises: the measured speedup, the predicted one where the bound is
    broken (1.0 where even that is unknown), and a bare callable's score."""
    if evaluation.feasible is None:
        value = evaluation.score
    elif evaluation.feasible:
        value = evaluation.speedup
    else:
        value = evaluation.predicted_speedup
        if value is None or not math.isfinite(value):
            value = evaluation.speedup
    return value if value is not None and math.isfinite(value) else 1.0


class OptunaSearch:
    """One Optuna study as the store and the source of points of one search.

    Args:
        space: the search space.
        bound: the objective's max_degradation; None for a bare callable.
        folder: where ``optuna_study.log`` is kept; None keeps nothing.
    """

    def __init__(self, space: SearchSpace, *, bound: float | None, folder: Path | None) -> None:
        self._space = space
        self._bound = bound
        self._path = None if folder is None else folder / STUDY_NAME
        self._log: IO[bytes] | None = None
        self._verbosity: int | None = None
        self._study: optuna.Study | None = None
        self._trial: optuna.Trial | None = None

    def begin(self, header: SearchHeader, *, resume: bool = False) -> Session:
        """Create the study, or load it, finish what a kill left open, and read it."""
        import optuna

        if self._path is not None:
            self._log = open_log(self._path, resume=resume)
        self._verbosity = optuna.logging.get_verbosity()
        # The search tells its own progress.
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            if self._path is None:
                session = MemoryStore().begin(header, resume=resume)
                self._study = optuna.create_study(direction="maximize")
                return session
            read_lines(self._path)  # a damaged line is told by its number
            try:
                self._study = optuna.create_study(
                    storage=_journal_storage(self._path),
                    study_name=_STUDY,
                    direction="maximize",
                    load_if_exists=True,
                )
                return self._load(self._study, header)
            except (VarMoeError, OSError):
                raise
            except Exception as error:  # lines of another program or version fail in many ways
                raise UsageError(
                    f"{self._path}: not a study of this version ({type(error).__name__}: {error}); "
                    "start anew without resume"
                ) from error
        except BaseException:
            self.close()
            raise

    def suggest(self, number: int, evaluations: Sequence[Evaluation], plan: GuidedPlan) -> Params:
        """Start the trial of evaluation `number` and return its point."""
        from optuna.trial import TrialState

        study = self._open_study()
        if not _waiting(study):
            planned = plan.without_model(number, evaluations)
            if planned is not None:
                study.enqueue_trial(planned)
        by_model = not _waiting(study)
        # A new sampler each time: it has no memory that a resumed search would lack.
        study.sampler = _sampler(plan.seed_for(number))
        trial = study.ask()
        try:
            params = self._point(trial)
            repeat = by_model and is_repeat(params, evaluations)
        except Exception:
            if not by_model:
                raise
            # A process that cannot be fitted would fail again on every resume.
            _LOG.warning("no suggestion for evaluation %d; drawn at random", number, exc_info=True)
            repeat = True
        if repeat:
            study.tell(trial, state=TrialState.FAIL)
            study.enqueue_trial(plan.instead(number, evaluations))
            trial = study.ask()
            params = self._point(trial)
        self._trial = trial
        return params

    def append(self, number: int, evaluation: Evaluation) -> None:
        """Tell the running trial its evaluation.

        The evaluation is written before the trial's state: a kill between the two is
        made good by the next `begin`.
        """
        trial = self._trial
        if trial is None:
            raise ValueError("append: no trial is running; call suggest first")
        if not evaluation.failed and self._bound is not None:
            if evaluation.degradation is None:
                raise ValueError("append: the evaluation has no degradation")
            distance = evaluation.degradation - self._bound
            trial.set_constraint(CONSTRAINT, distance)
            # Who wins is decided on other text, by the upper bound there: a search that only
            # minds its own estimate proposes what then fails.
            if evaluation.degradation_se is not None:
                margin = Z_95 * math.sqrt(2) * evaluation.degradation_se
                trial.set_constraint(UPPER_CONSTRAINT, distance + margin)
        stored = evaluation.to_dict()
        trial.set_user_attr(_SCORE, stored["score"])
        trial.set_user_attr(_EVALUATION, stored)
        _tell(self._open_study(), trial.number, evaluation)
        self._trial = None

    def extend(self, header: SearchHeader) -> None:
        """Note another number of evaluations."""
        self._open_study().set_user_attr(_HEADER, header.to_dict())

    def close(self) -> None:
        """Give the study's file free; a second call does nothing."""
        if self._verbosity is not None:
            import optuna

            optuna.logging.set_verbosity(self._verbosity)
            self._verbosity = None
        if self._log is not None:
            self._log.close()
            self._log = None
        self._study = self._trial = None

    def _open_study(self) -> optuna.Study:
        if self._study is None:
            raise ValueError("the study is not open; call begin first")
        return self._study

    def _point(self, trial: optuna.Trial) -> Params:
        point: Params = {}
        for d in dimensions(self._space):
            if isinstance(d, Choice):
                point[d.name] = str(trial.suggest_categorical(d.name, d.choices))
            elif d.integer:
                point[d.name] = int(trial.suggest_int(d.name, int(d.low), int(d.high), log=d.log))
            else:
                point[d.name] = float(trial.suggest_float(d.name, d.low, d.high, log=d.log))
        return point

    def _load(self, study: optuna.Study, header: SearchHeader) -> Session:
        trials = study.get_trials(deepcopy=False)
        stored = study.user_attrs.get(_HEADER)
        if stored is None:
            if trials:
                raise UsageError(f"{self._path}: holds a study of another program")
            header = header.begun()
            study.set_user_attr(_HEADER, header.to_dict())
            return Session(header=header, evaluations=[])
        if self._path is None:
            raise ValueError("a study in memory cannot be resumed")
        header = header.resumed_from(stored, source=self._path)
        self._finish_interrupted(study)
        return Session(header=header, evaluations=_stored_evaluations(study))

    def _finish_interrupted(self, study: optuna.Study) -> None:
        """Close the trials that a kill left running: tell those whose evaluation is stored,
        fail the others and enqueue their points again."""
        from optuna.trial import TrialState

        for trial in study.get_trials(deepcopy=True, states=(TrialState.RUNNING,)):
            stored = trial.user_attrs.get(_EVALUATION)
            if stored is not None:
                _tell(study, trial.number, Evaluation.from_dict(stored))
                continue
            study.tell(trial.number, state=TrialState.FAIL)
            # A point that is not complete was never evaluated; it is suggested anew.
            if set(trial.params) == set(self._space):
                study.enqueue_trial(trial.params, user_attrs={"again": trial.number})


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
    from optuna.samplers import GPSampler
    from optuna.trial import FrozenTrial

    class RelaxedGPSampler(GPSampler):
        """GPSampler that chooses integers with many values as numbers and rounds them.

        It optimises each integer by a line search of its own, one point at a time, which
        makes a suggestion in this search space take ten times as long.
        """

        def sample_relative(
            self,
            study: optuna.Study,
            trial: FrozenTrial,
            search_space: dict[str, BaseDistribution],
        ) -> dict[str, Any]:
            relaxed = {
                name: FloatDistribution(d.low, d.high, log=d.log)
                for name, d in search_space.items()
                if isinstance(d, IntDistribution) and d.high - d.low >= _FEW_VALUES
            }
            params = super().sample_relative(study, trial, {**search_space, **relaxed})
            return {name: round(v) if name in relaxed else v for name, v in params.items()}

    return RelaxedGPSampler(
        seed=seed,
        n_startup_trials=_MIN_COMPLETE,
        deterministic_objective=False,
        warn_independent_sampling=False,
    )


def _journal_storage(path: Path) -> optuna.storages.BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    class HeldLock(JournalFileOpenLock):
        """No lock of its own: `open_log` holds the file for the whole search, and unlike
        Optuna's lock files that lock does not outlive a killed process."""

        def acquire(self) -> bool:
            return True

        def release(self) -> None:
            pass

    return JournalStorage(JournalFileBackend(str(path), lock_obj=HeldLock(str(path))))


def _waiting(study: optuna.Study) -> bool:
    from optuna.trial import TrialState

    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _tell(study: optuna.Study, number: int, evaluation: Evaluation) -> None:
    from optuna.trial import TrialState

    if evaluation.failed:
        study.tell(number, state=TrialState.FAIL)
    else:
        study.tell(number, told_value(evaluation))


def _stored_evaluations(study: optuna.Study) -> list[Evaluation]:
    return [
        Evaluation.from_dict(trial.user_attrs[_EVALUATION], source=f"trial {trial.number}")
        for trial in study.get_trials(deepcopy=True)
        if _EVALUATION in trial.user_attrs
    ]
