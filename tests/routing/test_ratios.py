"""Quantiles of w_j / w_1 from streaming counts, against answers computed by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.ratios import BINS, RatioHistogram, RatioQuantiles, calibrate_ratios


def counted(*layers: list[list[float]]) -> RatioQuantiles:
    return calibrate_ratios(
        (layer, torch.zeros(len(rows), len(rows[0])).long(), torch.tensor(rows))
        for layer, rows in enumerate(layers)
    )


def near(value: float) -> Any:
    return pytest.approx(value, abs=4 / BINS)


def test_the_median_of_each_layer() -> None:
    # Ratios 1/4, 1/2, 3/4 in any slot order and scale; 1/8, 1/4, 1/2 in the second layer.
    found = counted(
        [[0.8, 0.2], [1.0, 2.0], [4.0, 3.0]],
        [[0.1, 0.8], [0.5, 2.0], [6.0, 3.0]],
    )
    assert found.at(0.5) == (near(0.5), near(0.25))
    assert (found.layers, found.top_k, found.tokens) == (2, 2, 3)


def test_experts_after_the_first_are_pooled() -> None:
    # Ratios 1/4 and 1/2 of the first token, 3/4 and 1 of the second.
    found = counted([[4.0, 1.0, 2.0], [3.0, 4.0, 4.0]])
    assert [found.at(q)[0] for q in (0.25, 0.5, 0.75)] == [near(0.25), near(0.5), near(0.75)]


def test_the_ends_are_nothing_and_everything() -> None:
    found = counted([[4.0, 2.0], [4.0, 3.0]])
    assert found.at(0.0) == (0.0,)
    assert found.at(1.0) == (1.0,)


def test_between_two_levels_a_straight_line() -> None:
    found = RatioQuantiles(top_k=2, tokens=1, quantiles=((0.0, 0.5, 1.0), (0.25, 0.25, 0.75)))
    assert found.at(0.25) == (0.25, 0.25)
    assert found.at(0.75) == (0.75, 0.5)


def random_batches() -> list[tuple[int, Tensor, Tensor]]:
    dice = torch.Generator().manual_seed(1)
    weight = torch.rand((3, 2000, 4), generator=dice)
    index = torch.zeros(2000, 4).long()
    return [(layer, index, weight[layer] ** (layer + 1)) for layer in range(3)]


def test_random_weights_agree_with_sorting_them_all() -> None:
    found = calibrate_ratios(random_batches())
    levels = torch.tensor([0.01, 0.1, 0.333, 0.5, 0.777, 0.99])
    for layer, _, weight in random_batches():
        ratio = weight / weight.amax(dim=1, keepdim=True)
        later = ratio.sort(dim=1).values[:, :-1].reshape(-1)
        expected = torch.quantile(later, levels).tolist()
        actual = [found.at(level)[layer] for level in levels.tolist()]
        assert actual == pytest.approx(expected, abs=2e-3)


def test_pieces_in_any_order_count_as_the_whole() -> None:
    pieces = [
        (layer, index[part], weight[part])
        for layer, index, weight in random_batches()
        for part in torch.arange(2000).split(301)
    ]
    assert calibrate_ratios(reversed(pieces)) == calibrate_ratios(random_batches())


def test_weights_of_zero_tie_with_the_first() -> None:
    assert counted([[0.0, 0.0]]).at(0.5) == (near(1.0),)


def test_one_expert_per_token_has_no_ratios() -> None:
    assert counted([[0.7], [0.3]]).top_k == 1


def test_saved_and_read_again() -> None:
    found = calibrate_ratios(random_batches())
    assert RatioQuantiles.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_layers_of_other_text_are_refused() -> None:
    histogram = RatioHistogram()
    with pytest.raises(UsageError, match="same tokens in every layer"):
        histogram.quantiles()
    histogram.add(0, torch.zeros(3, 2).long(), torch.rand(3, 2))
    histogram.add(2, torch.zeros(3, 2).long(), torch.rand(3, 2))
    with pytest.raises(UsageError, match="same tokens in every layer"):
        histogram.quantiles()
    histogram.add(1, torch.zeros(2, 2).long(), torch.rand(2, 2))
    with pytest.raises(UsageError, match=r"got \{0: 3, 2: 3, 1: 2\}"):
        histogram.quantiles()
    with pytest.raises(UsageError, match="K = 4, before it was 2"):
        histogram.add(0, torch.zeros(3, 4).long(), torch.rand(3, 4))


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
