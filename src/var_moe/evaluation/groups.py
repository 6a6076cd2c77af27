"""A text's data sets, or sources, apart: which documents are of which, and how each one fares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from var_moe.errors import UsageError
from var_moe.evaluation.paired import Degradation, degradation
from var_moe.evaluation.perplexity import DocumentLosses
from var_moe.evaluation.sequential import FUTILE_ALPHA, is_over

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument

Groups = Mapping[str, NDArray[np.int64]]
"""Positions of documents by the name of what they are of."""

LEAST = 2
"""Documents that a comparison needs."""


def datasets_of(documents: Sequence[EncodedDocument]) -> dict[str, NDArray[np.int64]]:
    """The documents of each data set, by name; empty where the text is of one alone."""
    return _by([document.dataset for document in documents])


def groups_of(documents: Sequence[EncodedDocument]) -> dict[str, NDArray[np.int64]]:
    """Those of each data set; where there is one alone, those of each of its sources.

    Empty where there is but one source, too.
    """
    return datasets_of(documents) or _by([document.source for document in documents])


def _by(names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    found: dict[str, list[int]] = {}
    for at, name in enumerate(names):
        found.setdefault(name, []).append(at)
    if len(found) < 2:
        return {}
    return {name: np.array(positions, dtype=np.int64) for name, positions in found.items()}


def losses_of(losses: DocumentLosses, at: NDArray[np.int64]) -> DocumentLosses:
    """The losses of some of the documents."""
    return DocumentLosses(nll=losses.nll[at], tokens=losses.tokens[at])


@dataclass(frozen=True, kw_only=True)
class Worst:
    """The data set whose degradation has the highest upper bound: all others are below it."""

    dataset: str
    change: Degradation

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "worst_dataset": self.dataset,
            "worst_degradation": self.change.value,
            "worst_degradation_standard_error": self.change.standard_error,
            "worst_degradation_upper_95": self.change.upper,
            "worst_documents": self.change.documents,
        }


def worst_of(
    baseline: DocumentLosses, other: DocumentLosses, groups: Groups, *, partial: bool = False
) -> Worst:
    """The worst of several data sets.

    Args:
        baseline, other: losses of all documents.
        groups: at least one.
        partial: the scoring ended early, so that a data set may lack documents; it is left out.

    Raises:
        UsageError: a data set has too few documents to be judged.
    """
    found = []
    for name, at in groups.items():
        scored = int(np.count_nonzero(baseline.tokens[at] > 0))
        if scored < LEAST:
            if partial:
                continue
            raise UsageError(
                f"too few documents of {name!r} to judge it: {scored}, at least {LEAST} needed"
            )
        change = degradation(losses_of(baseline, at), losses_of(other, at))
        found.append(Worst(dataset=name, change=change))
    return max(found, key=lambda one: one.change.upper)


def any_over(baseline: DocumentLosses, other: DocumentLosses, groups: Groups, limit: float) -> bool:
    """Whether the documents so far show that the degradation of a group is above a limit.

    Args:
        baseline, other: losses of all documents, without tokens where they are not scored yet.
        groups: judged apart; without any, all documents are judged together.
        limit: on PPL / PPL - 1.
    """
    parts = list(groups.values()) or [np.arange(len(baseline.tokens))]
    change, tokens = other.nll - baseline.nll, baseline.tokens
    return any(
        is_over(change[own], tokens[own], limit, alpha=FUTILE_ALPHA / len(parts))
        for own in (at[tokens[at] > 0] for at in parts)
    )
