"""Pages as the units of a certificate, and their losses, measured in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from var_moe.evaluation.perplexity import DocumentLosses, Groups
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import Tier

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.evaluation.evaluator import Evaluator


Unit = Sequence["EncodedDocument"]
"""The documents of one page: what is drawn independently of the rest."""

CHUNK_UNITS = 16
"""Units that are scored together: how often a sequential certificate looks."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Units of text under a policy: what each lost, and the decisions by chunk."""

    change: NDArray[np.float64]  # (units,) nats
    baseline_nll: NDArray[np.float64]  # (units,) nats
    tokens: NDArray[np.int64]  # (units,)
    learned: NDArray[np.int64]  # (chunks,) decisions left to the router
    decisions: NDArray[np.int64]  # (chunks,)
    executed: int  # pairs
    documents: int

    @property
    def experts_per_token(self) -> float:
        """Executed pairs per layer and token."""
        return self.executed / max(1, int(self.decisions.sum()))

    @property
    def learned_pct(self) -> float:
        """Share of decisions left to the router, in percent."""
        return 100 * float(self.learned.sum()) / max(1, int(self.decisions.sum()))


@dataclass
class UnitScorer:
    """Measures policies on units, a chunk at a time; the baseline's losses are kept.

    Decisions must not depend on what other documents were scored before: the policies are made
    so (`cache_scope="document"`), and each chunk starts from empty caches.
    """

    evaluator: Evaluator
    units: Sequence[Unit]
    chunk_units: int = CHUNK_UNITS
    judged: Groups = field(default_factory=dict)
    """Units of each data set that a claim must hold on; empty where it is about all of them."""
    _chunks: dict[int, Evaluator] = field(default_factory=dict)

    @property
    def chunks(self) -> int:
        """How many chunks there are."""
        return -(-len(self.units) // self.chunk_units)

    def _chunk(self, number: int) -> tuple[Sequence[Unit], Evaluator]:
        units = self.units[number * self.chunk_units : (number + 1) * self.chunk_units]
        if number not in self._chunks:
            _ = self.evaluator.baseline_backend  # measured on all text, not on a chunk of it
            documents = [document for unit in units for document in unit]
            self._chunks[number] = self.evaluator.with_documents(documents)
            self._chunks[number].progress = None
        return units, self._chunks[number]

    def chunk(self, policy: RoutingPolicy | None, number: int) -> Measured:
        """Measure a chunk; None is the unmodified model, which changes nothing."""
        units, evaluator = self._chunk(number)
        baseline = evaluator.baseline_losses
        if policy is None:
            tokens = int(baseline.tokens.sum())
            return _measured(units, baseline, baseline, tokens, tokens, tokens * evaluator.top_k)
        losses, report = evaluator.losses(policy)
        counts = np.array(report.tier_counts)  # (L, 3)
        return _measured(
            units,
            baseline,
            losses,
            int(counts[:, Tier.LEARNED].sum()),
            int(counts.sum()),
            sum(report.executed_pairs),
        )

    def all(self, policy: RoutingPolicy | None, *, what: str = "scoring") -> Measured:
        """Measure every unit."""
        parts = []
        for number in range(self.chunks):
            parts.append(self.chunk(policy, number))
            if self.evaluator.progress:
                self.evaluator.progress(what, number + 1, self.chunks)
        return join(parts)


def _measured(
    units: Sequence[Unit],
    baseline: DocumentLosses,
    other: DocumentLosses,
    learned: int,
    decisions: int,
    executed: int,
) -> Measured:
    starts = np.cumsum([0, *(len(unit) for unit in units[:-1])])
    return Measured(
        change=np.add.reduceat(other.nll - baseline.nll, starts),
        baseline_nll=np.add.reduceat(baseline.nll, starts),
        tokens=np.add.reduceat(baseline.tokens, starts),
        learned=np.array([learned]),
        decisions=np.array([decisions]),
        executed=executed,
        documents=len(baseline.tokens),
    )


def join(parts: Sequence[Measured]) -> Measured:
    """Chunks as one."""
    return Measured(
        change=np.concatenate([part.change for part in parts]),
        baseline_nll=np.concatenate([part.baseline_nll for part in parts]),
        tokens=np.concatenate([part.tokens for part in parts]),
        learned=np.concatenate([part.learned for part in parts]),
        decisions=np.concatenate([part.decisions for part in parts]),
        executed=sum(part.executed for part in parts),
        documents=sum(part.documents for part in parts),
    )
