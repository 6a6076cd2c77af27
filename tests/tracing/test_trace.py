"""A trace's folder: whole, damaged, interrupted; and what it is refused for."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from traces import OPTIONS

from var_moe.errors import UsageError
from var_moe.tracing import record
from var_moe.tracing.record import record_trace
from var_moe.tracing.trace import RoutingTrace


def assert_same(one: RoutingTrace, two: RoutingTrace) -> None:
    assert one.columns().keys() == two.columns().keys()
    for name, value in one.columns().items():
        assert value.dtype == two.columns()[name].dtype
        assert torch.equal(value, two.columns()[name]), name
    assert torch.equal(one.starts, two.starts)
    assert torch.equal(one.documents, two.documents)
    assert one.head == two.head


@pytest.fixture
def folder(loaded, documents, profile, tmp_path, monkeypatch):
    """Several shards."""
    monkeypatch.setattr(record, "_FORWARDS_PER_SHARD", 2)
    record_trace(loaded, documents, profile=profile, folder=tmp_path / "t", **OPTIONS)
    return tmp_path / "t"


def test_round_trip(recorded, folder):
    assert len(list(folder.glob("trace-*.safetensors"))) >= 2
    assert_same(RoutingTrace.load(folder), recorded)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 255
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "missing shard"),
        (truncate, "damaged or truncated shard"),
        (flip, "damaged or truncated shard"),
        (lambda path: path.write_bytes(b""), "damaged or truncated shard"),
    ],
    ids=["missing", "truncated", "changed", "empty"],
)
def test_a_bad_shard_is_named(folder, harm, words):
    harm(folder / "trace-00001.safetensors")
    with pytest.raises(UsageError, match="make it again with `var-moe trace`") as caught:
        RoutingTrace.load(folder)
    assert f"trace-00001.safetensors: {words}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bad_head(folder, tmp_path):
    with pytest.raises(UsageError, match="no such trace folder"):
        RoutingTrace.load(tmp_path / "nowhere")
    head = json.loads((folder / "trace.json").read_text())
    for change in ({"starts": [0, 5]}, {"documents": None}, {"tokens": 7}):
        (folder / "trace.json").write_text(json.dumps({**head, **change}))
        with pytest.raises(UsageError, match=r"trace.json: not (of the shards|as this version)"):
            RoutingTrace.load(folder)
    (folder / "trace.json").write_text(json.dumps({**head, "schema_version": 99}))
    with pytest.raises(UsageError, match=r"trace.json: not a trace of schema"):
        RoutingTrace.load(folder)
    (folder / "trace.json").unlink()
    with pytest.raises(UsageError, match=r"trace.json: missing, so the recording did not end"):
        RoutingTrace.load(folder)


def recording(loaded, documents, folder, *, stop=None, **options):
    """Record into ``folder``; returns the tokens done after each forward that ran."""
    done = []

    def progress(tokens, total):
        done.append(tokens)
        if stop is not None and len(done) == stop:
            raise KeyboardInterrupt

    trace = None
    with contextlib.suppress(KeyboardInterrupt):
        trace = record_trace(
            loaded, documents, folder=folder, progress=progress, **{**OPTIONS, **options}
        )
    return trace, done


def test_killed_and_resumed(recorded, loaded, documents, profile, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_FORWARDS_PER_SHARD", 2)
    place = tmp_path / "t"
    _, before = recording(loaded, documents, place, stop=4, profile=profile)
    # Killed in the fourth forward: one shard of two is whole.
    assert [path.name for path in place.iterdir()] == ["trace-00000.safetensors"]
    trace, after = recording(loaded, documents, place, profile=profile)
    assert after[0] == before[2]
    assert_same(trace, recorded)
    assert_same(RoutingTrace.load(place), recorded)
    again, none = recording(loaded, documents, place, profile=profile)
    assert none == []
    assert_same(again, recorded)


def test_other_text_or_options_start_anew(loaded, documents, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "_FORWARDS_PER_SHARD", 1)
    for change in ({"data_hash": "other"}, {"damage": False}, {"window": 32}, {"seed": 1}):
        place = tmp_path / str(change)
        _, before = recording(loaded, documents, place, stop=4)
        truncate(place / "trace-00002.safetensors")
        _, resumed = recording(loaded, documents, place, stop=4)
        assert resumed[0] == before[2]
        _, after = recording(loaded, documents, place, stop=1, **change)
        assert after[0] <= before[0]
        assert not list(place.iterdir())


def test_another_profile_is_refused(recorded, loaded, documents, profile):
    recorded.check_profile(profile)
    other = replace(profile, head={**profile.head, "hash": "f" * 64})
    with pytest.raises(UsageError, match="'ffffffffffff' does not fit the trace") as caught:
        recorded.check_profile(other)
    assert profile.hash[:12] in str(caught.value)
    # Without residual means in it, any profile of the model serves.
    record_trace(loaded, documents[:2], **OPTIONS).check_profile(other)
    with pytest.raises(UsageError, match="'other' does not fit the trace of model 'tiny'"):
        recorded.check_profile(
            replace(profile, head={**profile.head, "model": "other", "top_k": 1})
        )
