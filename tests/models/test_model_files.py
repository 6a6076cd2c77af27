"""Files of a model: what is damaged or not the file itself is named before the work."""

from __future__ import annotations

import json

import pytest
from damaged import rewrite, without

from var_moe.errors import UsageError
from var_moe.models.loading import check_name

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4915520\n"
FILES = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")


@pytest.mark.parametrize("file", FILES)
def test_a_pointer_or_nothing_in_place_of_a_file(folder, file):
    (folder / file).write_text(POINTER)
    with pytest.raises(UsageError, match=f"{file} is a Git LFS pointer .* `git lfs pull`"):
        check_name(str(folder))
    (folder / file).write_text("")
    with pytest.raises(UsageError, match=f"{file} is empty"):
        check_name(str(folder))


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer_config.json"])
def test_no_object_in_a_file(folder, file):
    for content in ("[]", "{"):
        (folder / file).write_text(content)
        with pytest.raises(UsageError, match=f"{file} is not a valid JSON object"):
            check_name(str(folder))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"version": "2.0"}, "tokenizer.json is written by a later version than tokenizers"),
        ({"model": {"type": "New"}}, "tokenizer.json is damaged, or written by a later version"),
        ({"normalizer": {"type": "New"}}, "tokenizer.json is damaged, or written by a later"),
        (None, "its tokenizer cannot be loaded ("),
    ],
)
def test_a_tokenizer_of_a_later_version(refused, folder, values, expected):
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text())
    path.write_text("[]" if values is None else json.dumps({**whole, **values}))
    assert expected in refused(folder)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("model.gguf", "model.gguf is a GGUF file"),
        ("adapter_config.json", "is an adapter of None, not a model"),
        ("consolidated.00.pth", "is in the layout of the model's makers"),
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
    assert "index.json lacks weight_map or metadata" in refused(folder)


def test_experts_that_do_not_belong_together(refused, folder):
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:32].clone()}))
    assert f"{name} has shape (32, 64), other experts have (96, 64)" in refused(folder)
    without(folder, name)
    assert f"{name} is missing, other experts have (96, 64)" in refused(folder)
    without(folder, name.replace(".3.", ".4."))
    assert "what its experts are made of is missing, or has another shape" in refused(folder)


@pytest.mark.parametrize("name", ["a" * 300, "~no such user/model"])
def test_a_name_that_no_file_can_have(refused, name):
    assert "cannot be looked for (" in refused(name)
