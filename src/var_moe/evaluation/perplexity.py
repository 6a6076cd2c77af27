"""Perplexity: summed loss per document, and the paired comparison of two such scorings.

Losses are summed in float64; a mean of batch means is never taken. Documents are the units of
every comparison, never tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from var_moe.data.documents import check_encoded
from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.batching import Window, batches, collate, logits_of

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.execution.session import Session

CONFIDENCE = 0.95
LEAST = 2  # documents that a comparison needs
_LOGITS_BYTES = 256 * 2**20  # float32 logits held at once

Groups = Mapping[str, NDArray[np.int64]]
"""Positions of documents by the name of their data set or source."""


@dataclass(frozen=True)
class DocumentLosses:
    """Summed negative log-likelihood (nats) and scored tokens of each document."""

    nll: np.ndarray  # (N,) float64
    tokens: np.ndarray  # (N,) int64

    @property
    def perplexity(self) -> float:
        """exp of the mean loss over all scored tokens."""
        return math.exp(float(self.nll.sum()) / int(self.tokens.sum()))

    def at(self, positions: NDArray[np.int64]) -> DocumentLosses:
        """Those of some of the documents."""
        return DocumentLosses(nll=self.nll[positions], tokens=self.tokens[positions])


def document_losses(
    model: Any,
    documents: Sequence[EncodedDocument],
    *,
    window: int,
    session: Session | None = None,
    tokens_per_batch: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> DocumentLosses:
    """Score every document, each in its own row; its first token has no loss.

    Args:
        model: a causal language model, routed or not.
        documents: the text.
        window: longest row; longer documents are cut into windows that overlap by a quarter,
            where the overlap gives context and is not scored again.
        session: the routing session, if the model is routed: it is told which tokens count.
        tokens_per_batch: padded tokens per forward.
        progress: called with documents done and documents in all.

    Raises:
        UsageError: there is nothing to score.
        VarMoeError: a loss is not finite.
    """
    check_encoded(documents)
    if not any(len(document.ids) > 1 for document in documents):
        raise UsageError("no text to score: expected at least one document of two tokens")
    before = session.policy.ids_before if session is not None else 0
    nll = np.zeros(len(documents))
    tokens = np.zeros(len(documents), dtype=np.int64)
    done = 0
    with torch.inference_mode():
        for rows in batches(documents, tokens_per_batch, window=window, prefix=before):
            batch = collate(rows)
            losses = _token_losses(logits_of(model, batch, session), batch.ids)
            _add(nll, tokens, rows, losses.double().cpu().numpy())
            done += len({row.document for row in rows})
            if progress:
                progress(min(done, len(documents)), len(documents))
    if not np.isfinite(nll).all():
        bad = documents[int(np.flatnonzero(~np.isfinite(nll))[0])]
        raise VarMoeError(f"document {bad.id!r}: the loss is not finite; try --dtype float32")
    return DocumentLosses(nll=nll, tokens=tokens)


def _token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Loss of token s + 1 at position s, in float32. (B, S - 1)"""
    batch, width, vocabulary = logits.shape
    flat = logits[:, :-1].reshape(-1, vocabulary)
    target = ids[:, 1:].reshape(-1).to(logits.device)
    step = max(1, _LOGITS_BYTES // (4 * vocabulary))
    parts = [
        torch.nn.functional.cross_entropy(some.float(), those, reduction="none")
        for some, those in zip(flat.split(step), target.split(step), strict=True)
    ]
    return torch.cat(parts).view(batch, width - 1)


def _add(nll: np.ndarray, tokens: np.ndarray, rows: list[Window], losses: np.ndarray) -> None:
    """Sum each row's scored tokens: not the first of a document, not the overlap."""
    for number, row in enumerate(rows):
        first = max(row.overlap, 1) - 1
        last = len(row.ids) - 1
        nll[row.document] += losses[number, first:last].sum()
        tokens[row.document] += max(0, last - first)


def perplexity(
    model: Any, documents: Sequence[EncodedDocument], *, window: int, **options: Any
) -> float:
    """Perplexity of ``model`` on ``documents``; see `document_losses` for the arguments."""
    return document_losses(model, documents, window=window, **options).perplexity


# -- paired comparison -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """PPL(VAR) / PPL(baseline) - 1 on the same tokens, with its standard error over documents."""

    value: float
    standard_error: float
    upper: float  # one-sided 95% upper bound
    documents: int
    tokens: int
    baseline_perplexity: float
    perplexity: float

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "degradation": self.value,
            "degradation_standard_error": self.standard_error,
            "degradation_upper_95": self.upper,
            "documents": self.documents,
            "scored_tokens": self.tokens,
            "baseline_perplexity": self.baseline_perplexity,
            "perplexity": self.perplexity,
        }


