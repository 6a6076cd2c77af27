"""The methods of a search, each an Optuna sampler: points by number, Optuna's Gaussian process,
scikit-optimize's.

A sampler here proposes whole points, and has one method to write, `PointSampler.point`. What it
proposes depends on the seed, the evaluation's number and the finished evaluations alone, never on
what this process did before: a search that was interrupted goes on as an unbroken one would, and
several processes can share it.
"""

from __future__ import annotations

import logging
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, GPSampler
from optuna.trial import FrozenTrial

from var_moe.optimization.search_space import (
    Choice,
    Dimension,
    Params,
    SearchSpace,
    dimensions,
    fresh_sample,
    point_key,
    starting_points,
)
from var_moe.optimization.trials import Trials

_LOG = logging.getLogger(__name__)

# Below this many completed evaluations a process has nothing to fit.
_MIN_COMPLETE = 2
# Integers with more values than this are continuous to the process, see `_RelaxedGP`.
_FEW_VALUES = 32


class NothingLeftError(Exception):
    """No point that is left is worth an evaluation."""


class PointSampler(BaseSampler):
    """Proposes whole points of a search space.

    Args:
        space: the search space.
        seed: of the search.
    """

    once = True
    """Whether a point that another process has just taken is exchanged for another one."""

    def __init__(self, space: SearchSpace, *, seed: int) -> None:
        self.space, self.seed = space, seed
        self.dims = dimensions(space)
        self.seconds = 0.0  # that the last proposal took
        self.trials: Trials | None = None  # that it saw

    @abstractmethod
    def point(self, trials: Trials) -> Params | None:
        """The point of evaluation `trials.number`; None where nothing that is left is worth it."""

    def seed_for(self, number: int) -> int:
        """The seed of evaluation `number`: with it alone a model that is made anew for each
        evaluation proposes what one in an unbroken search would."""
        return int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])

    def suggest(self, trial: optuna.Trial) -> Params:
        """The point of a trial, written into the storage.

        Raises:
            NothingLeftError: there is none.
        """
        self.trials, self.seconds = None, 0.0
        point: Params = {}
        for d in self.dims:
            if isinstance(d, Choice):
                point[d.name] = str(trial.suggest_categorical(d.name, d.choices))
            elif d.integer:
                point[d.name] = int(trial.suggest_int(d.name, int(d.low), int(d.high), log=d.log))
            else:
                point[d.name] = float(trial.suggest_float(d.name, d.low, d.high, log=d.log))
        return point

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {d.name: _distribution(d) for d in self.dims}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        started = time.perf_counter()
        self.trials = Trials.of(study, trial)
        point = self.point(self.trials)
        self.seconds = time.perf_counter() - started
        if point is None:
            raise NothingLeftError
        return point

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise ValueError(f"{type(self).__name__}: proposed a point without {param_name!r}")


def _distribution(d: Dimension | Choice) -> BaseDistribution:
    if isinstance(d, Choice):
        return CategoricalDistribution(d.choices)
    if d.integer:
        return IntDistribution(int(d.low), int(d.high), log=d.log)
    return FloatDistribution(d.low, d.high, log=d.log)


class NumberedSampler(PointSampler):
    """Points that are known by their numbers alone: a grid's, or random ones.

    Args:
        space: the search space.
        points: the point of an evaluation's number.
    """

    once = False

    def __init__(self, space: SearchSpace, points: Callable[[int], Params]) -> None:
        super().__init__(space, seed=0)
        self._points = points

    def point(self, trials: Trials) -> Params:
        return self._points(trials.number)


