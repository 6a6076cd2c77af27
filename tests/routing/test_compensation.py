"""What stands in for dropped experts, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from damages import compensation_of
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.compensation import (
    Compensation,
    LayerCompensation,
    ResidualMeans,
    first_expert,
)
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.registry import policy_names, policy_spec
from var_moe.routing.simple import NativePolicy
from var_moe.routing.var import RoutingTable, VARPolicy

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PAIRS = torch.tensor([[1.0, 0.0], [2.0, -4.0], [0.0, 8.0], [16.0, 1.0], [0.0, 0.0]])  # E = 2
SINGLES = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 4.0], [8.0, 0.0], [0.0, 0.0]])  # E = 4


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def test_the_first_expert_is_the_heaviest_of_equals_the_lower_id() -> None:
    index = torch.tensor([[0, 1, 2], [1, 0, 2], [2, 1, 0]])
    weight = torch.tensor([[0.25, 0.75, 0.5], [0.5, 0.5, 0.25], [0.125, 0.25, 0.25]])
    assert first_expert(index, weight).tolist() == [1, 0, 0]


@DTYPES
def test_vectors_by_pair(dtype: torch.dtype) -> None:
    """K = 2: by first and dropped expert, in whichever slot each is."""
    part = Compensation(layers=(LayerCompensation(PAIRS),), by_pair=True, experts=2)
    index = torch.tensor([[0, 1], [0, 1], [0, 1]])
    weight = torch.tensor([[0.75, 0.25], [0.25, 0.5], [0.5, 0.25]], dtype=dtype)
    kept = torch.tensor([[True, False], [False, True], [True, True]])
    rows, dropped = part.dropped(index, weight, kept)
    out = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.3, 0.7]], dtype=dtype)
    layer = part.layers[0].to(torch.device("cpu"), dtype)
    found = layer.add(out, torch.full_like(out, torch.nan), rows, dropped)
    # (0, 1) with 0.25 of (2, -4); (1, 0) with 0.25 of (0, 8).
    assert found[:2].tolist() == [[1.5, 0.0], [1.0, 3.0]]
    assert found.dtype == dtype
    assert torch.equal(found[2], out[2])


@DTYPES
def test_vectors_by_dropped_expert(dtype: torch.dtype) -> None:
    """K = 3: one and two dropped."""
    part = Compensation(layers=(LayerCompensation(SINGLES.to(dtype)),), by_pair=False, experts=4)
    index = torch.tensor([[3, 1, 2], [0, 2, 3]])
    weight = torch.tensor([[0.5, 0.25, 0.125], [0.25, 0.5, 1.0]], dtype=dtype)
    kept = torch.tensor([[True, False, False], [False, True, True]])
    rows, dropped = part.dropped(index, weight, kept)
    nothing = torch.zeros((2, 2), dtype=dtype)
    found = part.layers[0].add(nothing, nothing, rows, dropped)
    # 0.25 (0, 2) + 0.125 (4, 4); 0.25 (1, 0).
    assert found.tolist() == [[0.5, 1.0], [0.25, 0.0]]


@pytest.mark.parametrize(
    ("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=str
)
def test_the_map_by_hand(dtype: torch.dtype, close: float) -> None:
    """Rank 2: B silu(A h + a) for each unit of dropped weight, whoever is dropped."""
    layer = LayerCompensation(
        SINGLES,
        down=torch.tensor([[1.0, 0.0], [1.0, 1.0]]),
        bias=torch.tensor([0.0, -1.0]),
        up=torch.tensor([[1.0, 0.0], [2.0, 3.0]]),
    ).to(torch.device("cpu"), dtype)
    hidden = torch.tensor([[2.0, -2.0]], dtype=dtype)
    weight = torch.tensor([[0.0, 0.25, 0.5]], dtype=dtype)
    out = layer.add(torch.ones((1, 2), dtype=dtype), hidden, torch.tensor([[3, 1, 2]]), weight)
    one, two = silu(2.0), silu(-1.0)
    expected = [1 + 0.75 * one + 0.5 * 4, 1 + 0.75 * (2 * one + 3 * two) + 0.25 * 2 + 0.5 * 4]
    assert out.tolist()[0] == pytest.approx(expected, rel=close)
    correction = layer.correction(hidden)
    assert correction is not None
    assert correction.tolist()[0] == pytest.approx([one, 2 * one + 3 * two], rel=close)


@DTYPES
@pytest.mark.parametrize("rank", [0, 3])
def test_where_nothing_is_dropped_nothing_changes(dtype: torch.dtype, rank: int) -> None:
    whole = compensation_of(layers=1, experts=4, hidden=5, top_k=3, rank=rank)
    part = whole.layers[0].to(torch.device("cpu"), dtype)
    rng = torch.Generator().manual_seed(0)
    out, hidden = (torch.randn((20, 5), generator=rng).to(dtype) for _ in range(2))
    row = torch.randint(0, 4, (20, 3), generator=rng)
    found = part.add(out, hidden, row, torch.zeros((20, 3), dtype=dtype))
    assert torch.equal(found, out)


def test_residual_means_per_pair_are_rank_zero() -> None:
    found = Compensation.of_residual_means(ResidualMeans((PAIRS, PAIRS), by_pair=True, experts=2))
    assert (found.rank, found.by_pair, found.experts, len(found.layers)) == (0, True, 2, 2)
    assert found.layers[0].correction(torch.ones((1, 2))) is None
    with pytest.raises(UsageError, match="per first expert are no compensation"):
        Compensation.of_residual_means(ResidualMeans((PAIRS,), by_pair=False, experts=4))


def test_another_models_is_refused() -> None:
    found = compensation_of(layers=2, experts=4, hidden=5, top_k=2)
    found.check(layers=2, experts=4, hidden=5)
    for other in ((3, 4, 5), (2, 3, 5), (2, 4, 6)):
        with pytest.raises(UsageError, match=r"\(2, 4, 5\) does not fit a model of \(") as caught:
            found.check(layers=other[0], experts=other[1], hidden=other[2])
        assert str(other) in str(caught.value)


def test_hash_tells_compensations_apart() -> None:
    def made(**more: int) -> str:
        return compensation_of(layers=2, experts=4, hidden=5, top_k=2, **more).hash

    assert made() == made()
    assert len({made(), made(seed=1), made(rank=2), made(rank=2, seed=1)}) == 4


def test_policies_that_run_other_experts_than_the_routers_take_none() -> None:
    compensation = Compensation.empty(layers=1, experts=4, hidden=2)
    nothing = torch.zeros((1, 1))
    table = RoutingTable(
        count=nothing, entropy=nothing, index=nothing[..., None].long(), weight=nothing[..., None]
    )
    plain = VARPolicy(VARConfig(mode="plain"), table)
    with pytest.raises(UsageError, match=r"VARPolicy runs experts .* mode='verified'"):
        plain.compensated(compensation)
    assert plain.compensation is None
    assert plain.compensated(None) is plain
    verified = VARPolicy(VARConfig(mode="verified", residuals=False), table)
    for policy in (verified, NativePolicy()):
        assert policy.compensated(compensation).compensation is compensation


def test_the_damage_policy_is_one_of_the_registered() -> None:
    assert "damage" in policy_names()
    spec = policy_spec("damage")
    assert (spec.load(), spec.needs, spec.replayable) == (DamagePolicy, ("damage",), True)
    with pytest.raises(UsageError, match=r"policy 'damage' needs 'damage': .*var-moe profile"):
        spec.make({"tau": 0.1}, {"damage": None})
