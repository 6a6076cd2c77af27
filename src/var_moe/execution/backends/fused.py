"""Our experts backend on CPU with a compiler: one kernel for a layer's pairs (``kernel/``).

Sorting, both products, the activation and the weighted sum are compiled for the machine that runs
them. Any number of rows is served by the same code, so there is no warm-up; and a token's output
is the same to the last bit whatever else is in the forward (but for bfloat16 with AMX, which sums
few rows in another order than many).

Weights are copied into the kernel's layout, with gate and up side by side. A float32 weight that
16 bits hold exactly, as in a model whose checkpoint is float16 or bfloat16, is copied in these:
few tokens cost the reading of weights, so that halves their time. Products are summed in float32.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.profiler import record_function

from var_moe.execution.backends import build
from var_moe.execution.backends.base import ExpertsBackend, activate, is_plain_silu
from var_moe.execution.backends.copies import WeightCopies, can_copy, worth_copying
from var_moe.execution.backends.sorted import SortedBackend
from var_moe.models.moe_layers import biases_of, weights_of
from var_moe.routing.compensation import StandIn

_STORED = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_PLAIN, _GATED_SILU, _CLAMPED, _SILU = range(4)  # activations that the kernel knows
_ELEMENTS = 2**27
"""Largest intermediate result; more tokens are run in equal pieces."""


class FusedBackend(ExpertsBackend):
    """Runs a layer's pairs in one kernel; where that is impossible, as `SortedBackend`."""

    name = "fused"

    def __init__(self) -> None:
        self._plain = SortedBackend()
        self._copies = WeightCopies(_PackedLayer)
        self._scratch: Tensor | None = None

    def exact(self) -> ExpertsBackend:
        return self._plain

    def begin(self) -> None:
        self._copies.begin()

    def close(self) -> None:
        self._plain.close()
        self._copies.clear()
        self._scratch = None

    def run(self, module: Any, hidden: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        if not _serves(module, hidden):
            return self._plain.run(module, hidden, index, weight)
        return self._run(module, hidden, index, index, weight, None)

    def run_with(
        self,
        module: Any,
        hidden: Tensor,
        index: Tensor,
        weight: Tensor,
        kept: Tensor,
        stand_in: StandIn,
    ) -> Tensor:
        if not (_serves(module, hidden) and _in_steps(hidden, stand_in)):
            return super().run_with(module, hidden, index, weight, kept, stand_in)
        return self._run(module, hidden, index, kept, weight, stand_in)

    def _run(
        self,
        module: Any,
        hidden: Tensor,
        index: Tensor,
        kept: Tensor,
        weight: Tensor,
        stand_in: StandIn | None,
    ) -> Tensor:
        packed = self._copies.of(module)
        rows = hidden if hidden.dtype == torch.bfloat16 else hidden.float()
        layer = packed.layer(index.shape[1], stand_in, rows.dtype)
        rows, weight = rows.contiguous(), weight.float().contiguous()
        index, kept = index.long().contiguous(), kept.long().contiguous()
        out = torch.empty_like(rows)
        pieces = -(-index.numel() * packed.widest // _ELEMENTS)
        if pieces <= 1:
            self._piece(module, layer, rows, index, kept, weight, out)
        else:
            whole = (rows, index, kept, weight, out)
            parts = (tensor.tensor_split(pieces) for tensor in whole)
            for part in zip(*parts, strict=True):
                self._piece(module, layer, *part)
        return out.to(hidden.dtype)

    def _piece(
        self,
        module: Any,
        layer: build.Layer,
        hidden: Tensor,
        index: Tensor,
        kept: Tensor,
        weight: Tensor,
        out: Tensor,
    ) -> None:
        functions = _library()
        size = functions.scratch_bytes(layer, len(index))
        if self._scratch is None or len(self._scratch) < size:
            with torch.inference_mode(False):  # it serves inside and outside inference mode
                self._scratch = torch.empty(size, dtype=torch.uint8)
        scratch = self._scratch
        addresses = (one.data_ptr() for one in (hidden, index, kept, weight, out, scratch))
        call = build.Call(*addresses, len(index), torch.get_num_threads())
        apart = layer.first.activation == _PLAIN or module.has_post_expert_norm
        if not apart and not _profiler_enabled():
            functions.run_layer(layer, call)
            return

        def step(number: int, width: int) -> Tensor:
            place = (ctypes.c_int64 * 2)()
            # Named so that `analysis.components` sees the experts' part of a forward.
            with record_function("fused_mm" if number < 2 else "fused_combine"):
                functions.run_step(layer, call, number, place)
            found = scratch[place[0] : place[0] + place[1] * width * hidden.itemsize]
            return found.view(hidden.dtype).view(-1, width)

        inner = step(0, layer.first.width)
        if layer.first.activation == _PLAIN:
            made = activate(module, inner)
            inner.view(-1)[: made.numel()] = made.reshape(-1)
        pairs = step(1, layer.second.width)
        if module.has_post_expert_norm:
            pairs.copy_(module.post_expert_norm(pairs))
        step(2, layer.second.width)


class _Packed:
    """All experts' weights of one product, by panels, and their `build.Product`."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: int = _PLAIN,
        limit: float = 0.0,
        alpha: float = 0.0,
    ) -> None:
        dtype = _smallest(weight)
        pair = 2 if weight.dtype == torch.bfloat16 else 1  # neighbours that are multiplied at once
        gated = activation in (_GATED_SILU, _CLAMPED)
        self._weight = _in_panels(weight, dtype, activation, pair)
        self._bias: Tensor | None = None
        if bias is not None:
            self._bias = _in_panels(bias[:, :, None], torch.float32, activation)
        self.product = build.Product(
            self._weight.data_ptr(),
            None if self._bias is None else self._bias.data_ptr(),
            weight.shape[2],
            weight.shape[1] // (2 if gated else 1),
            _STORED[dtype],
            activation,
            limit,
            alpha,
        )


class _PackedLayer:
    """An experts module's weights, and its `build.Layer` without and with a stand-in."""

    def __init__(self, module: Any) -> None:
        first, second = (weight.detach() for weight in weights_of(module))
        if module.is_transposed:
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        biases: list[Tensor | None] = [bias.detach() for bias in biases_of(module)] or [None, None]
        self._first = _Packed(first, biases[0], *_gate_of(module, first.shape[1]))
        self._second = _Packed(second, biases[1])
        self._experts = len(first)
        self.widest = max(first.shape[1], second.shape[1])
        self._layers: WeakKeyDictionary[Any, tuple[build.Layer, Any]] = WeakKeyDictionary()

    def layer(self, top_k: int, stand_in: StandIn | None, dtype: torch.dtype) -> build.Layer:
        """For rows of a dtype, with K = ``top_k``."""
        key = self._first if stand_in is None else stand_in
        known = self._layers.get(key)
        if known is not None and known[0].top_k == top_k:
            return known[0]
        products = self._first.product, self._second.product
        made = build.Layer(dtype.itemsize, 0, self._experts, top_k, *products)
        held: list[Any] = []  # whatever the kernel is given addresses of
        if stand_in is not None:
            part = stand_in.layer
            vectors = part.vectors.to(dtype).contiguous()
            held.append(vectors)
            made.by_pair, made.vectors = stand_in.compensation.by_pair, vectors.data_ptr()
            if part.down is not None and part.up is not None and part.bias is not None:
                down = _Packed(part.down.to(dtype)[None], part.bias[None], _SILU)
                up = _Packed(part.up.to(dtype)[None])
                held += [down, up]
                made.down, made.up = down.product, up.product
        self._layers[key] = made, held
        return made


def _library() -> ctypes.CDLL:
    functions = build.library()
    assert not isinstance(functions, str)
    return functions


def _serves(module: Any, hidden: Tensor) -> bool:
    """Whether the kernel runs this layer on these inputs."""
    return can_copy(module, hidden) and can_run(hidden.dtype) and _fits(module)


def _in_steps(hidden: Tensor, stand_in: StandIn) -> bool:
    return hidden.dtype != torch.bfloat16 or stand_in.compensation.rank % 2 == 0


def can_run(dtype: torch.dtype) -> bool:
    """Whether the kernel is there, and serves a dtype here."""
    return dtype in _served(build.library())


@cache
def _served(functions: ctypes.CDLL | str) -> frozenset[torch.dtype]:
    if isinstance(functions, str):
        return frozenset()
    there = [dtype for dtype, stored in _STORED.items() if functions.serves(stored)]
    return frozenset(dtype for dtype in there if _right(functions, dtype))


def _right(functions: ctypes.CDLL, dtype: torch.dtype) -> bool:
    """Whether the kernel computes an example right: few machines are at hand to test it on."""
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn((40, 64), generator=rng).to(dtype)
    weight = torch.randn((1, 64, 64), generator=rng).div(8).to(dtype)
    wide = rows if dtype == torch.bfloat16 else rows.float()
    packed = _Packed(weight)  # which holds what the product points to
    layer = build.Layer(wide.itemsize, 0, 1, 1, packed.product, packed.product)
    index, ones, out = torch.zeros((40, 1), dtype=torch.int64), torch.ones(40, 1), wide * 0
    scratch = torch.empty(functions.scratch_bytes(layer, 40), dtype=torch.uint8)
    given = (wide, index, index, ones, out, scratch)
    functions.run_layer(layer, build.Call(*(one.data_ptr() for one in given), 40, 1))
    expected = rows.double() @ weight[0].double().t() @ weight[0].double().t()
    distance = (out.double() - expected).norm() / expected.norm()
    return bool(distance < (2e-2 if dtype == torch.bfloat16 else 1e-5))


def can_fuse(modules: list[Any]) -> bool:
    """Whether the kernel serves these experts here, and there is memory for their copies."""
    return worth_copying(modules, can_run)


def _fits(module: Any) -> bool:
    """Whether what is multiplied comes in whole steps: pairs, in bfloat16."""
    second = module.down_proj
    sizes = second.shape[1:]
    return second.dtype != torch.bfloat16 or all(size % 2 == 0 for size in sizes)


def instructions() -> str:
    """What the kernel was compiled for, or why there is none."""
    functions = build.library()
    return functions if isinstance(functions, str) else functions.instructions().decode()


def _gate_of(module: Any, width: int) -> tuple[int, float, float]:
    """The activation of a first product of this width, with its limit and alpha."""
    if module.has_gate and is_plain_silu(module):
        return _GATED_SILU, 0.0, 0.0
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


def _in_panels(weight: Tensor, dtype: torch.dtype, activation: int, pair: int = 1) -> Tensor:
    """(E, O, I) in a dtype, by panels: (E, panels, I / pair, columns, pair)."""
    functions = _library()
    columns = int(functions.panel_columns())
    width, share = weight.shape[1], columns
    if activation in (_GATED_SILU, _CLAMPED):
        width, share = width // 2, columns // 2
    out = torch.empty(
        (len(weight), -(-width // share), weight.shape[2] // pair, columns, pair), dtype=dtype
    )
    for expert, target in zip(weight, out, strict=True):
        values = expert.to(dtype)
        matrix = build.Matrix(values.data_ptr(), 1, *values.shape, 0, *values.stride())
        given = (dtype.itemsize, activation, pair, target.data_ptr(), torch.get_num_threads())
        functions.pack_matrix(matrix, *given)
    return out


def _smallest(weight: Tensor) -> torch.dtype:
    """The shortest dtype in which every value stays what it is."""
    if weight.dtype != torch.float32:
        return weight.dtype
    for dtype in (torch.bfloat16, torch.float16):
        if _library().serves(_STORED[dtype]) and all(
            torch.equal(one.to(dtype).float(), one) for one in weight
        ):
            return dtype
    return torch.float32
