"""Files are written whole or not at all."""

from __future__ import annotations

import pytest

from var_moe.errors import UsageError, VarMoeError
from var_moe.storage import (
    alone_in,
    atomic_write,
    atomic_write_json,
    atomic_write_text,
    check_output_folder,
    provenance,
    read_json,
    sha256_of,
)


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "result.json"
    atomic_write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        atomic_write(path, fail)
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        atomic_write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


def test_output_folder(tmp_path):
    assert check_output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()
    (tmp_path / "f").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        check_output_folder(tmp_path / "f" / "b")


def test_hash_tells_joins_apart():
    assert sha256_of(["ab", "c"]) != sha256_of(["a", "bc"])
    assert sha256_of(["ab"]) == sha256_of([b"ab"])


def test_provenance_names_versions_and_hardware():
    found = provenance()
    assert found["versions"]["torch"]
    assert found["hardware"]["cpus"] >= 1


def test_what_cannot_be_written_is_named_by_its_own_name(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("folder", "file/below.json", "x" * 300):
        with pytest.raises(VarMoeError) as found:
            atomic_write_text(tmp_path / name, "")
        assert str(found.value).startswith(f"{tmp_path / name}: cannot be written (")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_name_that_is_no_text_is_written_as_its_code(tmp_path):
    atomic_write_text(tmp_path / "a", "of b\udcff")
    assert (tmp_path / "a").read_text() == "of b\\udcff"


@pytest.mark.parametrize("name", ["b\udcff", "a\0b"])
def test_a_folder_that_libraries_cannot_write_is_refused_before_any_work(name, tmp_path):
    with pytest.raises(UsageError, match="choose another"):
        check_output_folder(tmp_path / name)


def test_a_file_that_an_editor_marked_as_utf_8_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5_000])
def test_json_that_cannot_be_held_is_named(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UsageError, match=r"x\.json: not valid JSON"):
        read_json(tmp_path / "x.json")


def test_tensors_that_do_not_fit_on_the_disk_name_their_file(tmp_path):
    from safetensors import SafetensorError

    def fail(_temporary):
        raise SafetensorError("Error while serializing: No space left on device")

    with pytest.raises(VarMoeError, match=r"x\.safetensors: cannot be written .*No space left"):
        atomic_write(tmp_path / "x.safetensors", fail)
    assert not list(tmp_path.iterdir())


def test_one_run_at_a_time_is_in_a_folder(tmp_path):
    folder = tmp_path / "a" / "results"
    with alone_in(folder), pytest.raises(UsageError, match="results: another run"):  # noqa: SIM117
        with alone_in(folder):
            pass
    assert not folder.exists()  # nothing was written
    with alone_in(folder):
        (folder / "x").write_text("")
    assert folder.is_dir()
