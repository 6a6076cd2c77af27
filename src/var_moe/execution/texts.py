"""Generation with a KV cache: which ids stood before the tokens of a forward.

A forward of `generate` sees only the new ids. Decisions depend on the ids before them as well
(context keys) and on whose text they continue (``cache_scope="document"``). Both come from
`generate` itself, which hands all ids to ``prepare_inputs_for_generation`` at each step, so that
beams that change places are right; in a loop of the user's own they come from what this session
has seen go into the same KV cache.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from var_moe.errors import UsageError
from var_moe.routing.decision import ForwardContext

_FIRST_DOCUMENT = 2**40  # numbers of generated texts, far from those of scored documents


@dataclass(frozen=True)
class _Text:
    """What stands in one KV cache."""

    length: int  # positions, padding included
    documents: tuple[int, ...]  # (B,)
    look: Callable[[], Tensor]  # what `recent` is; `generate` mostly tells it anew instead

    @cached_property
    def recent(self) -> Tensor:
        """(B, W - 1) the last ids before the next forward, -1 where there are none."""
        return self.look()


class _Generating(threading.local):
    """A thread's running call of `generate`, and what it holds before its next forward."""

    call: _Call | None = None
    step: tuple[Tensor, Tensor] | None = None  # all ids, or all since the call; valid; (B, P)


