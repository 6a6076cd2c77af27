"""A tiny model, its text and its trace: what the tests of this room share."""

from __future__ import annotations

import pytest

from var_moe.evaluation.text import TextDocument, encode
from var_moe.models.loading import LoadedModel
from var_moe.profiling.collect import collect_profile
from var_moe.tracing.record import record_trace


@pytest.fixture(scope="session")
def loaded(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="session")
def documents(tiny_texts, tiny_tokenizer):
    texts = [TextDocument(f"d{i}", "s", text) for i, text in enumerate(tiny_texts[:16])]
    return encode(texts, tiny_tokenizer)


@pytest.fixture(scope="session")
def profile(loaded, tiny_texts, tiny_tokenizer):
    texts = [TextDocument(str(i), "s", text) for i, text in enumerate(tiny_texts[20:])]
    return collect_profile(
        loaded, encode(texts, tiny_tokenizer), dataset="tiny", data_hash="h", max_tokens=None
    )


OPTIONS = {"dataset": "tiny", "data_hash": "h", "tokens_per_batch": 400, "window": 48}


@pytest.fixture(scope="session")
def recorded(loaded, documents, profile):
    """With damages, from windows that are shorter than the longer documents."""
    return record_trace(loaded, documents, profile=profile, **OPTIONS)
