"""Quantiles of w_j / w_1: read off, saved, and refused where they are impossible."""

from __future__ import annotations

import json
from typing import Any

import pytest

from var_moe.errors import UsageError
from var_moe.routing.naee import RatioQuantiles


def test_between_two_levels_a_straight_line() -> None:
    found = RatioQuantiles(top_k=2, tokens=1, quantiles=((0.0, 0.5, 1.0), (0.25, 0.25, 0.75)))
    assert found.at(0.25) == (0.25, 0.25)
    assert found.at(0.75) == (0.75, 0.5)


def test_saved_and_read_again() -> None:
    known = RatioQuantiles(top_k=2, tokens=7, quantiles=((0.0, 0.25, 1.0), (0.0, 0.5, 1.0)))
    assert RatioQuantiles.from_dict(json.loads(json.dumps(known.to_dict()))) == known


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 0}, r"RatioQuantiles\.top_k = 0: expected an integer in \[1"),
        ({"tokens": 0}, r"RatioQuantiles\.tokens = 0"),
        ({"quantiles": ()}, r"expected a row for each layer"),
        ({"quantiles": ((0.5,),)}, r"quantiles\[0\] = \(0\.5,\): expected at least 2"),
        ({"quantiles": ((0, 1), (0, 1.5))}, r"quantiles\[1\] = 1\.5: .* in \[0, 1\]"),
        ({"quantiles": ((0, 0.5, 0.4),)}, r"quantiles\[0\]: expected .* not decrease"),
        ({"tocens": 1}, r"'tocens' is missing or unknown"),
    ],
)
def test_impossible_quantiles_are_refused(change: dict[str, Any], message: str) -> None:
    good = {"top_k": 2, "tokens": 5, "quantiles": ((0, 1), (0, 1))}
    assert RatioQuantiles.from_dict(good).layers == 2
    with pytest.raises(UsageError, match=message):
        RatioQuantiles.from_dict({**good, **change})
