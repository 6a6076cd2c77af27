"""Which configurations are put to the test, the frozen study, and the ledger."""

from __future__ import annotations

import itertools
import json

import pytest
from certification_helpers import point, skip

from var_moe.certification.plan import (
    FROZEN_FILE,
    LEDGER_FILE,
    CertifySettings,
    Ledger,
    Study,
    find_candidates,
)
from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.optimization.candidate import Candidate


def find(folder, *, at_most=10):
    return find_candidates(folder, max_degradation=0.01, at_most=at_most)


def shares(candidates):
    return [one.settings["share"] for one in candidates.values()]


def test_the_choice_and_safer_points_of_the_front(results):
    front = [point(i / 100) for i in range(1, 60)]  # 0.04% to 2.36%
    candidates = find(results(skip(0.235), front))
    assert len(candidates) == 10
    assert next(iter(candidates)) == "best"
    assert shares(candidates)[0] == 0.235
    others = shares(candidates)[1:]
    assert others[0] == 0.01  # the safest
    assert others[-1] == 0.24  # the fastest that is believed to keep 1%
    gaps = [b - a for a, b in itertools.pairwise(others)]
    assert max(gaps) < 0.05  # evenly spread
    assert len(find(results(skip(0.235), front), at_most=3)) == 3


def test_points_of_one_name_are_all_tested(results):
    front = [{**point(share), "name": "best"} for share in (0.1, 0.2)]
    candidates = find(results(skip(0.23), front))
    assert sorted(shares(candidates)) == [0.1, 0.2, 0.23]
    assert next(iter(candidates)) == "best"


def test_equal_candidates_are_one(results):
    candidates = find(results(skip(0.2), [point(0.2), point(0.1)]))
    assert sorted(shares(candidates)) == [0.1, 0.2]


def test_where_nothing_is_below_the_bound_the_safest_is_asked(results):
    candidates = find(results(skip(0.5), [point(0.4), point(0.5), point(0.6)]))
    assert shares(candidates) == [0.5, 0.4]


def test_var_is_certified_with_a_cache_of_each_document(results):
    front = [{"config": VARConfig().to_dict(), "degradation": 0.001}]
    candidates = find(results(VARConfig(confidence_threshold=0.6).to_dict(), front))
    assert [one.settings["cache_scope"] for one in candidates.values()] == ["document"] * 2


def test_a_nearest_miss_stands_in_for_a_choice(results, tmp_path):
    folder = results(skip(0.4))
    (folder / "best_config.json").rename(folder / "nearest_miss.json")
    (folder / "nearest_miss.json").write_text(json.dumps({"config": skip(0.4)}))
    candidates = find(folder)
    assert list(candidates) == ["nearest miss"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not valid JSON"),
        ('{"schema_version": 99}', "not a front of schema 1"),
        (
            '{"schema_version": 1, "points": [{"config": {"policy": "x"}}]}',
            "'degradation' is missing",
        ),
        (
            '{"schema_version": 1, "points": [{"config": {"x": 1}, "degradation": 0}]}',
            "unknown field 'x'",
        ),
    ],
)
def test_a_damaged_front(results, content, expected):
    folder = results(skip(0.4))
    (folder / "pareto.json").write_text(content)
    with pytest.raises(UsageError, match=expected) as caught:
        find(folder)
    assert "pareto.json" in str(caught.value)


def test_an_empty_folder(tmp_path):
    with pytest.raises(UsageError, match=r"neither pareto.json nor best_config.json"):
        find(tmp_path)


def study(**changes):
    named = {"best": Candidate(policy="var")}
    values = {"candidates": named, "settings": CertifySettings(), "identity": {"model": "m"}}
    return Study(**{**values, **changes})


def test_a_study_keeps_its_order(tmp_path):
    assert study().freeze(tmp_path) is None
    study().write(tmp_path, [{"name": "best"}])
    assert study().freeze(tmp_path) == [{"name": "best"}]
    other = study(settings=CertifySettings(alpha=0.1))
    assert other.hash != study().hash
    assert other.freeze(tmp_path) is None
    assert json.loads((tmp_path / FROZEN_FILE).read_text())["hash"] == other.hash
    for changed in (
        study(candidates={"best": Candidate(policy="var", settings={"cache_size": 7})}),
        study(identity={"model": "n"}),
    ):
        assert changed.hash != study().hash


def test_each_text_can_be_used_for_one_certificate_only(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.check_unused("text", "one")
    ledger.open("text", "one", confirmatory=True)
    with pytest.raises(UsageError, match="opened before, for other candidates"):
        ledger.check_unused("text", "two")
    # Interrupted, the same study goes on; finished, it does not.
    ledger.check_unused("text", "one")
    ledger.open("text", "one", confirmatory=True)
    ledger.finish("text", "one", certified=True)
    (entry,) = ledger.entries()
    assert (entry["state"], entry["certified"]) == ("finished", True)
    with pytest.raises(UsageError, match="tested on this certify part before"):
        ledger.check_unused("text", "one")
    with pytest.raises(UsageError, match="opened before, for other candidates"):
        ledger.check_unused("text", "two")
    ledger.check_unused("other text", "two")


@pytest.mark.parametrize("content", ["{", "[]", '{"entries": 3}', '{"entries": [{}]}'])
def test_a_damaged_ledger_is_not_ignored(tmp_path, content):
    (tmp_path / LEDGER_FILE).write_text(content)
    with pytest.raises(UsageError, match=LEDGER_FILE):
        Ledger(tmp_path).entries()
