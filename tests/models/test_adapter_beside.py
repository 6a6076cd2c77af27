"""An adapter beside a model: it counts, or it is refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from damaged import without

from var_moe.models.loading import load_model


@pytest.fixture
def adapt(folder, make_tiny_mixtral):
    """Lay an adapter beside the model; returns what both give, and the ids they are given."""

    def run(**targets):
        peft = pytest.importorskip("peft")
        wrapped = peft.get_peft_model(
            make_tiny_mixtral(), peft.LoraConfig(r=2, lora_alpha=4, **targets)
        ).eval()
        torch.manual_seed(1)
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.data.normal_(std=0.3)
        wrapped.save_pretrained(folder)
        ids = torch.tensor([[1, 2, 3, 4]])
        with torch.inference_mode():
            return wrapped(input_ids=ids).logits, ids

    return run


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        {"target_modules": ["w1", "w2", "w3"]},  # each expert's own, as they were before fusing
        {"target_modules": ["o_proj"], "target_parameters": ["mlp.gate.weight"]},
    ],
)
def test_an_adapter_beside_the_model_counts(folder, adapt, targets):
    plain = load_model(str(folder)).model
    both, ids = adapt(**targets)
    loaded = load_model(str(folder))
    assert not torch.allclose(plain(input_ids=ids).logits, both, atol=0.1)
    assert torch.allclose(loaded.model(input_ids=ids).logits, both, atol=1e-4)
    assert not hasattr(loaded.model, "peft_config")
    assert loaded.moe_layers == 3


def test_an_adapter_of_another_model(refused, folder, adapt, make_tiny_mixtral):
    adapt(target_modules=["q_proj"])
    make_tiny_mixtral(layers=4).save_pretrained(folder)
    assert "its adapter cannot be loaded (2 of its tensors do not fit" in refused(folder)


def test_weights_that_lack_a_tensor_beside_an_adapter(refused, folder, adapt):
    """transformers then tells of the adapter's tensors alone."""
    adapt(target_modules=["q_proj"])
    without(folder, "model.norm.weight")
    assert "lack 1 tensors (model.norm.weight, ...)" in refused(folder)


@pytest.mark.parametrize("where", ["folder", "cache"])
def test_an_adapter_needs_peft(refused, folder, cached_model, monkeypatch, where):
    name = folder if where == "folder" else "someone/tiny"
    for place in (folder, cached_model):
        (place / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    line = refused(name)
    assert "adapter_config.json says that an adapter belongs to it, which needs peft" in line
    assert "pip install 'var-moe[adapters]'" in line


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors"])
def test_an_adapter_alone(refused, folder, cached_model, gone):
    for place, name in ((folder, folder), (cached_model, "someone/tiny")):
        (place / gone).unlink()
        (place / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
        line = refused(name)
        assert "is an adapter of 'someone/base', not a model; load both with peft" in line
        assert "merge_and_unload()" in line


def test_an_adapter_beside_a_cached_model(folder, cached_model, adapt):
    both, ids = adapt(target_modules=["q_proj"])
    for path in folder.glob("adapter*"):
        path.rename(cached_model / path.name)
    loaded = load_model("someone/tiny")
    assert torch.allclose(loaded.model(input_ids=ids).logits, both, atol=1e-4)


def test_an_adapter_that_cannot_be_merged(refused, folder):
    kind = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    (folder / "adapter_config.json").write_text(json.dumps(kind))
    assert "its adapter cannot be loaded (" in refused(folder)
