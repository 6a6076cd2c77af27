"""Which split a document falls to, by its text alone: the same on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

SPLITS = ("calibration", "validation", "certify", "test")

# Whole percent, so that no rounding decides a border.
SHARES = {"calibration": 40, "validation": 25, "certify": 15, "test": 20}


def share_of(text: str, splits: Sequence[str]) -> str:
    """The one of ``splits`` that a document falls to, in proportion to their `SHARES`.

    The first eight bytes of the SHA-256 of its UTF-8 text, as a big-endian integer, are mapped
    evenly onto the sum of the shares. Documents of equal text fall to the same split.
    """
    total = sum(SHARES[name] for name in splits)
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    point = int.from_bytes(digest[:8], "big") * total >> 64  # 0 .. total - 1
    for name in splits:
        if point < SHARES[name]:
            return name
        point -= SHARES[name]
    raise AssertionError("the shares cover every point")


def split_of(text: str) -> str:
    """The split of a document of a single file: 40/25/15/20."""
    return share_of(text, SPLITS)
