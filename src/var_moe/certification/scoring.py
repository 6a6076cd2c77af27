"""Pages as the units of a certificate, and their losses, measured in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import Tier

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.evaluation.evaluator import Evaluator


Unit = Sequence["EncodedDocument"]
"""The documents of one page: what is drawn independently of the rest."""

CHUNK_UNITS = 16
"""Units that are scored together, and whose decisions are counted together."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Units of text under a policy: the losses of each, and the decisions by chunk."""

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


class UnitScorer:
    """Measures policies on units, a chunk at a time; the baseline's losses are kept.

    Decisions must not depend on what other documents were scored before: the policies are made
    so (`cache_scope="document"`), and each chunk starts from empty caches.
    """

    def __init__(
        self, evaluator: Evaluator, units: Sequence[Unit], *, chunk_units: int = CHUNK_UNITS
    ) -> None:
        self.evaluator, self.units = evaluator, units
        _ = evaluator.baseline_backend  # measured on all text, not on a chunk of it
        self._chunks: list[tuple[Sequence[Unit], Evaluator]] = []
        for start in range(0, len(units), chunk_units):
            chunk = units[start : start + chunk_units]
            part = evaluator.with_documents([document for unit in chunk for document in unit])
            part.progress = None
            self._chunks.append((chunk, part))

    def measure(self, policy: RoutingPolicy | None, *, what: str = "scoring") -> Measured:
        """Measure every unit; policy None is the unmodified model, which changes nothing."""
        parts = []
        for chunk, evaluator in self._chunks:
            parts.append(_measured(chunk, evaluator, policy))
            if self.evaluator.progress:
                self.evaluator.progress(what, len(parts), len(self._chunks))
        names = [field.name for field in fields(Measured)]
        return Measured(**{n: np.concatenate([getattr(part, n) for part in parts]) for n in names})


def _measured(
    units: Sequence[Unit], evaluator: Evaluator, policy: RoutingPolicy | None
) -> Measured:
    baseline = losses = evaluator.baseline_losses
    learned = decisions = int(baseline.tokens.sum())
    executed = decisions * evaluator.top_k
    if policy is not None:
        losses, report = evaluator.losses(policy)
        counts = np.array(report.tier_counts)  # (L, 3)
        learned, decisions = int(counts[:, Tier.LEARNED].sum()), int(counts.sum())
        executed = sum(report.executed_pairs)
    sizes = [len(unit) for unit in units]
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