class Texts:
    """The texts that a session's KV caches hold.

    Args:
        window: ids that a decision depends on, the token's own included; 0 where nothing that
            an earlier forward left matters.
    """

    def __init__(self, window: int) -> None:
        self._looks_back = window > 0
        self._before = max(window - 1, 0)
        self._texts: WeakKeyDictionary[Any, _Text] = WeakKeyDictionary()
        self._numbers = count(_FIRST_DOCUMENT)
        self._own = _Generating()
        # Before and in a forward that may make its own KV cache.
        self._unbound: tuple[_Text, ForwardContext] | None = None

    def forget(self) -> None:
        """Forget all texts: a KV cache filled before can then not be continued."""
        self._texts.clear()

    def context(
        self, ids: Tensor, mask: Any | None, cache: Any | None, positions: Tensor | None = None
    ) -> ForwardContext:
        """The context of a forward.

        Args:
            ids: (B, S) token ids of the forward.
            mask: (B, N >= S) attention mask, None where nothing is padding.
            cache: the forward's KV cache (``past_key_values``, ``cache`` since transformers 5.24).
            positions: (B, S) ``position_ids``, where given.

        Raises:
            UsageError: the KV cache holds tokens that this session has not seen, the mask does not
                tell what is padding, or several texts are packed into a row.
        """
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise UsageError(f"input_ids {_shape(ids)}: routed(...) needs (batch, sequence)")
        step, self._own.step = self._own.step, None
        if step is not None:
            mask = step[1].to(ids.device)
        length = ids.shape[1]
        if mask is not None:
            flat = isinstance(mask, Tensor) and mask.dim() == 2
            if flat and mask.shape == (1, length):
                mask = mask.expand(len(ids), -1)
            if not flat or len(mask) != len(ids) or mask.shape[1] < length:
                raise UsageError(
                    f"attention_mask {_shape(mask)} for tokens of {tuple(ids.shape)}: routed(...) "
                    "needs (batch, sequence), to know which positions are padding"
                )
        elif positions is not None and self._looks_back and _packed(positions):
            raise UsageError(
                "position_ids begin anew within a row, as where several texts are packed into one: "
                "the policy looks at earlier tokens, and would look past a text's start; give each "
                "text a row of its own, with padding and an attention_mask"
            )
        context = ForwardContext.of(ids, None if mask is None else mask[:, -length:])
        past = 0 if cache is None else int(cache.get_seq_length())
        text = self._continued(cache, past, context, step) if past else self._new(ids)
        if cache is None:
            self._unbound = (text, context)
        else:
            self._texts[cache] = self._after(text, context)
        return replace(
            context,
            document=text.documents,
            prefix=text.recent if past else None,
            inserting=not self._beams,
        )

    @property
    def _beams(self) -> bool:
        return self._own.call is not None and self._own.call.beams

    def bind(self, output: Any) -> None:
        """See a forward's output: it may hold a KV cache that the forward has made."""
        unbound, self._unbound = self._unbound, None
        # The name up to transformers 5.23 and the one since; asking for the old one warns.
        names = getattr(output, "__dataclass_fields__", {})
        cache = getattr(output, "cache" if "cache" in names else "past_key_values", None)
        if unbound is not None and hasattr(cache, "get_seq_length"):
            self._texts[cache] = self._after(*unbound)

    def _after(self, text: _Text, context: ForwardContext) -> _Text:
        """A text with a forward's tokens added to it."""
        recent = text.recent

        def look() -> Tensor:
            seen = torch.cat((recent, torch.where(context.valid, context.ids, -1)), dim=1)
            return _last(seen, self._before)

        return _Text(text.length + context.ids.shape[1], text.documents, look)

    def _new(self, ids: Tensor) -> _Text:
        numbers = tuple(next(self._numbers) for _ in range(ids.shape[0]))
        return _Text(0, numbers, lambda: ids.new_full((ids.shape[0], self._before), -1))

    def _continued(
        self, cache: Any, past: int, context: ForwardContext, step: tuple[Tensor, Tensor] | None
    ) -> _Text:
        """The text in a KV cache with ``past`` tokens."""
        known = self._texts.get(cache)
        held = 0 if known is None else known.length
        if known is not None and len(known.documents) != context.ids.shape[0]:
            known = None
        if step is not None and step[0].shape[1] == past + context.ids.shape[1]:
            documents = (known or self._new(context.ids)).documents
            earlier = torch.where(step[1], step[0], -1)[:, :past].to(context.ids.device)
            return _Text(past, documents, lambda: _last(earlier, self._before))
        if not self._looks_back:
            return replace(known or self._new(context.ids), length=past)
        if known is None or held != past or self._beams:
            raise UsageError(
                f"the KV cache holds {past} tokens, of which routed(...) knows {held} (it was "
                "filled outside the block, or cropped): fill a new one inside the block, or give "
                "generate() the whole input_ids"
            )
        return known

    # -- what `generate` tells -----------------------------------------------------------------

    @contextmanager
    def watching(self, model: Any) -> Iterator[None]:
        """Listen to the model's `generate` until the block ends."""
        if not callable(getattr(model, "generate", None)):
            yield
            return
        names = ("generate", "prepare_inputs_for_generation", "init_continuous_batching")
        before = {name: vars(model)[name] for name in names if name in vars(model)}
        model.generate = self._generate(model, model.generate)
        model.prepare_inputs_for_generation = self._prepare(model.prepare_inputs_for_generation)
        model.init_continuous_batching = _no_continuous_batching
        try:
            yield
        finally:
            for name in names:
                delattr(model, name)
            for name, value in before.items():
                setattr(model, name, value)

    def _generate(self, model: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            self._own.call = _Call.of(model, args, kwargs)
            args, kwargs = _uncompiled(args, kwargs)
            try:
                return original(*args, **kwargs)
            finally:
                self._own.call = self._own.step = None

        return generate

    def _prepare(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            call = self._own.call
            if call is not None:
                valid = call.unfinished(input_ids)
                mask = kwargs.get("attention_mask")
                if mask is not None and mask.dim() == 2:
                    valid = valid & mask[:, -input_ids.shape[1] :].to(valid)
                self._own.step = input_ids, valid
            return original(input_ids, *args, **kwargs)

        return prepare


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of `generate`."""

    beams: bool
    ends: tuple[int, ...]  # ids that end a row
    prompt: int  # tokens that were there before

    @classmethod
    def of(cls, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
        """Read the call's arguments as `generate` will.

        Raises:
            UsageError: a kind of generation that routed(...) does not follow.
        """
        from transformers.generation.configuration_utils import GenerationMode

        given = _config(args, kwargs)
        config = copy.deepcopy(given if given is not None else model.generation_config)
        for name in ("num_beams", "do_sample", "eos_token_id"):
            if getattr(config, name, None) is None:
                setattr(config, name, getattr(model.generation_config, name, None))
        config.update(**kwargs)
        mode = config.get_generation_mode(kwargs.get("assistant_model"))
        beams = mode in (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
        if not beams and mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise UsageError(
                f"{mode.value.replace('_', ' ')} is not supported inside routed(...); expected "
                "greedy search, sampling or beam search"
            )
        ends = config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, (list, tuple)) else [ends]
        first = args[0] if args else kwargs.get("inputs")
        ids = kwargs.get("input_ids") if first is None else first
        prompt = 1 if ids is None else ids.shape[1]  # without one, a token to begin with
        return cls(beams=beams, ends=tuple(int(token) for token in ends), prompt=prompt)

    def unfinished(self, ids: Tensor) -> Tensor:
        """(B, P) False where a row has ended: what follows its end token is padding.

        A row that a stopping criterion of the user's ends counts on, until the batch is done.
        """
        out = torch.ones_like(ids, dtype=torch.bool)
        if ids.shape[1] > self.prompt and self.ends:
            ended = torch.isin(ids[:, self.prompt :], ids.new_tensor(self.ends)).long()
            out[:, self.prompt :] = ended.cumsum(dim=1) == ended
        return out


def _config(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The `GenerationConfig` that `generate` is given, if any."""
    return kwargs.get("generation_config", args[1] if len(args) > 1 else None)


def _uncompiled(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With a static cache, `generate` would compile the model on a GPU: see `dispatched`."""
    given = _config(args, kwargs)
    if given is None:
        return args, {"disable_compile": True, **kwargs}
    # Beside a whole configuration, `generate` wants no argument of the kind.
    given = copy.deepcopy(given)
    given.disable_compile = True
    if len(args) > 1:
        return (args[0], given, *args[2:]), kwargs
    return args, {**kwargs, "generation_config": given}


def _no_continuous_batching(*_args: Any, **_kwargs: Any) -> Any:
    raise UsageError(
        "continuous batching (generate_batch) packs several texts into a row, which routed(...) "
        "does not follow; expected generate() with a padded batch"
    )


def _packed(positions: Tensor) -> bool:
    """Whether transformers takes a row's (B, S) positions for those of several texts."""
    return positions.dim() == 2 and bool((positions.diff(dim=1) != 1).any())


def _shape(given: Any) -> str:
    """What was given in place of a (B, S) tensor."""
    return f"of shape {tuple(given.shape)}" if hasattr(given, "shape") else type(given).__name__


def _last(ids: Tensor, number: int) -> Tensor:
    """The last ``number`` ids of each row that are not -1, at the right; (B, number)."""
    if ids.shape[1] < number:
        ids = torch.cat((ids.new_full((ids.shape[0], number - ids.shape[1]), -1), ids), dim=1)
    order = (ids >= 0).to(torch.uint8).argsort(dim=1, stable=True)
    return ids.gather(1, order)[:, ids.shape[1] - number :]
