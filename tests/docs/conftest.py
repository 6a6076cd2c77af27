"""A folder in which the snippets of README and docs find what they say is there."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from var_moe.cli import main

DOCUMENTS = {"calibration": 40, "validation": 120, "certify": 60, "test": 20}


def _write_demo_text(folder: Path, words: list[str]) -> None:
    """Text in the form of the bundled demo's, of which a few documents are enough here."""
    import pandas as pd

    dice = random.Random(7)
    rows = []
    for split, number in DOCUMENTS.items():
        for at in range(number):
            text = " ".join(dice.choices(words, k=dice.randint(10, 40)))
            source = ("postgres", "python", "wordnet")[at % 3]
            rows.append({"id": f"{source}/{split}-{at}", "source": source, "text": text})
            rows[-1]["split"] = split
    table = pd.DataFrame(rows)
    for split, part in table.groupby("split"):
        part.drop(columns="split").to_parquet(folder / f"{split}.parquet")
    table.assign(source="kjv").to_parquet(folder / "kjv.parquet")


@pytest.fixture(scope="session")
def demo_places(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_texts: list[str]
) -> tuple[Path, Path]:
    """Folders of a tiny random model and of a little text, to stand in for the demo's."""
    folder = tmp_path_factory.mktemp("demo_text")
    _write_demo_text(folder, " ".join(tiny_texts).split())
    return tiny_model_folder, folder


@contextmanager
def standing_in(places: tuple[Path, Path]) -> Iterator[pytest.MonkeyPatch]:
    """Within it, they have the name demo, so that snippets run as they stand.

    Not a fixture of the session: other tests mean the demo.
    """
    model, text = places
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("var_moe.models.loading.DEMO_FOLDER", model)
        patch.setattr("var_moe.data.text.DEMO_FOLDER", text)
        yield patch


@pytest.fixture(scope="session")
def results(demo_places: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``results/phase3`` as `make tune` and `var-moe guard` leave it, and a folder ``mine``."""
    place = tmp_path_factory.mktemp("workspace")
    tuned = ["tune", "--max_samples", "10", "--final_samples", "30", "--n_calls", "3"]
    with standing_in(demo_places) as patch:
        patch.chdir(place)
        assert main([*tuned, "--max_degradation", "0.5", "--seed", "1", "--quiet"]) == 0
        assert main(["guard", "results/phase3", "--quiet"]) == 0
        assert main(["export", "results/phase3", "--output", "mine"]) == 0
    return place


@pytest.fixture
def small_demo(demo_places: tuple[Path, Path]) -> Iterator[None]:
    """`standing_in` for as long as a test takes."""
    with standing_in(demo_places):
        yield
