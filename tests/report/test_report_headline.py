"""The answer in one sentence, and whether it is good news."""

from __future__ import annotations

import json

from var_moe.report.folder import read_results
from var_moe.report.headline import BAD, GOOD, headline


def top(folder):
    return headline(read_results(folder))


def test_the_strongest_answer_comes_first(sample):
    found = top(sample)
    certificate = json.loads((sample / "certificate.json").read_text())
    assert found.answers[0].sentence == certificate["sentence"]
    assert "On test, which nothing was chosen on, it keeps the bound" in found.answers[1].sentence
    assert [answer.tone for answer in found.answers] == [GOOD, GOOD, GOOD]
    assert found.configuration == json.loads((sample / "best_config.json").read_text())


def test_cards_carry_the_figures(sample):
    values = {card.label: card.value for card in top(sample).cards}
    assert values["certified perplexity rise"] == "< 1%"
    assert values["certified speed"] == "≥ 1.129x"
    assert values["speedup, validation"] == "1.354x"
    assert values["perplexity, validation"] == "+0.92%"
    assert values["executed experts per token"] == "1.27"


def test_a_broken_bound_is_bad_news(change):
    found = top(change("validation_results", degradation_upper_95=0.02))
    assert "breaks the bound of 1%" in found.answers[1].sentence
    assert found.answers[1].tone == BAD


def test_no_certificate_is_bad_news(change):
    found = top(change("certificate", certified=False, sentence="Nothing is certified."))
    assert found.answers[0].tone == BAD
    assert not [card for card in found.cards if card.label.startswith("certified")]


def test_nothing_found_is_bad_news(change):
    folder = change("optimization_results", best_params=None)
    for name in ("certificate", "validation_results"):
        (folder / f"{name}.json").unlink()
    found = top(folder)
    assert [answer.tone for answer in found.answers] == [BAD]
    assert found.cards == ()


def test_comparisons_name_the_policy_that_costs_least(alone):
    found = top(alone("comparison"))
    assert found.answers[0].sentence.startswith("Least perplexity: at 1.6, damage + learned")
