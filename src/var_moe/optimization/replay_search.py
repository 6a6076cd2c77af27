"""Search by replay: thousands of forecasts choose each full evaluation.

A pool of points is forecast once. Before each full evaluation the forecasts are corrected by what
the evaluations so far measured (`optimization.correction`), and the point with the highest
expected feasible improvement is taken, after a local search around the best of the pool. The
limit that it is to keep changes from one evaluation to the next, from the bound itself to
well below it, so that the final measurement on other text finds bold and safe candidates alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.config import check_seed
from var_moe.optimization.correction import Correction, Floats, feasible_improvement
from var_moe.optimization.forecast import Forecast, Forecaster
from var_moe.optimization.guided import check_enqueue
from var_moe.optimization.journal import SearchHeader, TrialJournal, as_store
from var_moe.optimization.objective_protocol import RichObjective
from var_moe.optimization.replay_pool import neighbours, pool_points
from var_moe.optimization.results import Evaluation, OptimizationResult
from var_moe.optimization.search import (
    OnEvaluation,
    SearchOptions,
    ShouldStop,
    Suggest,
    run_search,
)
from var_moe.optimization.search_space import (
    SEARCH_SPACE,
    Params,
    SearchSpace,
    check_count,
    dimensions,
    point_key,
    stand_in_of,
)

CAUTION = (0.7, 1.4, 0.0, 1.0, 1.645, 0.4, 1.2)
"""Errors of the difference between two texts that are kept from the bound, call by call."""

CALLS = 10
_AROUND = 6
_ALIKE = 1e-9
_WORTH = 5e-4  # expected gain in score for which a last measurement is made


class Forecasts:
    """Forecasts by point, each made once.

    Args:
        forecaster: makes them.
    """

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

    forecast = of  # it forecasts, too

    def learn(self, points: Sequence[Params], forecasts: Sequence[Forecast]) -> None:
        """Take over forecasts that were made elsewhere, as those of a whole grid."""
        self._known.update(zip(map(point_key, points), forecasts, strict=True))

    def __len__(self) -> int:
        return len(self._known)


def column(forecasts: Sequence[Forecast], name: str) -> Floats:
    """One figure of many forecasts. (M,)"""
    return np.array([getattr(one, name) for one in forecasts], dtype=np.float64)


class ReplayPlan:
    """Chooses each point of a replay search from the forecasts and the evaluations so far.

    A choice depends on the seed, its number and the finished evaluations alone, so that a resumed
    search goes on as an unbroken one would.

    Args:
        space: search space.
        forecasts: of its points.
        bound: on the degradation.
        seed: of the pool and the local search.
        first: points to evaluate before all others.
        points: choose among these alone, as a grid's.
    """

    def __init__(
        self,
        space: SearchSpace,
        forecasts: Forecasts,
        *,
        bound: float,
        seed: int,
        first: Sequence[Params] = (),
        points: Sequence[Params] | None = None,
    ) -> None:
        self._dims = dimensions(space)
        self._forecasts, self._bound, self._seed = forecasts, bound, seed
        self._first, self._local = list(first), points is None
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

    def suggest(self, number: int, evaluations: Sequence[Evaluation]) -> Params | None:
        """The point of evaluation ``number`` (from 0); None where every point is known."""
        if number < len(self._first):
            return self._first[number]
        caution = CAUTION[number % len(CAUTION)]
        limit = self._bound - caution * _text_error(evaluations, self._bound)
        tried = {stand_in_of(e.params) for e in evaluations}
        # Every compensation is evaluated, whatever the forecasts say: a wrong one is corrected.
        pool = [point for point in self.pool if stand_in_of(point) not in tried] or self.pool
        gain = self._gain(pool, evaluations, limit)
        points = pool
        if self._local:
            nearest = [pool[i] for i in np.argsort(-gain, kind="stable")[:_AROUND]]
            dice = np.random.default_rng([self._seed, 6, number])
            points = [*pool, *neighbours(self._dims, nearest, dice)]
            gain = self._gain(points, evaluations, limit)
        best = int(np.argmax(gain))
        return points[best] if np.isfinite(gain[best]) else None

    def closer(self, measured: Sequence[tuple[Params, float]]) -> Params | None:
        """A point that should be faster than the measured ones and still keep the bound.

        On the text of the last measurement the forecasts are off by another factor than on the
        search's: what was measured there tells which, and with it the bound can be approached
        more closely than by the search's own evaluations.

        Args:
            measured: points with the upper bounds of their degradation on that text.

        Returns:
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
            found = feasible_improvement(score, mean, deviation, best=max(kept), limit=self._bound)
            executed = column(forecasts, "experts_per_token").tolist()
            again = zip(map(stand_in_of, points), executed, strict=True)
            found[[one in tried for one in again]] = 0.0
            return found

        nearest = [self.pool[i] for i in np.argsort(-gains(self.pool), kind="stable")[:_AROUND]]
        dice = np.random.default_rng([self._seed, 9, len(measured)])
        points = [*nearest, *neighbours(self._dims, nearest, dice)]
        found = gains(points)
        best = int(np.argmax(found))
        return points[best] if found[best] >= _WORTH else None

    def _gain(
        self, points: Sequence[Params], evaluations: Sequence[Evaluation], limit: float
    ) -> Floats:
        """Expected feasible improvement of each; minus infinity for what is known. (M,)"""
        forecasts = self._forecasts.of(points)
        seen = self._forecasts.of([e.params for e in evaluations])
        mean, deviation = self.predict(points, evaluations)
        score = column(forecasts, "score")
        kept = [
            forecast.score
            for forecast, e in zip(seen, evaluations, strict=True)
            if e.eligible and e.degradation is not None and e.degradation <= limit
        ]
        best = max(kept, default=float(score.min()))
        gain = feasible_improvement(score, mean, deviation, best=best, limit=limit)
        # Where nothing promises a gain: what is likely to keep the limit, the fastest first.
        gain += 1e-6 * feasible_improvement(score, mean, deviation, best=0.0, limit=limit)
        gain -= 1e-9 * np.exp(mean)
        executed, learned = column(forecasts, "experts_per_token"), column(forecasts, "learned_pct")
        stand_ins = np.array([str(stand_in_of(point)) for point in points])
        for one, e in zip(seen, evaluations, strict=True):  # points that decide alike count once
            alike = stand_ins == str(stand_in_of(e.params))
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


