"""Running sums of a profile against the same figures computed at once or by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from var_moe.calibration import statistics
from var_moe.calibration.statistics import (
    RATIO_BINS,
    OutputChange,
    RatioHistogram,
    ResidualSums,
    RoutingStatistics,
)
from var_moe.tracing.all_pairs import LayerDecisions


def decided(weight, *, index=None, outputs=None, layer=0, ids=None, entropy=None):
    """One layer's decisions of T tokens, whose slots stand by rank."""
    weight = torch.as_tensor(weight)
    shape = weight.shape
    return LayerDecisions(
        layer=layer,
        module=torch.nn.Identity(),
        hidden=torch.zeros((len(weight), 1)),
        outputs=torch.zeros((*shape, 1)) if outputs is None else outputs,
        at=torch.arange(len(weight)),
        ids=torch.zeros(len(weight), dtype=torch.int64) if ids is None else torch.tensor(ids),
        rank=torch.arange(shape[1]).expand(shape),
        index=torch.zeros(shape, dtype=torch.int64) if index is None else torch.tensor(index),
        weight=weight,
        entropy=torch.zeros(len(weight)) if entropy is None else torch.tensor(entropy),
    )


def stream(parts, *, experts=4):
    """The statistics of (ids, entropy, index, mass) parts."""
    ids = np.concatenate([part[0] for part in parts])
    found = RoutingStatistics(ids, layers=1, experts=experts)
    for tokens, entropy, index, mass in parts:
        found.add(decided(mass, ids=tokens, entropy=entropy, index=index))
    return found


def test_batches_merge_to_the_figures_of_the_whole():
    rng = np.random.default_rng(4)
    parts = []
    for _ in range(6):
        size = int(rng.integers(1, 900))
        index = np.argsort(rng.random((size, 4)), axis=1)[:, :2]
        first = rng.uniform(0.5, 1, size)
        mass = np.stack((first, 1 - first), 1)
        ids = rng.integers(0, 700, size).tolist()
        parts.append((ids, rng.uniform(0, 1.4, size), index, mass))
    found = stream(parts)
    ids = np.concatenate([part[0] for part in parts])
    entropy, index, mass = (np.concatenate([part[i] for part in parts]) for i in range(1, 4))
    confidence = mass[:, 0]
    assert found.tokens == len(ids)
    assert found.token_ids.tolist() == sorted(set(ids.tolist()))
    for row, token in enumerate(found.token_ids):
        mine = ids == token
        sums = {name: value[0, row] for name, value in found.sums.items()}
        assert sums["count"] == mine.sum()
        assert sums["entropy_mean"] == pytest.approx(entropy[mine].mean())
        deviation = (sums["entropy_m2"] / mine.sum()).sqrt()
        assert deviation == pytest.approx(entropy[mine].std(), abs=1e-9)
        assert sums["min_entropy"] == pytest.approx(entropy[mine].min())
        assert sums["max_entropy"] == pytest.approx(entropy[mine].max())
        assert sums["confidence_mean"] == pytest.approx(confidence[mine].mean())
        firsts = np.bincount(index[mine][:, 0], minlength=4)
        assert sums["first"].tolist() == firsts.tolist()
        by_hand = np.zeros(4)
        np.add.at(by_hand, index[mine].ravel(), mass[mine].ravel())
        assert sums["mass"].numpy() == pytest.approx(by_hand)


def test_by_hand():
    found = stream([([7, 7, 3], [0.2, 0.4, 1.0], [[1, 0], [1, 2], [3, 0]], [[0.9, 0.1]] * 3)])
    sums = {name: value[0, found.token_ids.tolist().index(7)] for name, value in found.sums.items()}
    assert sums["count"] == 2
    assert sums["entropy_mean"] == pytest.approx(0.3)
    assert sums["entropy_m2"] == pytest.approx(0.02)
    assert sums["first"].tolist() == [0, 2, 0, 0]
    assert sums["mass"].tolist() == pytest.approx([0.1, 1.8, 0.1, 0])


def test_a_constant_difference_is_recovered(monkeypatch):
    monkeypatch.setattr(statistics, "SHRINK_TOKENS", 0.0)
    fit = ResidualSums(layers=1, experts=3, top_k=2, hidden=2)
    outputs = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]] * 4)  # f_first, f_dropped
    weight = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    fit.add(decided(weight, outputs=outputs, index=[[2, 1]] * 4))
    means = fit.means()
    # full - kept = w2 f_dropped, so per unit of dropped weight: (3, 4).
    assert means.by_pair
    assert means.table[0][2 * 3 + 1].tolist() == pytest.approx([3.0, 4.0])
    assert means.table[0][-1].tolist() == [0.0, 0.0]
    assert means.table[0].shape == (10, 2)
    rows = means.row(torch.tensor([2, 2]), torch.tensor([1, 1]), torch.tensor([True, False]))
    assert rows.tolist() == [7, 9]


def test_unnormalised_weights():
    """Weights that do not sum to one: only what is dropped counts."""
    fit = ResidualSums(layers=1, experts=2, top_k=2, hidden=1)
    outputs, weight = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1.5, 0.5]])
    fit.add(decided(weight, outputs=outputs, index=[[0, 1]]))
    # full = 1.5 + 1.0 = 2.5; kept = 1.5 * 1 = 1.5; difference 1.0, dropped weight 0.5
    assert fit.sums["residual_moment"][0, 1, 0] == pytest.approx(0.5)
    assert fit.sums["residual_square"][0, 1] == pytest.approx(0.25)


