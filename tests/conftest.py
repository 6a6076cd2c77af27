"""Tiny random models and text, made here: no test needs a network."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = """
the router sends a token to an expert and table cache window entropy speed model layer value
index select from where order group join list dict tuple class def return yield
"""


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tests run in parallel workers: one thread each, and in the processes that they start."""
    import torch

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _moments():
    """What a test does not set is timed for a moment: on a tiny model the figures mean nothing."""
    from var_moe.evaluation import cost, evaluator
    from var_moe.evaluation.speed_setting import SpeedSetting

    with pytest.MonkeyPatch.context() as patch:
        small = {"batch_size": 2, "sequence": 32, "forwards": 1, "new_tokens": 12}
        small = {**SpeedSetting.__init__.__kwdefaults__, **small}
        patch.setattr(SpeedSetting.__init__, "__kwdefaults__", small)
        shapes = [SpeedSetting(batch_size=size, sequence=16, forwards=1) for size in (2, 1)]
        patch.setattr(cost, "SHAPES", (SpeedSetting(), *shapes))
        patch.setitem(cost.fit_cost_model.__kwdefaults__, "blocks", 2)
        for name, value in {"CHOOSING_BLOCKS": 1, "_CHOOSING_TOKENS": 2}.items():
            patch.setattr(evaluator, name, value)
        yield


@pytest.fixture(scope="session")
def make_tiny_mixtral():
    """A tiny random Mixtral in float32; the same weights each time."""

    def make(*, top_k=2, experts=8, layers=3, vocabulary=300):
        import torch
        from transformers import MixtralConfig, MixtralForCausalLM

        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
            max_position_embeddings=256,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=0,
        )
        return MixtralForCausalLM(config).eval().requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def tiny_texts():
    """Sixty short texts over a small vocabulary, so that tokens and contexts repeat."""
    import random

    dice = random.Random(3)
    return [" ".join(dice.choices(WORDS.split(), k=dice.randint(25, 70))) for _ in range(60)]


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_texts):
    """A byte-level BPE of 300 tokens that starts each text with its one special token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tiny_texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory, make_tiny_mixtral, tiny_tokenizer):
    """An ordinary Hugging Face folder with a tiny random Mixtral."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_mixtral().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text_folder(tmp_path_factory, tiny_texts):
    """A data set of local files, one per split."""
    import json

    folder = tmp_path_factory.mktemp("text")
    parts = {
        "calibration": tiny_texts[:20],
        "validation": tiny_texts[:44],
        "certify": tiny_texts[44:52],
        "test": tiny_texts[44:],
    }
    for name, texts in parts.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder
