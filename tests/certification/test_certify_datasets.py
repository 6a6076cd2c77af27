"""Certificates over several data sets: the union claimed, or each; the truth is made up."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from certification_helpers import point, skip

from texts import WORDS, write_data_set
from var_moe.certification.inference import QualityClaim
from var_moe.certification.judging import groups_to_test, judge
from var_moe.certification.scoring import Measured
from var_moe.cli import main
from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """Two data sets; the documents of the second start with a Z, and are known by that."""
    root, rng = tmp_path_factory.mktemp("sets"), random.Random(3)
    sizes = {"calibration": 10, "validation": 60, "certify": 60}
    for name, mark in (("calm", ""), ("harsh", "Z ")):
        write_data_set(root / name, sizes, rng, words=WORDS[:14], length=12, mark=mark)
    return f"{root / 'calm'},{root / 'harsh'}"


@pytest.fixture
def certify(two_sets, tiny_model_folder, tiny_tokenizer, certify_profile, results, made_up, capsys):
    """Runs the command where one data set costs a third of what the other does."""
    mark = tiny_tokenizer("Z").input_ids[1]
    made_up.rate = lambda share, ids: (0.03 if ids[1] == mark else 0.01) * share

    def run(share, *more):
        folder = results(skip(share), [point(s, 0.02 * s) for s in (share / 2, share)])
        words = ["--model", str(tiny_model_folder), "--dataset", two_sets]
        words += ["--profile", str(certify_profile), "--quiet", "--blocks", "0"]
        code = main(["certify", str(folder), *words, *map(str, more)])
        captured = capsys.readouterr()
        return code, json.loads((folder / "certificate.json").read_text()), captured

    return run


def measured(change, tokens):
    return Measured(
        change=np.array(change),
        baseline_nll=np.ones(len(change)),
        tokens=np.array(tokens),
        learned=np.array([0]),
        decisions=np.array([1]),
        executed=np.array([1]),
        documents=np.ones(len(change), dtype=int),
    )


def test_the_largest_p_decides():
    """a: -1 nat below its allowance each; b: on it, give or take."""
    groups = {"a": np.array([0, 2, 4, 6]), "b": np.array([1, 3, 5, 7])}
    losses = measured([-1, 0.5, -1.1, -0.5, -0.9, 0.4, -1, -0.4], [10] * 8)
    claim = QualityClaim(bound=1e-9, alpha=0.05)
    verdict = judge("x", losses, groups, claim)
    p = {one.dataset: one.p for one in verdict.tests}
    assert p["a"] < 0.05 < p["b"]
    assert verdict.worst.dataset == "b"
    assert not verdict.passed
    union = judge("x", losses, {"": np.arange(8)}, claim)
    assert union.worst.units == 8
    assert union.p < p["b"]


def test_units_are_groups_to_test_only_where_that_is_claimed():
    units = [[EncodedDocument("d", "s", np.arange(3), name)] for name in "ab" * 10]
    judged = groups_to_test(units, robust=False, step="x")
    assert {name: at.tolist() for name, at in judged.items()} == {"": list(range(20))}
    judged = groups_to_test(units, robust=True, step="x")
    assert {name: at.tolist() for name, at in judged.items()} == {
        "a": list(range(0, 20, 2)),
        "b": list(range(1, 20, 2)),
    }
    with pytest.raises(UsageError, match="too few pages of 'b' for x: 9, at least 10 needed"):
        groups_to_test(units[:-1], robust=True, step="x")


def test_the_union_is_certified_and_each_data_set_described(certify):
    """+0.38% on one and +1.14% on the other: about +0.76% together."""
    code, certificate, _ = certify(0.38)
    assert code == 0
    assert certificate["certified_config"] == skip(0.38)
    assert not certificate["robust"]
    rows = {row["dataset"].rpartition("/")[2]: row for row in certificate["by_dataset"]}
    assert rows["calm"]["degradation"] == pytest.approx(0.0038, abs=0.001)
    assert rows["harsh"]["degradation"] == pytest.approx(0.0114, abs=0.001)
    assert rows["harsh"]["degradation_upper"] > 0.01  # the union hides it
    for row in rows.values():
        assert row["descriptive"]
        assert row["units"] == 60
        ratio = row["perplexity"] / row["baseline_perplexity"]
        assert ratio - 1 == pytest.approx(row["degradation"])
        low, high = row["degradation_interval"]
        assert low < row["degradation"] < row["degradation_upper"] < high
    assert any("The data sets apart" in line for line in certificate["not_claimed"])
    assert [part["documents"] for part in certificate["text"]["datasets"]] == [60, 60]


def test_robust_refuses_what_one_data_set_does_not_keep(certify):
    """Half as much keeps the bound on each: +0.19% and +0.57%."""
    code, certificate, _ = certify(0.38, "--robust")
    assert code == 0
    assert certificate["certified_config"] == skip(0.19)
    assert certificate["robust"]
    test = certificate["tests"][0]
    assert [row["passed"] for row in certificate["tests"]] == [True, False][
        : len(certificate["tests"])
    ]
    assert test["decided_by"].endswith("harsh")
    assert test["degradation"] == pytest.approx(0.0057, abs=0.001)
    assert test["p"] == max(row["p"] for row in test["by_dataset"])
    assert "on text like each of " in certificate["sentence"]
    assert not any(row["descriptive"] for row in certificate["by_dataset"])


def test_robust_alone_refuses_where_the_union_would_pass(certify):
    code, certificate, captured = certify(0.38, "--robust", "--candidates", 1)
    assert code == 1
    assert not certificate["certified"]
    assert certificate["nearest_miss"]["degradation"] == pytest.approx(0.0114, abs=0.001)
    assert "harsh, the worst" in captured.err


def test_robust_needs_several_data_sets(tiny_model_folder, results, capsys):
    words = ["--model", str(tiny_model_folder), "--quiet", "--dataset", "demo", "--robust"]
    assert main(["certify", str(results(skip(0.2))), *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--robust judges the worst of several data sets" in line
