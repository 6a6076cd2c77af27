"""Our experts backend on CPU with a compiler: one kernel for a layer's pairs (``fused.cpp``).

Sorting, both products, the activation and the weighted sum are compiled for the machine that runs
them. Any number of rows is served by the same code, so there is no warm-up; and a token's output
is the same to the last bit whatever else is in the forward (but for bfloat16 with AMX, which sums
few rows in another order than many).

Weights are copied into the kernel's layout, with gate and up side by side. A float32 weight that
16 bits hold exactly, as in a model whose checkpoint is float16 or bfloat16, is copied in these:
few tokens cost the reading of weights, so that halves their time. Products are summed in float32.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.nn import functional as F
from torch.profiler import record_function

from var_moe.execution.backends import build
from var_moe.execution.backends.base import ExpertsBackend, activate, is_plain_silu
from var_moe.execution.backends.copies import WeightCopies, can_copy, have_room
from var_moe.execution.backends.sorted import Scratch, SortedBackend
from var_moe.models.moe_layers import biases_of, weights_of

_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN, _SILU, _CLAMPED = 0, 1, 2  # activations that the kernel knows
_ELEMENTS = 2**27
"""Largest intermediate result; more tokens are run in equal pieces."""


class FusedBackend(ExpertsBackend):
    """Runs a layer's pairs in one kernel; where that is impossible, as `SortedBackend`."""

    name = "fused"

    def __init__(self) -> None:
        self._plain = SortedBackend()
        self._scratch = Scratch()
        self._copies = WeightCopies(_pack)

    def exact(self) -> ExpertsBackend:
        return self._plain

    def begin(self) -> None:
        self._copies.begin()

    def close(self) -> None:
        self._plain.close()
        self._scratch = Scratch()
        self._copies.clear()

    def run(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if not (can_copy(module, hidden) and can_run(hidden.dtype) and _fits(module)):
            return self._plain.run(module, hidden, index, weight)
        layer = self._copies.of(module)
        rows = hidden if hidden.dtype == torch.bfloat16 else hidden.float()
        largest = index.numel() * max(layer.first_width, layer.hidden)
        pieces = -(-largest // _ELEMENTS)
        if pieces <= 1:
            return self._run(module, layer, rows, index, weight).to(hidden.dtype)
        parts = (part.tensor_split(pieces) for part in (rows, index, weight))
        outputs = [self._run(module, layer, *part) for part in zip(*parts, strict=True)]
        return torch.cat(outputs).to(hidden.dtype)

    def _run(
        self, module: Any, layer: _PackedLayer, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        functions = build.library()
        assert not isinstance(functions, str)
        hidden, index, weight = hidden.contiguous(), index.contiguous(), weight.float().contiguous()
        (tokens, top_k), width, threads = index.shape, hidden.itemsize, torch.get_num_threads()
        slots = tokens * top_k
        numbers = self._scratch.take("numbers", _INT32, 1, 2 * slots)
        place = numbers.data_ptr()
        token = place + 4 * slots
        ends = self._scratch.take("ends", index, 1, layer.experts)
        functions.sort_pairs(
            index.data_ptr(), tokens, top_k, layer.experts, place, token, ends.data_ptr()
        )

        def product(
            rows: Tensor, numbered: int | None, line: int | None, part: _Packed, out: Tensor
        ) -> None:
            # Named so that `analysis.components` sees the experts' part of a forward.
            with record_function("fused_mm") if _profiler_enabled() else nullcontext():
                functions.products_of(
                    *(width, part.stored, rows.data_ptr(), numbered, line),
                    *(ends.data_ptr(), layer.experts),
                    *(part.weight.data_ptr(), _address(part.bias)),
                    *(part.depth, out.shape[1], part.activation, part.limit, part.alpha),
                    *(out.data_ptr(), threads),
                )

        room = slots + functions.slack_rows()  # matrix tiles read more rows than there are
        line = None
        if functions.gathers(width):
            line = self._scratch.take("rows", hidden, room, layer.hidden).data_ptr()
        inner = self._scratch.take("inner", hidden, room, layer.first_width)
        pairs = self._scratch.take("pairs", hidden, slots, layer.hidden)
        product(hidden, token, line, layer.first, inner)
        if layer.first.activation == _PLAIN:
            inner = activate(module, inner[: int(ends[0, -1])]).contiguous()
        product(inner, None, None, layer.second, pairs)
        if module.has_post_expert_norm:
            executed = pairs[: int(ends[0, -1])]
            executed.copy_(module.post_expert_norm(executed))
        out = torch.empty_like(hidden)
        functions.combine_of(
            *(width, pairs.data_ptr(), place, weight.data_ptr()),
            *(tokens, top_k, layer.hidden, out.data_ptr(), threads),
        )
        return out


_INT32 = torch.empty(0, dtype=torch.int32)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class _Packed:
    """All experts' weights of one product, by panels (see ``fused.cpp``)."""

    weight: Tensor  # (E, panels, depth / S, columns, S)
    bias: Tensor | None  # (E, panels, columns) float32
    depth: int
    activation: int = _PLAIN
    limit: float = 0.0
    alpha: float = 0.0

    @property
    def stored(self) -> int:
        return _STORED[self.weight.dtype]


@dataclass(frozen=True)
class _PackedLayer:
    """An experts module's weights."""

    first: _Packed
    first_width: int  # of what the first product hands on
    second: _Packed
    hidden: int
    experts: int


def can_run(dtype: torch.dtype) -> bool:
    """Whether the kernel is there, and serves a dtype here."""
    functions = build.library()
    return not isinstance(functions, str) and bool(functions.serves(_STORED.get(dtype, -1)))


def can_fuse(modules: list[Any]) -> bool:
    """Whether the kernel serves these experts here, and there is memory for their copies."""
    dtypes = {weight.dtype for module in modules for weight in weights_of(module)}
    return have_room(modules) and all(can_run(dtype) for dtype in dtypes)


def _fits(module: Any) -> bool:
    """Whether what is multiplied comes in whole steps: pairs, in bfloat16."""
    second = module.down_proj
    sizes = second.shape[1:]
    return second.dtype != torch.bfloat16 or all(size % 2 == 0 for size in sizes)


def instructions() -> str:
    """What the kernel was compiled for, or why there is none."""
    functions = build.library()
    return functions if isinstance(functions, str) else functions.instructions().decode()


def _pack(module: Any) -> _PackedLayer:
    first, second = (weight.detach() for weight in weights_of(module))
    if module.is_transposed:
        first, second = first.transpose(1, 2), second.transpose(1, 2)
    biases: list[Tensor | None] = [bias.detach() for bias in biases_of(module)] or [None, None]
    gate = _gate_of(module, first.shape[1])
    return _PackedLayer(
        first=_packed(first, biases[0], *gate),
        first_width=first.shape[1] // (1 if gate[0] == _PLAIN else 2),
        second=_packed(second, biases[1]),
        hidden=second.shape[1],
        experts=len(first),
    )


def _gate_of(module: Any, width: int) -> tuple[int, float, float]:
    """The activation of a first product of this width, with its limit and alpha."""
    if module.has_gate and is_plain_silu(module):
        return _SILU, 0.0, 0.0
    limit, alpha = getattr(module, "limit", None), getattr(module, "alpha", None)
    if module.has_gate and isinstance(limit, float) and isinstance(alpha, float):
        # As in GPT-OSS? What the class does with an example says so, not what it is called.
        example = torch.linspace(-2.0 * limit, 2.0 * limit, 8 * width).view(8, width)
        gate, up = example[:, ::2].clamp(max=limit), example[:, 1::2].clamp(-limit, limit)
        expected = (up + 1) * gate * torch.sigmoid(alpha * gate)
        got = module._apply_gate(example)
        if got.shape == expected.shape and torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
            return _CLAMPED, limit, alpha
    return _PLAIN, 0.0, 0.0


def _packed(weight: Tensor, bias: Tensor | None, activation: int = _PLAIN, *gate: float) -> _Packed:
    """(E, O, I) weights and (E, O) biases by panels."""
    functions = build.library()
    assert not isinstance(functions, str)
    columns = int(functions.panel_columns())
    dtype = _smallest(weight)
    pair = 2 if weight.dtype == torch.bfloat16 else 1  # neighbours that are multiplied at once
    first = _in_panels(weight[0], columns, activation)
    panels, depth = first.shape[0], weight.shape[2]
    out = torch.zeros((len(weight), panels, depth // pair, columns, pair), dtype=dtype)
    for expert, target in zip(weight, out, strict=True):
        panel = _in_panels(expert.to(dtype), columns, activation)
        target.copy_(panel.view(panels, columns, -1, pair).transpose(1, 2))
    if bias is not None:
        lines = (_in_panels(one[:, None], columns, activation) for one in bias.float())
        bias = torch.stack([line.squeeze(2) for line in lines]).contiguous()
    return _Packed(out, bias, depth, activation, *gate)


def _in_panels(weight: Tensor, columns: int, activation: int) -> Tensor:
    """(O, I) -> (panels, columns, I), with zeros for the last panel's missing columns."""
    if activation == _PLAIN:
        parts = [weight]
    elif activation == _SILU:
        parts = list(weight.chunk(2))
    else:
        parts = [weight[::2], weight[1::2]]
    share = columns // len(parts)
    padded = [F.pad(part, (0, 0, 0, -len(part) % share)) for part in parts]
    return torch.cat([part.view(-1, share, part.shape[1]) for part in padded], dim=1)


def _smallest(weight: Tensor) -> torch.dtype:
    """The shortest dtype in which every value stays what it is."""
    if weight.dtype != torch.float32:
        return weight.dtype
    for dtype in (torch.bfloat16, torch.float16):
        if can_run(dtype) and all(torch.equal(one.to(dtype).float(), one) for one in weight):
            return dtype
    return torch.float32
