"""Paired comparison of two sets of document losses: documents are the units, never tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from var_moe.errors import UsageError
from var_moe.evaluation.perplexity import DocumentLosses

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """PPL(VAR) / PPL(baseline) - 1 on the same tokens, with its uncertainty over documents."""

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


def both_scored(
    baseline: DocumentLosses, other: DocumentLosses
) -> tuple[DocumentLosses, DocumentLosses]:
    """Both, with the documents left out that ``other`` has not scored to the end."""
    whole = baseline.tokens == other.tokens
    first, second = (
        DocumentLosses(nll=np.where(whole, one.nll, 0.0), tokens=np.where(whole, one.tokens, 0))
        for one in (baseline, other)
    )
    return first, second


def degradation(baseline: DocumentLosses, other: DocumentLosses) -> Degradation:
    """Relative perplexity change, a ratio estimator over documents.

    With ``d_i`` the change of document i's summed loss and ``T_i`` its scored tokens, the log
    ratio is ``r = sum d / sum T`` and its standard error ``sqrt(n / (n - 1) * sum (d_i - r
    T_i)^2) / sum T`` (Cochran 1977, ratio estimation). The upper bound takes the t
    distribution with n - 1 degrees of freedom.

    Raises:
        UsageError: the two were not scored on the same tokens, or on fewer than two documents.
    """
    if not np.array_equal(baseline.tokens, other.tokens):
        raise UsageError("the two losses are of different tokens: they can't be compared")
    scored = baseline.tokens > 0
    size = baseline.tokens[scored].astype(float)
    change = (other.nll - baseline.nll)[scored]
    n = len(change)
    if n < 2:
        raise UsageError(f"{n} scored document(s): a comparison needs at least 2 documents")
    ratio = change.sum() / size.sum()
    rest = change - ratio * size
    error = math.sqrt(n / (n - 1) * float(rest @ rest)) / size.sum()
    bound = ratio + float(stats.t.ppf(CONFIDENCE, n - 1)) * error
    return Degradation(
        value=math.expm1(ratio),
        standard_error=math.exp(ratio) * error,
        upper=math.expm1(bound),
        documents=n,
        tokens=int(size.sum()),
        baseline_perplexity=baseline.perplexity,
        perplexity=other.perplexity,
    )
