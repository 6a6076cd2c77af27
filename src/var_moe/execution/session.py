"""`with routed(model, policy) as session:` is the only place that changes a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor, nn

from var_moe.errors import UsageError
from var_moe.execution.backends.packed import PackedExperts, can_pack
from var_moe.execution.dispatch import (
    PACKED,
    SORTED,
    PairBackend,
    attach,
    detach,
    execute,
    experts_modules,
    pair_backend,
)
from var_moe.execution.texts import Texts
from var_moe.models.loading import LoadedModel
from var_moe.models.routable import check_given, check_sizes, unwrapped
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.compensation import LayerCompensation
from var_moe.routing.counts import RoutingReport, TierCounts
from var_moe.routing.decision import ForwardContext, Residual, Routing
from var_moe.routing.guard import Guard, policy_facts
from var_moe.routing.keeping import all_pairs
from var_moe.routing.units import Sums, Units
from var_moe.routing.watch import GuardReport, Watch
from var_moe.serving.folder import load_exported


class Watching(Protocol):
    """What a session asks of whoever watches its documents."""

    @property
    def native(self) -> bool:
        """Whether the model's own routing is to be used from now on."""

    def see(self, unit: Sums) -> None:
        """A document has ended."""

    def report(self) -> GuardReport | None:
        """What it says of them."""


_LOOK_SECONDS = 1.0  # between looks at whether the thread whose turn it is still lives


class _Turn:
    """Lets the forwards of several threads into a session one after another."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner: threading.Thread | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread's forward is the one that runs."""
        return self._owner is threading.current_thread()

    def take(self) -> None:
        """Wait until no other thread's forward runs."""
        with self._free:
            # Ctrl-C or SystemExit may have ended this thread's last forward, or another thread.
            while not (self._owner is None or self.mine or not self._owner.is_alive()):
                self._free.wait(_LOOK_SECONDS)
            self._owner = threading.current_thread()

    def give(self) -> None:
        """Let the next thread in; without effect where this thread's forward does not run."""
        with self._free:
            if self.mine:
                self._owner = None
                self._free.notify()

    @contextmanager
    def taken(self) -> Iterator[None]:
        """For work between forwards, or in this thread's own."""
        inside = self.mine
        self.take()
        try:
            yield
        finally:
            if not inside:
                self.give()


class _Announced(threading.local):
    """The next forward's tokens as this thread has announced them."""

    batch: ForwardContext | None = None


