"""scikit-optimize's Gaussian process as the search's model, on the documented score.

It knows no constraint: the score's penalty stands for it, as the documentation has it. A
new optimizer is told everything before each suggestion, so that a resumed search goes on as
an unbroken one would; `gp_hedge` therefore picks among its acquisitions evenly.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from var_moe.optimization.guided import GuidedPlan, is_repeat
from var_moe.optimization.results import Evaluation
from var_moe.optimization.search import Suggest
from var_moe.optimization.search_space import Choice, Dimension, Params, SearchSpace, dimensions

_MIN_COMPLETE = 2


def skopt_suggest(space: SearchSpace, plan: GuidedPlan) -> Suggest:
    """The source of points of a search by scikit-optimize."""
    dims = dimensions(space)
    free = [d for d in dims if d.free]  # skopt refuses a range of one value

    def suggest(number: int, evaluations: Sequence[Evaluation]) -> Params:
        planned = plan.without_model(number, evaluations)
        if planned is not None:
            return planned
        complete = [e for e in evaluations if not e.failed]
        if not free or len(complete) < _MIN_COMPLETE:
            return plan.instead(number, evaluations)
        values = dict(
            zip((d.name for d in free), _ask(free, complete, plan.seed_for(number)), strict=True)
        )
        point = {d.name: values.get(d.name, d.default) for d in dims}
        return plan.instead(number, evaluations) if is_repeat(point, evaluations) else point

    return suggest


def _ask(free: list[Dimension | Choice], complete: list[Evaluation], seed: int) -> list[Any]:
    from skopt import Optimizer
    from skopt.space import Categorical, Integer, Real

    def range_of(d: Dimension | Choice) -> Any:
        if isinstance(d, Choice):
            return Categorical(d.choices)
        kind = Integer if d.integer else Real
        return kind(d.low, d.high, prior="log-uniform" if d.log else "uniform")

    ranges = [range_of(d) for d in free]
    optimizer = Optimizer(
        ranges, base_estimator="GP", n_initial_points=0, acq_func="gp_hedge", random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own notes on repeats, which are handled here
        optimizer.tell(
            [[e.params[d.name] for d in free] for e in complete],
            [-(e.score or 0.0) for e in complete],  # skopt minimises
        )
        point = optimizer.ask()
    return [d.clip(value) for d, value in zip(free, point, strict=True)]
