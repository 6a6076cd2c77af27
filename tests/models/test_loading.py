"""Loading a model: a round trip, and every refusal in its one line."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from damaged import change, without

from var_moe.errors import UsageError, VarMoeError
from var_moe.models import checks, loading
from var_moe.models.loading import LoadedModel, load_model, quiet, tokenizer_hash

# -- what loads ------------------------------------------------------------------------------


def test_round_trip(tiny_model_folder, make_tiny_mixtral, tiny_tokenizer, tiny_texts):
    loaded = load_model(str(tiny_model_folder))
    assert (loaded.name, loaded.revision) == (str(tiny_model_folder), None)
    assert (loaded.top_k, loaded.num_experts, loaded.moe_layers, loaded.window) == (2, 8, 3, 256)
    assert (loaded.dtype, str(loaded.device)) == ("float32", "cpu")
    assert not loaded.model.training
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert (
        loaded.tokenizer(tiny_texts[0])["input_ids"] == tiny_tokenizer(tiny_texts[0])["input_ids"]
    )
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        expected = make_tiny_mixtral()(input_ids=ids).logits
        assert torch.equal(loaded.model(input_ids=ids).logits, expected)


def test_the_tokenizers_hash(tiny_model_folder, tiny_tokenizer):
    given = LoadedModel.of(load_model(str(tiny_model_folder)).model, tiny_tokenizer)
    assert load_model(str(tiny_model_folder)).tokenizer_hash == given.tokenizer_hash
    padded = copy.deepcopy(tiny_tokenizer)
    padded.pad_token = padded.eos_token  # a habit that changes no token
    assert tokenizer_hash(padded) == given.tokenizer_hash
    padded.pad_token = "the"
    assert tokenizer_hash(padded) != given.tokenizer_hash
    padded = copy.deepcopy(tiny_tokenizer)
    padded.add_tokens(["<new>"])
    assert tokenizer_hash(padded) != given.tokenizer_hash


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(tiny_model_folder, dtype):
    loaded = load_model(str(tiny_model_folder), dtype=dtype, device="cpu")
    assert loaded.dtype == dtype
    assert str(loaded.device) == "cpu"


def test_float16_computes_in_float32_on_a_cpu_and_it_is_said(
    folder, make_tiny_mixtral, caplog, monkeypatch
):
    model = make_tiny_mixtral().to(torch.float16)
    model.save_pretrained(folder)
    loaded = load_model(str(folder))
    assert loaded.dtype == "float32"
    assert "stored in float16, which is slow on a CPU: it computes in float32" in caplog.text
    for (name, mine), theirs in zip(
        loaded.model.named_parameters(), model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs.float()), name
    caplog.clear()
    assert load_model(str(folder), dtype="float16").dtype == "float16"
    assert not caplog.records
    monkeypatch.setattr(loading, "memory_limit", lambda: 1000)
    assert load_model(str(folder)).dtype == "float16"
    assert "float32 takes too much memory" in caplog.text


def test_auto_takes_the_dtype_that_is_stored(folder, make_tiny_mixtral):
    make_tiny_mixtral().to(torch.bfloat16).save_pretrained(folder)
    assert load_model(str(folder)).dtype == "bfloat16"


def test_the_demo_computes_in_float32_on_a_cpu(folder, make_tiny_mixtral, monkeypatch):
    make_tiny_mixtral().half().save_pretrained(folder)
    monkeypatch.setattr("var_moe.models.loading.DEMO_FOLDER", folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert load_model("demo").dtype == "float32"
    assert load_model("demo", dtype="float16").dtype == "float16"
    assert load_model("demo").name == "demo"


def test_shards(folder, make_tiny_mixtral, refused):
    (folder / "model.safetensors").unlink()
    make_tiny_mixtral().save_pretrained(folder, max_shard_size="300KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert load_model(str(folder)).moe_layers == 3
    shards[0].unlink()
    line = refused(folder)
    assert f"1 of its {len(shards)} weight files missing ({shards[0].name}, ...)" in line


@pytest.mark.parametrize(
    ("family", "options", "top_k"),
    [
        ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 3}, 3),
        (
            "Qwen3MoeConfig",
            {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1},
            2,
        ),
    ],
)
def test_other_families(tiny_tokenizer, family, options, top_k):
    import transformers

    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    config = getattr(transformers, family)(**sizes, **options)
    assert checks.check_config("x", config, trust_remote_code=False) == 2
    model = transformers.AutoModelForCausalLM.from_config(config)
    loaded = LoadedModel.of(model, tiny_tokenizer, name="x")
    assert (loaded.top_k, loaded.num_experts, loaded.moe_layers) == (top_k, 4, 2)


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "~/none", "a/b/c", "none/", ""])
def test_no_such_folder(refused, name):
    assert "no such folder; expected a model folder or a Hub id" in refused(name)


def test_a_file_is_no_folder(refused, folder):
    assert "is a file; expected the model's folder" in refused(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no config.json in the folder"),
        ("{", "config.json is not a valid JSON object"),
        ("[]", "config.json is not a valid JSON object"),
        ("{}", "its config.json names no model_type"),
        ('{"model_type": "klingon"}', "klingon"),
    ],
)
def test_no_configuration(refused, folder, content, expected):
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_text(content)
    assert expected in refused(folder)


def test_missing_weights_and_tokenizer(refused, folder):
    kept = (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle file; convert the model to" in refused(folder)
    kept.rename(folder / "model.safetensors")
    for path in folder.glob("*token*"):
        path.unlink()
    assert "no tokenizer in the folder" in refused(folder)


def test_damaged_weights(refused, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors is no whole safetensors file (" in refused(folder)


def test_weights_that_lack_a_tensor(refused, folder):
    """transformers would fill it with random numbers and only warn."""
    without(folder, "model.norm.weight")
    assert "lack 1 tensors (model.norm.weight, ...)" in refused(folder)


def test_a_dense_model(refused, folder, tiny_tokenizer):
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    line = refused(folder)
    assert "(type 'llama') is not a Mixture of Experts that transformers dispatches" in line


@pytest.mark.parametrize("family", ["T5Config", "SwitchTransformersConfig", "ViTConfig"])
def test_no_causal_language_model(refused, folder, family):
    import transformers

    getattr(transformers, family)().save_pretrained(folder)
    line = refused(folder)
    assert "no causal language model" in line
    assert "(type '" in line


def test_fp8_and_fixed_backends(refused, folder):
    change(folder, quantization_config={"quant_method": "fp8"})
    assert "(type 'mixtral'): fp8 experts are not served" in refused(folder)
    change(folder, quantization_config=None, experts_implementation="deepgemm_megamoe")
    assert "experts backend 'deepgemm_megamoe' is fixed" in refused(folder)


def test_experts_that_became_others_in_loading(make_tiny_mixtral):
    model = make_tiny_mixtral(layers=2)
    checks.check_experts("x", model, 2)
    with pytest.raises(UsageError, match="model 'x': 1 of 3 experts modules do not go through"):
        checks.check_experts("x", model, 3)
    model.model.layers[1].mlp.experts.to(torch.float8_e4m3fn)
    with pytest.raises(UsageError, match=r"layers\.1\.mlp\.experts \(MixtralExperts\) do not go"):
        checks.check_experts("x", model, 2)


def test_code_of_its_own_is_not_run(refused, folder):
    (folder / "configuration_own.py").write_text("raise SystemExit('was run')\n")
    change(folder, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    assert "config.json cannot be loaded (" in refused(folder)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "int4"}, "dtype 'int4': expected one of auto, float32, bfloat16, float16"),
        ({"device": "gpu"}, "device 'gpu': no such device here; expected auto, cpu, cuda"),
        ({"device": "meta"}, "device 'meta': no such device here"),
    ],
)
def test_unknown_device_and_dtype(refused, tiny_model_folder, options, expected):
    assert expected in refused(tiny_model_folder, **options)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "xpu"])
def test_a_device_that_is_not_there(refused, tiny_model_folder, device):
    kind = getattr(torch, device.partition(":")[0], None)
    if kind is not None and kind.is_available():
        pytest.skip(f"{device} is there")
    assert f"device {device!r}: no such" in refused(tiny_model_folder, device=device)


def test_other_failures_are_no_bad_input(refused, tiny_model_folder, monkeypatch):
    from transformers import AutoModelForCausalLM

    def fail(*_, **__):
        raise RuntimeError("not enough memory:\nyou tried to allocate too much")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    line = refused(tiny_model_folder, kind=VarMoeError)
    assert "(not enough memory: you tried to allocate too much)" in line


# -- the Hub ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mistralai/Mixtral-8x7B-v0.1", "gpt2", "models/none"])
def test_out_of_reach_is_one_quick_line(refused, monkeypatch, tmp_path, name):
    monkeypatch.setattr("var_moe.hub.reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    line = refused(name)
    assert time.perf_counter() - start < 5
    assert line.startswith(f"model {name!r}: neither a local path nor in the local Hub cache")
    assert f"hf download {name}" in line


def test_no_name_of_the_hub(refused, monkeypatch):
    monkeypatch.setattr("var_moe.hub.reachable", lambda: pytest.fail("asked the network"))
    assert "no name that the Hub could have" in refused("two words")


@pytest.mark.slow
def test_a_cached_model_loads_without_a_network(cached_model):
    loaded = load_model("someone/tiny")
    assert (loaded.name, loaded.revision) == ("someone/tiny", cached_model.name)
    assert loaded.moe_layers == 3


@pytest.mark.slow
def test_half_a_cached_model(refused, cached_model):
    (cached_model / "model.safetensors").unlink()
    assert "model 'someone/tiny': no model.safetensors weights" in refused("someone/tiny")
    (cached_model / "config.json").unlink()
    assert "neither a local path nor in the local Hub cache" in refused("someone/tiny")


# -- silence ---------------------------------------------------------------------------------


def test_loading_is_silent_and_leaves_everything_as_it_was(tiny_model_folder, capfd):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    def state():
        bars = logging.is_progress_bar_enabled(), are_progress_bars_disabled()
        return logging.get_verbosity(), *bars

    before = state()
    load_model(str(tiny_model_folder))
    assert state() == before
    assert capfd.readouterr() == ("", "")

    def fail():
        with quiet():
            assert state() == (logging.ERROR, False, True)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert state() == before
    with quiet(downloads=True):
        assert state() == (logging.ERROR, False, False)
    assert state() == before


def test_debugging_is_not_silenced():
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_debug()
    try:
        with quiet():
            assert logging.get_verbosity() == logging.DEBUG
            assert logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity(before)


@pytest.mark.parametrize("given", [(None, "tokenizer"), ("model", None), ("model", "gpt2")])
def test_a_model_of_ones_own_needs_its_tokenizer(tiny_model_folder, given):
    loaded = load_model(str(tiny_model_folder))
    parts = [getattr(loaded, str(one), one) for one in given]
    with pytest.raises(
        UsageError, match=r"LoadedModel.of\(...\): got .*(NoneType|str).*, expected a transformers"
    ):
        LoadedModel.of(*parts)
    with pytest.raises(UsageError, match=r"got LoadedModel and .*, expected a transformers model"):
        LoadedModel.of(loaded, loaded.tokenizer)


def test_a_text_is_continued(make_tiny_mixtral, tiny_tokenizer):
    loaded = LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")
    prompt = "the router sends a token"
    ids = tiny_tokenizer(prompt, return_tensors="pt").input_ids
    made = loaded.model.generate(ids, max_new_tokens=5, do_sample=False)
    expected = tiny_tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert loaded.generate(prompt, max_new_tokens=5, do_sample=False) == expected
    whole = loaded.generate(prompt, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert whole == expected


@pytest.mark.parametrize("prompt", ["", None, [1, 2]])
def test_what_is_no_text_is_not_continued(make_tiny_mixtral, tiny_tokenizer, prompt):
    loaded = LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")
    with pytest.raises(UsageError, match="expected a text that is not empty"):
        loaded.generate(prompt)
