"""Load, tune, apply, generate: what a new user writes (the README's own lines run in docs/)."""

from __future__ import annotations

import json

import pytest

from var_moe import UsageError, load_model, tune
from var_moe.optimization.settings import TuneSettings

SMALL = {
    "method": "random",
    "policy": "naee",
    "n_calls": 1,
    "max_samples": 12,
    "final_samples": 12,
    "final_blocks": 1,
    "candidates": 1,
    "calibration_tokens": 4_000,
    "seed": 1,
    "verbose": False,
}


@pytest.mark.slow
def test_load_tune_apply_generate(tiny_model_folder, tmp_path):
    text = tmp_path / "text.jsonl"
    rows = [{"text": f"the router sends token {n} to a table"} for n in range(400)]
    text.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model = load_model(str(tiny_model_folder))
    asked = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    before = model.generate("the router", **asked)
    result = tune(model, text, max_degradation=0.9, output=tmp_path / "out", **SMALL)
    with result.policy(model) as session:
        assert model.generate("the router", **asked)
    report = session.report()
    assert report.tokens > 8
    assert report.experts_per_token < report.top_k
    # The block is over: the model is what it was.
    assert model.generate("the router", **asked) == before


@pytest.mark.parametrize(
    ("asked", "options", "expected"),
    [
        ("demo", {"max_degradaton": 0.01}, "no option 'max_degradaton'; expected max_degradation"),
        (TuneSettings(), {"seed": 1}, "seed given beside TuneSettings"),
        ("demo", {"max_degradation": -1}, "max_degradation = -1"),
        ("demo", {"dataset": "demo-kjv"}, "the text is given twice"),
        ("no-such-file.txt", {"seed": 1}, "no-such-file.txt"),
    ],
)
def test_options_are_checked(make_tiny_mixtral, tiny_tokenizer, asked, options, expected):
    from var_moe.models.loading import LoadedModel

    loaded = LoadedModel.of(make_tiny_mixtral(), tiny_tokenizer, name="tiny")
    with pytest.raises(UsageError, match=expected):
        tune(loaded, asked, **options)
