"""Calibrating a guard on documents, and running documents as if they were served."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from var_moe.config import check_seed
from var_moe.data.documents import check_encoded
from var_moe.evaluation.batching import collate, in_order, logits_of
from var_moe.evaluation.evaluator import Progress
from var_moe.execution.session import Session, routed
from var_moe.models.identity import identity
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import Sums
from var_moe.routing.guard import (
    Expectation,
    Guard,
    check_alpha,
    check_answer,
    check_units,
    policy_facts,
)
from var_moe.routing.watch import Units
from var_moe.storage import provenance

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

DEFAULT_ALPHA = 0.01
_TOKENS_PER_BATCH = 4096


def calibrate_guard(
    loaded: LoadedModel,
    policy: RoutingPolicy,
    documents: Sequence[EncodedDocument],
    *,
    alpha: float = DEFAULT_ALPHA,
    action: str = "warn",
    tolerance: float = 0.0,
    seed: int = 0,
    data: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> Guard:
    """Run documents under a policy and record the statistics of its routing.

    The documents must be independent of each other and like those to be served: in kind, in
    length, and scored as a whole or generated. Nothing of the policy should have been fitted to
    them. The guarantee is exact for policies that decide each document apart; a context cache
    that documents share makes them slightly dependent.

    Args:
        loaded: the model.
        policy: as it will serve.
        documents: at least `guard.LEAST_UNITS`; see `var_moe.data.documents.one_per_page`.
        alpha: probability of an alarm, ever, on documents like these.
        action, tolerance: see `Guard`.
        seed: of the order.
        data: recorded about the text (name, hash).
        progress: called with "calibrating the guard", documents done and in all.

    Raises:
        UsageError: there are too few documents, or an argument is out of its range.
    """
    check_encoded(documents)
    check_alpha(alpha)
    check_answer(action, tolerance)
    check_units(len(documents))
    units: list[Sums] = []
    recorder = Units(loaded.moe_layers, drops_only=policy.drops_only, ended=units.append)
    with routed(loaded.model, policy, observers=[recorder]) as session:
        session.reset()
        run_documents(
            loaded, session, documents, seed=seed, what="calibrating the guard", progress=progress
        )
    expectation = Expectation.of_units(
        units,
        alpha=alpha,
        policy=policy_facts(policy),
        shared_cache=not policy.documents_apart,
        head={
            "model": identity(loaded),
            "data": data or {},
            "documents": len(documents),
            "tokens": sum(len(document.ids) for document in documents),
            "seed": seed,
            "provenance": provenance(),
        },
    )
    return Guard(expectation=expectation, action=action, tolerance=tolerance)


def run_documents(
    loaded: LoadedModel,
    session: Session,
    documents: Sequence[EncodedDocument],
    *,
    seed: int = 0,
    tokens_per_batch: int = _TOKENS_PER_BATCH,
    what: str = "running documents",
    progress: Progress | None = None,
) -> None:
    """Run documents through a routed model, in random order, several in a forward.

    Rows are not sorted by length, so that early documents are like later ones. ``progress`` is
    called with ``what``, documents begun and in all.
    """
    order = np.random.default_rng(check_seed(seed)).permutation(len(documents))
    played, places = [documents[number] for number in order], range(len(documents))
    before = session.policy.ids_before
    with torch.inference_mode():
        for rows in in_order(played, places, tokens_per_batch, window=loaded.window, prefix=before):
            if progress:  # rows come in order; a long document has several
                progress(what, rows[-1].document, len(documents))
            logits_of(loaded.model, collate(rows), session)
    session.end_documents()
    if progress:
        progress(what, len(documents), len(documents))
