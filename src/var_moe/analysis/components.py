"""Where the time of a forward goes: attention, router, policy, compaction, experts, head.

The model's parts are timed by forward hooks; what happens inside our seam by a policy and a
backend that wrap the ones in use. Nothing of it is there when nothing is being profiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from var_moe.analysis.spans import SEPARATOR, GPUProfiler, summary
from var_moe.errors import UsageError
from var_moe.evaluation.throughput import backend_arm
from var_moe.execution.backends.sorted import SortedExperts
from var_moe.execution.dispatch import PairBackend, experts_modules, pair_backend
from var_moe.execution.session import automatic, routed
from var_moe.models.router_hooks import router_modules
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing

COMPONENTS = (
    *("attention", "router", "policy", "compaction", "experts", "combine", "head", "other"),
)
"""``policy``: our decision, cache included; ``compaction``: gathering and sorting pairs;
``experts``: their matrix products (in the unmodified model, the whole experts module);
``combine``: the weighted sum, what stands in for dropped experts, and counting; ``other``: norms,
embedding, residual adds, dense layers."""

_FORWARD, _SEAM = "forward", "combine"
_LAYER = "@"


class TimedPolicy(RoutingPolicy):
    """Another policy, timed. ``profiler`` gets its time as ``policy``."""

    def __init__(self, inner: RoutingPolicy, profiler: GPUProfiler) -> None:
        self._inner, self._profiler = inner, profiler
        self.context_window, self.compensation = inner.context_window, inner.compensation

    @property
    def drops_only(self) -> bool:
        return self._inner.drops_only

    def begin(self, context: ForwardContext) -> None:
        self._profiler.enter("policy")
        self._inner.begin(context)
        self._profiler.leave()

    def see(self, layer: int, hidden: Tensor) -> None:
        self._profiler.enter(f"policy{_LAYER}{layer}")
        self._inner.see(layer, hidden)
        self._profiler.leave()

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        self._profiler.enter(f"policy{_LAYER}{layer}")
        routing = self._inner.route(context, layer, index, weight)
        self._profiler.leave()
        return routing

    def reset(self) -> None:
        self._inner.reset()


def timed_backend(name: str, profiler: GPUProfiler) -> PairBackend:
    """The backend of that name; its products are ``experts``, the rest of it ``compaction``."""
    backend: Any = pair_backend(name)
    own = isinstance(backend, SortedExperts)
    backend.products = _timed(backend.products, "experts", profiler)
    if not own:
        return _timed(backend, "compaction", profiler)
    backend.gathered = _timed(backend.gathered, "compaction", profiler)
    found: PairBackend = backend
    return found


def _timed(call: Callable[..., Any], name: str, profiler: GPUProfiler) -> Callable[..., Any]:
    def timed(*args: Any) -> Any:
        profiler.enter(name)
        out = call(*args)
        profiler.leave()
        return out

    return timed


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


def _parts(model: Any, *, seam: bool) -> list[tuple[str, nn.Module]]:
    """(stretch, module) of everything that a hook times."""
    layers = {name: layer for layer, name, _ in attention_modules(model)}
    parts = [(f"attention{_LAYER}{layers[name]}", m) for _, name, m in attention_modules(model)]
    blocks = [(_layer_number(name, at), m) for at, (name, m) in enumerate(experts_modules(model))]
    # Inside the seam, what its own marks do not cover is the sum over the pairs.
    parts += [(f"{_SEAM if seam else 'experts'}{_LAYER}{layer}", m) for layer, m in blocks]
    try:
        routers = router_modules(model)
    except UsageError:
        routers = []  # then their time is part of ``other``
    parts += [
        (f"router{_LAYER}{layer}", m) for (layer, _), (_, m) in zip(blocks, routers, strict=False)
    ]
    head = model.get_output_embeddings()
    return parts if head is None else [*parts, ("head", head)]


def _layer_number(name: str, fallback: int) -> int:
    """The decoder layer that a module's name stands for."""
    return next((int(word) for word in name.split(".") if word.isdigit()), fallback)


@contextmanager
def watched(model: Any, profiler: GPUProfiler, *, seam: bool) -> Iterator[None]:
    """Time the model's forwards and their parts until the block ends.

    Args:
        model: the model.
        profiler: gets the stretches.
        seam: whether the experts go through our seam, with a `timed_backend`.
    """
    handles = []
    for stretch, module in [(_FORWARD, model), *_parts(model, seam=seam)]:

        def before(*_: Any, stretch: str = stretch) -> None:
            profiler.enter(stretch)

        def after(*_: Any) -> None:
            profiler.leave()

        # The forward's own hooks stand outside those of a routed model.
        first = module is model
        handles.append(module.register_forward_pre_hook(before, prepend=first))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, kw_only=True)
class ComponentTimings:
    """Milliseconds of each forward, as a whole and by component and layer."""

    forwards: tuple[float, ...]
    by_component: dict[str, tuple[float, ...]]  # one figure per forward
    by_layer: dict[str, dict[int, tuple[float, ...]]]

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


def profile_components(
    model: Any,
    batches: Sequence[Tensor],
    *,
    policy: RoutingPolicy | None,
    backend: str,
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
    profiler = GPUProfiler(device)
    with ExitStack() as stack:
        session: Any = None
        if policy is None:
            stack.enter_context(backend_arm(model, backend)())
        else:
            timed = timed_backend(automatic(model, backend), profiler)
            arm = routed(model, TimedPolicy(policy, profiler), backend=timed)
            session = stack.enter_context(arm)
        stack.enter_context(watched(model, profiler, seam=policy is not None))
        stack.enter_context(torch.inference_mode())
        for number in range(-1, rounds):
            if session is not None:
                session.reset()
            for ids in batches[:1] if number < 0 else batches:
                model(input_ids=ids.to(device), use_cache=False)
            if number < 0:
                profiler.reset()
        return _by_component(profiler)


def _by_component(profiler: GPUProfiler) -> ComponentTimings:
    """Own times, summed over what each forward ran of a component."""
    forwards = profiler.runs()[_FORWARD]
    by_component: dict[str, list[float]] = {name: [0.0] * len(forwards) for name in COMPONENTS}
    by_layer: dict[str, dict[int, list[float]]] = {}
    for path, values in profiler.runs(own=True).items():
        component, layer = _where(path)
        # Each forward runs a stretch equally often, in order.
        often = max(len(values) // len(forwards), 1)
        for at, value in enumerate(values):
            forward = min(at // often, len(forwards) - 1)
            by_component[component][forward] += value
            if layer is not None:
                row = by_layer.setdefault(component, {}).setdefault(layer, [0.0] * len(forwards))
                row[forward] += value
    return ComponentTimings(
        forwards=tuple(forwards),
        by_component={name: tuple(values) for name, values in by_component.items()},
        by_layer={
            name: {layer: tuple(row) for layer, row in rows.items()}
            for name, rows in by_layer.items()
        },
    )


def _where(path: str) -> tuple[str, int | None]:
    """Component and layer of a stretch; the layer is that of the innermost part that names one."""
    words = [word.partition(_LAYER) for word in path.split(SEPARATOR)]
    layer = next((int(number) for _, at, number in reversed(words) if at), None)
    name = words[-1][0]
    return ("other", None) if name == _FORWARD else (name, layer)
