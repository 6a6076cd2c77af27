"""Fitting a compensation on a tiny model: it helps, it resumes, it leaves the model alone."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from var_moe.calibration import fit_compensation as fitting
from var_moe.calibration.distillation import (
    affordable_rank,
    divergence,
    frozen,
    schedule,
    trainable,
)
from var_moe.calibration.fit_compensation import (
    FitSettings,
    fit_compensation,
    split,
)
from var_moe.errors import UsageError, VarMoeError
from var_moe.execution.session import routed
from var_moe.routing.compensation import Compensation
from var_moe.routing.damage import DamagePolicy
from var_moe.routing.decision import ForwardContext

QUICK = FitSettings(rank=4, regress_tokens=0, tokens=3000, tokens_per_batch=400, rate=1e-2)


class KilledError(Exception):
    """The run ends here."""


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def case(request, make_loaded, make_cuts):
    loaded = make_loaded(request.param)
    return (loaded, *make_cuts(loaded))


def fit(case, documents, settings=QUICK, **more):
    loaded, damage, taus = case
    start = Compensation.empty(layers=2, experts=8, hidden=64)
    options = {"damage": damage, "taus": taus, "start": start, "settings": settings, **more}
    compensation, about = fit_compensation(loaded, documents, **options)
    return SimpleNamespace(
        compensation=compensation,
        about=about,
        held_out=about["held_out_divergence_nats"],
        curve=[(look["tokens"], look["held_out_divergence_nats"]) for look in about["curve"]],
        taus=about["held_out_taus"],
        tokens=about["fitted_tokens"],
        stopped=about["stopped"],
    )


def tensors(compensation):
    return [t for part in compensation.layers for t in part.tensors().values()]


def same(one, other):
    pairs = zip(tensors(one), tensors(other), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.fixture(scope="module")
def unbroken(case, documents):
    return fit(case, documents)


def test_it_helps_on_held_out_text(unbroken):
    held = unbroken.held_out
    assert held["fitted"] < min(held["start"], held["nothing"])
    assert held["fitted"] == min(divergence for _, divergence in unbroken.curve)
    assert unbroken.compensation.rank == 4
    assert not any(t.requires_grad for t in tensors(unbroken.compensation))
    assert all((part.vectors[-1] == 0).all() for part in unbroken.compensation.layers)
    assert [tokens for tokens, _ in unbroken.curve] == sorted(t for t, _ in unbroken.curve)
    assert unbroken.about["rank"] == 4


def test_the_live_model_diverges_as_little_as_was_told(unbroken, case, documents):
    """By `routed` itself, over the held-out documents, from plain logits."""
    loaded, damage, _ = case
    held, _ = split([documents[i] for i in _order(len(documents))])
    total = tokens = 0
    for document in held:
        ids = torch.from_numpy(document.ids)[None]
        with torch.inference_mode():
            teacher = loaded.model(ids).logits[0, :-1].log_softmax(-1)
            for tau in unbroken.taus:
                policy = DamagePolicy(tau, damage=damage)
                policy.compensation = unbroken.compensation
                with routed(loaded.model, policy):
                    student = loaded.model(ids).logits[0, :-1].log_softmax(-1)
                total += float((teacher.exp() * (teacher - student)).sum())
                tokens += len(teacher)
    assert total / tokens == pytest.approx(unbroken.held_out["fitted"], rel=1e-3)


def _order(count):
    import numpy as np

    return np.random.default_rng(QUICK.seed).permutation(count)


@pytest.mark.parametrize("steps", [1, pytest.param(4, marks=pytest.mark.slow), 7])
def test_a_killed_fit_goes_on_to_the_same_end(steps, case, documents, unbroken, tmp_path):
    path = tmp_path / "fit.pt"
    first, second = [], []

    def kill(what, done, total):
        first.append(done)
        if len(first) == steps:
            raise KilledError

    with pytest.raises(KilledError):
        fit(case, documents, checkpoint=path, progress=kill)
    assert path.exists() == (steps > 1)  # there was a look
    found = fit(
        case, documents, checkpoint=path, progress=lambda what, done, total: second.append(done)
    )
    assert same(found.compensation, unbroken.compensation)
    assert (found.curve, found.held_out) == (unbroken.curve, unbroken.held_out)
    assert (found.tokens, found.stopped) == (unbroken.tokens, unbroken.stopped)
    if steps > 1:
        assert second[0] > first[0]  # it did not begin anew


@pytest.mark.slow
@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, rate=3e-2)], ids=["text", "patience"])
def test_once_more_after_its_end(settings, case, documents, tmp_path, monkeypatch):
    """The text is used up, or patience is: nothing is learned or lost by going on.

    What comes after a fit may be killed, too.
    """
    monkeypatch.setattr(fitting, "_PATIENCE", 4 if settings is QUICK else 1)
    path, steps = tmp_path / "fit.pt", []
    whole = fit(case, documents, settings, checkpoint=path)
    assert (whole.tokens < settings.tokens) == (settings is not QUICK)
    found = fit(
        case, documents, settings, checkpoint=path, progress=lambda *done: steps.append(done)
    )
    assert steps == []
    assert same(found.compensation, whole.compensation)
    assert found.about == whole.about
    assert found.stopped.startswith("the text" if settings is QUICK else "no improvement")


@pytest.mark.parametrize("other", ["text", "settings", "damage"])
def test_a_checkpoint_of_another_fit_is_not_gone_on_with(other, case, documents, tmp_path):
    path, small, seen = tmp_path / "fit.pt", replace(QUICK, tokens=1200), []

    def kill(what, done, total):
        seen.append(done)
        if done > 800 or len(seen) > 5:
            raise KilledError

    with pytest.raises(KilledError):
        fit(case, documents, small, checkpoint=path, progress=kill)
    assert path.exists()
    begun = seen[0]
    loaded, damage, taus = case
    if other == "text":
        documents = documents[::-1]
    elif other == "settings":
        small = replace(small, rate=5e-3)
    else:
        case = loaded, replace(damage, token=damage.token + 0.1), taus
    seen[:] = [0] * 5  # the next step ends it
    with pytest.raises(KilledError):
        fit(case, documents, small, checkpoint=path, progress=kill)
    assert seen[-1] < begun + 400  # it began anew


@pytest.mark.slow
def test_a_damaged_checkpoint_is_as_good_as_none(case, documents, unbroken, tmp_path):
    path = tmp_path / "fit.pt"
    path.write_bytes(b"half a chec")
    assert same(fit(case, documents, checkpoint=path).compensation, unbroken.compensation)


@pytest.mark.slow
def test_the_model_is_left_as_it_was(case, documents):
    loaded = case[0]
    parameters = list(loaded.model.parameters())

    def state():
        asked = [p.requires_grad for p in parameters]
        return asked, loaded.model.get_experts_implementation(), torch.is_grad_enabled()

    weights = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    for wanted in (True, False):
        for number, parameter in enumerate(parameters):
            parameter.requires_grad_(wanted and number % 2 == 0)
        before = state()
        fit(case, documents, replace(QUICK, tokens=1000))
        assert state() == before

        def kill(what, done, total):
            raise KilledError

        with torch.inference_mode(), pytest.raises(KilledError):
            fit(case, documents, progress=kill)
        assert state() == before
    assert all(p.grad is None for p in parameters)
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_models_in_half_precision(dtype, make_loaded, case, documents):
    """The compensation is learned in float32 and used as the model computes."""
    loaded, damage, taus = case
    half = make_loaded(loaded.top_k, dtype)
    found = fit((half, damage, taus), documents, replace(QUICK, tokens=1500))
    assert found.held_out["fitted"] < min(found.held_out["start"], found.held_out["nothing"])
    assert {t.dtype for t in tensors(found.compensation)} == {torch.float32}


def test_rank_zero_learns_vectors_alone(case, documents):
    found = fit(case, documents, replace(QUICK, rank=0, tokens=1500))
    assert found.compensation.rank == 0
    assert found.held_out["fitted"] < found.held_out["start"]


def test_a_fit_that_does_not_help_is_an_error(case, documents, tmp_path):
    """A rate that throws everything off; the checkpoint goes, too."""
    with pytest.raises(VarMoeError, match=r"no better on held-out text .* nothing was saved"):
        fit(case, documents, replace(QUICK, rate=100.0), checkpoint=tmp_path / "fit.pt")
    assert list(tmp_path.iterdir()) == []


def test_too_few_documents(case, documents):
    with pytest.raises(UsageError, match=r"3 calibration documents, .* too few to fit on some"):
        fit(case, documents[:3])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", -1),
        ("tokens", -1),
        ("tokens_per_batch", 0),
        ("rate", 0.0),
        ("rate", -1e-3),
        ("rate", math.nan),
        ("rate", math.inf),
    ],
)
def test_impossible_settings_are_refused(field, value):
    with pytest.raises(UsageError, match=f"{field} = {value}"):
        FitSettings(**{field: value})


def test_another_models_damages_or_start_are_refused(case, documents):
    other = Compensation.empty(layers=3, experts=8, hidden=64)
    with pytest.raises(UsageError, match=r"\(3, 8, 64\) does not fit a model of \(2, 8, 64\)"):
        fit(case, documents, start=other)


def test_the_learning_rate_rises_and_falls():
    rates = [schedule(done / 50) for done in range(51)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[5] == pytest.approx(1.0)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.0)


def test_the_rank_costs_a_small_share_of_what_it_saves(case):
    loaded = case[0]
    # Experts of 3 x 64 x 96 multiply-adds; the map costs 2 x 64 per rank.
    saved = 3 * 64 * 96 * 0.35 * loaded.top_k
    rank = affordable_rank(loaded.model, loaded.top_k)
    assert rank % 8 == 0
    assert rank == 8 or 2 * 64 * rank <= 0.03 * saved < 2 * 64 * (rank + 8)


def test_a_trainable_begins_as_its_start():
    start = Compensation.empty(layers=2, experts=3, hidden=4)
    found = trainable(start, rank=2, scale=torch.tensor([1.0, 10.0]), seed=0)
    begun = frozen(found)
    assert torch.equal(begun.layers[0].vectors, start.layers[0].vectors)
    assert begun.layers[0].correction(torch.randn(5, 4)).abs().max() == 0  # B is zero
    first, second = (part.down for part in begun.layers)
    assert second.abs().mean() / first.abs().mean() > 3
    with torch.no_grad():
        found.layers[0].vectors.add_(1)
    assert torch.equal(begun.layers[0].vectors, start.layers[0].vectors)
    # One start for all layers must not become one parameter.
    assert not torch.equal(*[part.vectors for part in found.layers])


def test_divergence_by_hand_and_its_gradient():
    batch = ForwardContext.of(
        torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    )
    dice = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn((2, 3, 7), generator=dice) for _ in range(2))
    leaf = student.clone().requires_grad_(True)
    mine, theirs = leaf.log_softmax(-1), teacher.log_softmax(-1)
    each = (theirs.exp() * (theirs - mine)).sum(-1)
    expected = each[0, 0] + each[0, 1] + each[1, 0]  # what predicts a token of the text
    total, places, gradient = divergence(student, teacher, batch, gradient=True)
    assert places == 3
    assert total == pytest.approx(float(expected.detach()))
    expected.backward()
    torch.testing.assert_close(gradient, leaf.grad)
    assert divergence(student, teacher, batch, gradient=False)[2] is None


def test_small_gradients_survive_float16():
    """A student near its teacher, in a large batch over many words."""
    ids = torch.ones((8, 128), dtype=torch.int64)
    teacher = torch.randn((8, 128, 2000), generator=torch.Generator().manual_seed(0))
    student = teacher + 0.01 * teacher.flip(-1)
    batch = ForwardContext.of(ids)
    exact = divergence(student, teacher, batch, gradient=True)[2]
    half = divergence(student.half(), teacher.half(), batch, gradient=True)[2]
    assert half.dtype == torch.float16
    assert float((half.float() - exact).norm() / exact.norm()) < 0.2
