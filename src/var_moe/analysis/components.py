"""Where the time of a forward goes: attention, router, policy, compaction, experts, head.

The model's parts are marked by forward hooks; an observer marks where the policy's decisions end.
Within a routed experts module, the first and the last matrix product tell compaction, experts and
combination apart, whatever backend runs them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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

_ATTENTION = {"self_attn", "attention", "attn", "self_attention", "linear_attn", "mixer", "mamba"}
"""What families call the module of a layer that mixes tokens."""
_LAYER = "@"
_BEGUN, _DECIDED = "begun", "decided"  # marks of a moment, not of a stretch
_PRODUCT = re.compile("mm|linear|matmul|einsum")


class DecisionMarks(Observer):
    """Marks when the policy begins a forward, and when it has decided each layer."""

    def begin(self, context: ForwardContext) -> None:
        with mark(_BEGUN):
            pass

    def see(
        self, layer: int, context: ForwardContext, routing: Routing, index: Tensor, weight: Tensor
    ) -> None:
        with mark(_DECIDED):
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
    # The decoder layer that a module's name stands for.
    layers = [
        next((int(word) for word in name.split(".") if word.isdigit()), at)
        for at, (name, _) in enumerate(experts)
    ]
    try:
        routers = router_modules(model)
    except UsageError:
        routers = []  # then their time is part of ``other``
    parts = [
        *((f"attention{_LAYER}{at}", module) for at, module in attention_modules(model)),
        *((f"experts{_LAYER}{at}", m) for at, (_, m) in zip(layers, experts, strict=True)),
        *((f"router{_LAYER}{at}", m) for at, (_, m) in zip(layers, routers, strict=False)),
        ("other", model.get_input_embeddings()),  # the first of a forward: it ends `_BEGUN`
        ("head", model.get_output_embeddings()),
    ]
    open_marks: list[Any] = []

    def before(name: str) -> Any:
        def enter(*_: Any) -> None:
            open_marks.append(mark(name))
            open_marks[-1].__enter__()

        return enter

    def after(*_: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        for name, module in parts:
            if module is not None:
                hooks.enter_context(module.register_forward_pre_hook(before(name)))
                hooks.enter_context(module.register_forward_hook(after))
        yield


Parts = Mapping[tuple[str, str], float]
"""(component, decoder layer or "") -> milliseconds, of one forward."""


def parts_of(forward: Span, *, wall: bool) -> Parts:
    """The parts of a forward, which sum to it; ``wall``: times are wall time, as on CPU."""
    parts: defaultdict[tuple[str, str], float] = defaultdict(float)

    def walk(span: Span) -> None:
        name, _, layer = span.name.partition(_LAYER)
        unmarked = _unmarked_parts(span, wall=wall)
        for part, ms in unmarked.items():
            parts[part, layer] += ms
        if name == "experts" and unmarked:
            name = "combine"
        parts[name if name in COMPONENTS else "other", layer] += span.own_ms - sum(
            unmarked.values()
        )
        for inner in span.inner:
            walk(inner)

    walk(forward)
    return parts


def _unmarked_parts(span: Span, *, wall: bool) -> dict[str, float]:
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


def component_statistics(forwards: Sequence[Parts]) -> dict[str, Any]:
    """Of each forward as a whole, by component and by layer, for ``profile_report.json``."""
    whole = [sum(parts.values()) for parts in forwards]
    by_component = {
        name: [sum(ms for (part, _), ms in parts.items() if part == name) for parts in forwards]
        for name in COMPONENTS
    }
    places = sorted({(name, int(layer)) for parts in forwards for name, layer in parts if layer})
    layers: dict[str, dict[str, Any]] = {}
    for name, layer in places:
        values = [parts.get((name, str(layer)), 0.0) for parts in forwards]
        layers.setdefault(name, {})[str(layer)] = summary(values)
    return {
        "forward": summary(whole),
        "components": {
            name: {**summary(values), "share": sum(values) / sum(whole)}
            for name, values in by_component.items()
        },
        "layers": layers,
    }


def profile_components(
    model: Any,
    batches: Sequence[Tensor],
    *,
    policy: RoutingPolicy | None,
    backend: str | ExpertsBackend,
    rounds: int,
) -> dict[str, Any]:
    """Time the parts of full forwards.

    Args:
        model: a transformers MoE causal language model.
        batches: (B, S) token ids, a forward each.
        policy: who decides; None is the unmodified model.
        backend: experts backend; for the unmodified model one of transformers'.
        rounds: passes over the batches that are timed, after a warm-up.

    Returns:
        See `component_statistics`.
    """
    forwards: list[Parts] = []
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
                with recorded(model.device) as spans, mark("forward"):
                    model(input_ids=ids.to(model.device), use_cache=False)
                if number >= 0:
                    forwards.append(parts_of(spans[0], wall=model.device.type == "cpu"))
    return component_statistics(forwards)
