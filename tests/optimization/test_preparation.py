"""Validation's halves."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers.processors import ByteLevel

from var_moe.calibration.fitted_files import DAMAGE_FILE
from var_moe.calibration.profile import RoutingProfile
from var_moe.data.documents import EncodedDocument
from var_moe.errors import UsageError
from var_moe.models.loading import load_model
from var_moe.optimization.preparation import DAMAGE_FOLDER, halves, obtain_profile


def documents(ids):
    return [EncodedDocument(id=name, source="s", ids=np.arange(3)) for name in ids]


def test_sections_of_a_page_stay_in_one_half():
    text = documents([f"book/page{i % 40}#{i}" for i in range(400)])
    first, second = halves(text)
    assert sorted(d.id for d in [*first, *second]) == sorted(d.id for d in text)
    pages = [{d.id.split("#")[0] for d in half} for half in (first, second)]
    assert pages[0].isdisjoint(pages[1])
    assert abs(len(first) - len(second)) <= 10
    # A search takes the first of its half: they must be of many pages.
    assert len({d.id.split("#")[0] for d in first[:20]}) > 8
    assert [d.id for d in halves(text)[0]] == [d.id for d in first]


def test_documents_of_one_file_are_not_one_page():
    first, second = halves(documents([f"c#notes.jsonl:{i}" for i in range(30)]))
    assert len(first) == len(second) == 15


def mixed(**counts):
    return [
        EncodedDocument(f"{name}/{i}", "s", np.arange(3), name)
        for name, count in counts.items()
        for i in range(count)
    ]


def test_each_data_set_is_halved_by_itself():
    first, second = halves(mixed(a=30, b=10))
    for half in (first, second):
        count = [sum(d.dataset == name for d in half) for name in "ab"]
        assert count == [15, 5]
        # A search takes the first of its half: they are as the whole.
        assert sum(d.dataset == "a" for d in half[:8]) == 6
    alone = halves(mixed(a=30))[0]
    assert [d.id for d in first if d.dataset == "a"] == [d.id for d in alone]


def test_where_each_is_judged_the_first_are_as_many_of_each():
    first, _ = halves(mixed(a=30, b=10), equal=True)
    assert [d.dataset for d in first[:10]] == ["a", "b"] * 5
    assert {d.id for d in first} == {d.id for d in halves(mixed(a=30, b=10))[0]}


@pytest.mark.slow
def test_a_profile_is_obtained_once_with_its_damages(tiny_model_folder, tiny_text_folder, tmp_path):
    loaded, dataset = load_model(str(tiny_model_folder)), str(tiny_text_folder)
    said = []

    def obtain(given=None):
        said.clear()
        return obtain_profile(
            loaded,
            dataset,
            given=given,
            folder=tmp_path,
            tokens=300,
            progress=lambda what, done, total: said.append(what),
        )

    first, place = obtain()
    assert list(first.damages) == ["none", "means"]
    assert set(said) == {"profiling the routing", "predicting damages"}
    assert not (place / DAMAGE_FOLDER).exists()

    def hashes(profile):
        return {name: damage.hash for name, damage in profile.damages.items()}

    assert hashes(obtain()[0]) == hashes(first)
    assert said == []
    # One that an earlier version left, or a kill before its damages.
    (place / DAMAGE_FILE).unlink()
    assert hashes(obtain()[0]) == hashes(first)
    assert set(said) == {"predicting damages"}
    assert hashes(RoutingProfile.load(place)) == hashes(first)
    # One that is given is taken as it is.
    (place / DAMAGE_FILE).unlink()
    assert obtain(given=place)[0].damages == {}
    assert said == []


def test_a_profile_that_a_search_is_resumed_with_is_not_replaced(
    tiny_model_folder, tiny_text_folder, tmp_path
):
    """Its results could not be validated any more."""
    loaded, dataset = load_model(str(tiny_model_folder)), str(tiny_text_folder)
    options = {"given": None, "folder": tmp_path, "keep": True, "damages": False}
    first, place = obtain_profile(loaded, dataset, tokens=300, **options)
    assert obtain_profile(loaded, dataset, tokens=300, **options)[0].hash == first.hash
    with pytest.raises(UsageError, match="with 200 tokens; resume with the same --model"):
        obtain_profile(loaded, dataset, tokens=200, **options)
    assert RoutingProfile.load(place).hash == first.hash


def test_a_profile_of_the_text_as_it_was_tokenised_before_is_not_reused(
    tiny_model_folder, tiny_text_folder, tmp_path
):
    """One start token less, with the same vocabulary: as an edited tokenizer_config.json leaves."""
    dataset = str(tiny_text_folder)
    options = {"given": None, "folder": tmp_path, "tokens": 300, "damages": False}
    loaded = load_model(str(tiny_model_folder))
    first, _ = obtain_profile(loaded, dataset, **options)
    loaded.tokenizer.backend_tokenizer.post_processor = ByteLevel()
    again, _ = obtain_profile(loaded, dataset, **options)
    assert again.hash != first.hash
    assert again.hash == obtain_profile(loaded, dataset, **options)[0].hash