def test_little_evidence_is_shrunk_to_zero():
    fit = ResidualSums(layers=1, experts=2, top_k=2, hidden=1)
    outputs, weight = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0.5, 0.5]])
    fit.add(decided(weight, outputs=outputs, index=[[0, 1]]))
    vector = float(fit.means().table[0][1])
    assert 0 < vector < 0.1  # one token against twenty


def test_top_8_is_keyed_by_the_first_expert():
    fit = ResidualSums(layers=2, experts=16, top_k=8, hidden=4)
    assert not fit.by_pair
    assert fit.means().table[1].shape == (17, 4)


def test_several_dropped_experts_count_together():
    fit = ResidualSums(layers=1, experts=4, top_k=3, hidden=1)
    outputs, weight = torch.tensor([[[1.0], [5.0], [2.0]]]), torch.tensor([[0.5, 0.3, 0.2]])
    fit.add(decided(weight, outputs=outputs, index=[[3, 0, 1]]))
    # dropped: 0.2 of the third alone
    assert fit.sums["residual_moment"][0, 3, 0] == pytest.approx(0.2 * 0.4)
    assert fit.sums["residual_square"][0, 3] == pytest.approx(0.04)


def test_output_change_by_hand():
    change = OutputChange(layers=2, top_k=2)
    # Outputs along one axis each. Full: (3, 1); the first alone, rescaled: (4, 0).
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    change.add(decided([[3.0, 1.0]], outputs=outputs))
    # The experts agree: nothing changes.
    change.add(decided([[3.0, 1.0]], outputs=torch.ones((1, 2, 2))))
    change.add(decided([[1.0, 0.0], [0.0, 0.0]], outputs=torch.rand((2, 2, 2)), layer=1))
    found = change.sensitivity(2)
    # The squares 2 (of (1, -1)) and 0 have the mean 1.
    assert found.loss == ((pytest.approx(1.0), 0.0), (0.0, 0.0))
    assert (found.layers, found.top_k) == (2, 2)


def test_three_experts_by_hand():
    change = OutputChange(layers=1, top_k=3)
    outputs = torch.tensor([[[4.0], [0.0], [0.0]]])
    change.add(decided([[2.0, 1.0, 1.0]], outputs=outputs))
    # Full 8; the first alone 4 * 4 = 16; the first two 8 * 4 / 3.
    assert change.sensitivity(1).loss[0] == pytest.approx((8.0, 8 / 3, 0.0))


def counted(*layers):
    """Quantiles of the weights (T, K) of each layer."""
    weights = [torch.as_tensor(rows).sort(dim=1, descending=True).values for rows in layers]
    histogram = RatioHistogram(layers=len(layers), top_k=weights[0].shape[1])
    for layer, weight in enumerate(weights):
        for part in weight.split(301):
            histogram.add(decided(part, layer=layer))
    return histogram.quantiles(len(weights[0]))


def near(value):
    return pytest.approx(value, abs=4 / RATIO_BINS)


def test_the_median_of_each_layer():
    # Ratios 1/4, 1/2, 3/4 in any slot order and scale; 1/8, 1/4, 1/2 in the second layer.
    found = counted(
        [[0.8, 0.2], [1.0, 2.0], [4.0, 3.0]],
        [[0.1, 0.8], [0.5, 2.0], [6.0, 3.0]],
    )
    assert found.at(0.5) == (near(0.5), near(0.25))
    assert (found.layers, found.top_k, found.tokens) == (2, 2, 3)


def test_experts_after_the_first_are_pooled():
    # Ratios 1/4 and 1/2 of the first token, 3/4 and 1 of the second.
    found = counted([[4.0, 1.0, 2.0], [3.0, 4.0, 4.0]])
    assert [found.at(q)[0] for q in (0.25, 0.5, 0.75)] == [near(0.25), near(0.5), near(0.75)]


def test_the_ends_are_nothing_and_everything():
    found = counted([[4.0, 2.0], [4.0, 3.0]])
    assert found.at(0.0) == (0.0,)
    assert found.at(1.0) == (1.0,)


def test_random_weights_agree_with_sorting_them_all():
    dice = torch.Generator().manual_seed(1)
    weights = [w ** (layer + 1) for layer, w in enumerate(torch.rand((3, 2000, 4), generator=dice))]
    found = counted(*weights)
    levels = torch.tensor([0.01, 0.1, 0.333, 0.5, 0.777, 0.99])
    for layer, weight in enumerate(weights):
        ratio = weight / weight.amax(dim=1, keepdim=True)
        later = ratio.sort(dim=1).values[:, :-1].reshape(-1)
        expected = torch.quantile(later, levels).tolist()
        actual = [found.at(level)[layer] for level in levels.tolist()]
        assert actual == pytest.approx(expected, abs=2e-3)


def test_weights_of_zero_tie_with_the_first():
    assert counted([[0.0, 0.0]]).at(0.5) == (near(1.0),)


def test_one_expert_per_token_has_no_ratios():
    assert counted([[0.7], [0.3]]).top_k == 1
