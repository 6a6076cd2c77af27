"""A tiny model, its text, and damages to fit a compensation with."""

from __future__ import annotations

import pytest

from var_moe.calibration.calibrate import calibration_trace
from var_moe.calibration.fit_damage import fit_damage, predicted, tau_for
from var_moe.data.documents import TextDocument
from var_moe.data.encoding import encode
from var_moe.models.loading import LoadedModel

DATA = {"dataset": "tiny", "data_hash": "h"}


@pytest.fixture(scope="session")
def make_loaded(make_tiny_mixtral, tiny_tokenizer):
    """A tiny model with two MoE layers; K and dtype as asked."""

    def make(top_k=2, dtype="float32"):
        import torch

        model = make_tiny_mixtral(top_k=top_k, layers=2).to(getattr(torch, dtype))
        return LoadedModel.of(model, tiny_tokenizer, name="tiny")

    return make


@pytest.fixture(scope="session")
def documents(tiny_texts, tiny_tokenizer):
    texts = [TextDocument(f"d{i}", "s", text) for i, text in enumerate(tiny_texts[:30])]
    return encode(texts, tiny_tokenizer)


@pytest.fixture(scope="session")
def make_cuts(documents):
    """Damages of rescaled cuts, and taus that leave about 55 and 80% of the pairs."""

    def make(loaded):
        trace = calibration_trace(loaded, documents, data=DATA, compensation=None)
        damage = fit_damage(trace, vocabulary=300)
        sizes = predicted(trace, damage)
        return damage, [tau_for(sizes, share * loaded.top_k) for share in (0.55, 0.8)]

    return make