def log_ratio(change: NDArray[np.float64], tokens: NDArray[np.int64]) -> tuple[float, float]:
    """The log perplexity ratio of units of text: a ratio estimator (Cochran 1977).

    Args:
        change: (n,) d_u, the change of each unit's summed loss, in nats.
        tokens: (n,) T_u, its scored tokens.

    Returns:
        ``r = sum d / sum T`` and its standard error,
        ``sqrt(n / (n - 1) * sum (d_u - r T_u)^2) / sum T``.
    """
    n, total = len(change), float(tokens.sum())
    ratio = float(change.sum()) / total
    rest = change - ratio * tokens
    return ratio, math.sqrt(n / (n - 1) * float(rest @ rest)) / total


def degradation(baseline: DocumentLosses, other: DocumentLosses) -> Degradation:
    """Relative perplexity change, by `log_ratio` over documents.

    The upper bound takes the t distribution with n - 1 degrees of freedom.

    Raises:
        UsageError: the two were not scored on the same tokens, or on fewer than two documents.
    """
    if not np.array_equal(baseline.tokens, other.tokens):
        raise UsageError("the two losses are of different tokens: they can't be compared")
    scored = baseline.tokens > 0
    n = int(np.count_nonzero(scored))
    if n < LEAST:
        raise UsageError(f"{n} scored document(s): a comparison needs at least 2 documents")
    ratio, error = log_ratio((other.nll - baseline.nll)[scored], baseline.tokens[scored])
    bound = ratio + float(stats.t.ppf(CONFIDENCE, n - 1)) * error
    return Degradation(
        value=math.expm1(ratio),
        standard_error=math.exp(ratio) * error,
        upper=math.expm1(bound),
        documents=n,
        tokens=int(baseline.tokens.sum()),
        baseline_perplexity=baseline.perplexity,
        perplexity=other.perplexity,
    )


# -- several data sets -----------------------------------------------------------------------


def datasets_of(documents: Sequence[EncodedDocument]) -> dict[str, NDArray[np.int64]]:
    """Positions of each data set's documents; empty for a text of one data set."""
    return _by([document.dataset for document in documents])


def groups_of(documents: Sequence[EncodedDocument]) -> dict[str, NDArray[np.int64]]:
    """Positions by data set, or by source for a text of one data set; empty for one source."""
    return datasets_of(documents) or _by([document.source for document in documents])


def _by(names: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    distinct = list(dict.fromkeys(names))
    if len(distinct) < 2:
        return {}
    each = np.array(names)
    return {name: np.flatnonzero(each == name) for name in distinct}


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


def worst_of(baseline: DocumentLosses, other: DocumentLosses, groups: Groups) -> Worst:
    """The worst of several data sets, at least one.

    Raises:
        UsageError: a data set has too few documents to be judged.
    """
    judged = []
    for name, at in groups.items():
        scored = int(np.count_nonzero(baseline.tokens[at] > 0))
        if scored < LEAST:
            raise UsageError(
                f"too few documents of {name!r} to judge it: {scored}, at least {LEAST} needed"
            )
        change = degradation(baseline.at(at), other.at(at))
        judged.append(Worst(dataset=name, change=change))
    return max(judged, key=lambda one: one.change.upper)
