"""What the context cache's slots hold in a replay: who filled the one that each token hits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from var_moe.tracing.stays import Bools, Ints, Stays


@dataclass(frozen=True)
class Hits:
    """The tokens that hit a filled slot of one layer."""

    token: Ints  # (H,) positions in the stream
    source: Ints  # (H,) position of the token whose decision the slot holds
    licensed: Bools  # (H,) the slot's first expert is among the token's own leading ones


def layer_hits(stays: Stays, confident: Bools, index: NDArray[np.int16], lead: int) -> Hits:
    """One layer's hits: the first confident token of a stay fills, those after it hit.

    Args:
        stays: stays of several tokens.
        confident: (N,) whose decisions are stored.
        index: (N, K) experts by rank.
        lead: how many of them lead.
    """
    size = len(stays.token)
    if not size:
        none = stays.token
        return Hits(token=none, source=none, licensed=np.zeros(0, dtype=bool))
    place = np.arange(size)
    filling = np.where(confident[stays.token], place, size)
    filler = np.repeat(np.minimum.reduceat(filling, stays.first), stays.sizes)
    hit = filler < place
    token, source = stays.token[hit], stays.token[filler[hit]]
    licensed = (index[token, :lead] == index[source, 0][:, None]).any(axis=1)
    return Hits(token=token, source=source, licensed=licensed)
