"""What peers need, by hand, and through a checkpoint."""

from __future__ import annotations

import json

import pytest
import torch

from var_moe.calibration.peers import OutputChange, PeerCalibration, PeerStatistics
from var_moe.errors import UsageError


def test_output_change_by_hand() -> None:
    change = OutputChange()
    # Outputs along one axis each. Full: (3, 1); the first alone, rescaled: (4, 0).
    outputs = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    change.add(0, outputs, torch.tensor([[3.0, 1.0]]))
    # The experts agree: nothing changes.
    change.add(0, torch.ones((1, 2, 2)), torch.tensor([[3.0, 1.0]]))
    change.add(1, torch.rand((2, 2, 2)), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    found = change.sensitivity()
    # The squares 2 (of (1, -1)) and 0 have the mean 1.
    assert found.loss == ((pytest.approx(1.0), 0.0), (0.0, 0.0))
    assert (found.layers, found.top_k) == (2, 2)


def test_three_experts_by_hand() -> None:
    change = OutputChange()
    outputs = torch.tensor([[[4.0], [0.0], [0.0]]])
    change.add(0, outputs, torch.tensor([[2.0, 1.0, 1.0]]))
    # Full 8; the first alone 4 * 4 = 16; the first two 8 * 4 / 3.
    assert change.sensitivity().loss[0] == pytest.approx((8.0, 8 / 3, 0.0))


def test_layers_of_other_text_are_refused() -> None:
    change = OutputChange()
    with pytest.raises(UsageError, match="same tokens in every layer"):
        change.sensitivity()
    change.add(1, torch.rand(3, 2, 4), torch.rand(3, 2))
    with pytest.raises(UsageError, match="same tokens in every layer"):
        change.sensitivity()


def test_a_checkpoint_and_a_file_change_nothing() -> None:
    dice = torch.Generator().manual_seed(0)
    batches = [
        (
            layer,
            torch.rand((5, 4), generator=dice).argsort(dim=1)[:, :2],
            torch.rand((5, 2), generator=dice).sort(dim=1, descending=True).values,
            torch.rand((5, 2, 3), generator=dice),
        )
        for layer in (0, 1, 0, 1)
    ]
    whole, half = PeerStatistics(), PeerStatistics()
    for batch in batches:
        whole.add(*batch)
    for batch in batches[:2]:
        half.add(*batch)
    resumed = PeerStatistics()
    resumed.load_state_dict(half.state_dict())
    for batch in batches[2:]:
        resumed.add(*batch)
    found = whole.calibration()
    assert resumed.calibration() == found
    assert PeerCalibration.from_dict(json.loads(json.dumps(found.to_dict()))) == found
