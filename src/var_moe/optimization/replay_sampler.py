"""The sampler of a search by replay: thousands of forecasts choose each full evaluation.

A pool of points is forecast once. Before each full evaluation the forecasts are corrected by what
the evaluations so far measured (`optimization.forecast`), and the point with the highest
expected feasible improvement is taken, after a local search around the best of the pool. The
limit that it is to keep changes from one evaluation to the next, from the bound itself to well
below it, so that the last measurement, on other text, gets bold and safe candidates alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
from scipy.stats import qmc

from var_moe.optimization.forecast import (
    Correction,
    Floats,
    Forecast,
    Forecaster,
    feasible_improvement,
)
from var_moe.optimization.results import Evaluation
from var_moe.optimization.samplers import PointSampler
from var_moe.optimization.search_space import (
    Choice,
    Dimension,
    Params,
    SearchSpace,
    dimensions,
    distinct,
    point_key,
    stand_in_of,
    starting_points,
)
from var_moe.optimization.trials import Trials

POOL_GROUPS, POOL_CONFIDENCES, POOL_REST = 48, 8, 6
"""VAR's pool: groups of points that share the cache's settings; confidence thresholds in each
group; draws of the other two settings for each of these."""

POOL_EVEN = 256
"""Evenly spread points of another policy's pool: its few settings leave no gaps between them."""

SHARED = ("context_window_size", "cache_size", "cache_ttl_seconds")
"""Settings for which a replay does most of its work: points that share them cost little."""

_NEIGHBOURS, _NEIGHBOURS_PER_SETTING = 48, 16
_MOST_CORNERS = 3  # of a space with so many settings, at 2^n of them

CAUTION = (0.7, 1.4, 0.0, 1.0, 1.645, 0.4, 1.2)
"""How far below the bound each evaluation's limit lies in turn, in standard errors of the
difference between two texts."""

_AROUND = 6
_ALIKE = 1e-9
_WORTH = 5e-4  # expected gain in score for which a last measurement is made


class Forecasts:
    """Forecasts by point, each made once."""

    def __init__(self, forecaster: Forecaster) -> None:
        self._forecaster = forecaster
        self._known: dict[tuple[tuple[str, Any], ...], Forecast] = {}

    def of(self, points: Sequence[Params]) -> list[Forecast]:
        """In the order of ``points``; what is new is forecast in one go."""
        keys = [point_key(point) for point in points]
        new = {k: p for k, p in zip(keys, points, strict=True) if k not in self._known}
        made = self._forecaster.forecast(list(new.values())) if new else []
        self._known.update(zip(new, made, strict=True))
        return [self._known[key] for key in keys]

    def learn(self, points: Sequence[Params], forecasts: Sequence[Forecast]) -> None:
        """Take over forecasts that were made elsewhere, as those of a whole grid."""
        self._known.update(zip(map(point_key, points), forecasts, strict=True))

    def __len__(self) -> int:
        return len(self._known)


def column(forecasts: Sequence[Forecast], name: str) -> Floats:
    """One figure of many forecasts. (M,)"""
    return np.array([getattr(one, name) for one in forecasts], dtype=np.float64)


