"""Data sets of the Hub: whose split is whose, the local cache, and being out of reach."""

from __future__ import annotations

import time

import pytest

from var_moe.data.documents import SPLITS, share_of
from var_moe.data.readers import hub_name
from var_moe.data.text import check_dataset, load_text
from var_moe.errors import UsageError


def part(**columns):
    import datasets

    return datasets.Dataset.from_dict(columns)


def texts(name, count=400):
    return [f"{name} {i}" for i in range(count)]


def rows(name, count=400):
    return part(text=texts(name, count))


@pytest.fixture
def served(monkeypatch):
    """Let `load_dataset` answer with these splits; returns what it was asked for."""
    asked = []

    def serve(**parts):
        import datasets

        def load_dataset(repo, config):
            asked.append((repo, config))
            return parts

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr("var_moe.hub.reachable", lambda: True)
        return asked

    return serve


def loaded(name="someone/data"):
    return {split: [d.text for d in load_text(name, split).documents] for split in SPLITS}


def test_train_calibrates_and_validation_is_shared_with_certify(served):
    served(train=rows("train"), validation=rows("validation"), test=rows("test"))
    found = loaded()
    assert found["calibration"] == texts("train")
    assert found["test"] == texts("test")
    assert sorted(found["validation"] + found["certify"]) == sorted(texts("validation"))
    assert len(found["certify"]) == pytest.approx(400 * 15 / 40, abs=25)
    for split in ("validation", "certify"):
        assert {share_of(t, ("validation", "certify")) for t in found[split]} == {split}
    note = load_text("someone/data", "certify").note
    assert "shared out to validation, certify by a hash of each document, 25/15" in note
    assert load_text("someone/data", "test").note == "the Hub's test"


@pytest.mark.parametrize(
    "names",
    [
        ["train"],
        ["test"],
        ["anything"],
        ["train", "test"],
        ["train", "dev"],
        ["train", "validation", "test", "certify"],
        ["validation", "test"],
    ],
)
def test_no_text_is_in_two_splits_whatever_there_is(served, names):
    served(**{name: rows(name) for name in names})
    found = loaded()
    together = [text for each in found.values() for text in each]
    assert all(found.values())
    assert len(together) == len(set(together)) == 400 * len(names)


def test_a_split_of_its_own_name_and_all(served):
    served(train=rows("train"), extra=rows("extra"), test=rows("test"))
    assert len(load_text("someone/data", "train").documents) == 400
    assert len(load_text("someone/data", "extra").documents) == 400
    assert len(load_text("someone/data", "all").documents) == 1200
    with pytest.raises(UsageError, match="split 'dev': dataset 'someone/data' has train, extra"):
        load_text("someone/data", "dev")


def test_names(served):
    asked = served(train=rows("train"), validation=rows("v"), test=rows("t"))
    for name in ("wikitext", "wikitext:wikitext-103-raw-v1", "someone/data", "data:config"):
        load_text(name, "train")
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
        ("Salesforce/wikitext", "wikitext-103-raw-v1"),
        ("someone/data", None),
        ("data", "config"),
    ]


def test_documents_of_wikitext_are_articles(served):
    lines = [
        "",
        " = One = \n",
        "",
        " a \n",
        " = = Part = = \n",
        " b \n",
        "",
        " = Two = \n",
        " c \n",
    ]
    served(train=part(text=lines), validation=rows("v"), test=rows("t"))
    documents = load_text("wikitext", "calibration").documents
    assert [d.text for d in documents] == [
        " = One = \n a \n = = Part = = \n b \n",
        " = Two = \n c \n",
    ]


def test_a_data_set_without_a_text_column(served):
    served(train=part(question=["a"], answer=["b"]))
    with pytest.raises(UsageError, match="no column 'text'; it has question, answer"):
        load_text("someone/data", "train")
    served(train=part(text=[1]))
    with pytest.raises(UsageError, match="expected strings in column 'text'"):
        load_text("someone/data", "train")


def test_what_the_library_raises_is_one_line(served, monkeypatch):
    served()
    import datasets

    def fail(repo, config):
        raise ValueError("Config name is missing.\nPlease pick one: ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError) as caught:
        load_text("someone/data", "test")
    assert "(Config name is missing. Please pick one: ['a', 'b'])" in str(caught.value)
    assert "\n" not in str(caught.value)


# -- out of reach ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wikitext", "someone/data:config", "results/none"])
@pytest.mark.parametrize("call", [check_dataset, lambda name: load_text(name, "test")])
def test_out_of_reach_is_one_quick_line(monkeypatch, tmp_path, name, call):
    monkeypatch.setattr("var_moe.hub.reachable", lambda: False)
    monkeypatch.setattr("var_moe.hub._datasets_cache", lambda: tmp_path)
    start = time.perf_counter()
    with pytest.raises(UsageError) as caught:
        call(name)
    assert time.perf_counter() - start < 5
    assert str(caught.value).startswith(f"dataset {name!r}: neither a local path nor in the local")
    assert "\n" not in str(caught.value)


def test_no_name_of_the_hub(monkeypatch):
    monkeypatch.setattr("var_moe.hub.reachable", lambda: pytest.fail("asked the network"))
    with pytest.raises(UsageError, match="no name that the Hub could have"):
        check_dataset("two words")


@pytest.fixture
def cached_data(tmp_path, monkeypatch):
    """A data set as the datasets library leaves it in its cache."""
    import datasets
    from datasets.arrow_writer import ArrowWriter

    name, folder = "some_data", tmp_path / "someone___some_data" / "default" / "0.0.0" / "abc"
    folder.mkdir(parents=True)
    infos = {}
    for split in ("train", "validation", "test"):
        with ArrowWriter(path=str(folder / f"{name}-{split}.arrow")) as writer:
            for text in texts(split, 40):
                writer.write({"text": text})
            examples, size = writer.finalize()
        infos[split] = datasets.SplitInfo(
            name=split, num_bytes=size, num_examples=examples, dataset_name=name
        )
    datasets.DatasetInfo(
        features=datasets.Features({"text": datasets.Value("string")}),
        splits=datasets.SplitDict(infos),
        dataset_name=name,
        config_name="default",
        version="0.0.0",
    ).write_to_directory(str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr("var_moe.hub.reachable", lambda: False)
    return "someone/SomeData"


def test_a_cached_data_set_is_read_without_a_network(cached_data, monkeypatch):
    import datasets
    import huggingface_hub

    # As on a machine whose network is down, where nothing says so.
    places = (datasets.config, huggingface_hub.constants)
    for place in places:
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    check_dataset(cached_data)
    start = time.perf_counter()
    found = loaded(cached_data)
    assert time.perf_counter() - start < 5
    assert found["calibration"] == texts("train", 40)
    assert sorted(found["validation"] + found["certify"]) == sorted(texts("validation", 40))
    assert [place.HF_HUB_OFFLINE for place in places] == [False, False]


def test_parse():
    assert hub_name("a/b") == ("a/b", None)
    assert hub_name("a/b:c") == ("a/b", "c")
