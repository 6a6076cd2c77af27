"""Pages as the units of a certificate, and their losses, measured in chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from var_moe.evaluation.perplexity import Groups
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
    documents: NDArray[np.int64]  # (units,) how many each has
    learned: NDArray[np.int64]  # (chunks,) decisions left to the router
    decisions: NDArray[np.int64]  # (chunks,)
    executed: NDArray[np.int64]  # (chunks,) pairs

    @property
    def experts_per_token(self) -> float:
        """Executed pairs per layer and token."""
        return int(self.executed.sum()) / max(1, int(self.decisions.sum()))

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

    def _evaluator(self, number: int) -> Evaluator:
        if number not in self._chunks:
            _ = self.evaluator.baseline_backend  # measured on all text, not on a chunk of it
            documents = [document for unit in self._units(number) for document in unit]
            self._chunks[number] = self.evaluator.with_documents(documents)
            self._chunks[number].progress = None
        return self._chunks[number]

    def _units(self, number: int) -> Sequence[Unit]:
        return self.units[number * self.chunk_units : (number + 1) * self.chunk_units]

    def chunk(self, policy: RoutingPolicy | None, number: int) -> Measured:
        """Measure a chunk; None is the unmodified model, which changes nothing."""
        evaluator = self._evaluator(number)
        baseline = losses = evaluator.baseline_losses
        learned = decisions = int(baseline.tokens.sum())
        executed = decisions * evaluator.top_k
        if policy is not None:
            losses, report = evaluator.losses(policy)
            counts = np.array(report.tier_counts)  # (L, 3)
            learned, decisions = int(counts[:, Tier.LEARNED].sum()), int(counts.sum())
            executed = sum(report.executed_pairs)
        sizes = [len(unit) for unit in self._units(number)]
        starts = np.cumsum([0, *sizes[:-1]])
        return Measured(
            change=np.add.reduceat(losses.nll - baseline.nll, starts),
            baseline_nll=np.add.reduceat(baseline.nll, starts),
            tokens=np.add.reduceat(baseline.tokens, starts),
            documents=np.array(sizes),
            learned=np.array([learned]),
            decisions=np.array([decisions]),
            executed=np.array([executed]),
        )

    def growing(self, policy: RoutingPolicy | None, *, what: str) -> Iterator[Measured]:
        """After each chunk, all units measured so far."""
        parts = []
        for number in range(self.chunks):
            parts.append(self.chunk(policy, number))
            if self.evaluator.progress:
                self.evaluator.progress(what, number + 1, self.chunks)
            yield _joined(parts)

    def all(self, policy: RoutingPolicy | None, *, what: str = "scoring") -> Measured:
        """Measure every unit."""
        *_, whole = self.growing(policy, what=what)
        return whole


def _joined(parts: Sequence[Measured]) -> Measured:
    columns = {one.name: [getattr(part, one.name) for part in parts] for one in fields(Measured)}
    return Measured(**{name: np.concatenate(arrays) for name, arrays in columns.items()})
