"""Context keys: one 64-bit number for a token's last N ids, for all tokens at once.

The cache reads them on the host, so they are made there, by numpy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_moe.routing.decision import ForwardContext

# Odd 64-bit constants of SplitMix64 (Steele, Lea, Flood 2014); a hash wants products that wrap.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)
_SHIFTS = tuple(np.uint64(by) for by in (30, 27, 31))


def context_keys(context: ForwardContext, window: int) -> Tensor:
    """Hash each token's last ``window`` ids, itself included, and how many they are.

    Each id is hashed with its distance from the token, and the sum of these once more (Zobrist
    hashing). A document's first tokens have fewer ids; padding and other documents take no part.
    Returns (B, S) int64 on the CPU; values at padding positions mean nothing.
    """
    ids, valid = context.ids.cpu().numpy(), context.valid.cpu().numpy()
    before = 0
    if context.prefix is not None:
        prefix = context.prefix.cpu().numpy()
        before = prefix.shape[1]
        ids, valid = np.concatenate((prefix, ids), 1), np.concatenate((prefix >= 0, valid), 1)
    # Padding may stand anywhere, between a prefix and its row too: put it first, so that a
    # document's ids are neighbours.
    order = None if valid.all() else valid.argsort(axis=1, kind="stable")
    if order is not None:
        ids, valid = (np.take_along_axis(each, order, axis=1) for each in (ids, valid))
    keys = _hashed(ids, valid.cumsum(axis=1), window)
    if order is not None:
        np.put_along_axis(keys, order, keys.copy(), axis=1)
    return torch.from_numpy(keys[:, before:])


def stream_keys(ids: Tensor, place: Tensor, window: int) -> Tensor:
    """The same keys for documents that stand end to end, without padding. (N,) int64

    Args:
        ids: (N,) int64 token ids.
        place: (N,) of each token in its document, from 0.
        window: token ids in a key, the token itself included.
    """
    return torch.from_numpy(_hashed(ids[None].numpy(), place[None].numpy() + 1, window)[0])


def _hashed(ids: Any, known: Any, window: int) -> Any:
    """Hash the last ``known`` (B, N) ids, at most ``window``, of each of (B, N) ids."""
    known = np.minimum(known, window)
    back = np.arange(window)
    place = np.arange(ids.shape[1])[:, None] - back  # (N, window), the newest id first
    windows = ids.astype(np.uint64)[:, place.clip(0)] + _ONE  # (B, N, window)
    # A constant for each place of the window, so that order counts.
    terms = _mix(windows * _GOLDEN + (back + 1).astype(np.uint64) * _MIX_2)
    terms[back >= known[:, :, None]] = 0
    return _mix(terms.sum(2) + (known + 1).astype(np.uint64) * _GOLDEN).view(np.int64)


def _mix(value: Any) -> Any:
    """SplitMix64's finaliser."""
    value = (value ^ (value >> _SHIFTS[0])) * _MIX_1
    value = (value ^ (value >> _SHIFTS[1])) * _MIX_2
    return value ^ (value >> _SHIFTS[2])
