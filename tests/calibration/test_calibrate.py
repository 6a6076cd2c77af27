"""From calibration text to a profile's damages, and on to a learned compensation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

from var_moe.calibration import calibrate, without_backward
from var_moe.calibration.calibrate import (
    calibration_trace,
    learn_compensation,
    with_damages,
)
from var_moe.calibration.collect import collect_profile
from var_moe.calibration.fit_compensation import FitSettings
from var_moe.calibration.fit_damage import predicted, tau_for
from var_moe.errors import UsageError
from var_moe.evaluation.perplexity import document_losses
from var_moe.execution.session import routed
from var_moe.routing.damage import DamagePolicy
from var_moe.tracing.record import NoBackwardError

DATA = {"dataset": "tiny", "data_hash": "h"}
QUICK = FitSettings(rank=4, regress_tokens=0, tokens=2500, tokens_per_batch=400, rate=1e-2)


def profiled(loaded, documents):
    return collect_profile(loaded, documents, **DATA, max_tokens=None)


@pytest.fixture(scope="module", params=[2, 3], ids=lambda k: f"K={k}")
def case(request, make_loaded, documents):
    loaded = make_loaded(request.param)
    return loaded, profiled(loaded, documents)


@pytest.fixture(scope="module")
def learned(case, documents):
    loaded, profile = case
    return learn_compensation(loaded, profile, documents, data=DATA, settings=QUICK)


def test_damages_for_rescaled_cuts_and_with_residual_means(case, documents):
    loaded, profile = case
    found = with_damages(loaded, profile, documents, data=DATA).damages
    assert list(found) == (["none", "means"] if loaded.top_k == 2 else ["none"])
    assert found["none"].compensation is None
    for damage in found.values():
        assert (damage.layers, damage.top_k, damage.experts) == (2, loaded.top_k, 8)
        assert damage.token.shape == (2, 300)
        assert damage.inner.shape[1:] == (16, 64)  # it looks at the layers' inputs
    if loaded.top_k == 2:
        assert found["means"].compensation.hash == profile.compensations()["means"].hash


def test_a_folder_holds_the_running_pass_and_is_removed(case, documents, tmp_path):
    loaded, profile = case
    place, seen = tmp_path / "pass", []
    in_memory = with_damages(loaded, profile, documents, data=DATA).damages
    found = with_damages(
        loaded,
        profile,
        documents,
        data=DATA,
        folder=place,
        progress=lambda *done: seen.append((done, place.exists())),
    ).damages
    assert {name: one.hash for name, one in found.items()} == {
        name: one.hash for name, one in in_memory.items()
    }
    assert {what for (what, _, _), _ in seen} == {"predicting damages"}
    assert not place.exists()


def test_without_room_for_inputs_damages_do_without(case, documents, monkeypatch):
    loaded, profile = case
    monkeypatch.setattr(calibrate, "HIDDEN_BYTES", 1)
    found = with_damages(loaded, profile, documents, data=DATA).damages
    assert {one.out.shape[1] for one in found.values()} == {0}


@pytest.mark.slow
def test_without_a_backward_pass_sizes_of_changes_stand_in(case, documents, monkeypatch, caplog):
    loaded, profile = case
    trace = calibration_trace(loaded, documents, data=DATA, compensation=None)
    exact = with_damages(loaded, profile, documents, data=DATA).damages

    def refuse(*args, **options):
        raise NoBackwardError("model 'tiny': no backward pass")

    monkeypatch.setattr(calibrate, "record_trace", refuse)
    estimated = with_damages(loaded, profile, documents, data=DATA).damages
    assert "sizes of changes instead" in caplog.text
    assert estimated.keys() == exact.keys()
    for name in exact:
        mine, theirs = predicted(trace, exact[name]), predicted(trace, estimated[name])
        for layer in range(trace.layers):
            found = spearmanr(mine[layer].flatten(), theirs[layer].flatten()).statistic
            assert found > 0.7, (name, layer)


def test_sizes_are_scaled_to_the_measured_rise(case, documents, monkeypatch):
    """All cuts to the first expert in one layer cost what was measured of them together."""
    loaded, _ = case
    rises = torch.tensor([0.5, 3.0], dtype=torch.float64)
    monkeypatch.setattr(without_backward, "_rises", lambda *given: rises)
    trace = without_backward.trace_without_backward(
        loaded, documents, compensation=None, tokens=2000
    )
    total = (trace.damage["cut"][:, :, 0].double().square() / 2).sum(dim=1)
    torch.testing.assert_close(total, rises, rtol=1e-4, atol=0)


def test_nothing_to_do(case, documents, make_loaded):
    loaded, profile = case
    assert with_damages(loaded, profile, documents, data=DATA, tokens=0) is profile
    single = make_loaded(1)
    whole = profiled(single, documents)
    assert with_damages(single, whole, documents, data=DATA) is whole
    with pytest.raises(UsageError, match="'tiny' runs one expert per token"):
        learn_compensation(single, whole, documents, data=DATA, settings=QUICK)


def test_labels_are_sampled_and_tokens_bounded(case, documents):
    loaded, _ = case
    trace = calibration_trace(loaded, documents, data=DATA, compensation=None, tokens=400)
    assert 400 <= trace.tokens < 700
    assert trace.head["labels"] == "sampled"
    assert set(trace.damage) == {"cut"}


def test_what_is_learned_knows_where_it_comes_from(case, learned):
    loaded, profile = case
    assert learned.head["model"] == "tiny"
    assert learned.head["profile_hash"] == profile.hash
    assert learned.head["dataset"] == "tiny"
    fit = learned.head["fit"]
    assert fit["rank"] == learned.compensation.rank == 4
    assert fit["held_out_divergence_nats"]["fitted"] < fit["held_out_divergence_nats"]["start"]
    assert learned.damage.compensation is learned.compensation
    assert learned.compensation.by_pair == (loaded.top_k == 2)


def test_a_profile_with_it_makes_the_policy(case, learned, documents):
    """About 75% of the pairs, closer to the unmodified model than rescaled cuts at as many."""
    loaded, profile = case
    profile = with_damages(loaded, profile, documents, data=DATA)
    whole = profile.with_compensation(learned)
    rescaled, compensated = (whole.calibration(name)["damage"] for name in ("none", "learned"))
    assert whole.calibration()["damage"] is compensated
    trace = calibration_trace(loaded, documents, data=DATA, compensation=learned.compensation)
    change = {}
    for name, damage in (("rescaled", rescaled), ("compensated", compensated)):
        tau = tau_for(predicted(trace, damage), 0.75 * loaded.top_k)
        with routed(loaded.model, DamagePolicy(tau, damage=damage)) as session:
            change[name] = logits(loaded, documents)
            kept = session.report().experts_per_token
        assert kept == pytest.approx(0.75 * loaded.top_k, abs=0.1)
    whole = logits(loaded, documents)
    off = {name: float((one - whole).square().mean()) for name, one in change.items()}
    assert off["compensated"] < off["rescaled"]


def logits(loaded, documents):
    with torch.inference_mode():
        rows = [loaded.model(torch.from_numpy(d.ids)[None]).logits[0] for d in documents[:8]]
    return torch.cat(rows).log_softmax(-1)


def test_losses_with_it_are_finite(case, learned, documents):
    loaded, _ = case
    with routed(loaded.model, DamagePolicy(0.05, damage=learned.damage)) as session:
        found = document_losses(loaded.model, documents[:4], window=64, session=session)
    assert all(value == pytest.approx(value) for value in found.nll)
    assert replace(learned, head={}).compensation is learned.compensation