class GuidedSampler(PointSampler):
    """A sampler with a model, and the rules that all of them share.

    First come the default configuration and the presets, then random points, up to `n_startup` in
    all (by default a quarter of the evaluations, 5 to 10). Later a random point stands in after a
    failed evaluation and for a point that was evaluated already: a failure tells the model nothing,
    so that it would ask for nearly the same again.

    Args:
        space: the search space.
        seed: of the search.
        total: evaluations planned.
        n_startup: evaluations before the model is asked.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        total: int,
        n_startup: int | None = None,
    ) -> None:
        super().__init__(space, seed=seed)
        if n_startup is None:
            n_startup = min(10, max(5, total // 4))
        points = starting_points(space)
        while len(points) < n_startup:
            points.append(fresh_sample(space, seed, len(points), points))
        self.start = points

    @abstractmethod
    def by_model(self, trials: Trials) -> Params | None:
        """The model's point for it; None where it has nothing to go by."""

    def point(self, trials: Trials) -> Params:
        """The next starting point, the model's, or a random one in its place."""
        if trials.number < len(self.start):
            return self.start[trials.number]
        point = None
        complete = sum(not e.failed for e in trials.evaluations)
        if complete >= _MIN_COMPLETE and not trials.evaluations[-1].failed:
            try:
                point = self.by_model(trials)
            except Exception:
                # A process that cannot be fitted would fail again on every resume.
                _LOG.warning(
                    "no proposal for evaluation %d; drawn at random", trials.number, exc_info=True
                )
        if point is None or point_key(point) in trials.seen:
            return fresh_sample(self.space, self.seed, trials.number, trials.points)
        return point


class GPPointSampler(GuidedSampler):
    """Optuna's Gaussian process, with the bound as a constraint."""

    def by_model(self, trials: Trials) -> Params | None:
        """A new sampler's each time: it has no memory that a resumed search would lack."""
        assert trials.asking is not None
        model = _RelaxedGP(
            seed=self.seed_for(trials.number),
            n_startup_trials=_MIN_COMPLETE,
            deterministic_objective=False,
            warn_independent_sampling=False,
        )
        space = model.infer_relative_search_space(trials.study, trials.asking)
        values = model.sample_relative(trials.study, trials.asking, space)
        return {d.name: values.get(d.name, d.default) for d in self.dims} if values else None


class _RelaxedGP(GPSampler):
    """GPSampler that chooses integers with many values as numbers and rounds them.

    It optimises each integer by a line search of its own, one point at a time, which makes a
    suggestion in this search space take ten times as long.
    """

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        relaxed = {
            name: FloatDistribution(d.low, d.high, log=d.log)
            for name, d in search_space.items()
            if isinstance(d, IntDistribution) and d.high - d.low >= _FEW_VALUES
        }
        params = super().sample_relative(study, trial, {**search_space, **relaxed})
        return {name: round(v) if name in relaxed else v for name, v in params.items()}


class SkoptSampler(GuidedSampler):
    """scikit-optimize's Gaussian process, on the documented score.

    It knows no constraint: the score's penalty stands for it, as the documentation has it. A new
    optimizer is told everything before each suggestion; `gp_hedge` therefore picks among its
    acquisitions evenly.
    """

    def by_model(self, trials: Trials) -> Params | None:
        """The optimizer's point; points that are under way do not count."""
        from skopt import Optimizer

        free = [d for d in self.dims if d.free]  # skopt refuses a range of one value
        if not free:
            return None
        optimizer = Optimizer(
            [_skopt_range(d) for d in free],
            base_estimator="GP",
            n_initial_points=0,
            acq_func="gp_hedge",
            random_state=self.seed_for(trials.number),
        )
        complete = [e for e in trials.evaluations if not e.failed]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own notes on repeats, which are handled here
            optimizer.tell(
                [[e.params[d.name] for d in free] for e in complete],
                [-(e.score or 0.0) for e in complete],  # skopt minimises
            )
            asked = optimizer.ask()
        values = {d.name: d.clip(value) for d, value in zip(free, asked, strict=True)}
        return {d.name: values.get(d.name, d.default) for d in self.dims}


def _skopt_range(d: Dimension | Choice) -> Any:
    from skopt.space import Categorical, Integer, Real

    if isinstance(d, Choice):
        return Categorical(d.choices)
    kind = Integer if d.integer else Real
    return kind(d.low, d.high, prior="log-uniform" if d.log else "uniform")
