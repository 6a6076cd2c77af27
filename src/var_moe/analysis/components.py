"""Where the time of a forward goes: attention, router, policy, compaction, experts, head.

The model's parts are marked by forward hooks, our decisions by a policy that wraps the one in use.
Within a routed experts module, the first and the last matrix product tell compaction, experts and
combination apart, whatever backend runs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from var_moe.analysis.profiler import PeakMemory, Span, mark, recorded, summary
from var_moe.errors import UsageError
from var_moe.evaluation.throughput import backend_arm
from var_moe.execution.backends.base import ExpertsBackend
from var_moe.execution.session import routed
from var_moe.models.moe_layers import experts_modules, router_modules
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import RoutingReport
from var_moe.routing.decision import ForwardContext, Routing

COMPONENTS = (
    *("attention", "router", "policy", "compaction", "experts", "combine", "head", "other"),
)
"""``policy``: our decision, cache included; ``compaction``: gathering and sorting pairs;
``experts``: from the first of their matrix products to the last (in the unmodified model, the
whole experts module); ``combine``: the weighted sum, what stands in for dropped experts, and
counting; ``other``: norms, embedding, residual adds, dense layers."""

_LAYER = "@"
_PRODUCT = re.compile("mm|linear|matmul|einsum")


class WatchedPolicy(RoutingPolicy):
    """Another policy, whose decisions are marked for a profiler.

    Args:
        inner: the other.
        pairs: (L, E) zeros, where the executed pairs are to be counted by expert.
    """

    def __init__(self, inner: RoutingPolicy, pairs: Tensor | None = None) -> None:
        self._inner, self._pairs = inner, pairs
        self.context_window, self.compensation = inner.context_window, inner.compensation

    @property
    def drops_only(self) -> bool:
        return self._inner.drops_only

    def begin(self, context: ForwardContext) -> None:
        with mark("policy"):
            self._inner.begin(context)

    def see(self, layer: int, hidden: Tensor) -> None:
        with mark("policy"):
            self._inner.see(layer, hidden)

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        with mark("policy"):
            routing = self._inner.route(context, layer, index, weight)
        if self._pairs is not None:
            experts = self._pairs.shape[1]
            counts = torch.bincount(routing.index.reshape(-1) + 1, minlength=experts + 1)
            self._pairs[layer] += counts[1 : experts + 1].cpu()
        return routing

    def reset(self) -> None:
        self._inner.reset()


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a policy decided and ran.

    ``imbalance`` is the busiest expert's pairs over the mean of its layer, in the worst layer.
    """

    report: RoutingReport
    imbalance: float
    memory: dict[str, Any]


def run_policy(
    model: Any,
    batches: Sequence[Tensor],
    policy: RoutingPolicy,
    *,
    backend: ExpertsBackend,
    layers: int,
    experts: int,
) -> Ran:
    """One pass over the batches, from empty caches."""
    pairs = torch.zeros((layers, experts), dtype=torch.float64)
    with routed(model, WatchedPolicy(policy, pairs), backend=backend) as session:
        session.reset()
        memory = _pass(model, batches)
        report = session.report()
    busiest = pairs.amax(dim=1) / pairs.mean(dim=1).clamp(min=1)
    return Ran(report=report, imbalance=float(busiest.max()), memory=memory)


def run_baseline(model: Any, batches: Sequence[Tensor], *, backend: str) -> dict[str, Any]:
    """Peak memory of the unmodified model on the batches."""
    with backend_arm(model, backend)():
        return _pass(model, batches)


def _pass(model: Any, batches: Sequence[Tensor]) -> dict[str, Any]:
    """Peak memory of forwards of (B, S) ids."""
    device = next(model.parameters()).device
    memory = PeakMemory(device)
    with torch.inference_mode():
        for ids in batches:
            model(input_ids=ids.to(device), use_cache=False)
    return memory.to_dict()


def attention_modules(model: Any) -> list[tuple[int, str, nn.Module]]:
    """(layer, name, module) of each attention, or whatever mixes tokens in its place.

    Found by name below the list of layers: each family calls it ``self_attn``, ``attention``,
    ``attn``, ``linear_attn``, ``mixer`` or ``mamba``.
    """
    kinds = ("self_attn", "attention", "attn", "self_attention", "linear_attn", "mixer", "mamba")
    found: list[tuple[int, str, nn.Module]] = []
    for name, module in model.named_modules():
        *above, last = name.split(".")
        inside = any(name.startswith(outer + ".") for _, outer, _ in found)
        if last in kinds and above and above[-1].isdigit() and not inside:
            found.append((int(above[-1]), name, module))
    return found


