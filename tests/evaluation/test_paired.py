"""The paired comparison against answers computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from var_moe.errors import UsageError
from var_moe.evaluation.perplexity import DocumentLosses, degradation


def losses(nll, tokens):
    return DocumentLosses(nll=np.array(nll, dtype=float), tokens=np.array(tokens))


def test_by_hand():
    base = losses([10.0, 20.0, 30.0], [5, 10, 10])
    other = losses([11.0, 20.5, 31.0], [5, 10, 10])
    change = degradation(base, other)
    # d = 1, 0.5, 1; T = 25; r = 2.5 / 25 = 0.1; rest = 0.5, -0.5, 0
    error = math.sqrt(3 / 2 * 0.5) / 25
    assert change.value == pytest.approx(math.exp(0.1) - 1)
    assert change.standard_error == pytest.approx(math.exp(0.1) * error)
    assert change.upper == pytest.approx(math.exp(0.1 + 2.9199856 * error) - 1)
    assert change.baseline_perplexity == pytest.approx(math.exp(60 / 25))
    assert change.perplexity == pytest.approx(math.exp(62.5 / 25))
    assert (change.documents, change.tokens) == (3, 25)


def test_documents_without_scored_tokens_do_not_count():
    base, other = losses([1, 2, 0], [1, 2, 0]), losses([1.5, 2.5, 0], [1, 2, 0])
    assert degradation(base, other).documents == 2


def test_upper_bound_covers_at_its_rate():
    """The true ratio lies above the bound in about 5% of studies."""
    rng = np.random.default_rng(5)
    true, studies, over = 0.01, 1500, 0
    for _ in range(studies):
        size = rng.integers(50, 400, 80)
        noise = rng.standard_t(5, 80) * 0.02 * np.sqrt(size)
        base = losses(size * 2.5, size)
        change = degradation(base, losses(base.nll + size * math.log1p(true) + noise, size))
        over += change.upper < true
    assert stats.binomtest(over, studies, 0.05).pvalue > 0.01


def test_other_tokens_are_refused():
    with pytest.raises(UsageError, match="different tokens"):
        degradation(losses([1, 2], [1, 2]), losses([1, 2], [2, 2]))


def test_one_document_is_too_few():
    with pytest.raises(UsageError, match="at least 2 documents"):
        degradation(losses([1], [1]), losses([1], [1]))
