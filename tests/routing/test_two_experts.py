"""The short ways for K = 2 decide and weigh exactly as the general ones."""

from __future__ import annotations

import pytest
import torch

from damages import damage_model
from var_moe.routing.compensation import Compensation, LayerCompensation, first_expert
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.decision import ForwardContext
from var_moe.routing.keeping import kept_pairs, rank_slots, shares

TOKENS, EXPERTS, HIDDEN, VOCABULARY = 200, 8, 16, 50


def choices(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Router decisions in any slot order, with zero weights and ties among them."""
    rng = torch.Generator().manual_seed(seed)
    index = torch.rand((TOKENS, EXPERTS), generator=rng).argsort(dim=1)[:, :2]
    weight = torch.rand((TOKENS, 2), generator=rng).to(dtype)
    weight[:5] = 0
    weight[5:9] = 0.5
    return index, weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_a_decision_is_that_of_the_formula(seed: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=rng)
    hidden = torch.randn((TOKENS, HIDDEN), generator=rng)
    index, weight = choices(seed, dtype)
    damage = damage_model(
        layers=2, experts=EXPERTS, top_k=2, vocabulary=VOCABULARY, hidden=HIDDEN, seed=seed
    )
    policy = DamagePolicy(10 ** (seed - 4), damage=damage)
    policy.see(1, hidden)
    found = policy.route(ForwardContext.of(ids), 1, index, weight)

    part = damage.layer(1, index.device)
    rank = rank_slots(index, weight)
    log_damage = part.log_damage(
        index.gather(1, rank), shares(weight.gather(1, rank).float()), ids[0], part.hint(hidden)
    )
    runs = torch.cat((torch.ones((TOKENS, 1)), log_damage.exp() >= policy.tau), dim=1).bool()
    wanted = kept_pairs(index, weight, torch.empty_like(runs).scatter_(1, rank, runs))
    assert 0 < int((wanted.index < 0).sum()) < TOKENS
    assert torch.equal(found.index, wanted.index)
    executed = found.index >= 0
    assert torch.equal(found.weight[executed], wanted.weight[executed])


@pytest.mark.parametrize("by_pair", [True, False])
def test_what_is_dropped_of_two_is_that_of_any_k(by_pair: bool) -> None:
    rng = torch.Generator().manual_seed(3)
    rows = EXPERTS**2 if by_pair else EXPERTS
    part = LayerCompensation(
        torch.randn((rows + 1, HIDDEN), generator=rng),
        torch.randn((4, HIDDEN), generator=rng),
        torch.randn(4, generator=rng),
        torch.randn((HIDDEN, 4), generator=rng),
    )
    compensation = Compensation(layers=(part,), by_pair=by_pair, experts=EXPERTS)
    index, weight = choices(1, torch.float32)
    rank = rank_slots(index, weight)
    kept = torch.rand(TOKENS, generator=rng)[:, None] < 0.5
    kept = kept | torch.zeros_like(index, dtype=torch.bool).scatter(1, rank[:, :1], True)
    out = torch.randn((TOKENS, HIDDEN), generator=rng)
    hidden = torch.randn((TOKENS, HIDDEN), generator=rng)
    rows = compensation.rows(index, first_expert(index, weight))
    wanted = part.add(out, hidden, rows, weight.masked_fill(kept, 0))
    found = part.add(out, hidden, *compensation.dropped(index, weight, kept))
    torch.testing.assert_close(found, wanted)
    whole = kept.all(dim=1)
    assert torch.equal(found[whole], out[whole])
