"""What a forward computes and moves, counted from shapes and executed pairs.

Counted are the multiply-adds (two FLOPs each) of all matrices: those of the experts for each
executed pair, all others for each token; and attention's scores and sums, of which a causal mask
leaves half. Norms, activations, softmax and gathering are not counted: they are a few percent of
the FLOPs.

Bytes are the least that a forward must move: each matrix once (of the experts, those that any
token runs), the rows that go in and out of each matrix, and queries, keys, values and output
of attention. What stays in a cache costs less; buffers between operations cost more.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from var_moe.analysis.components import attention_modules
from var_moe.evaluation.cost import expected_experts
from var_moe.execution.dispatch import experts_modules


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of a model that decide what a forward costs.

    ``dense`` are (rows out, rows in) of all matrices that every token goes through, the head
    included; ``expert_elements`` and ``expert_rows`` are the weights of one expert and the widths
    that a pair's rows take on the way through it; ``attention_width`` is heads times head size, 0
    where the configuration does not say.
    """

    total_parameters: int
    dense: tuple[tuple[int, int], ...]
    other_parameters: int  # norms, biases: every token's, without matrices
    embedding: int
    expert_elements: int
    expert_rows: int
    layers: int
    experts: int
    top_k: int
    attention_layers: int
    attention_width: int
    bytes_per_element: int

    @property
    def dense_elements(self) -> int:
        """Weights that every token goes through, as matrices."""
        return sum(out * into for out, into in self.dense)

    def active_parameters(self, experts_per_token: float) -> float:
        """Weights that one token uses: all that is no expert, and so many experts in each layer.

        The embedding counts as a whole, as is usual.
        """
        shared = self.dense_elements + self.other_parameters + self.embedding
        return shared + self.layers * experts_per_token * self.expert_elements


@dataclass(frozen=True, kw_only=True)
class ForwardWork:
    """FLOPs by part, and the least bytes, of one forward."""

    flops: dict[str, float]  # experts, attention, dense
    bytes_moved: float

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def intensity(self) -> float:
        """FLOPs per byte."""
        return self.total_flops / self.bytes_moved


def shapes_of(model: Any, *, top_k: int) -> Shapes:
    """Read a model's sizes off its parameters."""
    modules = [module for _, module in experts_modules(model)]
    of_experts = {id(p) for module in modules for p in module.parameters()}
    embedding = model.get_input_embeddings()
    looked_up = {id(p) for p in embedding.parameters()} if embedding is not None else set()
    head = model.get_output_embeddings()
    tied = head is not None and any(id(p) in looked_up for p in head.parameters())
    dense, other, embedded = [], 0, 0
    for parameter in model.parameters():  # a shared one comes once
        if id(parameter) in of_experts:
            continue
        if id(parameter) in looked_up:
            embedded += parameter.numel()
            continue
        if parameter.dim() >= 2:
            dense.append((parameter.shape[0], parameter.numel() // parameter.shape[0]))
        else:
            other += parameter.numel()
    if tied:  # the same weights serve as a matrix too; they are counted once as parameters
        weight = head.weight
        dense.append((weight.shape[0], weight.shape[1]))
        embedded -= weight.numel()
    one: Any = modules[0]
    experts = int(getattr(one, "num_experts", 1))
    matrices = [p for p in one.parameters() if p.dim() == 3]
    text = model.config.get_text_config()
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    size = getattr(text, "head_dim", None)
    if not size and heads:
        size = int(text.hidden_size) // heads
    return Shapes(
        total_parameters=sum(p.numel() for p in model.parameters()),
        dense=tuple(dense),
        other_parameters=other,
        embedding=embedded,
        expert_elements=sum(p.numel() for p in one.parameters()) // experts,
        expert_rows=sum(int(p.shape[1] + p.shape[2]) for p in matrices),
        layers=len(modules),
        experts=experts,
        top_k=top_k,
        attention_layers=len(attention_modules(model)),
        attention_width=heads * int(size or 0),
        bytes_per_element=next(iter(one.parameters())).element_size(),
    )


def forward_work(
    shapes: Shapes, *, batch_size: int, sequence: int, experts_per_token: float
) -> ForwardWork:
    """FLOPs and bytes of one forward of (batch_size, sequence) tokens."""
    tokens = batch_size * sequence
    pairs = shapes.layers * tokens * experts_per_token
    each_layer = np.asarray(tokens * experts_per_token, dtype=np.float64)
    run = shapes.layers * float(expected_experts(shapes.experts, each_layer))
    attended = sequence / 2 * shapes.attention_width * shapes.attention_layers
    flops = {
        "experts": 2.0 * pairs * shapes.expert_elements,
        "attention": 4.0 * tokens * attended,  # scores and sums
        "dense": 2.0 * tokens * shapes.dense_elements,
    }
    elements = (
        shapes.dense_elements
        + run * shapes.expert_elements
        + tokens * sum(out + into for out, into in shapes.dense)
        + pairs * shapes.expert_rows
        + 4 * tokens * shapes.attention_width * shapes.attention_layers
    )
    return ForwardWork(flops=flops, bytes_moved=float(elements) * shapes.bytes_per_element)