class ReplaySampler(PointSampler):
    """Chooses each point of a search by replay, from the forecasts and the evaluations so far.

    Args:
        space: search space.
        forecasts: of its points.
        bound: on the degradation.
        seed: of the pool and the local search.
        points: choose among these alone, as a grid's.
    """

    def __init__(
        self,
        space: SearchSpace,
        forecasts: Forecasts,
        *,
        bound: float,
        seed: int,
        points: Sequence[Params] | None = None,
    ) -> None:
        super().__init__(space, seed=seed)
        self._forecasts, self._bound = forecasts, bound
        self._local = points is None
        self.pool = pool_points(space, seed) if points is None else list(points)

    def predict(
        self, points: Sequence[Params], evaluations: Sequence[Evaluation]
    ) -> tuple[Floats, Floats]:
        """Mean and deviation of ln(degradation) of each point, by what the evaluations say. (M,)

        One that ended early counts with what it had measured by then: somewhat too high, as it
        was stopped for being high, which errs on the safe side.
        """
        known = [e for e in evaluations if not e.failed and e.degradation is not None]
        return self._corrected(points, [(e.params, e.degradation or 0.0) for e in known])

    def _corrected(
        self, points: Sequence[Params], measured: Sequence[tuple[Params, float]]
    ) -> tuple[Floats, Floats]:
        """The same, by measured points. Forecasts with another compensation in place are of other
        damages, so that what is off by one says nothing about another."""
        sizes = column(self._forecasts.of(points), "degradation")
        mean, deviation = np.empty(len(points)), np.empty(len(points))
        stand_ins = [stand_in_of(point) for point in points]
        for name in dict.fromkeys(stand_ins):
            own = np.array([one == name for one in stand_ins])
            known = [(point, value) for point, value in measured if stand_in_of(point) == name]
            forecasts = self._forecasts.of([point for point, _ in known])
            correction = Correction.fit(
                [one.degradation for one in forecasts],
                [value for _, value in known],
                scale=self._bound,
            )
            mean[own], deviation[own] = correction.predict(sizes[own])
        return mean, deviation

    def point(self, trials: Trials) -> Params | None:
        """The point with the highest expected gain; None where every point decides as one that
        is evaluated."""
        caution = CAUTION[trials.number % len(CAUTION)]
        limit = self._bound - caution * _text_error(trials.evaluations, self._bound)
        tried = {stand_in_of(point) for point in trials.points}
        # Every compensation is evaluated, whatever the forecasts say: a wrong one is corrected.
        pool = [point for point in self.pool if stand_in_of(point) not in tried] or self.pool
        gain = self._gain(pool, trials, limit)
        points = pool
        if self._local:
            nearest = [pool[i] for i in np.argsort(-gain, kind="stable")[:_AROUND]]
            rng = np.random.default_rng([self.seed, 6, trials.number])
            points = [*pool, *neighbours(self.dims, nearest, rng)]
            gain = self._gain(points, trials, limit)
        best = int(np.argmax(gain))
        return points[best] if np.isfinite(gain[best]) else None

    def closer(self, measured: Sequence[tuple[Params, float]]) -> Params | None:
        """A point that should be faster than the measured ones and still keep the bound.

        On the text of the last measurement the forecasts are off by another factor than on the
        search's. Points ``measured`` there, with the upper bounds of their degradation, tell which.
        None where no point promises a gain worth a measurement.
        """
        if not measured or not self._local:
            return None
        known = self._forecasts.of([point for point, _ in measured])
        kept = [
            forecast.score
            for forecast, (_, upper) in zip(known, measured, strict=True)
            if upper < self._bound
        ]
        if not kept:
            return None
        tried = {
            (stand_in_of(point), forecast.experts_per_token)
            for (point, _), forecast in zip(measured, known, strict=True)
        }

        def gains(points: Sequence[Params]) -> Floats:
            forecasts = self._forecasts.of(points)
            mean, deviation = self._corrected(points, measured)
            score = column(forecasts, "score")
            gain = feasible_improvement(score, mean, deviation, best=max(kept), limit=self._bound)
            executed = column(forecasts, "experts_per_token").tolist()
            again = zip(map(stand_in_of, points), executed, strict=True)
            gain[[one in tried for one in again]] = 0.0
            return gain

        nearest = [self.pool[i] for i in np.argsort(-gains(self.pool), kind="stable")[:_AROUND]]
        rng = np.random.default_rng([self.seed, 9, len(measured)])
        points = [*nearest, *neighbours(self.dims, nearest, rng)]
        gain = gains(points)
        best = int(np.argmax(gain))
        return points[best] if gain[best] >= _WORTH else None

    def _gain(self, points: Sequence[Params], trials: Trials, limit: float) -> Floats:
        """Expected feasible improvement of each; minus infinity for what is known. (M,)"""
        evaluations = trials.evaluations
        forecasts = self._forecasts.of(points)
        seen = self._forecasts.of(trials.points)
        mean, deviation = self.predict(points, evaluations)
        score = column(forecasts, "score")
        kept = [
            forecast.score
            for forecast, e in zip(seen, evaluations, strict=False)  # the finished ones come first
            if e.eligible and e.degradation is not None and e.degradation <= limit
        ]
        best = max(kept, default=float(score.min()))
        gain = feasible_improvement(score, mean, deviation, best=best, limit=limit)
        # Where nothing promises a gain: what is likely to keep the limit, the fastest first.
        gain += 1e-6 * feasible_improvement(score, mean, deviation, best=0.0, limit=limit)
        gain -= 1e-9 * np.exp(mean)
        executed, learned = column(forecasts, "experts_per_token"), column(forecasts, "learned_pct")
        stand_ins = np.array([str(stand_in_of(point)) for point in points])
        for one, known in zip(seen, trials.points, strict=True):  # what decides alike counts once
            alike = stand_ins == str(stand_in_of(known))
            alike &= np.abs(executed - one.experts_per_token) < _ALIKE
            gain[alike & (np.abs(learned - one.learned_pct) < _ALIKE)] = -np.inf
        return gain


