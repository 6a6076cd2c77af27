"""Each data set of a text measured by itself, as if it were the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from var_moe.evaluation.compare import Evaluator, Quality
from var_moe.evaluation.groups import LEAST, groups_of, losses_of

if TYPE_CHECKING:
    from var_moe.routing.base import RoutingPolicy


@dataclass(frozen=True, kw_only=True)
class Apart:
    """A policy's quality on one data set, or source, of a text."""

    dataset: str
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {"dataset": self.dataset, **self.quality.to_dict()}


def measure_apart(evaluator: Evaluator, policy: RoutingPolicy, *, what: str = "") -> list[Apart]:
    """A policy on each data set of the evaluator's text, or on each source of a single one.

    Each is scored in a pass of its own, from empty caches: what it would show as the whole text.
    One of fewer than two documents is left out.

    Args:
        evaluator: of the whole text; its baseline losses count.
        policy: what is measured.
        what: shown before the data set's name as it is scored.

    Returns:
        In the order in which they first occur; empty where there is nothing to tell apart.
    """
    found = []
    for name, at in groups_of(evaluator.documents).items():
        if len(at) < LEAST:
            continue
        part = evaluator.with_documents([evaluator.documents[i] for i in at])
        part.baseline_losses = losses_of(evaluator.baseline_losses, at)
        label = f"{what}: {name}" if what else name
        found.append(Apart(dataset=name, quality=part.quality(policy, what=label)))
    return found
