"""Context keys: one 64-bit number for a token's last N ids, for all tokens at once."""

from __future__ import annotations

import torch
from torch import Tensor

from var_moe.routing.decision import ForwardContext

# Odd 64-bit constants of SplitMix64 (Steele, Lea, Flood 2014), as signed integers: int64
# multiplication wraps, which is what a hash wants.
_GOLDEN = -7046029254386353131
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685
_WORD = 2**64 - 1
_FEW = 16  # tokens up to which Python's integers are faster than tensors


def context_keys(context: ForwardContext, window: int) -> Tensor:
    """Hash each token's last ``window`` ids, itself included, and how many they are.

    Each id is hashed with its distance from the token, and the sum of these once more (Zobrist
    hashing). A document's first tokens have fewer ids; padding and other documents take no part.
    Returns (B, S) int64 on the ids' device; values at padding positions mean nothing.
    """
    ids, valid = context.ids, context.valid
    on_cpu = ids.device.type == "cpu"
    if on_cpu and context.size <= _FEW:
        return _few(context, window)
    prefix_length = 0
    if context.prefix is not None and context.prefix.shape[1] > 0:
        prefix_length = context.prefix.shape[1]
        prefix = context.prefix.to(ids.device)
        ids, valid = torch.cat((prefix, ids), dim=1), torch.cat((prefix >= 0, valid), dim=1)
    # Padding may stand anywhere, between a prefix and its row too: put it first, so that a
    # document's ids are neighbours. (On the CPU, asking whether there is any does not wait.)
    order = None
    if not on_cpu or not valid.all():
        order = valid.long().argsort(dim=1, stable=True)
        ids, valid = ids.gather(1, order), valid.gather(1, order)
    key = _hashed(ids, valid.cumsum(1).clamp(max=window), window)
    if order is not None:
        key = key.scatter(1, order, key)
    return key[:, prefix_length:]


def stream_keys(ids: Tensor, place: Tensor, window: int) -> Tensor:
    """The same keys for documents that stand end to end, without padding. (N,) int64

    Args:
        ids: (N,) int64 token ids.
        place: (N,) of each token in its document, from 0.
        window: token ids in a key, the token itself included.
    """
    return _hashed(ids[None], (place + 1).clamp(max=window)[None], window)[0]


def _hashed(ids: Tensor, known: Tensor, window: int) -> Tensor:
    """Hash the last ``known`` (B, N) ids, at most ``window``, of each of (B, N) ids."""
    padding = ids.new_zeros((len(ids), window - 1))
    windows = torch.cat((padding, ids), dim=1).unfold(1, window, 1)  # (B, N, window)
    back = torch.arange(window - 1, -1, -1, device=ids.device)  # the newest id stands last
    # A constant for each place of the window, so that order counts.
    terms = _mix((windows + 1) * _GOLDEN + (back + 1) * _MIX_2)
    terms = terms.masked_fill(back >= known[:, :, None], 0)
    return _mix(terms.sum(2) + (known + 1) * _GOLDEN)


def _mix(value: Tensor) -> Tensor:
    """SplitMix64's finaliser; masks make the shifts logical."""
    value = (value ^ ((value >> 30) & 0x3FFFFFFFF)) * _MIX_1
    value = (value ^ ((value >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return value ^ ((value >> 31) & 0x1FFFFFFFF)


def _few(context: ForwardContext, window: int) -> Tensor:
    """`context_keys` in Python's integers: the same values, for a step of generation."""
    prefixes = [[]] * len(context.ids) if context.prefix is None else context.prefix.tolist()
    rows = zip(context.ids.tolist(), context.valid.tolist(), prefixes, strict=True)
    keys = []
    for row, valid, prefix in rows:
        text = [token for token in prefix if token >= 0]
        for token, real in zip(row, valid, strict=True):
            if real:
                text.append(token)
            keys.append(_key(text[-window:]))
    return torch.tensor(keys, dtype=torch.int64).view(context.ids.shape)


def _key(context: list[int]) -> int:
    """The key of one context, newest id last."""
    total = (len(context) + 1) * _GOLDEN
    for back, token in enumerate(reversed(context)):
        total += _mix_word((token + 1) * _GOLDEN + (back + 1) * _MIX_2)
    key = _mix_word(total)
    return key - 2**64 if key >= 2**63 else key


def _mix_word(value: int) -> int:
    """`_mix` of one number, unsigned."""
    value &= _WORD
    value = ((value ^ (value >> 30)) * _MIX_1) & _WORD
    value = ((value ^ (value >> 27)) * _MIX_2) & _WORD
    return value ^ (value >> 31)
