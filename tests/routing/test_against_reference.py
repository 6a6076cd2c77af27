"""`VARPolicy` decides as the plain-Python oracle does, on random streams of forwards.

Weights are multiples of 1/64, so that sums are exact in float32 and ties occur; confidence
thresholds are either dyadic, where a share that equals them is exact as well, or off the grid
of shares, so that rounding decides nothing.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from routing_streams import Forward, Stream, Table, assert_agrees

from oracle import ReferenceRow, RouterChoice
from var_moe.config import VARConfig

GRID = 64
BESIDE = 1e-5  # shares of at most 8 weights of at most 16 lie further apart
CONFIDENCE = (0.3001, 0.5, 0.5001, 0.5503, 0.625, 0.7001, 0.75, 0.8503, 1.0)
# Hypothesis draws what stands first most often: the ordinary, not the extreme.
ENTROPY = (0.25, 0.5, 1.0, 1.5)
TTL = (60, 0.012, 0.007, 0.03, 0.02, 0.004, 0.0025, 0.002, 0.001)
SIZES = (2, 3, 4, 5, 6, 1, 0)
WINDOWS = (2, 1, 3, 2, 1, 4, 5, 6, 7, 8)  # mostly short, so that contexts come back

SETTINGS = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def numbers(draw: st.DrawFn, size: int, below: int) -> list[int]:
    """``size`` numbers; bytes are drawn much faster than lists of integers."""
    return [byte % below for byte in draw(st.binary(min_size=size, max_size=size))]


@st.composite
def confidences(draw: st.DrawFn, pool: list[RouterChoice]) -> float:
    """A threshold of `CONFIDENCE`, or one just beside the confidence of a choice of ``pool``."""
    if draw(st.booleans()):
        return draw(st.sampled_from(CONFIDENCE))
    weights = sorted(draw(st.sampled_from(pool))[1], reverse=True)
    share = sum(weights[: (len(weights) + 1) // 2]) / sum(weights)
    return min(share + draw(st.sampled_from([-BESIDE, BESIDE])), 1.0)


@st.composite
def configs(draw: st.DrawFn, pool: list[RouterChoice]) -> VARConfig:
    return VARConfig(
        frequency_threshold=draw(st.integers(0, 3)),
        entropy_threshold=draw(st.sampled_from(ENTROPY)),
        confidence_threshold=draw(confidences(pool)),
        cache_size=draw(st.sampled_from(SIZES)),
        cache_ttl_seconds=draw(st.sampled_from(TTL)),
        context_window_size=draw(st.sampled_from(WINDOWS)),
        mode=draw(st.sampled_from(["plain", "verified"])),
        cache_scope=draw(st.sampled_from(["shared", "shared", "document"])),
    )


@st.composite
def weighted_experts(draw: st.DrawFn, experts: int, k: int) -> RouterChoice:
    """K different experts in any order, with weights on the grid; few values, so many ties."""
    chosen = draw(st.permutations(range(experts)))[:k]
    weights = draw(st.lists(st.sampled_from([1, 2, 3, 8, 16]), min_size=k, max_size=k))
    return chosen, [weight / GRID for weight in weights]


@st.composite
def tables(draw: st.DrawFn, layers: int, vocabulary: int, experts: int, leading: int) -> Table:
    """Fewer than half of all (layer, token) are known, from a few different entries."""
    entries = st.tuples(
        st.integers(0, 4), st.sampled_from(ENTROPY), weighted_experts(experts, leading)
    )
    pool = draw(st.lists(entries, max_size=4))
    table: Table = {}
    for number, pick in enumerate(numbers(draw, layers * vocabulary, len(pool) + 6)):
        if pick < len(pool):
            count, entropy, chosen = pool[pick]
            experts_and_means = list(zip(*chosen, strict=True))
            table[divmod(number, vocabulary)] = (count, entropy, experts_and_means)
    return table


def laid_out(
    text: list[int], padding: list[int], *, looks: int, left: bool, document: int, prefix: list[int]
) -> ReferenceRow:
    """A padded row: ``text``, of which the first ``looks`` ids are only looked up."""
    real, absent = [True] * len(text), [False] * len(padding)
    counted = [False] * looks + [True] * (len(text) - looks)
    return ReferenceRow(
        ids=padding + text if left else text + padding,
        valid=absent + real if left else real + absent,
        counted=absent + counted if left else counted + absent,
        document=document,
        prefix=prefix,
    )


class Documents:
    """Cuts one document after the other into rows."""

    def __init__(self) -> None:
        self.number = 0
        self.text: list[int] = []

    def row(
        self,
        ids: list[int],
        *,
        length: int,
        overlap: int,
        fresh: bool,
        left: bool,
        looks_only: bool,
    ) -> ReferenceRow:
        """A row of ``len(ids)`` positions, ``length`` of them real, starting with an overlap."""
        if fresh:
            self.number += 1
            self.text = []
        overlap = min(overlap, length, len(self.text))
        kept = len(self.text) - overlap
        prefix, repeated = self.text[:kept], self.text[kept:]
        text = repeated + ids[: length - overlap]
        self.text = prefix + text
        return laid_out(
            text,
            ids[length:],
            looks=length if looks_only else overlap,
            left=left,
            document=self.number,
            prefix=prefix,
        )


@st.composite
def streams(draw: st.DrawFn, *, generating: bool = False) -> Stream:
    """Batches of text, or steps of generation: many forwards of one token per row."""
    layers = draw(st.integers(1, 3))
    vocabulary = draw(st.sampled_from([3, 3, 4, 4, 5, 6, 7, 8]))
    top_k = draw(st.sampled_from([2, 3, 8, 1, 2, 3]))
    experts = draw(st.integers(top_k, 10))
    table = draw(tables(layers, vocabulary, experts, (top_k + 1) // 2))
    pool = draw(st.lists(weighted_experts(experts, top_k), min_size=3, max_size=6))
    config = draw(configs(pool))
    stream = Stream(config, layers, vocabulary, top_k, table)
    stream.spare_prefix = draw(st.integers(0, 2))
    documents = Documents()

    ids: list[int] = []
    for _ in range(draw(st.sampled_from([12, 9, 15] if generating else [3, 2, 4, 5, 1]))):
        width = 1 if generating else draw(st.sampled_from([7, 10, 13, 4, 1]))
        rows = []
        for _ in range(draw(st.sampled_from([1, 1, 2] if generating else [2, 3, 4, 1]))):
            drawn = numbers(draw, width, vocabulary)
            # Often the same ids again, so that long contexts come back too.
            ids = ids[:width] + drawn[len(ids) :] if draw(st.booleans()) else drawn
            row = documents.row(
                ids,
                length=max(width - draw(st.sampled_from([0, 0, 0, 0, 1, 2, 20])), 0),
                overlap=draw(st.integers(0, 3)),
                fresh=draw(st.sampled_from([False, False, False, True])),
                left=draw(st.booleans()),
                looks_only=draw(st.sampled_from([False, False, False, True])),
            )
            rows.append(row)
        tokens = len(rows) * width
        router = {
            layer: [pool[pick] for pick in numbers(draw, tokens, len(pool))]
            for layer in range(layers)
        }
        stream.forwards.append(Forward(rows, router))
    return stream


@pytest.mark.slow
@SETTINGS
@given(streams())
def test_random_streams(stream: Stream) -> None:
    for tier in set(assert_agrees(stream)):
        event(f"{stream.config.mode}: {tier}")


@pytest.mark.slow
@SETTINGS
@given(streams(generating=True))
def test_random_generation(stream: Stream) -> None:
    for tier in set(assert_agrees(stream)):
        event(f"{stream.config.mode}: {tier}")


def seeded_stream(config: VARConfig, *, seed: int, tokens: int, vocabulary: int) -> Stream:
    """A longer stream of one-document rows, drawn from ``seed``."""
    rng = random.Random(seed)
    stream = Stream(config, 2, vocabulary, 3)

    def choice(k: int) -> RouterChoice:
        return rng.sample(range(6), k), [rng.randint(1, 16) / GRID for _ in range(k)]

    for layer in range(2):
        for token in range(0, vocabulary, 3):
            experts = list(zip(*choice(2), strict=True))
            stream.table[layer, token] = (rng.randint(0, 60), rng.choice(ENTROPY), experts)
    for number in range(tokens // 64):
        rows = [
            laid_out(
                [rng.randrange(vocabulary) for _ in range(16)],
                [],
                looks=0,
                left=False,
                document=4 * number + row,
                prefix=[],
            )
            for row in range(4)
        ]
        router = {layer: [choice(3) for _ in range(64)] for layer in range(2)}
        stream.forwards.append(Forward(rows, router))
    return stream


@pytest.mark.parametrize("mode", ["plain", "verified"])
@pytest.mark.parametrize(("size", "ttl"), [(1000, 60), (150, 0.3)], ids=str)
def test_a_cache_larger_than_its_first_storage(mode: str, size: int, ttl: float) -> None:
    config = VARConfig(
        mode=mode,
        frequency_threshold=10,
        confidence_threshold=0.7001,
        cache_size=size,
        cache_ttl_seconds=ttl,
        context_window_size=2,
    )
    tiers = assert_agrees(seeded_stream(config, seed=size, tokens=1024, vocabulary=20))
    assert {tiers.count(tier) > 20 for tier in ("FAST", "CACHED", "LEARNED")} == {True}


def one_row(
    config: VARConfig, ids: list[int], router: list[RouterChoice], table: Table | None = None
) -> Stream:
    stream = Stream(config, 1, max(ids) + 1, len(router[0][0]), table or {})
    row = laid_out(ids, [], looks=0, left=False, document=0, prefix=[])
    stream.forwards.append(Forward([row], {0: router}))
    return stream


@pytest.mark.parametrize(
    ("threshold", "tiers"),
    [(0.75, ["LEARNED", "CACHED"]), (0.7500001, ["LEARNED", "LEARNED"])],
    ids=["met exactly", "just missed"],
)
def test_confidence_at_the_threshold(threshold: float, tiers: list[str]) -> None:
    config = VARConfig(confidence_threshold=threshold, context_window_size=1)
    router: list[RouterChoice] = [((4, 1), (0.25, 0.75))] * 2
    assert assert_agrees(one_row(config, [0, 0], router)) == tiers


@pytest.mark.parametrize(
    ("count", "entropy", "tier"),
    [
        (50, 0.5, "FAST"),
        (49, 0.5, "LEARNED"),
        (50, 0.5000001, "LEARNED"),
    ],
)
def test_fast_path_at_its_thresholds(count: int, entropy: float, tier: str) -> None:
    table: Table = {(0, 0): (count, entropy, [(1, 0.5)])}
    stream = one_row(VARConfig(), [0], [((4, 1), (0.25, 0.75))], table)
    assert assert_agrees(stream) == [tier]


def test_threshold_zero_leaves_unseen_tokens_off_the_fast_path() -> None:
    table: Table = {(0, 0): (1, 0.0, [(1, 0.5)])}
    config = VARConfig(frequency_threshold=0, cache_size=0)
    router: list[RouterChoice] = [((4, 1), (0.25, 0.75))] * 2
    assert assert_agrees(one_row(config, [0, 1], router, table)) == ["FAST", "LEARNED"]


def test_a_hand_made_stream_meets_every_tier() -> None:
    router: list[RouterChoice] = [((4, 1), (0.25, 0.75))] * 4
    table: Table = {(0, 2): (60, 0.1, [(1, 0.5)])}
    config = VARConfig(context_window_size=1, confidence_threshold=0.5)
    stream = one_row(config, [0, 2, 0, 1], router, table)
    assert assert_agrees(stream) == ["LEARNED", "FAST", "CACHED", "LEARNED"]
