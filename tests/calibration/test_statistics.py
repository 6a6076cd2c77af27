"""Streaming statistics against the same figures computed at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from var_moe.calibration.statistics import RoutingStatistics


def stream(parts, *, experts=4, state_after=None):
    """Feed (ids, entropy, confidence, index, mass) parts; optionally save and reload between."""
    statistics = RoutingStatistics(layers=1, experts=experts)
    for number, (ids, entropy, confidence, index, mass) in enumerate(parts):
        rows = statistics.rows(torch.tensor(ids))
        statistics.add(
            0,
            rows,
            entropy=torch.tensor(entropy),
            confidence=torch.tensor(confidence),
            index=torch.tensor(index),
            mass=torch.tensor(mass),
        )
        statistics.tokens += len(ids)
        if number == state_after:
            fresh = RoutingStatistics(layers=1, experts=experts)
            fresh.load_state_dict({k: v.clone() for k, v in statistics.state_dict().items()})
            statistics = fresh
    return statistics


@pytest.mark.parametrize("state_after", [None, 0, 3])
def test_batches_merge_to_the_figures_of_the_whole(state_after):
    rng = np.random.default_rng(4)
    parts = []
    for _ in range(6):
        size = int(rng.integers(1, 900))
        index = np.argsort(rng.random((size, 4)), axis=1)[:, :2]
        first = rng.uniform(0.5, 1, size)
        mass = np.stack((first, 1 - first), 1)
        ids = rng.integers(0, 700, size).tolist()
        parts.append((ids, rng.uniform(0, 1.4, size), first, index, mass))
    statistics = stream(parts, state_after=state_after)
    ids = np.concatenate([part[0] for part in parts])
    entropy, confidence, index, mass = (
        np.concatenate([part[i] for part in parts]) for i in range(1, 5)
    )
    assert statistics.tokens == len(ids)
    assert sorted(statistics.token_ids) == sorted(set(ids.tolist()))
    for row, token in enumerate(statistics.token_ids):
        mine = ids == token
        count = mine.sum()
        assert statistics.count[0, row] == count
        assert statistics.entropy.mean[0, row] == pytest.approx(entropy[mine].mean())
        deviation = (statistics.entropy.m2[0, row] / count).sqrt()
        assert deviation == pytest.approx(entropy[mine].std(), abs=1e-9)
        assert statistics.min_entropy[0, row] == pytest.approx(entropy[mine].min())
        assert statistics.max_entropy[0, row] == pytest.approx(entropy[mine].max())
        assert statistics.confidence.mean[0, row] == pytest.approx(confidence[mine].mean())
        firsts = np.bincount(index[mine][:, 0], minlength=4)
        assert statistics.first[0, row].tolist() == firsts.tolist()
        by_hand = np.zeros(4)
        np.add.at(by_hand, index[mine].ravel(), mass[mine].ravel())
        assert statistics.mass[0, row].numpy() == pytest.approx(by_hand)


def test_by_hand():
    statistics = stream(
        [([7, 7, 3], [0.2, 0.4, 1.0], [0.9, 0.7, 0.6], [[1, 0], [1, 2], [3, 0]], [[0.9, 0.1]] * 3)]
    )
    row = statistics.token_ids.index(7)
    assert statistics.count[0, row] == 2
    assert statistics.entropy.mean[0, row] == pytest.approx(0.3)
    assert statistics.entropy.m2[0, row] == pytest.approx(0.02)
    assert statistics.first[0, row].tolist() == [0, 2, 0, 0]
    assert statistics.mass[0, row].tolist() == pytest.approx([0.1, 1.8, 0.1, 0])
