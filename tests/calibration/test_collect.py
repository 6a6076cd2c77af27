"""A profile of a tiny model: against the model itself, on disk, interrupted and resumed."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from var_moe.calibration import collect
from var_moe.calibration.collect import collect_profile
from var_moe.calibration.profile import RoutingProfile
from var_moe.data.documents import TextDocument
from var_moe.data.encoding import encode
from var_moe.errors import UsageError
from var_moe.models.loading import LoadedModel
from var_moe.routing.registry import policy_names, policy_spec


@pytest.fixture(scope="module")
def loaded(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="module")
def documents(tiny_texts, tiny_tokenizer):
    texts = [TextDocument(str(i), "s", text) for i, text in enumerate(tiny_texts)]
    return encode(texts, tiny_tokenizer)


def profiled(loaded, documents, **options):
    options = {"dataset": "tiny", "data_hash": "h", "max_tokens": None, **options}
    return collect_profile(loaded, documents, **options)


@pytest.fixture(scope="module")
def profile(loaded, documents):
    return profiled(loaded, documents)


def test_counts_and_entropy_are_the_models_own(profile, loaded, documents):
    """The same figures by asking the model for its router logits, document by document."""
    seen: dict[tuple[int, int], list[tuple[float, int, float]]] = {}
    for document in documents:
        with torch.inference_mode():
            out = loaded.model(
                input_ids=torch.tensor([document.ids.tolist()]), output_router_logits=True
            )
        for layer, logits in enumerate(out.router_logits):
            shares = logits.double().softmax(-1)
            entropy = -(shares * shares.log()).sum(-1)
            top = shares.topk(2).values
            mass = top[:, 0] / top.sum(-1)
            for token, h, e, c in zip(
                document.ids,
                entropy.tolist(),
                shares.argmax(-1).tolist(),
                mass.tolist(),
                strict=True,
            ):
                seen.setdefault((layer, int(token)), []).append((h, e, c))
    stats = profile.stats.set_index(["layer", "token_id"])
    assert len(stats) == len(seen)
    for key, values in seen.items():
        row = stats.loc[key]
        entropy = np.array([v[0] for v in values])
        assert row["frequency"] == len(values)
        assert row["mean_entropy"] == pytest.approx(entropy.mean(), abs=1e-4)
        assert row["max_entropy"] == pytest.approx(entropy.max(), abs=1e-4)
        firsts = np.bincount([v[1] for v in values], minlength=8)
        assert firsts[row["top_expert"]] == firsts.max()
        assert row["routing_consistency"] == pytest.approx(firsts.max() / len(values))
        assert row["mean_confidence"] == pytest.approx(np.mean([v[2] for v in values]), abs=1e-4)


def test_columns_and_head(profile, documents):
    assert list(profile.stats.columns) == [
        "layer",
        "token_id",
        "token_str",
        "frequency",
        "mean_entropy",
        "std_entropy",
        "min_entropy",
        "max_entropy",
        "mean_confidence",
        "std_confidence",
        "routing_consistency",
        "top_expert",
        "leading_experts",
        "leading_weights",
    ]
    assert profile.head["tokens"] == sum(len(d.ids) for d in documents)
    assert (profile.layers, profile.head["experts"], profile.head["top_k"]) == (3, 8, 2)


def test_round_trip(profile, tmp_path):
    profile.save(tmp_path / "p")
    again = RoutingProfile.load(tmp_path / "p")
    assert again.hash == profile.hash
    one, two = profile.table(), again.table()
    for name in ("count", "entropy", "index", "weight"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    for mine, theirs in zip(profile.residuals.table, again.residuals.table, strict=True):
        assert torch.equal(mine, theirs)


def test_what_peers_need_is_gathered_and_kept(profile, tmp_path):
    ratios, sensitivity = profile.ratios, profile.sensitivity
    assert (ratios.layers, ratios.top_k) == (sensitivity.layers, sensitivity.top_k) == (3, 2)
    assert ratios.tokens == profile.head["tokens"]
    assert all(row[0] > row[1] == 0 for row in sensitivity.loss)
    profile.save(tmp_path)
    found = RoutingProfile.load(tmp_path)
    assert (found.ratios, found.sensitivity) == (ratios, sensitivity)
    needed = {**profile.calibration(), "damage": SimpleNamespace(compensation=None)}
    for name in policy_names():
        spec = policy_spec(name)
        settings = {key: entry["default"] for key, entry in spec.search_space(2).items()}
        spec.make(settings, needed)


def test_parts_that_do_not_belong_together_are_refused(profile, tmp_path):
    profile.save(tmp_path / "p")
    head = json.loads((tmp_path / "p" / "profile.json").read_text())
    head["data_hash"] = "another"
    (tmp_path / "p" / "profile.json").write_text(json.dumps(head))
    with pytest.raises(UsageError, match="does not belong to"):
        RoutingProfile.load(tmp_path / "p")


def test_interrupted_and_resumed(loaded, documents, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "_CHECKPOINT_EVERY", 2)
    place = tmp_path / "checkpoint.safetensors"
    calls = []

    def stop(done, total):
        calls.append(done)
        if len(calls) == 5:
            raise KeyboardInterrupt

    options = {"tokens_per_batch": 400, "checkpoint": place}
    with pytest.raises(KeyboardInterrupt):
        profiled(loaded, documents, progress=stop, **options)
    assert place.is_file()
    resumed_at = []
    again = profiled(
        loaded, documents, progress=lambda done, total: resumed_at.append(done), **options
    )
    assert resumed_at[0] > calls[0]
    assert not place.exists()
    whole = profiled(loaded, documents, tokens_per_batch=400)
    assert again.hash == whole.hash
    assert (again.ratios, again.sensitivity) == (whole.ratios, whole.sensitivity)


def test_a_checkpoint_of_other_documents_is_not_gone_on_with(
    loaded, documents, tmp_path, monkeypatch
):
    monkeypatch.setattr(collect, "_CHECKPOINT_EVERY", 1)
    options = {"tokens_per_batch": 200, "max_tokens": 900}

    def stop(done, total):
        if done > 400:
            raise KeyboardInterrupt

    place = tmp_path / "checkpoint.safetensors"
    with pytest.raises(KeyboardInterrupt):
        profiled(loaded, documents, progress=stop, checkpoint=place, seed=1, **options)
    again = profiled(loaded, documents, checkpoint=place, seed=2, **options)
    assert again.hash == profiled(loaded, documents, seed=2, **options).hash


def test_a_part_of_the_text(loaded, documents):
    small = profiled(loaded, documents, max_tokens=500)
    assert small.head["tokens"] == 500
    assert small.head["tokens_asked"] == 500


def test_the_model_is_left_as_it_was(loaded, documents):
    def state():
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in loaded.model.modules()]
        return hooks, loaded.model.get_experts_implementation()

    before = state()
    profiled(loaded, documents[:3])
    assert state() == before


def test_nothing_to_profile(loaded):
    with pytest.raises(UsageError, match="no calibration text"):
        profiled(loaded, [])


def test_a_profile_of_other_weights_is_refused(profile, make_tiny_mixtral, tiny_tokenizer):
    other = make_tiny_mixtral()
    other.model.layers[1].mlp.gate.weight.mul_(1.02)
    with pytest.raises(UsageError, match="'tiny' does not fit model 'other': the routers have"):
        profile.check_loaded(LoadedModel.of(other, tiny_tokenizer, name="other"))


def fine_tuned(model, share=0.01):
    """Attention's weights with a small change, as an adapter of them leaves when it is merged."""
    weight = model.model.layers[1].self_attn.q_proj.weight
    dice = torch.Generator().manual_seed(0)
    weight += share * weight.norm() * torch.randn(weight.shape, generator=dice) / 64
    return model


