"""Context keys: one 64-bit number for a token's last N ids, for all tokens at once."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from var_moe.routing.arrays import NUMPY, TORCH, Array, Operations
from var_moe.routing.decision import ForwardContext

# Odd 64-bit constants of SplitMix64 (Steele, Lea, Flood 2014), as signed integers: int64
# multiplication wraps in both libraries, which is what a hash wants.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _mix(value: Array) -> Array:
    """SplitMix64's finaliser; the shifts are made logical by masking the sign's copies."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * _MIX_1
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


_FEW = 16  # tokens up to which plain numbers cost less than calls of numpy
_WORD = 2**64 - 1


def context_keys(context: ForwardContext, window: int) -> Tensor:
    """Hash each token's last ``window`` ids, itself included, and how many they are.

    Each id is hashed with its distance from the token, the sum of these once more (Zobrist's
    way), so that the number of operations does not grow with the window. At a document's start
    there are fewer ids; padding and other documents take no part. Returns (B, S) int64 on the
    ids' device; values at padding positions mean nothing.
    """
    if context.ids.device.type == "cpu" and context.size <= _FEW:
        return _few(context, window)
    ops = NUMPY if context.ids.device.type == "cpu" else TORCH
    ids, valid = ops.of_tensor(context.ids), ops.of_tensor(context.valid)
    prefix_length = 0
    if context.prefix is not None and context.prefix.shape[1] > 0:
        prefix_length = context.prefix.shape[1]
        prefix = ops.of_tensor(context.prefix.to(context.ids.device))
        ids = ops.library.concatenate((prefix, ids), axis=1)
        valid = ops.library.concatenate((prefix >= 0, valid), axis=1)
    # Padding can stand anywhere (left of a row that has a prefix, it stands in the middle): put
    # it first, so that the ids of a document are neighbours. (Asking for it is free on the CPU.)
    order = None
    if ops is TORCH or not valid.all():
        order = ops.order(ops.where(valid, 1, 0))
        ids, valid = ops.take(ids, order), ops.take(valid, order)
    key = _hashed(ops, ids, ops.clip(valid.cumsum(1), window), window)
    if order is not None:
        key = ops.put(key, order, key)
    return ops.to_tensor(key[:, prefix_length:])


def _few(context: ForwardContext, window: int) -> Tensor:
    """`context_keys` in plain numbers: the same values, for a step of generation."""
    before = [[]] * len(context.ids) if context.prefix is None else context.prefix.tolist()
    keys = []
    for row, valid, prefix in zip(
        context.ids.tolist(), context.valid.tolist(), before, strict=True
    ):
        text = [token for token in prefix if token >= 0]
        found = []
        for token, real in zip(row, valid, strict=True):
            if real:
                text.append(token)
            found.append(_key(text[-window:]))
        keys.append(found)
    return torch.tensor(keys, dtype=torch.int64).view(context.ids.shape)


def _key(context: list[int]) -> int:
    """The key of one context, newest id last."""
    total = (len(context) + 1) * _GOLDEN
    for back, token in enumerate(reversed(context)):
        total += _mixed((token + 1) * _GOLDEN + (back + 1) * _MIX_2)
    key = _mixed(total)
    return key - 2**64 if key >= 2**63 else key


def _mixed(value: int) -> int:
    """`_mix` of one number, without a sign."""
    value &= _WORD
    value = ((value ^ (value >> 30)) * _MIX_1) & _WORD
    value = ((value ^ (value >> 27)) * _MIX_2) & _WORD
    return value ^ (value >> 31)


def stream_keys(ids: Tensor, place: Tensor, window: int) -> Tensor:
    """The same keys for documents that stand end to end, without padding. (N,) int64

    Args:
        ids: (N,) int64 token ids.
        place: (N,) of each token in its document, from 0.
        window: token ids in a key, the token itself included.
    """
    keys: Tensor = _hashed(TORCH, ids[None], (place + 1).clamp(max=window)[None], window)[0]
    return keys


def _hashed(ops: Operations, ids: Array, known: Array, window: int) -> Array:
    """Hash the last ``known`` (B, N) ids, at most ``window``, of each of (B, N) ids."""
    back = _back(ops, ids, window)
    # A constant for each place of the window, so that order counts.
    terms = _mix((_windows(ops, ids, window) + 1) * _GOLDEN + (back + 1) * _MIX_2)
    # The newest ids stand last; what lies before the document's start is left out.
    terms = ops.where(back < known[:, :, None], terms, 0)
    return _mix(terms.sum(2) + (known + 1) * _GOLDEN)


def _windows(ops: Operations, ids: Array, window: int) -> Array:
    """(B, N) -> (B, N, window): each id behind those before it, zeros before the row."""
    rows, width = ids.shape
    if ops is NUMPY:
        padded = np.zeros((rows, width + window - 1), dtype=np.int64)
        padded[:, window - 1 :] = ids
        strides = (padded.strides[0], padded.strides[1], padded.strides[1])
        return np.lib.stride_tricks.as_strided(padded, (rows, width, window), strides)
    padding = ids.new_zeros((rows, window - 1))
    return torch.cat((padding, ids), dim=1).unfold(1, window, 1)


def _back(ops: Operations, ids: Array, window: int) -> Array:
    """How far back each place of a window lies: window - 1, ..., 0."""
    if ops is NUMPY:
        return np.arange(window - 1, -1, -1)
    return torch.arange(window - 1, -1, -1, device=ids.device)
