"""Throughput of scoring and decoding, timed in alternating blocks, each on text of its own.

Alternation makes a machine that changes its speed hit all arms alike. On text that was timed
before, a backend that prepares itself for each number of rows would look faster than it is; and
what it does in its first forwards is left out for all arms alike: they run until they are steady.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import ExpertsBackend
from var_moe.execution.session import routed
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.simple import NativePolicy

HF_BACKENDS = ("eager", "grouped_mm", "batched_mm")
CHOOSING_BLOCKS = 8
WARM_UP = 6
"""Most forwards of an arm before it is timed."""
_STEADY = 0.9  # a forward that takes no less of the one before
_GATHER_LIMIT_BYTES = 2**30  # batched_mm copies each pair's weights; above this it can't win

# Enters whatever the arm needs; the context's value is reset before each timed block.
Arm = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Ratio:
    """Median over blocks of time(a) / time(b), with a 95% bootstrap interval."""

    median: float
    low: float
    high: float
    blocks: tuple[float, ...] = ()  # each block's ratio

    def to_dict(self) -> dict[str, float]:
        """For result files."""
        return {"median": self.median, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Timings:
    """Seconds per block and arm, and how many tokens a block holds."""

    seconds: dict[str, np.ndarray]  # (blocks,)
    tokens: int

    def throughput(self, arm: str) -> float:
        """Median tokens per second."""
        return self.tokens / float(np.median(self.seconds[arm]))

    def ratio(self, slow: str, fast: str) -> Ratio:
        """Speedup of ``fast`` over ``slow``: the median of block ratios."""
        ratios = self.seconds[slow] / self.seconds[fast]
        rng = np.random.default_rng(0)
        draws = np.median(rng.choice(ratios, size=(2000, len(ratios))), axis=1)
        low, high = np.quantile(draws, (0.025, 0.975))
        blocks = tuple(ratios.tolist())
        return Ratio(float(np.median(ratios)), float(low), float(high), blocks)


Run = Callable[[Any, Tensor], None]
"""What is timed: something that the model does with a batch."""


def score(model: Any, ids: Tensor) -> None:
    """One full forward."""
    model(input_ids=ids, use_cache=False)


def generating(new_tokens: int) -> Run:
    """Greedy decoding of so many tokens after each prompt, which is included."""

    def generate(model: Any, ids: Tensor) -> None:
        # Always as many tokens: an early end would make a policy look fast.
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=0,
        )

    return generate


@dataclass(frozen=True)
class ArmGroup:
    """Arms by name that are timed on the same batches.

    Args:
        arms: what is timed.
        batches: (B, S) each; a block takes the next `forwards` of them, and begins anew at the
            end.
        forwards: batches of a block; all by default.
        run: what is done with a batch.
        tokens: that a block counts; by default those of its batches.
    """

    arms: Mapping[str, Arm]
    batches: Sequence[Tensor]
    forwards: int | None = None
    run: Run = score
    tokens: int | None = None

    @property
    def per_block(self) -> int:
        """Batches of a block."""
        return self.forwards or len(self.batches)

    def block(self, number: int) -> list[Tensor]:
        """The batches of a block."""
        start = number * self.per_block
        return [self.batches[(start + i) % len(self.batches)] for i in range(self.per_block)]

    def timings(self, seconds: Mapping[str, list[float]]) -> Timings:
        """What was measured."""
        tokens = self.tokens or sum(batch.numel() for batch in self.block(0))
        return Timings({name: np.array(values) for name, values in seconds.items()}, tokens)


def time_arms(
    model: Any, arms: Mapping[str, Arm], batches: Sequence[Tensor], *, blocks: int, **options: Any
) -> Timings:
    """`time_groups` of one group; further options are `ArmGroup`'s."""
    progress = options.pop("progress", None)
    group = ArmGroup(arms, batches, **options)
    (timings,) = time_groups(model, [group], blocks=blocks, progress=progress)
    return timings


def time_groups(
    model: Any,
    groups: Sequence[ArmGroup],
    *,
    blocks: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Timings]:
    """Time each arm in alternating blocks (A B B A ...), a block of each group in turn.

    Each arm is warm before: it has run until a batch takes no less than the one before, or
    `WARM_UP` batches.

    Args:
        model: the model that the arms' contexts act on.
        groups: what is timed.
        blocks: timed blocks of each arm.
        progress: called with blocks done and in all.
    """
    device = next(model.parameters()).device
    seconds: list[dict[str, list[float]]] = [{name: [] for name in one.arms} for one in groups]

    def timed(group: ArmGroup, name: str, batches: Sequence[Tensor]) -> float:
        inputs = [batch.to(device) for batch in batches]
        with group.arms[name]() as state:
            if state is not None:
                state.reset()
            _wait(device)
            start = time.perf_counter()
            for ids in inputs:
                group.run(model, ids)
            _wait(device)
            return time.perf_counter() - start

    with torch.inference_mode():
        for group in groups:
            for name in group.arms:
                before = np.inf
                for number in range(WARM_UP):  # from the end: the first blocks are timed first
                    batch = group.batches[-1 - number % len(group.batches)]
                    took = timed(group, name, [batch])
                    if took >= _STEADY * before:
                        break
                    before = took
        for block in range(blocks):
            for group, measured in zip(groups, seconds, strict=True):
                names = list(group.arms)
                for name in names if block % 2 == 0 else names[::-1]:
                    measured[name].append(timed(group, name, group.block(block)))
            if progress:
                progress(block + 1, blocks)
    return [group.timings(measured) for group, measured in zip(groups, seconds, strict=True)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def backend_arm(model: Any, backend: str) -> Arm:
    """The unmodified model on one of transformers' experts backends."""

    @contextmanager
    def arm() -> Iterator[None]:
        before = model.get_experts_implementation()
        model.set_experts_implementation(backend)
        try:
            yield
        finally:
            model.set_experts_implementation(before)

    return arm


def policy_arm(
    model: Any, policy: RoutingPolicy | None, *, backend: str | ExpertsBackend = "auto"
) -> Arm:
    """The model routed by ``policy``; None keeps all pairs through the same path.

    A backend that is given by its name is opened once, for all blocks of the arm.
    """
    chosen = policy or NativePolicy()
    opened = open_backend(backend, model) if isinstance(backend, str) else backend
    return lambda: routed(model, chosen, backend=opened)


def usable_backends(model: Any, tokens: int, top_k: int) -> list[str]:
    """transformers' experts backends that can run a forward of this size here."""
    _, module = experts_modules(model)[0]
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    gathered = parameters / max(1, int(getattr(module, "num_experts", 1))) * tokens * top_k
    usable = []
    for name in HF_BACKENDS:
        if name == "batched_mm" and gathered > _GATHER_LIMIT_BYTES:
            continue
        with contextlib.suppress(ValueError, ImportError), backend_arm(model, name)():
            usable.append(name)
    return usable