def _text_error(evaluations: Sequence[Evaluation], bound: float) -> float:
    """Error of a degradation near the bound, between this text and one of the same size."""
    known = [e for e in evaluations if e.degradation_se is not None and e.degradation is not None]
    if not known:
        return 0.0
    near = min(known, key=lambda e: abs((e.degradation or 0.0) - bound))
    return float(np.sqrt(2) * (near.degradation_se or 0.0))


def shares_work(space: SearchSpace) -> bool:
    """Whether points can share settings that are costly to replay, see `SHARED`."""
    return any(name in SHARED for name in space)


def pool_points(space: SearchSpace, seed: int) -> list[Params]:
    """The points to choose from, the default first.

    Where some settings are costly to replay, the presets and random points that share them. Else
    the ends of each range and evenly spread points, whatever the seed.
    """
    if not shares_work(space):
        return _even_points(space)
    dims = dimensions(space)
    rng = np.random.default_rng([seed, 5])
    points = starting_points(space)
    for _ in range(POOL_GROUPS):
        shared = {d.name: d.at(rng.random()) for d in dims if d.name in SHARED}
        for _ in range(POOL_CONFIDENCES):
            confidence = rng.random()
            for _ in range(POOL_REST):
                point = {}
                for d in dims:
                    share = confidence if d.name == "confidence_threshold" else rng.random()
                    point[d.name] = shared.get(d.name, d.at(share))
                points.append(point)
    return distinct(points)


def _even_points(space: SearchSpace) -> list[Params]:
    """The default, the corners, and a scrambled Sobol sequence."""
    dims = dimensions(space)
    points = starting_points(space)
    if len(dims) <= _MOST_CORNERS:
        points += [_point(dims, ends) for ends in product(*(d.ends for d in dims))]
    shares = qmc.Sobol(len(dims), scramble=True, seed=5).random(POOL_EVEN)
    points += [
        _point(dims, [d.at(share) for d, share in zip(dims, row, strict=True)])
        for row in shares.tolist()
    ]
    return distinct(points)


def _point(dims: Sequence[Dimension | Choice], values: Sequence[Any]) -> Params:
    return {d.name: value for d, value in zip(dims, values, strict=True)}


def neighbours(
    dims: Sequence[Dimension | Choice], centres: Sequence[Params], rng: np.random.Generator
) -> list[Params]:
    """Points near the centres: one or all settings moved by a tenth of their range or less."""
    near: list[Params] = []
    dims = [d for d in dims if d.span] or list(dims)  # what has a scale to move on
    for number in range(min(_NEIGHBOURS, _NEIGHBOURS_PER_SETTING * len(dims))):
        point = dict(centres[number % len(centres)])
        moved = [dims[int(rng.integers(len(dims)))]] if number % 2 else dims
        for d in moved:
            point[d.name] = d.moved(point[d.name], rng.normal(scale=0.05 * d.span))
        near.append(point)
    # Shared settings side by side, for the replay.
    return sorted(near, key=lambda p: [p.get(name, 0) for name in SHARED])
