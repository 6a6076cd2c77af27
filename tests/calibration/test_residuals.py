"""Residual means against the least-squares answer computed by hand."""

from __future__ import annotations

import pytest
import torch

from var_moe.calibration import residuals as module
from var_moe.calibration.residuals import ResidualFit


def test_a_constant_difference_is_recovered(monkeypatch):
    monkeypatch.setattr(module, "SHRINK_TOKENS", 0.0)
    fit = ResidualFit(layers=1, experts=3, top_k=2, hidden_size=2)
    outputs = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]] * 4)  # f_first, f_dropped
    weight = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    index = torch.tensor([[2, 1]] * 4)
    fit.add(0, outputs=outputs, weight=weight, index=index, lead=1)
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
    fit = ResidualFit(layers=1, experts=2, top_k=2, hidden_size=1)
    outputs, weight = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1.5, 0.5]])
    fit.add(0, outputs=outputs, weight=weight, index=torch.tensor([[0, 1]]), lead=1)
    # full = 1.5 + 1.0 = 2.5; kept = 1.5 * 1 = 1.5; difference 1.0, dropped weight 0.5
    assert fit.moment[0, 1, 0] == pytest.approx(0.5)
    assert fit.square[0, 1] == pytest.approx(0.25)


def test_little_evidence_is_shrunk_to_zero():
    fit = ResidualFit(layers=1, experts=2, top_k=2, hidden_size=1)
    outputs, weight = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[0.5, 0.5]])
    fit.add(0, outputs=outputs, weight=weight, index=torch.tensor([[0, 1]]), lead=1)
    vector = float(fit.means().table[0][1])
    assert 0 < vector < 0.1  # one token against twenty


def test_top_8_is_keyed_by_the_first_expert():
    fit = ResidualFit(layers=2, experts=16, top_k=8, hidden_size=4)
    assert not fit.by_pair
    assert fit.means().table[1].shape == (17, 4)


def test_several_dropped_experts_count_together():
    fit = ResidualFit(layers=1, experts=4, top_k=3, hidden_size=1)
    outputs, weight = torch.tensor([[[1.0], [5.0], [2.0]]]), torch.tensor([[0.5, 0.3, 0.2]])
    fit.add(0, outputs=outputs, weight=weight, index=torch.tensor([[3, 0, 1]]), lead=2)
    # dropped: 0.2 of the third alone
    assert fit.moment[0, 3, 0] == pytest.approx(0.2 * 0.4)
    assert fit.square[0, 3] == pytest.approx(0.04)
