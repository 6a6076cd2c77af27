"""Context keys: one 64-bit number for a token's last N ids, for all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor

from var_moe.routing.decision import TokenBatch

# Odd 64-bit constants of SplitMix64 (Steele, Lea, Flood 2014), as signed integers: torch's
# int64 multiplication wraps, which is what a hash wants.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser; the shifts are made logical by masking the sign's copies."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * _MIX_1
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def context_keys(batch: TokenBatch, window: int) -> Tensor:
    """Hash each token's last ``window`` ids, itself included, and how many they are.

    At a document's start there are fewer; padding and other documents take no part. Returns
    (B, S) int64; values at padding positions mean nothing.
    """
    ids, valid = batch.ids, batch.valid
    prefix_length = 0
    if batch.prefix is not None and batch.prefix.shape[1] > 0:
        prefix_length = batch.prefix.shape[1]
        ids = torch.cat((batch.prefix.to(ids.device), ids), dim=1)
        valid = torch.cat((ids[:, :prefix_length] >= 0, valid), dim=1)
    # Padding can stand anywhere (left of a row that has a prefix, it stands in the middle): put
    # it first, so that the ids of a document are neighbours. (Asking for it is free on the CPU.)
    order = None
    if valid.device.type != "cpu" or not valid.all():
        order = valid.to(torch.uint8).argsort(dim=1, stable=True)
        ids, valid = ids.gather(1, order), valid.gather(1, order)
    key = _hashed(ids, valid.cumsum(dim=1).clamp(max=window), window)
    if order is not None:
        key = torch.empty_like(key).scatter_(1, order, key)
    return key[:, prefix_length:]


def stream_keys(ids: Tensor, place: Tensor, window: int) -> Tensor:
    """The same keys for documents that stand end to end, without padding. (N,) int64

    Args:
        ids: (N,) int64 token ids.
        place: (N,) of each token in its document, from 0.
        window: token ids in a key, the token itself included.
    """
    return _hashed(ids, (place + 1).clamp(max=window), window)


def _hashed(ids: Tensor, known: Tensor, window: int) -> Tensor:
    """Hash the last ``known`` ids (at most ``window``) along the last dimension, oldest first."""
    key = _mix((known + 1) * _GOLDEN)
    for back in range(min(window, ids.shape[-1]) - 1, -1, -1):
        earlier = ids.roll(back, dims=-1) if back else ids
        key = torch.where(back < known, _mix(key + (earlier + 1) * _GOLDEN), key)
    return key
