"""The text of a fit: a part that it is judged on, and the order in which the rest is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from var_moe.config import check_seed
from var_moe.errors import UsageError
from var_moe.evaluation.batching import batches, collate

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.routing.decision import ForwardContext

_HELD_OUT, _HELD_OUT_TOKENS = 0.1, 8_000
_WARM = 0.1


class Material:
    """Calibration documents in a seeded order, the first of them held out.

    Args:
        documents: the text.
        window: longest row.
        tokens_per_batch: padded tokens of a batch.
        seed: draws what is held out and the order of the rest.

    Raises:
        UsageError: there are too few documents.
    """

    def __init__(
        self,
        documents: Sequence[EncodedDocument],
        *,
        window: int,
        tokens_per_batch: int,
        seed: int,
    ) -> None:
        self._window, self._size, self._seed = window, tokens_per_batch, seed
        order = np.random.default_rng(check_seed(seed)).permutation(len(documents))
        self.held_out, self.text = split([documents[i] for i in order])

    def held_out_batches(self) -> list[ForwardContext]:
        """The held-out documents, always in one order."""
        rows = batches(self.held_out, self._size, window=self._window)
        return [collate(one) for one in rows]

    def batches(
        self, part: int, done: Callable[[], tuple[int, int]], wanted: int
    ) -> Iterator[ForwardContext]:
        """Batches of the text, pass after pass in another order, until ``wanted`` tokens.

        Args:
            part: of the fit; each has orders of its own.
            done: steps and tokens so far; those of a restored state are passed over.
            wanted: tokens.
        """
        number = step = 0
        while done()[1] < wanted:
            rows = list(batches(self.text, self._size, window=self._window))
            order = np.random.default_rng([self._seed, part, number])
            for at in order.permutation(len(rows)):
                if done()[1] >= wanted:
                    return
                step += 1
                if step > done()[0]:
                    yield collate(rows[at])
            number += 1

    def identity(self) -> Iterator[bytes]:
        """What tells one text from another, for a hash."""
        return (document.ids.tobytes() for document in (*self.held_out, *self.text))


def schedule(done: float) -> float:
    """Share of the highest learning rate: a short rise, then a cosine to zero."""
    if done < _WARM:
        return max(done / _WARM, 0.02)
    return 0.5 * (1 + float(np.cos(np.pi * min(1.0, (done - _WARM) / (1 - _WARM)))))


def split(
    documents: list[EncodedDocument],
) -> tuple[list[EncodedDocument], list[EncodedDocument]]:
    """Held-out documents, and the others.

    Raises:
        UsageError: there are too few.
    """
    total = sum(len(document.ids) for document in documents)
    wanted = min(_HELD_OUT_TOKENS, int(_HELD_OUT * total))
    sizes = np.cumsum([len(document.ids) for document in documents])
    count = int(np.searchsorted(sizes, wanted)) + 1
    if len(documents) < 4 or count >= len(documents):
        raise UsageError(
            f"{len(documents)} calibration documents, {total:,} tokens: too few to fit on some and "
            "judge on others; give more text"
        )
    return documents[:count], documents[count:]
