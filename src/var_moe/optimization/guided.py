"""What model-guided searches share: where they start, and when they draw at random instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from var_moe.optimization.results import Evaluation
from var_moe.optimization.search_space import (
    Params,
    SearchSpace,
    check_count,
    check_point,
    distinct,
    fresh_sample,
    point_key,
    starting_points,
)

STARTUP_SHARE = 4
STARTUP_RANGE = (5, 10)


class GuidedPlan:
    """The points of a guided search that its model does not choose.

    First the default configuration, the presets and the caller's own points, then random
    ones, up to `n_startup` in all (by default a quarter of the evaluations, 5 to 10; never
    fewer than the given points). Later a random point stands in after a failed evaluation
    and for a point already evaluated: a failure tells the model nothing, so that it would
    ask for nearly the same again, and a repeat would tell it little.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        total: int,
        enqueue: Sequence[Mapping[str, Any]] = (),
        n_startup: int | None = None,
    ) -> None:
        self._space = space
        self._seed = seed
        if n_startup is None:
            low, high = STARTUP_RANGE
            n_startup = min(high, max(low, total // STARTUP_SHARE))
        points = distinct([*starting_points(space), *check_enqueue(space, enqueue)])
        while len(points) < n_startup:
            points.append(self._fresh(len(points), points))
        self.start = points

    def without_model(self, number: int, evaluations: Sequence[Evaluation]) -> Params | None:
        """The point of evaluation `number` (from 0) where the model is not asked, else None."""
        if number < len(self.start):
            return self.start[number]
        if evaluations and evaluations[-1].failed:
            return self.instead(number, evaluations)
        return None

    def instead(self, number: int, evaluations: Sequence[Evaluation]) -> Params:
        """The random point that stands in for the model's evaluation `number`."""
        return self._fresh(number, [e.params for e in evaluations])

    def seed_for(self, number: int) -> int:
        """The model's seed for evaluation `number`: a resumed search goes on as an unbroken one
        would, since each suggestion depends on the finished evaluations and this alone."""
        return int(np.random.SeedSequence([self._seed, number]).generate_state(1)[0])

    def _fresh(self, number: int, seen: Sequence[Params]) -> Params:
        return fresh_sample(self._space, self._seed, number, seen)


def is_repeat(params: Params, evaluations: Sequence[Evaluation]) -> bool:
    """Whether exactly this point was evaluated before."""
    key = point_key(params)
    return any(point_key(e.params) == key for e in evaluations)


def check_enqueue(space: SearchSpace, points: Sequence[Mapping[str, Any]]) -> list[Params]:
    """The caller's own first points, checked against the space."""
    return [
        check_point(space, point, what=f"enqueue[{place}]") for place, point in enumerate(points)
    ]


def check_startup(n_startup: int | None) -> int | None:
    """`n_startup` as None or at least 1, or UsageError."""
    return check_count("n_startup", n_startup)
