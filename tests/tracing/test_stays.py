"""Stays computed for all tokens at once are those that the running cache gives one by one."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from var_moe.routing.lru import Clock, Stream, Walk
from var_moe.tracing.stays import Recency, smaller_before

SETTINGS = settings(max_examples=300, deadline=None, derandomize=True)


def walked(keys: list[int], documents: list[int] | None, size: int, ttl: float) -> list[int]:
    """Number of each token's stay by the cache's own walk, -1 where it has none."""
    walk = Walk(size=size, ttl=ttl, free=[], base=0)
    streams: dict[int, Stream] = {}
    for key, document in zip(keys, documents or [0] * len(keys), strict=True):
        stream = streams.setdefault(document, Stream(Clock()))
        walk.row(stream, [key], [True], [True])
    return walk.local


def renumbered(numbers: list[int]) -> list[int]:
    """Numbers in the order of first appearance; -1 stays."""
    seen: dict[int, int] = {-1: -1}
    return [seen.setdefault(number, len(seen) - 1) for number in numbers]


def assert_agrees(keys: list[int], documents: list[int] | None, size: int, ttl: float) -> None:
    recency = Recency.of(
        np.array(keys, dtype=np.int64),
        None if documents is None else np.array(documents, dtype=np.int64),
    )
    expected = renumbered(walked(keys, documents, size, ttl))
    stays = recency.stays(size=size, ttl=ttl)
    groups: dict[int, list[int]] = {}
    for token, number in enumerate(expected):
        groups.setdefault(number, []).append(token)
    groups.pop(-1, None)
    ends = [*stays.first[1:].tolist(), len(stays.token)]
    found = [stays.token[a:b].tolist() for a, b in zip(stays.first, ends, strict=False)]
    assert sorted(found) == sorted(group for group in groups.values() if len(group) > 1)
    assert stays.sizes.tolist() == [len(group) for group in found]


@SETTINGS
@given(
    keys=st.lists(st.integers(-3, 5), max_size=60),
    size=st.integers(0, 10),
    ttl=st.sampled_from([1e9, 1, 2, 2.5, 3, 7.000000000000001, 12, 20]),
    cuts=st.none() | st.lists(st.integers(0, 60), max_size=4),
)
def test_random_streams(keys, size, ttl, cuts):
    documents = None
    if cuts is not None:
        documents = [sum(cut <= token for cut in cuts) for token in range(len(keys))]
    assert_agrees(keys, documents, size, ttl)


@pytest.mark.parametrize("size", [1, 5, 50, 1000])
@pytest.mark.parametrize("ttl", [1, 30, 400, 60_000])
def test_a_longer_stream(size, ttl):
    rng = random.Random(size)
    keys = [min(int(rng.expovariate(0.02)), 300) * 10**15 for _ in range(2000)]
    assert_agrees(keys, None, size, ttl)
    assert_agrees(keys, sorted(rng.choices(range(5), k=2000)), size, ttl)


def test_one_key_expires_at_every_token():
    """The number of rounds is that of stays, also where there are many."""
    assert_agrees([7] * 500, None, 3, 1)
    assert_agrees([7] * 500, None, 3, 2)


@SETTINGS
@given(st.integers(0, 70).flatmap(lambda size: st.permutations(range(size))))
def test_smaller_before(order):
    expected = [sum(v < value for v in order[:at]) for at, value in enumerate(order)]
    assert smaller_before(np.array(order, dtype=np.int64)).tolist() == expected
