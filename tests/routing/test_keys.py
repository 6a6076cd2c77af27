"""Context keys: equal for equal contexts, different for all others, wherever they stand."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from var_moe.routing.decision import ForwardContext
from var_moe.routing.keys import context_keys, stream_keys


def padded_batch(
    rows: list[list[int]], *, left: bool, pad: int = 0, prefixes: list[list[int]] | None = None
) -> ForwardContext:
    width = max(map(len, rows))
    gaps = [width - len(row) for row in rows]
    pairs = list(zip(rows, gaps, strict=True))
    if left:
        ids = [[pad] * gap + row for row, gap in pairs]
        valid = [[False] * gap + [True] * len(row) for row, gap in pairs]
    else:
        ids = [row + [pad] * gap for row, gap in pairs]
        valid = [[True] * len(row) + [False] * gap for row, gap in pairs]
    prefix = None
    if prefixes is not None:
        longest = max(map(len, prefixes))
        prefix = torch.tensor([[-1] * (longest - len(p)) + p for p in prefixes])
    mask = torch.tensor(valid)
    return ForwardContext(
        ids=torch.tensor(ids),
        valid=mask,
        counted=mask,
        document=tuple(range(len(rows))),
        prefix=prefix,
    )


def keys_of(batch: ForwardContext, window: int) -> list[int]:
    """Keys of the real tokens, row-major."""
    return context_keys(batch, window)[batch.valid].tolist()


def texts(seed: int, *, vocabulary: int = 3, longest: int = 12) -> list[list[int]]:
    rng = random.Random(seed)
    lengths = [rng.randint(1, longest) for _ in range(20)]
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("window", [1, 2, 3, 8])
@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
def test_keys_are_equal_exactly_when_contexts_are(window: int, left: bool) -> None:
    rows = texts(window)
    contexts = [
        tuple(row[max(end - window, 0) : end]) for row in rows for end in range(1, len(row) + 1)
    ]
    keys = keys_of(padded_batch(rows, left=left, pad=1), window)
    assert len(set(zip(contexts, keys, strict=True))) == len(set(contexts)) == len(set(keys))


def test_all_short_contexts_have_keys_of_their_own() -> None:
    ids = torch.tensor(list(itertools.product(range(30), repeat=3)))
    keys = context_keys(ForwardContext.of(ids), 3)
    assert [keys[:, length].unique().numel() for length in range(3)] == [30, 30**2, 30**3]
    assert keys.unique().numel() == 30 + 30**2 + 30**3


def test_order_length_and_identity_all_count() -> None:
    rows = [[1, 2], [2, 1], [0, 1, 2], [0, 0], [0, 0, 0], [150_000, 1], [1, 150_000]]
    last = [context_keys(padded_batch([row], left=False), 4)[0, -1].item() for row in rows]
    assert len(set(last)) == len(rows)


@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_padding_neither_side_nor_content_matters(window: int) -> None:
    rows = texts(100 + window)
    right = keys_of(padded_batch(rows, left=False, pad=2), window)
    assert keys_of(padded_batch(rows, left=True, pad=2), window) == right
    assert keys_of(padded_batch(rows, left=True, pad=0), window) == right


@pytest.mark.parametrize("window", [1, 2, 4, 8])
@pytest.mark.parametrize("left", [False, True], ids=["right padding", "left padding"])
@pytest.mark.parametrize("spare", [0, 3])
def test_a_prefix_gives_the_keys_of_the_unsplit_text(window: int, left: bool, spare: int) -> None:
    rows = texts(200 + window, longest=16)
    cuts = [random.Random(number).randrange(len(row)) for number, row in enumerate(rows)]
    whole = context_keys(padded_batch(rows, left=False), window)
    expected = [
        key
        for number, (row, cut) in enumerate(zip(rows, cuts, strict=True))
        for key in whole[number, cut : len(row)].tolist()
    ]
    # The last window - 1 ids of what came before are enough.
    prefixes = [
        row[max(cut - (window - 1) - spare, 0) : cut] for row, cut in zip(rows, cuts, strict=True)
    ]
    rests = [row[cut:] for row, cut in zip(rows, cuts, strict=True)]
    split = padded_batch(rests, left=left, pad=1, prefixes=prefixes)
    assert keys_of(split, window) == expected


def test_rows_do_not_see_each_other() -> None:
    alone = context_keys(padded_batch([[3, 4]], left=False), 4)
    below = context_keys(padded_batch([[1, 2], [3, 4]], left=False), 4)
    assert below[1].tolist() == alone[0].tolist()


def test_a_window_longer_than_the_text_is_the_text() -> None:
    batch = padded_batch([[1, 2, 3]], left=False)
    assert context_keys(batch, 3).tolist() == context_keys(batch, 50).tolist()


def test_keys_use_all_64_bits() -> None:
    keys = context_keys(ForwardContext.of(torch.arange(4096).reshape(1, -1)), 2)[0]
    for bit in range(64):
        share = ((keys >> bit) & 1).double().mean().item()
        assert 0.4 < share < 0.6, f"bit {bit} is set in {share:.0%} of the keys"


@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_documents_end_to_end_have_the_same_keys(window):
    rng = random.Random(window)
    rows = [[rng.randrange(3) for _ in range(size)] for size in (7, 1, 30, 12)]
    batch = padded_batch(rows, left=False)
    place = torch.tensor([at for row in rows for at in range(len(row))])
    found = stream_keys(torch.tensor([token for row in rows for token in row]), place, window)
    assert torch.equal(found, context_keys(batch, window)[batch.valid])
