"""A tiny model, its text and its trace: what the tests of this room share."""

from __future__ import annotations

import pytest
from traces import OPTIONS

from var_moe.calibration.collect import collect_profile
from var_moe.data.documents import TextDocument
from var_moe.data.encoding import encode
from var_moe.models.loading import LoadedModel
from var_moe.tracing.record import record_trace


@pytest.fixture(scope="session")
def loaded(make_tiny_mixtral, tiny_tokenizer):
    return LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")


@pytest.fixture(scope="session")
def documents(tiny_texts, tiny_tokenizer):
    texts = [TextDocument(f"d{i}", "s", text) for i, text in enumerate(tiny_texts[:16])]
    return encode(texts, tiny_tokenizer)


@pytest.fixture(scope="session")
def make_profile(tiny_texts, tiny_tokenizer):
    texts = [TextDocument(str(i), "s", text) for i, text in enumerate(tiny_texts[40:])]
    calibration = encode(texts, tiny_tokenizer)

    def make(loaded):
        return collect_profile(loaded, calibration, dataset="tiny", data_hash="h", max_tokens=None)

    return make


@pytest.fixture(scope="session")
def profile(loaded, make_profile):
    return make_profile(loaded)


@pytest.fixture(scope="session")
def recorded(loaded, documents, profile):
    """With damages, from windows that are shorter than the longer documents."""
    return record_trace(loaded, documents, profile=profile, **OPTIONS)
