"""`with routed(model, policy) as session:` is the only place that changes a model."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from var_moe.errors import UsageError
from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import ExpertsBackend
from var_moe.execution.dispatch import dispatched
from var_moe.execution.texts import Texts
from var_moe.models.loading import LoadedModel
from var_moe.models.moe_layers import experts_shape
from var_moe.routing.base import RoutingPolicy, check_model
from var_moe.routing.compensation import StandIn
from var_moe.routing.counts import RoutingReport, TierCounts
from var_moe.routing.decision import ForwardContext, Observer
from var_moe.routing.guard import Guard, policy_facts
from var_moe.routing.keeping import all_pairs
from var_moe.routing.watch import Watch

_READ_EXPORTED = "var_moe.serving.folder:load_exported"  # of a room above this one


class _Turn:
    """Lets the forwards of several threads into a session one after another."""

    def __init__(self) -> None:
        self._free = threading.Condition()
        self._owner: int | None = None

    @property
    def mine(self) -> bool:
        """Whether this thread's forward is the one that runs."""
        return self._owner == threading.get_ident()

    def take(self) -> None:
        """Wait for the turn, which an interrupted forward of this thread may still have.

        A thread that ended in a forward (SystemExit runs no hook) has given its turn.
        """
        with self._free:
            while self._owner is not None and not self.mine and self._owner_lives():
                self._free.wait(timeout=1.0)
            self._owner = threading.get_ident()

    def _owner_lives(self) -> bool:
        return any(one.ident == self._owner for one in threading.enumerate())

    def give(self) -> None:
        """Let the next thread in; without effect where it is another one's turn."""
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


