"""Exported configurations decide as what they were made of, and fit their own model alone."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from damages import compensation_of, damage_model
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.execution.session import routed
from var_moe.models.identity import identity
from var_moe.models.loading import LoadedModel
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.per_layer_k import LayerSensitivity
from var_moe.routing.registry import make_policy
from var_moe.routing.var import RoutingTable
from var_moe.serving.folder import load_exported, save_exported

LAYERS, EXPERTS, VOCABULARY, HIDDEN = 3, 8, 300, 64
IDS = torch.arange(120).reshape(2, 60) % 37


@pytest.fixture
def loaded(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")


def calibration():
    """All that a policy may ask for, with made-up numbers."""
    dice = torch.Generator().manual_seed(5)
    shape = (LAYERS, VOCABULARY)
    tables = tuple(torch.randn((EXPERTS**2 + 1, HIDDEN), generator=dice) for _ in range(LAYERS))
    sizes = {"layers": LAYERS, "experts": EXPERTS, "top_k": 2}
    learned = compensation_of(**sizes, hidden=HIDDEN, rank=2)
    return {
        "table": RoutingTable(
            count=torch.full(shape, 100.0, dtype=torch.float64),
            entropy=torch.rand(shape, generator=dice, dtype=torch.float64),
            index=torch.randint(0, EXPERTS, (*shape, 1), generator=dice),
            weight=torch.rand((*shape, 1), generator=dice),
        ),
        "residuals": ResidualMeans(table=tables, by_pair=True, experts=EXPERTS),
        "sensitivity": LayerSensitivity(measure="made up", loss=((1.0, 0.0),) * LAYERS),
        "damage": damage_model(**sizes, vocabulary=VOCABULARY, hidden=HIDDEN, compensation=learned),
    }


def save(folder, loaded, policy, settings, given, compensation=None):
    profile = {**identity(loaded), "dataset": "made up", "data_hash": "0", "tokens": 7, "hash": "1"}
    return save_exported(
        folder,
        policy=policy,
        settings=settings,
        compensation=compensation,
        calibration=given,
        profile=profile,
    )


def decided(model, policy):
    """Logits and report under a policy, twice, so that caches are used."""
    with torch.no_grad(), routed(model, policy) as session:
        logits = [model(input_ids=IDS).logits for _ in range(2)]
        return torch.stack(logits), session.report()


THRESHOLDS = VARConfig(frequency_threshold=10, entropy_threshold=0.5, confidence_threshold=0.6)


@pytest.mark.parametrize(
    ("policy", "settings"),
    [
        ("damage", {"tau": 0.002}),
        ("var_verified", THRESHOLDS.to_dict()),
        ("var_plain", replace(THRESHOLDS, mode="plain").to_dict()),
        ("per_layer_k", {"experts_per_token": 1.5}),
        ("top_p", {"p": 0.5}),
    ],
)
def test_decisions_are_bit_identical_after_loading(loaded, tmp_path, policy, settings):
    given = calibration()
    save(tmp_path, loaded, policy, settings, given)
    own, report = decided(loaded.model, make_policy(policy, settings, given))
    again, its_report = decided(loaded.model, str(tmp_path))
    assert report.experts_per_token < 2
    assert torch.equal(own, again)
    assert its_report == report


def test_a_compensation_that_was_asked_for_comes_along(loaded, tmp_path):
    given = {"compensation": calibration()["damage"].compensation}
    save(tmp_path, loaded, "fixed_k", {"k": 1}, given, "learned")
    own, _ = decided(loaded.model, make_policy("fixed_k", {"k": 1}, given))
    bare, _ = decided(loaded.model, make_policy("fixed_k", {"k": 1}))
    again, _ = decided(loaded.model, tmp_path)
    assert torch.equal(own, again)
    assert not torch.equal(bare, again)
    found = load_exported(tmp_path).calibration["compensation"]
    assert found.hash == given["compensation"].hash


def test_only_what_the_policy_needs_is_written(loaded, tmp_path):
    head = save(tmp_path, loaded, "per_layer_k", {"experts_per_token": 1.5}, calibration())
    assert list(head["parts"]) == ["sensitivity"]
    assert head["hashes"]["compensation"] is None


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"layers": 2}, "another number of MoE layers"),
        ({"top_k": 3}, "another top-k"),
        ({"experts": 4}, "another number of experts"),
    ],
)
def test_another_model_is_refused_by_both_names(
    loaded, make_tiny_mixtral, tmp_path, changed, fault
):
    save(tmp_path, loaded, "top_p", {"p": 0.5}, {})
    other = make_tiny_mixtral(**changed)
    other.name_or_path = "other"
    with pytest.raises(UsageError, match=f"'tiny' does not fit model 'other': {fault}"):
        decided(other, tmp_path)


def test_other_weights_or_tokenizer_are_refused(loaded, make_tiny_mixtral, tmp_path):
    save(tmp_path, loaded, "top_p", {"p": 0.5}, {})
    other = make_tiny_mixtral()
    other.model.layers[0].mlp.gate.weight.mul_(2)
    with pytest.raises(UsageError, match="the routers have other weights"):
        decided(other, tmp_path)
    tuned = make_tiny_mixtral()
    tuned.model.layers[0].self_attn.v_proj.weight[:, ::3] *= 1.1
    with pytest.raises(UsageError, match="the routers are the same, other weights are not"):
        decided(tuned, tmp_path)
    foreign = replace(loaded, tokenizer_hash="another")
    with pytest.raises(UsageError, match="another tokenizer"), routed(foreign, tmp_path):
        pass
    with routed(loaded, tmp_path):  # with its own tokenizer it fits
        pass


def test_damaged_files_are_said(loaded, tmp_path):
    save(tmp_path, loaded, "damage", {"tau": 0.002}, calibration())
    tensors, head = tmp_path / "var_moe.safetensors", tmp_path / "var_moe.json"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UsageError, match=r"does not belong to var_moe\.json"):
        load_exported(tmp_path)
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="damaged"):
        load_exported(tmp_path)
    tensors.unlink()
    with pytest.raises(UsageError, match=r"var_moe\.safetensors: missing"):
        load_exported(tmp_path)
    known = json.loads(head.read_text())
    head.write_text(json.dumps({**known, "schema_version": 99}))
    with pytest.raises(UsageError, match="no exported configuration of schema 1"):
        load_exported(tmp_path)


def test_a_hub_id_is_fetched(loaded, tmp_path, monkeypatch):
    save(tmp_path, loaded, "top_p", {"p": 0.5}, {})
    asked = []

    def snapshot(**options):
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("var_moe.hub.reachable", lambda: True)
    decided(loaded.model, "someone/fast-tiny")
    assert asked[0]["repo_id"] == "someone/fast-tiny"
    assert not asked[0]["local_files_only"]


@pytest.mark.parametrize(
    ("source", "said"),
    [("nowhere", "no such folder"), ("./a/b", "no such folder"), ("a/b", "does not answer")],
)
def test_what_is_nowhere_is_said(monkeypatch, source, said):
    monkeypatch.setattr("var_moe.hub.reachable", lambda: False)
    with pytest.raises(UsageError, match=said):
        load_exported(source)
