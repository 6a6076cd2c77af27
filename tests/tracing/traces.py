"""Traces made by hand for tests: from documents and choices in the form of the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from oracle import RouterChoice
from var_moe.tracing.trace import RoutingTrace

OPTIONS = {"dataset": "tiny", "data_hash": "h", "tokens_per_batch": 300, "window": 48}
"""How the tests of this room record: documents longer than a window, several forwards."""


def made_trace(
    documents: Sequence[Sequence[int]], router: Sequence[Sequence[RouterChoice]], **more: object
) -> RoutingTrace:
    """The trace of a model whose choice at each token of the documents, end to end, is known.

    Args:
        documents: token ids.
        router: per layer, one choice per token; slots in any order.
        more: further fields of the trace.
    """
    index, weight = [], []
    for choices in router:
        ranked = [sorted(zip(e, w, strict=True), key=lambda p: (-p[1], p[0])) for e, w in choices]
        index.append([[expert for expert, _ in row] for row in ranked])
        weight.append([[w / (sum(x for _, x in row) or 1) for _, w in row] for row in ranked])
    sizes = torch.tensor([0, *(len(document) for document in documents)])
    ids = torch.tensor([token for document in documents for token in document])
    layers, tokens = len(router), len(ids)
    return RoutingTrace(
        ids=ids.long(),
        starts=sizes.cumsum(0),
        documents=torch.arange(len(documents)),
        index=torch.tensor(index, dtype=torch.int16),
        weight=torch.tensor(weight, dtype=torch.float64).half(),
        entropy=torch.zeros((layers, tokens), dtype=torch.float16),
        head={"model": "made", "tokens": tokens},
        **more,
    )