@contextmanager
def marked(model: Any) -> Iterator[None]:
    """Mark the model's parts in every forward until the block ends."""
    parts = [(f"attention{_LAYER}{at}", module) for at, _, module in attention_modules(model)]
    experts = experts_modules(model)
    layers = [_layer_number(name, at) for at, (name, _) in enumerate(experts)]
    parts += [(f"experts{_LAYER}{at}", m) for at, (_, m) in zip(layers, experts, strict=True)]
    try:
        routers = router_modules(model)
    except UsageError:
        routers = []  # then their time is part of ``other``
    parts += [(f"router{_LAYER}{at}", m) for at, (_, m) in zip(layers, routers, strict=False)]
    head = model.get_output_embeddings()
    parts += [] if head is None else [("head", head)]
    open_marks: list[Any] = []

    def before(name: str) -> Any:
        def enter(*_: Any) -> None:
            open_marks.append(mark(name))
            open_marks[-1].__enter__()

        return enter

    def after(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    handles = []
    for name, module in parts:
        handles += [
            module.register_forward_pre_hook(before(name)),
            module.register_forward_hook(after),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layer_number(name: str, fallback: int) -> int:
    """The decoder layer that a module's name stands for."""
    return next((int(word) for word in name.split(".") if word.isdigit()), fallback)


class ComponentTimings:
    """Milliseconds of each forward, as a whole and by component and layer."""

    def __init__(self) -> None:
        self.forwards: list[float] = []
        self.by_component: dict[str, list[float]] = {name: [] for name in COMPONENTS}
        self.by_layer: dict[str, dict[int, list[float]]] = {}

    def add(self, forward: Span, *, is_routed: bool, wall: bool) -> None:
        """Add one forward; the parts sum to it.

        Args:
            forward: its span.
            is_routed: whether the experts ran by one of our backends.
            wall: whether times are wall time, as on CPU.
        """
        for values in self.by_component.values():
            values.append(0.0)
        self.forwards.append(forward.ms)

        def put(name: str, layer: str, ms: float) -> None:
            self.by_component[name][-1] += ms
            if layer:
                row = self.by_layer.setdefault(name, {}).setdefault(int(layer), [])
                row += [0.0] * (len(self.forwards) - len(row))
                row[-1] += ms

        def walk(span: Span) -> None:
            name, _, layer = span.name.partition(_LAYER)
            left = span.own_ms
            if is_routed and name == "experts":
                for part, ms in _experts_parts(span, wall=wall).items():
                    put(part, layer, ms)
                    left -= ms
                name = "combine"
            put(name if name in COMPONENTS else "other", layer, left)
            for inner in span.inner:
                walk(inner)

        walk(forward)

    def share(self, name: str) -> float:
        """A component's share of all the time."""
        return sum(self.by_component[name]) / sum(self.forwards)

    def to_dict(self) -> dict[str, Any]:
        """For ``profile_report.json``."""
        return {
            "forward": summary(self.forwards),
            "components": {
                name: {**summary(values), "share": self.share(name)}
                for name, values in self.by_component.items()
            },
            "layers": {
                name: {str(layer): summary(values) for layer, values in sorted(layers.items())}
                for name, layers in self.by_layer.items()
            },
        }


def _experts_parts(span: Span, *, wall: bool) -> dict[str, float]:
    """Milliseconds of compaction and of the experts in a routed experts module, by its products.

    The policy's are not among them: it has spans of its own, and runs first.
    """
    at = [number for number, one in enumerate(span.operators) if _PRODUCT.search(one.name)]
    if not at:
        return {}
    before, products = span.operators[: at[0]], span.operators[at[0] : at[-1] + 1]
    if not wall:
        sums = [sum(one.ms for one in some) for some in (before, products)]
        return {"compaction": sums[0], "experts": sums[1]}
    decided = max([span.start, *(one.end for one in span.inner)])
    return {
        "compaction": max(products[0].start - decided, 0.0),
        "experts": products[-1].end - products[0].start,
    }


def profile_components(
    model: Any,
    batches: Sequence[Tensor],
    *,
    policy: RoutingPolicy | None,
    backend: str | ExpertsBackend,
    rounds: int = 5,
) -> ComponentTimings:
    """Time the parts of full forwards.

    Args:
        model: a transformers MoE causal language model.
        batches: (B, S) token ids, a forward each.
        policy: who decides; None is the unmodified model.
        backend: experts backend; for the unmodified model one of transformers'.
        rounds: passes over the batches that are timed, after a warm-up.
    """
    device = next(model.parameters()).device
    found = ComponentTimings()
    if policy is None:
        assert isinstance(backend, str)
        arm: Any = backend_arm(model, backend)()
    else:
        arm = routed(model, WatchedPolicy(policy), backend=backend)
    with arm as session, marked(model), torch.inference_mode():
        for number in range(-1, rounds):
            if session is not None:
                session.reset()
            for ids in batches[:1] if number < 0 else batches:
                with recorded(device) as spans, mark("forward"):
                    model(input_ids=ids.to(device), use_cache=False)
                if number >= 0:
                    wall = device.type == "cpu"
                    found.add(spans[0], is_routed=policy is not None, wall=wall)
    return found
