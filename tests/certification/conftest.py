"""Results folders on a tiny model, whose losses on the text are made up where a test says so."""

from __future__ import annotations

import json
import math
import random
import zlib
from types import SimpleNamespace

import numpy as np
import pytest

WORDS = """
the router sends a token to an expert and table cache window entropy speed model layer value
index select from where order group join list dict tuple class def return yield
"""


@pytest.fixture(scope="session")
def certify_text(tmp_path_factory):
    """Sixty documents to validate on, eighty to certify on."""
    rng = random.Random(11)
    folder = tmp_path_factory.mktemp("certify_text")
    for split, count in {"calibration": 20, "validation": 60, "certify": 80, "test": 20}.items():
        rows = [{"text": " ".join(rng.choices(WORDS.split(), k=30))} for _ in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
    return folder


@pytest.fixture(scope="session")
def certify_profile(tiny_model_folder, certify_text, tmp_path_factory):
    from var_moe.cli import main

    folder = tmp_path_factory.mktemp("certify_profile")
    words = ["--model", str(tiny_model_folder), "--dataset", str(certify_text)]
    assert main(["profile", *words, "--output", str(folder), "--quiet"]) == 0
    return folder


@pytest.fixture
def words(tiny_model_folder, certify_text, certify_profile):
    """The command line of a certification, without its folder and --blocks."""
    return [
        *("--model", str(tiny_model_folder), "--dataset", str(certify_text)),
        *("--profile", str(certify_profile), "--quiet"),
    ]


@pytest.fixture
def results(tmp_path):
    """Makes a results folder with this best configuration, and a front if one is given."""

    def make(config, front=None):
        folder = tmp_path / "results"
        folder.mkdir(exist_ok=True)
        (folder / "best_config.json").write_text(json.dumps(config))
        if front is not None:
            value = {"schema_version": 1, "points": front}
            (folder / "pareto.json").write_text(json.dumps(value))
        return folder

    return make


@pytest.fixture
def made_up(monkeypatch):
    """Losses of random skipping: ``rate(share, document)`` higher per token, with noise.

    Attributes of what is returned can be changed by the test.
    """
    from var_moe.evaluation.perplexity import DocumentLosses
    from var_moe.routing.counts import RoutingReport

    world = SimpleNamespace(rate=lambda share, _text: 0.04 * share, noise=0.003, scored=0)

    def losses(self, policy, *, what="perplexity"):
        base = self.baseline_losses
        change = []
        for document in self.documents:
            seed = zlib.crc32(document.ids.tobytes())
            wobble = world.noise * np.random.default_rng(seed).normal()
            change.append(math.log1p(world.rate(policy.share, document.ids)) + wobble)
        world.scored += len(change)
        tokens = int(base.tokens.sum())
        pairs = round((2 - policy.share) * tokens)
        report = RoutingReport(
            tokens=tokens, top_k=2, tier_counts=((0, 0, tokens),), executed_pairs=(pairs,)
        )
        nll = base.nll + np.array(change) * base.tokens
        return DocumentLosses(nll=nll, tokens=base.tokens), report

    monkeypatch.setattr("var_moe.evaluation.evaluator.Evaluator.losses", losses)
    monkeypatch.setattr(
        "var_moe.evaluation.evaluator.Evaluator._fastest", ("eager", {"eager": 1.0})
    )
    return world