class Session:
    """A routed model's running state: the policy, the tokens of the forward, the counts.

    Threads may share it: their forwards run one after another, each with its own tokens.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        backend: PairBackend,
        layers: int,
        watch: Watching | None = None,
    ) -> None:
        self.policy = policy
        self.backend = backend
        self._compensation = policy.compensation
        self._parts: dict[tuple[int, torch.dtype], LayerCompensation] = {}
        self._layers = layers
        self._counts = TierCounts(layers, drops_only=policy.drops_only)
        self._watch = watch
        self._units = Units(layers, drops_only=policy.drops_only) if watch else None
        self._native = False  # the guard has fallen back to the model's own routing
        self._announced = _Announced()
        self._turn = _Turn()
        self._closed = False
        self._counted: Tensor = torch.empty(0, dtype=torch.bool)
        self._context = ForwardContext.of(torch.empty((0, 0), dtype=torch.int64))
        self._next_layer = layers  # of the running forward; past the last where none runs
        self.texts = Texts(policy.context_window)

    def announce(self, batch: ForwardContext) -> None:
        """Describe the next forward's tokens, where ids and mask alone do not tell.

        Needed for windows of a longer document (prefix, overlap) and documents over rows.
        """
        self._announced.batch = batch

    def report(self) -> RoutingReport:
        """Tiers, executed pairs and departure from the router since the session's start or the
        last `reset`; with a guard, what it has seen since the session's start."""
        with self._turn.taken():
            return self._counts.report(self._watch.report() if self._watch else None)

    def reset(self) -> None:
        """Empty the policy's caches and clocks, forget texts, set the counts to zero.

        For a guard, all documents have ended; what it has seen and done stays.
        """
        with self._turn.taken():
            self.end_documents()
            self.policy.reset()
            self.texts.forget()
            self._counts = TierCounts(self._layers, drops_only=self.policy.drops_only)

    def end_documents(self) -> None:
        """Tell the guard that no document goes on: it judges the last ones now.

        Else it does so when the next forward shows which documents go on.
        """
        with self._turn.taken():
            if self._units is not None:
                self._judge(self._units.end())

    def close(self) -> None:
        """End the session: a running forward ends first, another thread's next is refused."""
        self._turn.take()
        self._closed = True
        self._turn.give()

    def __reduce_ex__(self, _protocol: Any) -> Any:
        """A copy would not be told the tokens of its model's forwards."""
        raise UsageError(
            "the model is inside a routed(...) block, whose session can't be copied or pickled: "
            "copy the model after leaving the block, or save it with save_pretrained"
        )

    # -- called by the model ---------------------------------------------------------------

    def before_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """The model's forward pre-hook: sees the token ids, once for all layers.

        The turn that it takes ends in `after_forward`, also where the forward fails.
        """
        self._turn.take()
        if self._closed:
            self._turn.give()  # the hook that else gives it is gone
            raise UsageError(
                "the routed(...) block was left while another thread went on with its model: "
                "wait for the threads before leaving"
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UsageError("routed(...) needs input_ids: embeddings do not tell the token ids")
        batch, self._announced.batch = self._announced.batch, None
        if batch is None:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            # transformers 5.24 calls it `cache`, and still takes the earlier name.
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            batch = self.texts.batch(ids, mask, cache, kwargs.get("position_ids"))
        elif batch.ids.shape != ids.shape:
            raise UsageError(
                f"announced tokens of shape {tuple(batch.ids.shape)}, but the forward has "
                f"{tuple(ids.shape)}"
            )
        if self._units is not None:
            self._judge(self._units.begin(batch))
        self._counted = batch.counted.reshape(-1)
        self._context = batch
        if not self._native:
            self.policy.begin(batch)
        self._next_layer = 0

    def _judge(self, ended: list[Sums]) -> None:
        """Show documents that have ended to the guard, which may end the policy's decisions."""
        assert self._watch is not None
        for unit in ended:
            self._watch.see(unit)
        if self._watch.native and not self._native:
            self._native, self._units = True, None
            if isinstance(self.backend, PackedExperts):
                self.backend = pair_backend(SORTED)  # which rounds as the unmodified model does

    def after_forward(self, _model: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """The model's forward hook: the output may hold a new KV cache; None after an error."""
        if self._turn.mine:
            passed_by = output is not None and self._next_layer == 0
            self._next_layer = self._layers
            self.texts.bind(output)
            self._turn.give()
            if passed_by:
                raise UsageError(
                    "a forward ran none of its experts through routed(...): inside the block, "
                    "leave the model's experts and their set_experts_implementation alone"
                )

    def experts(
        self, layer: int, module: nn.Module, hidden: Tensor, index: Tensor, weight: Tensor
    ) -> Tensor:
        """One layer: the policy decides, the backend runs what is left, the counts grow.

        Raises:
            UsageError: the layer does not belong to the forward whose tokens are known.
        """
        known = self._turn.mine and layer >= self._next_layer
        if not known or len(hidden) != len(self._counted):
            raise UsageError(
                "a layer runs outside the model's own forward, so that its tokens are not known: "
                "inside routed(...) call the model itself, model(input_ids), and not a part of it, "
                "without gradient checkpointing"
            )
        self._next_layer = layer + 1
        if self._native:
            routing = all_pairs(index, weight)
            self._counts.add(layer, routing, self._counted, index, weight)
            return execute(module, hidden, index, weight, self.backend)
        self.policy.see(layer, hidden)
        routing = self.policy.route(self._context, layer, index, weight)
        self._counts.add(layer, routing, self._counted, index, weight)
        if self._units is not None:
            self._units.add(layer, routing, index, weight, self._counted)
        if self._compensation is not None:
            return self._compensated(layer, module, hidden, index, weight, routing)
        out = execute(module, hidden, routing.index, routing.weight, self.backend)
        return out if routing.residual is None else _with_residual(out, routing.residual)

    def _compensated(
        self,
        layer: int,
        module: nn.Module,
        hidden: Tensor,
        index: Tensor,
        weight: Tensor,
        routing: Routing,
    ) -> Tensor:
        """The kept pairs with the router's own weights, and what stands in for the others.

        What the policy itself would do about the dropped weight (rescaling, residual means) is
        not done.
        """
        assert self._compensation is not None
        key = (layer, hidden.dtype)
        part = self._parts.get(key)
        if part is None:
            part = self._compensation.layers[layer].to(hidden.device, hidden.dtype)
            self._parts[key] = part
        row, gone = self._compensation.dropped(index, weight, routing.index >= 0)
        # A dropped pair's output is zero, whatever its weight.
        out = execute(module, hidden, routing.index, weight, self.backend)
        return part.add(out, hidden, row, gone)


def _with_residual(out: Tensor, extra: Residual) -> Tensor:
    means, scale = extra.table[extra.row], extra.scale[:, None].to(extra.table.dtype)
    if out.dtype == means.dtype:
        return torch.addcmul(out, means, scale)
    # The means are float32; what they are added to must keep the model's dtype.
    return out + (means * scale).to(out.dtype)


def automatic(model: Any, backend: str) -> str:
    """The name of the backend that ``"auto"`` stands for on the model's device."""
    if backend != "auto":
        return backend
    if next(model.parameters()).device.type != "cpu":
        return "grouped_mm"
    modules = [module for _, module in experts_modules(model)]
    return PACKED if can_pack(modules) else SORTED


_running: WeakSet[Session] = WeakSet()


@contextmanager
def routed(
    model: Any,
    policy: RoutingPolicy | str | Path,
    *,
    backend: str | PairBackend = "auto",
    guard: Guard | Watching | None = None,
) -> Iterator[Session]:
    """Run the model's experts as ``policy`` decides, until the block ends.

    Args:
        model: a transformers Mixture-of-Experts causal language model; or a `LoadedModel`, whose
            tokenizer an exported policy is then held against as well.
        policy: which pairs are executed, and what stands in for the others; or the folder that
            `var-moe export` wrote, or its Hub id.
        backend: who executes them: ``"packed"`` or ``"sorted"`` (ours), ``"grouped_mm"``,
            ``"eager"``, ...; or a backend itself. ``"auto"`` on CPU is ``"packed"`` (weights in
            oneDNN's layout, a second copy) where that takes a quarter of the machine's memory at
            most, else ``"sorted"`` (bit-identical to ``grouped_mm`` where all pairs are kept);
            on other devices it is ``"grouped_mm"``.
        guard: warns, or goes over to the model's own routing, when decisions leave the range
            that it was calibrated on (`calibrate_guard`); its stream of documents is this block.

    Yields:
        The `Session`, with `report()` and `reset()`.

    Raises:
        UsageError: the model is no MoE, is routed already, or does not go through the seam; the
            policy or its compensation is another model's, or the guard another policy's; no such
            exported folder.

    On leaving, also by an exception, the model is what it was before.
    """
    if isinstance(policy, str | Path):
        policy = load_exported(policy, model).policy()
    if isinstance(model, LoadedModel):
        model = model.model
    check_given(model, policy, backend, guard)
    model, called = unwrapped(model)
    run_pairs = pair_backend(automatic(model, backend)) if isinstance(backend, str) else backend
    modules = [module for _, module in experts_modules(model)]
    check_sizes(model, policy)
    if isinstance(guard, Guard):
        guard.check(policy_facts(policy), layers=len(modules))
    watch = Watch(guard) if isinstance(guard, Guard) else guard
    if any(one.policy is policy or one.backend is run_pairs for one in _running):
        raise UsageError(
            "the policy, or the backend, is in use by another running routed(...) block, whose "
            "state it holds: make one for each model"
        )
    session = Session(policy, run_pairs, len(modules), watch)
    before = attach(model, session)
    _running.add(session)
    hooks: list[Any] = []
    try:
        for one in called:
            hooks += [
                one.register_forward_pre_hook(session.before_forward, with_kwargs=True),
                one.register_forward_hook(session.after_forward, always_call=True),
            ]
        with closing(session), session.texts.watching(model):
            yield session
            session.end_documents()
    finally:
        _running.discard(session)
        for hook in hooks:
            hook.remove()
        detach(model, before)
