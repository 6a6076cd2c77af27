"""Folders of models, to be damaged."""

import shutil

import pytest

from var_moe.errors import UsageError, VarMoeError
from var_moe.models.loading import load_model


@pytest.fixture
def refused():
    """The one line of a refusal."""

    def run(name, *, kind=UsageError, **options):
        with pytest.raises(VarMoeError) as caught:
            load_model(str(name), **options)
        assert type(caught.value) is kind
        line = str(caught.value)
        assert "\n" not in line
        assert len(line) < 500
        return line

    return run


@pytest.fixture
def folder(tiny_model_folder, tmp_path):
    """A copy of the tiny model's folder, to be damaged."""
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


@pytest.fixture
def cached_model(tiny_model_folder, tmp_path, monkeypatch):
    """The tiny model as the Hub's client leaves it in its cache, and no network."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny_model_folder, place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("var_moe.hub.reachable", lambda: False)
    return place / "snapshots" / revision
