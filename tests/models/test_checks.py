"""What a configuration asks for and weights hold: nothing that the model can not be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from damaged import change, rewrite

from families import find_families, tiny_model
from var_moe.errors import UsageError
from var_moe.models.checks import top_k_of
from var_moe.models.loading import LoadedModel, load_model


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_experts_per_tok": 9}, "asks for 9 experts per token of 8; expected at most as many"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok = 0; expected how many experts"),
        ({"num_experts_per_tok": -1}, "num_experts_per_tok = -1; expected how many experts"),
        ({"num_local_experts": 0}, "asks for 2 experts per token of 0"),
        ({"num_hidden_layers": 0}, "not a Mixture of Experts that transformers dispatches"),
        ({"num_experts_per_tok": "2"}, "its config.json cannot be loaded (Validation error for"),
        ({"num_local_experts": [8, 8]}, "'num_local_experts' expected int, got list"),
        ({"hidden_size": "64"}, "'hidden_size' expected int, got str (value: '64')"),
        ({"num_hidden_layers": 2.0}, "'num_hidden_layers' expected int, got float"),
        ({"hidden_act": "none"}, "cannot be built from its config.json (KeyError: 'none')"),
        ({"dtype": "none"}, "its config.json cannot be loaded (module 'torch' has no"),
        ({"vocab_size": 200}, "2 of its tensors have another shape than its config.json gives"),
        ({"num_local_experts": 4}, "experts.down_proj: [8, 64, 96], expected [4, 64, 96])"),
        ({"quantization_config": {"quant_method": "x"}}, "quantization 'x' is none that"),
        ({"quantization_config": []}, "its config.json cannot be loaded"),
    ],
)
def test_sizes_types_and_names_in_the_configuration(refused, folder, values, expected):
    change(folder, **values)
    assert expected in refused(folder)


def test_layers_that_differ(make_tiny_mixtral, tiny_tokenizer):
    model = make_tiny_mixtral()
    model.model.layers[1].mlp.experts.num_experts = 4
    with pytest.raises(UsageError, match="its layers have 4 and 8 experts"):
        LoadedModel.of(model, tiny_tokenizer, name="x")
    assert top_k_of(SimpleNamespace(moe_topk=[2, 2, 2]), "x") == 2
    with pytest.raises(UsageError, match=r"moe_topk = \[2, 1, 2\]; expected"):
        top_k_of(SimpleNamespace(moe_topk=[2, 1, 2]), "x")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (lambda one: one * float("nan"), "q_proj.weight holds NaN or infinity in torch.float32"),
        (lambda one: one / 0, "q_proj.weight holds NaN or infinity in torch.float32"),
        (lambda one: one[:32].clone(), "q_proj.weight: [32, 64], expected [64, 64])"),
    ],
)
def test_weights_that_are_none(refused, folder, changed, expected):
    name = "model.layers.1.self_attn.q_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: changed(tensors[name])}))
    assert expected in refused(folder)


def test_a_dtype_that_the_weights_overflow(refused, folder):
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].fill_(1e6))
    assert load_model(str(folder)).dtype == "float32"
    assert "lm_head.weight holds NaN or infinity in torch.float16" in refused(
        folder, dtype="float16"
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", find_families(), ids=str)
def test_every_family_passes(folder, family):
    tiny_model(family).save_pretrained(folder)
    assert load_model(str(folder)).top_k == family.top_k
