"""Files of a model: what is damaged or not the file itself is named before the work."""

from __future__ import annotations

import json

import pytest

from var_moe.errors import UsageError
from var_moe.models.loading import check_name

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4915520\n"
FILES = ("config.json", "model.safetensors", "tokenizer.json")


@pytest.mark.parametrize("file", FILES)
def test_a_pointer_or_nothing_in_place_of_a_file(folder, file):
    (folder / file).write_text(POINTER)
    with pytest.raises(UsageError, match=f"{file} is a Git LFS pointer .* `git lfs pull`"):
        check_name(str(folder))
    (folder / file).write_text("")
    with pytest.raises(UsageError, match=f"{file} is empty"):
        check_name(str(folder))


def test_a_damaged_tokenizer(refused, folder):
    (folder / "tokenizer.json").write_text("[]")
    assert "its tokenizer cannot be loaded (" in refused(folder)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("model.gguf", "model.gguf is a GGUF file"),
        ("adapter_config.json", "is an adapter of None, not a model"),
        ("snapshots/0a1b/config.json", "snapshots/0a1b/config.json lies below; give its folder"),
    ],
)
def test_something_else_in_place_of_a_model(refused, tmp_path, file, expected):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("{}")
    assert expected in refused(tmp_path)


def test_files_that_may_not_be_read(refused, folder, monkeypatch):
    def fail(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.open", fail)
    assert "cannot be read ([Errno 13] Permission denied: " in refused(folder)


@pytest.mark.parametrize("content", [{"metadata": {}}, {"metadata": {}, "weight_map": [1]}])
def test_an_index_that_says_nothing(refused, folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))
    assert "index.json lacks weight_map" in refused(folder)


@pytest.mark.parametrize("name", ["a" * 300, "~no such user/model"])
def test_a_name_that_no_file_can_have(refused, name):
    assert "cannot be looked for (" in refused(name)