def replay_search(
    objective_fn: RichObjective,
    forecaster: Forecaster,
    search_space: SearchSpace = SEARCH_SPACE,
    n_calls: int | None = None,
    verbose: bool = True,
    *,
    seed: int | None = None,
    journal: TrialJournal | str | Path | None = None,
    resume: bool = False,
    enqueue: Sequence[Params] = (),
    points: Sequence[Params] | None = None,
    mode: str | None = None,
    confirm: bool = True,
    settings: dict[str, Any] | None = None,
    on_evaluation: OnEvaluation | None = None,
    should_stop: ShouldStop | None = None,
) -> OptimizationResult:
    """Search with few full evaluations, each chosen from thousands of forecasts.

    It ends early where all points that are left decide as one that is evaluated.

    Args:
        objective_fn: a rich objective, as `create_objective_function` returns; best with its
            `stop_early` set.
        forecaster: forecasts of the same text, see `optimization.replay_forecast`.
        search_space: see `SEARCH_SPACE`.
        n_calls: full evaluations, failed ones included; 10 by default.
        verbose: progress on stderr.
        seed: of the pool; a fresh one by default, recorded in the result.
        journal: file that keeps each finished evaluation.
        resume: go on with the search in `journal`, to `n_calls` evaluations in all, by
            default as many as it was begun with.
        enqueue: points to evaluate first.
        points: choose among these alone, as all points of a grid.
        mode, confirm, settings, on_evaluation, should_stop: see `SearchOptions`.

    Raises:
        UsageError: an argument is not valid, or `journal` holds another search.
    """
    first = check_enqueue(search_space, enqueue)

    def make_suggest(header: SearchHeader) -> Suggest:
        plan = ReplayPlan(
            search_space,
            Forecasts(forecaster),
            bound=objective_fn.max_degradation,
            seed=header.known_seed,
            first=first,
            points=points,
        )
        return plan.suggest

    return run_search(
        objective_fn,
        search_space,
        store=as_store(journal),
        make_suggest=make_suggest,
        total=check_count("n_calls", CALLS if n_calls is None else n_calls),
        seed=check_seed(seed),
        options=SearchOptions(
            method="replay",
            mode=mode,
            confirm=confirm,
            verbose=verbose,
            resume=resume,
            count_given=n_calls is not None,
            settings={"enqueue": first, **(settings or {})},
            on_evaluation=on_evaluation,
            should_stop=should_stop,
        ),
    )