class Session:
    """A routed model's running state: the policy, the running forward's context, the observers.

    Threads may share it: their forwards run one after another, each with its own tokens.
    """

    def __init__(
        self,
        policy: RoutingPolicy,
        backend: ExpertsBackend,
        layers: int,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.policy = policy
        self.backend = backend
        self._compensation = policy.compensation
        self._stand_ins: dict[tuple[int, torch.dtype], StandIn] = {}
        self._layers = layers
        self._observers = (TierCounts(layers, drops_only=policy.drops_only), *observers)
        self._native = False  # an observer has ended the policy's decisions
        self._announced = threading.local()  # `context` of the thread's next forward
        self._turn = _Turn()
        self._closed = False
        self._context: ForwardContext | None = None  # of the running forward
        self._next_layer = 0
        self.texts = Texts(policy.context_window)

    def announce(self, context: ForwardContext) -> None:
        """Describe the next forward's tokens, where ids and mask alone do not tell.

        Needed for windows of a longer document (prefix, overlap) and documents over rows.
        """
        self._announced.context = context

    def report(self) -> RoutingReport:
        """Tiers, executed pairs and drift from the router since the start or the last `reset`;
        with a guard, what it has seen since the start."""
        with self._turn.taken():
            parts = [observer.report() for observer in self._observers]
        return RoutingReport(**{name: value for part in parts for name, value in part.items()})

    def reset(self) -> None:
        """Empty the policy's caches and clocks, forget texts, set the counts to zero.

        For a guard, all documents have ended; what it has seen and done stays.
        """
        with self._turn.taken():
            self.end_documents()
            self.policy.reset()
            self.texts.forget()
            for observer in self._observers:
                observer.reset()

    def end_documents(self) -> None:
        """Tell the guard that no document goes on: it judges the last ones now.

        Else it does so when the next forward shows which documents go on.
        """
        with self._turn.taken():
            for observer in self._observers:
                observer.end_documents()

    def close(self) -> None:
        """End the session: a running forward ends first, another thread's next is refused."""
        self._turn.take()
        self._closed = True
        self._turn.give()

    # -- called by the model ---------------------------------------------------------------

    def before_forward(self, _model: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        """The model's forward pre-hook: makes the context, once for all layers.

        The turn that it takes ends in `after_forward`, also where the forward fails.
        """
        self._turn.take()
        if self._closed:
            self._turn.give()  # the hook that else gives it is gone
            raise UsageError(
                "the routed(...) block was left while another thread went on with its model: "
                "wait for the threads before leaving"
            )
        context = self._context_of(args, kwargs)
        for observer in self._observers:
            observer.begin(context)
        self._native = self._native or any(observer.native for observer in self._observers)
        if not self._native:
            self.policy.begin(context)
        self._context, self._next_layer = context, 0

    def _context_of(self, args: tuple[Any, ...], kwargs: Any) -> ForwardContext:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise UsageError(
                "routed(...) needs input_ids: inputs_embeds do not say which tokens they are"
            )
        announced: ForwardContext | None = getattr(self._announced, "context", None)
        self._announced.context = None
        if announced is None:
            mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
            # transformers 5.24 calls it `cache`, and still takes the earlier name.
            cache = kwargs.get("cache", kwargs.get("past_key_values"))
            return self.texts.context(ids, mask, cache, kwargs.get("position_ids"))
        if announced.ids.shape != ids.shape:
            raise UsageError(
                f"announced tokens of shape {tuple(announced.ids.shape)}, but the forward has "
                f"{tuple(ids.shape)}"
            )
        return announced

    def after_forward(self, _model: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """The model's forward hook: the output may hold a new KV cache; None after an error."""
        if not self._turn.mine:
            return
        passed_by = output is not None and self._context is not None and self._next_layer == 0
        if output is not None:
            for observer in self._observers:
                observer.end()
        self._context = None
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
        """One layer: the policy decides, the observers see it, the backend runs what is left.

        Raises:
            UsageError: the layer does not belong to the forward whose tokens are known.
        """
        context = self._context if self._turn.mine else None
        if context is None or layer < self._next_layer or len(hidden) != context.size:
            raise UsageError(
                "a layer runs outside the model's own forward, so that its tokens are not known: "
                "inside routed(...) call the model itself, model(input_ids), and not a part of it, "
                "without gradient checkpointing"
            )
        self._next_layer = layer + 1
        if self._native:
            routing = all_pairs(index, weight)
        else:
            self.policy.see(layer, hidden)
            routing = self.policy.route(context, layer, index, weight)
        for observer in self._observers:
            observer.see(layer, context, routing, index, weight)
        if self._native:
            return self.backend.exact().run(module, hidden, index, weight)
        if self._compensation is None:
            out = self.backend.run(module, hidden, routing.index, routing.weight)
            return out if routing.residual is None else routing.residual.added_to(out)
        # The kept pairs with the router's own weights, and what stands in for the others: what the
        # policy itself would do about dropped weight (rescaling, residual means) is not done.
        key = (layer, hidden.dtype)
        stand_in = self._stand_ins.get(key)
        if stand_in is None:
            part = self._compensation.layers[layer].to(hidden.device, hidden.dtype)
            stand_in = self._stand_ins[key] = StandIn(self._compensation, part)
        return self.backend.run_with(module, hidden, index, weight, routing.index, stand_in)


_running: WeakSet[Session] = WeakSet()


class _Block(AbstractContextManager[Session]):
    """What `routed` returns: a block that is entered once."""

    def __init__(self, block: AbstractContextManager[Session]) -> None:
        self._block, self._entered = block, False

    def __enter__(self) -> Session:
        if self._entered:
            raise UsageError("this routed(...) block was entered before: call routed(...) again")
        self._entered = True
        return self._block.__enter__()

    def __exit__(self, *error: Any) -> bool | None:
        return self._block.__exit__(*error)


def routed(
    model: Any,
    policy: RoutingPolicy | str | Path,
    *,
    backend: str | ExpertsBackend = "auto",
    guard: Guard | None = None,
    observers: Sequence[Observer] = (),
) -> AbstractContextManager[Session]:
    """Run the model's experts as ``policy`` decides, until the block ends.

    Args:
        model: a transformers Mixture-of-Experts causal language model; or a `LoadedModel`, whose
            tokenizer an exported policy is then held against as well.
        policy: which pairs are executed, and what stands in for the others; or the folder that
            `var-moe export` wrote, or its Hub id.
        backend: who executes them: ``"packed"``, ``"sorted"`` or ``"grouped"`` (ours),
            ``"grouped_mm"``, ``"eager"``, ... (transformers'); or what `open_backend` returned, so
            that several blocks share its copies of weights. ``"auto"`` on CPU is ``"packed"``
            (weights in oneDNN's layout, a second copy for as long as the block) where that takes a
            quarter of the memory at most, else ``"sorted"`` (bit-identical to ``grouped_mm`` where
            all pairs are kept); on other devices it is ``"grouped"``, which is ``batched_mm`` for a
            few tokens and ``grouped_mm`` for many, without their dropped pairs.
        guard: warns, or goes over to the model's own routing, when decisions leave the range
            that it was calibrated on (`calibrate_guard`); its stream of documents is this block.
        observers: follow each forward's decisions (`Observer`).

    Yields:
        The `Session`, with `report()` and `reset()`.

    Raises:
        UsageError: the model is no MoE, is routed already, or does not go through the experts
            dispatch; the policy or its compensation is another model's, or the guard another
            policy's; no such exported folder.

    On leaving, also by an exception, the model is what it was before.
    """
    return _Block(_routed(model, policy, backend, guard, observers))


@contextmanager
def _routed(
    model: Any,
    policy: RoutingPolicy | str | Path,
    backend: str | ExpertsBackend,
    guard: Guard | None,
    observers: Sequence[Observer],
) -> Iterator[Session]:
    exported = isinstance(policy, str | Path)
    chosen: Any = resolve_name(_READ_EXPORTED)(policy, model).policy() if exported else policy
    if isinstance(model, LoadedModel):
        model = model.model
    if not hasattr(model, "get_experts_implementation"):
        raise _wrong("model", model, "a transformers model, or what load_model returned")
    if not isinstance(chosen, RoutingPolicy):
        made = "one that make_policy returned, or what `var-moe export` wrote"
        raise _wrong("policy", chosen, made)
    model, called = _unwrapped(model)
    sizes = experts_shape(model)
    if chosen.compensation is not None:
        chosen.compensation.check(**sizes)
    words = getattr(model.config.get_text_config(), "vocab_size", 0)
    check_model(chosen, {**sizes, "vocabulary": words})
    if not isinstance(guard, Guard | None):
        raise _wrong("guard", guard, "one that Guard.load or calibrate_guard returned")
    if guard is not None:
        guard.check(policy_facts(chosen), layers=sizes["layers"])
        observers = [*observers, Watch(guard, drops_only=chosen.drops_only)]
    with ExitStack() as leaving:
        if isinstance(backend, str):
            backend = leaving.enter_context(open_backend(backend, model))
        if any(one.policy is chosen or one.backend is backend for one in _running):
            raise UsageError(
                "the policy, or the backend, is in use by another running routed(...) block, whose "
                "state it holds: make one for each model"
            )
        session = Session(chosen, backend, sizes["layers"], observers)
        backend.begin()
        leaving.enter_context(dispatched(model, session))
        _running.add(session)
        leaving.callback(_running.discard, session)
        for one in called:
            before = one.register_forward_pre_hook(session.before_forward, with_kwargs=True)
            leaving.callback(before.remove)
            after = one.register_forward_hook(session.after_forward, always_call=True)
            leaving.callback(after.remove)
        leaving.callback(session.close)
        leaving.enter_context(session.texts.watching(model))
        yield session
        session.end_documents()


def _wrong(name: str, given: Any, expected: str) -> UsageError:
    return UsageError(f"routed(...): {name} is {type(given).__name__}: expected {expected}")


def _unwrapped(model: Any) -> tuple[Any, list[Any]]:
    """The transformers model, and all modules whose call is its forward.

    A `PeftModel` runs that model's forward without calling it, and its `generate` calls it.

    Raises:
        UsageError: an adapter puts tokens of its own into the forward.
    """
    if not (hasattr(model, "peft_config") and hasattr(model, "get_base_model")):
        return model, [model]
    if model.active_peft_config.is_prompt_learning:
        raise UsageError(
            f"adapter {model.active_peft_config.peft_type.value} adds virtual tokens, whose ids "
            "routed(...) cannot know; expected an adapter of weights, such as LoRA"
        )
    inner = model.get_base_model()
    return inner, [model, inner]