def test_a_profile_of_a_fine_tuned_model_is_refused(profile, make_tiny_mixtral, tiny_tokenizer):
    """Its routers are the same, and what comes to them is not."""
    other = LoadedModel.of(fine_tuned(make_tiny_mixtral()), tiny_tokenizer, name="other")
    with pytest.raises(UsageError, match="'other': the routers are the same, other weights are"):
        profile.check_loaded(other)


@pytest.mark.slow
def test_a_checkpoint_of_a_fine_tuned_model_is_not_gone_on_with(
    loaded, documents, make_tiny_mixtral, tiny_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(collect, "_CHECKPOINT_EVERY", 1)
    place = tmp_path / "checkpoint.safetensors"

    def stop(done, total):
        if done > 400:
            raise KeyboardInterrupt

    options = {"tokens_per_batch": 200}
    with pytest.raises(KeyboardInterrupt):
        profiled(loaded, documents, progress=stop, checkpoint=place, **options)
    assert place.is_file()
    other = LoadedModel.of(fine_tuned(make_tiny_mixtral(), 0.5), tiny_tokenizer, name="tiny")
    again = profiled(other, documents, checkpoint=place, **options)
    assert again.hash == profiled(other, documents, **options).hash


def test_a_profile_serves_the_same_weights_in_another_dtype(
    profile, make_tiny_mixtral, tiny_tokenizer
):
    for dtype in (torch.bfloat16, torch.float16):
        model = make_tiny_mixtral().to(dtype)
        profile.check_loaded(LoadedModel.of(model, tiny_tokenizer, name="tiny"))
