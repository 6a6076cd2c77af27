"""Where the time of a forward goes: attention, router, policy, compaction, experts, head.

The model's parts are marked by forward hooks; an observer marks where the policy's decisions end.
Within a routed experts module, the first and the last matrix product tell compaction, experts and
combination apart, whatever backend runs them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from var_moe.analysis.profiler import Span, mark, recorded, summary
from var_moe.errors import UsageError
from var_moe.evaluation.throughput import backend_arm
from var_moe.execution.backends.base import ExpertsBackend
from var_moe.execution.session import routed
from var_moe.models.moe_layers import experts_modules, router_modules
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import ForwardContext, Observer, Routing

COMPONENTS = ("attention", "router", "policy", "compaction", "experts", "combine", "head", "other")
"""``policy``: our decision, cache included; ``compaction``: gathering and sorting pairs;
``experts``: from the first of their matrix products to the last (in the unmodified model, the
whole experts module); ``combine``: the weighted sum, what stands in for dropped experts, and
counting; ``other``: norms, embedding, residual adds, dense layers."""

_ATTENTION = {
    *("self_attn", "attention", "attn", "self_attention", "linear_attn", "mixer", "mamba"),
}
"""What families call the module of a layer that mixes tokens."""
_LAYER = "@"
_BEGUN, _DECIDED = "begun", "decided"  # marks of a moment, not of a stretch
_PRODUCT = re.compile("mm|linear|matmul|einsum")


class DecisionMarks(Observer):
    """Marks when the policy begins a forward, and when it has decided each layer."""

    def begin(self, context: ForwardContext) -> None:
        self._moment(_BEGUN)

    def see(
        self, layer: int, context: ForwardContext, routing: Routing, index: Tensor, weight: Tensor
    ) -> None:
        self._moment(_DECIDED)

    def _moment(self, name: str) -> None:
        with mark(name):
            pass


def attention_modules(model: Any) -> list[tuple[int, nn.Module]]:
    """(layer, module) of each attention, or whatever mixes tokens in its place."""
    modules: list[tuple[int, nn.Module]] = []
    outermost = "no module"
    for name, module in model.named_modules():
        *above, last = name.split(".")
        inside = name.startswith(outermost + ".")
        if last in _ATTENTION and above and above[-1].isdigit() and not inside:
            outermost = name
            modules.append((int(above[-1]), module))
    return modules


@contextmanager
def marked(model: Any) -> Iterator[None]:
    """Mark the model's parts in every forward until the block ends."""
    experts = experts_modules(model)
    layers = [_layer_number(name, at) for at, (name, _) in enumerate(experts)]
    try:
        routers = router_modules(model)
    except UsageError:
        routers = []  # then their time is part of ``other``
    parts = [
        *((f"attention{_LAYER}{at}", module) for at, module in attention_modules(model)),
        *((f"experts{_LAYER}{at}", m) for at, (_, m) in zip(layers, experts, strict=True)),
        *((f"router{_LAYER}{at}", m) for at, (_, m) in zip(layers, routers, strict=False)),
        ("other", model.get_input_embeddings()),  # the first of a forward: it ends `_BEGUN`
    ]
    head = model.get_output_embeddings()
    if head is not None:
        parts.append(("head", head))
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

    def add(self, forward: Span, *, wall: bool) -> None:
        """Add one forward; the parts sum to it.

        Args:
            forward: its span.
            wall: whether times are wall time, as on CPU.
        """
        for values in self.by_component.values():
            values.append(0.0)
        self.forwards.append(forward.ms)
        self._walk(forward, wall=wall)

    def _walk(self, span: Span, *, wall: bool) -> None:
        name, _, layer = span.name.partition(_LAYER)
        parts = _inner_parts(span, wall=wall)
        for part, ms in parts.items():
            self._put(part, layer, ms)
        if name == "experts" and parts:
            name = "combine"
        left = span.own_ms - sum(parts.values())
        self._put(name if name in COMPONENTS else "other", layer, left)
        for inner in span.inner:
            self._walk(inner, wall=wall)

    def _put(self, name: str, layer: str, ms: float) -> None:
        self.by_component[name][-1] += ms
        if layer:
            row = self.by_layer.setdefault(name, {}).setdefault(int(layer), [])
            row += [0.0] * (len(self.forwards) - len(row))
            row[-1] += ms

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


def _inner_parts(span: Span, *, wall: bool) -> dict[str, float]:
    """Milliseconds of the components within a span that have no marks of their own.

    In a routed forward the policy begins just before the embedding; in a routed experts module it
    decides first, and the matrix products that follow are the experts'.
    """

    def between(start: float, end: float) -> float:
        if wall:
            return max(end - start, 0.0)
        return sum(one.ms for one in span.operators if start <= one.start < end)

    moments = {one.name: at for at, one in enumerate(span.inner)}
    if _BEGUN in moments:
        begun, embedding = span.inner[moments[_BEGUN] :][:2]
        return {"policy": between(begun.end, embedding.start)}
    if _DECIDED not in moments:
        return {}
    decided = span.inner[moments[_DECIDED]]
    parts = {"policy": between(span.start, decided.start)}
    products = [
        one for one in span.operators if one.start >= decided.end and _PRODUCT.search(one.name)
    ]
    if products:
        parts["compaction"] = between(decided.end, products[0].start)
        parts["experts"] = between(products[0].start, products[-1].end)
    return parts


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
    timings = ComponentTimings()
    if policy is None:
        assert isinstance(backend, str)
        arm: Any = backend_arm(model, backend)()
    else:
        arm = routed(model, policy, backend=backend, observers=[DecisionMarks()])
    with arm as session, marked(model), torch.inference_mode():
        for number in range(-1, rounds):
            if session is not None:
                session.reset()
            for ids in batches[:1] if number < 0 else batches:
                with recorded(device) as spans, mark("forward"):
                    model(input_ids=ids.to(device), use_cache=False)
                if number >= 0:
                    timings.add(spans[0], wall=device.type == "cpu")
    return timings
