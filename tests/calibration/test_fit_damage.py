"""Fitting predicted damages: planted log-linear damages are found again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from damages import compensation_of, damage_model
from var_moe.calibration.fit_damage import fit_damage, predicted, tau_for
from var_moe.errors import UsageError
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.decision import ForwardContext
from var_moe.tracing.trace import RoutingTrace

LAYERS, EXPERTS, VOCABULARY, HIDDEN = 2, 6, 40, 12


def planted(*, top_k, hidden=0, tokens=20_000, seed=0, kind="cut", compensation=None):
    """A trace whose damages are those of a known model, and the logarithm of their expectation.

    Each is the square root of twice a scaled chi-squared variable of one degree, either sign.
    """
    dice = torch.Generator().manual_seed(seed)
    truth = damage_model(
        layers=LAYERS,
        experts=EXPERTS,
        top_k=top_k,
        vocabulary=VOCABULARY,
        hidden=hidden,
        seed=seed,
    )
    truth = replace(truth, token=truth.token / 2, pair=truth.pair / 2, first=truth.first / 2)
    truth = replace(truth, base=truth.base - 3, inner=truth.inner / (4 * max(hidden, 1) ** 0.5))
    scores = torch.rand((LAYERS, tokens, EXPERTS), generator=dice)
    weight = torch.rand((LAYERS, tokens, top_k), generator=dice).sort(-1, descending=True).values
    trace = RoutingTrace(
        ids=torch.randint(0, VOCABULARY, (tokens,), generator=dice),
        starts=torch.tensor([0, tokens]),
        documents=torch.tensor([0]),
        index=scores.argsort(-1)[..., :top_k].to(torch.int16),
        weight=(weight / weight.sum(-1, keepdim=True)).half(),
        entropy=torch.zeros((LAYERS, tokens), dtype=torch.float16),
        hidden=4 * torch.randn((LAYERS, tokens, hidden), generator=dice).half() if hidden else None,
        head={
            "experts": EXPERTS,
            "compensation_hash": None if compensation is None else compensation.hash,
        },
    )
    log_damage = predicted(trace, truth)
    noise = torch.randn(log_damage.shape, generator=dice)
    effect = (2 * log_damage.exp()).sqrt() * noise
    return replace(trace, damage={kind: effect}), log_damage


@pytest.mark.slow
@pytest.mark.parametrize(("top_k", "hidden"), [(2, 0), (2, HIDDEN), (3, 0), (4, HIDDEN)])
def test_planted_damages_are_found(top_k, hidden):
    trace, truth = planted(top_k=top_k, hidden=hidden)
    fitted = fit_damage(trace, vocabulary=VOCABULARY, passes=40)
    found = predicted(trace, fitted)
    assert found.shape == truth.shape == (LAYERS, trace.tokens, top_k - 1)
    for layer in range(LAYERS):
        for k in range(top_k - 1):
            mine, theirs = found[layer, :, k], truth[layer, :, k]
            assert spearmanr(mine, theirs).statistic > 0.9
            # The scale: expected damage in all, and what its logarithm is off by in the mean.
            total = float(mine.double().exp().sum() / theirs.double().exp().sum())
            assert total == pytest.approx(1, abs=0.1), (layer, k)
            assert float((mine - theirs).mean()) == pytest.approx(0, abs=0.1), (layer, k)


def test_the_look_at_the_inputs_is_worth_it():
    trace, truth = planted(top_k=2, hidden=HIDDEN)
    blind = replace(trace, hidden=None)
    seeing, unseeing = (
        float((predicted(one, fit_damage(one, vocabulary=VOCABULARY)) - truth).square().mean())
        for one in (trace, blind)
    )
    assert seeing < 0.7 * unseeing


def test_the_same_again_and_in_inference_mode():
    trace, _ = planted(top_k=3, hidden=HIDDEN, tokens=500)
    one = fit_damage(trace, vocabulary=VOCABULARY)
    with torch.inference_mode():
        two = fit_damage(trace, vocabulary=VOCABULARY)
    assert one.hash == two.hash
    assert fit_damage(trace, vocabulary=VOCABULARY, seed=1).hash != one.hash


@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_tau_leaves_the_experts_asked_for(top_k):
    """By the policy itself, on the text that the damages are of."""
    experts = max(EXPERTS, top_k)
    damage = damage_model(layers=1, experts=experts, top_k=top_k, vocabulary=VOCABULARY)
    dice = torch.Generator().manual_seed(0)
    index = torch.rand((3000, experts), generator=dice).argsort(1)[:, :top_k]
    weight = torch.rand((3000, top_k), generator=dice).sort(1, descending=True).values
    ids = torch.randint(0, VOCABULARY, (3000,), generator=dice)
    share = weight / weight.sum(1, keepdim=True)
    sizes = damage.layer(0, ids.device).log_damage(index, share, ids)[None]
    for wanted in torch.linspace(1, top_k, 7).tolist():
        policy = DamagePolicy(tau_for(sizes, wanted), damage=damage)
        kept = (
            policy.route(ForwardContext.of(ids[None]), 0, index, weight).index >= 0
        ).sum() / 3000
        assert float(kept) == pytest.approx(wanted, abs=0.005)


def test_tau_never_asks_for_less_than_one_or_more_than_all():
    sizes = torch.randn((1, 50, 2))
    assert tau_for(sizes, 0.0) == tau_for(sizes, 1.0)
    assert tau_for(sizes, 9.0) == tau_for(sizes, 3.0)


def test_fits_of_compensated_damages_name_their_compensation():
    compensation = compensation_of(layers=LAYERS, experts=EXPERTS, hidden=4, top_k=2)
    trace, truth = planted(top_k=2, kind="cut_compensated", compensation=compensation, tokens=2000)
    fitted = fit_damage(trace, vocabulary=VOCABULARY, compensation=compensation)
    assert fitted.compensation is compensation
    assert spearmanr(predicted(trace, fitted).flatten(), truth.flatten()).statistic > 0.7
    other = compensation_of(layers=LAYERS, experts=EXPERTS, hidden=4, top_k=2, seed=1)
    with pytest.raises(UsageError, match="not recorded with this compensation"):
        fit_damage(trace, vocabulary=VOCABULARY, compensation=other)
    with pytest.raises(UsageError, match="damages 'cut': the trace holds cut_compensated"):
        fit_damage(trace, vocabulary=VOCABULARY)


def test_nothing_to_fit_is_refused():
    trace, _ = planted(top_k=2, tokens=20)
    with pytest.raises(UsageError, match="damages 'cut': the trace holds none"):
        fit_damage(replace(trace, damage={}), vocabulary=VOCABULARY)
    single = replace(
        trace,
        index=trace.index[..., :1],
        weight=trace.weight[..., :1],
        damage={"cut": trace.damage["cut"][..., :0]},
    )
    with pytest.raises(UsageError, match="one expert per token has nothing to drop"):
        fit_damage(single, vocabulary=VOCABULARY)
    looking = damage_model(
        layers=LAYERS, experts=EXPERTS, top_k=2, vocabulary=VOCABULARY, hidden=HIDDEN
    )
    with pytest.raises(UsageError, match=r"record them \(hidden=True\)"):
        predicted(trace, looking)


def test_damages_of_zero_and_outliers_leave_it_finite():
    """A document's last token has no damage; one token in a thousand may have a huge one."""
    trace, _ = planted(top_k=3, tokens=2000)
    effect = trace.damage["cut"].clone()
    effect[:, :50] = 0
    effect[:, 50] = 1e6
    fitted = fit_damage(replace(trace, damage={"cut": effect}), vocabulary=VOCABULARY)
    assert predicted(trace, fitted).isfinite().all()
    nothing = fit_damage(replace(trace, damage={"cut": effect * 0}), vocabulary=VOCABULARY)
    assert predicted(trace, nothing).isfinite().all()
