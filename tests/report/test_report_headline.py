"""The answer in one sentence, and whether it is good news."""

from __future__ import annotations

import json

from var_moe.report.folder import read_results
from var_moe.report.headline import BAD, GOOD, headline
from var_moe.report.page import build_report


def top(folder):
    return headline(read_results(folder))


def test_the_strongest_answer_comes_first(sample):
    found = top(sample)
    certificate = json.loads((sample / "certificate.json").read_text())
    assert found.answers[0].sentence == certificate["sentence"]
    assert "On test, which nothing was chosen on, it keeps the bound" in found.answers[1].sentence
    assert [answer.tone for answer in found.answers] == [GOOD, GOOD, GOOD]
    assert found.answers[2].sentence.startswith("Chosen by the search, not certified: fastest")
    assert found.configuration == certificate["certified_config"]


def test_cards_are_of_the_certified_configuration_alone(sample):
    cards = {card.label: (card.value, card.detail) for card in top(sample).cards}
    assert cards == {
        "certified perplexity rise": ("< 1%", "measured +0.78% [0.72, 0.83]"),
        "certified speed": ("≥ 1.129x", "measured 1.240x [1.176, 1.322]"),
        "executed experts per token": ("1.35", "of 2"),
    }


def test_without_a_certificate_cards_are_of_the_winner(sample):
    (sample / "certificate.json").unlink()
    found = top(sample)
    values = {card.label: card.value for card in found.cards}
    assert found.answers[-1].sentence.startswith("Fastest configuration")
    assert values["speedup, validation"] == "1.354x"
    assert values["perplexity, validation"] == "+0.92%"
    assert values["executed experts per token"] == "1.27"


def test_a_measurement_of_another_configuration_says_so(change):
    found = top(change("validation_results", config={"policy": "top_p", "settings": {"p": 0.5}}))
    assert "which nothing was chosen on, another (policy top_p" in found.answers[1].sentence


def test_text_that_was_seen_is_not_called_held_out(change):
    folder = change("validation_results", seen=["this text was profiled"])
    assert top(folder).answers[1].sentence.startswith("On test, which was profiled or chosen on")
    (section,) = (one for one in build_report(folder).sections if one.name == "held-out")
    assert section.title == "On text that was seen (test)"


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
    assert list(found.cards) == []


def test_comparisons_name_the_policy_that_costs_least(alone):
    found = top(alone("comparison"))
    assert found.answers[0].sentence == (
        "At equal experts per token, the smallest rise of perplexity has "
        "damage + learned (+0.22% at 1.6, +0.81% at 1.3)."
    )
