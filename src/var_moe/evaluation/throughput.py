"""Throughput of scoring and decoding, timed in alternating blocks.

Alternation makes a machine that changes its speed hit all arms alike.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import ExpertsBackend
from var_moe.execution.session import routed
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.simple import NativePolicy

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument

HF_BACKENDS = ("eager", "grouped_mm", "batched_mm")
BATCH_SIZES = (1, 16)  # of decoding
PROMPT_TOKENS, NEW_TOKENS = 32, 128
_CHOOSING_BLOCKS = 8
_DECODED_CHOOSING_TOKENS, _DECODED_CHOOSING_BLOCKS = 16, 3
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


@dataclass(frozen=True)
class ArmGroup:
    """Arms by name that are timed on the same batches (B, S); a block is one pass over them."""

    arms: Mapping[str, Arm]
    batches: Sequence[Tensor]


def time_arms(
    model: Any, arms: Mapping[str, Arm], batches: Sequence[Tensor], **options: Any
) -> Timings:
    """`time_groups` of one group."""
    (timings,) = time_groups(model, [ArmGroup(arms, batches)], **options)
    return timings


def _score(model: Any, ids: Tensor) -> None:
    model(input_ids=ids, use_cache=False)


def time_groups(
    model: Any,
    groups: Sequence[ArmGroup],
    *,
    blocks: int,
    progress: Callable[[int, int], None] | None = None,
    run: Callable[[Any, Tensor], None] = _score,
) -> list[Timings]:
    """Time each arm in alternating blocks (A B B A ...), a block of each group in turn.

    One batch is run untimed in each arm first.

    Args:
        model: the model that the arms' contexts act on.
        groups: what is timed.
        blocks: timed blocks of each arm.
        progress: called with blocks done and in all.
        run: what is timed, on one batch; by default one full forward.
    """
    device = next(model.parameters()).device
    seconds: list[dict[str, list[float]]] = [{name: [] for name in one.arms} for one in groups]
    with torch.inference_mode():
        for block in range(-1, blocks):
            for group, measured in zip(groups, seconds, strict=True):
                batches = group.batches if block >= 0 else group.batches[:1]
                inputs = [batch.to(device) for batch in batches]
                names = list(group.arms)
                for name in names if block % 2 == 0 else names[::-1]:
                    with group.arms[name]() as state:
                        if state is not None:
                            state.reset()
                        _wait(device)
                        start = time.perf_counter()
                        for ids in inputs:
                            run(model, ids)
                        _wait(device)
                        elapsed = time.perf_counter() - start
                    if block >= 0:
                        measured[name].append(elapsed)
            if progress and block >= 0:
                progress(block + 1, blocks)
    return [
        Timings(
            seconds={name: np.array(values) for name, values in measured.items()},
            tokens=sum(batch.numel() for batch in group.batches),
        )
        for group, measured in zip(groups, seconds, strict=True)
    ]


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


def fastest_backend(
    model: Any, batches: Sequence[Tensor], *, top_k: int
) -> tuple[str, dict[str, float]]:
    """Measure which of transformers' backends is fastest: the baseline of every speedup.

    Returns its name and the median tokens per second of all that were tried.
    """
    names = usable_backends(model, batches[0].numel(), top_k)
    arms = {name: backend_arm(model, name) for name in names}
    timings = time_arms(model, arms, batches[:1], blocks=_CHOOSING_BLOCKS)
    speeds = {name: timings.throughput(name) for name in names}
    return max(speeds, key=speeds.__getitem__), speeds


# -- decoding --------------------------------------------------------------------------------


class Decoding:
    """Times greedy decoding of prompts from a text; prompts are included.

    The baseline's backend is measured once per batch size.

    Args:
        model: a transformers MoE causal language model.
        documents: their first tokens are the prompts; repeated where there are too few.
        top_k: K of the model.
        backend: who executes a policy's pairs.
    """

    def __init__(
        self,
        model: Any,
        documents: Sequence[EncodedDocument],
        *,
        top_k: int,
        backend: str | ExpertsBackend = "auto",
    ) -> None:
        self._model, self._top_k, self._backend = model, top_k, backend
        self._prompts = [d.ids[:PROMPT_TOKENS] for d in documents if len(d.ids) >= PROMPT_TOKENS]
        if not self._prompts:
            joined = np.concatenate([document.ids for document in documents])
            self._prompts = [np.resize(joined, PROMPT_TOKENS)]
        self._fastest: dict[int, str] = {}

    def baseline_backend(self, batch_size: int) -> str:
        """The fastest of transformers' experts backends at this batch size."""
        if batch_size not in self._fastest:
            names = usable_backends(self._model, batch_size, self._top_k)
            arms = {name: backend_arm(self._model, name) for name in names}
            timings = self._time(
                arms, batch_size, _DECODED_CHOOSING_BLOCKS, _DECODED_CHOOSING_TOKENS
            )
            self._fastest[batch_size] = max(names, key=timings.throughput)
        return self._fastest[batch_size]

    def speed(self, policy: RoutingPolicy, batch_size: int, *, blocks: int) -> dict[str, Any]:
        """Baseline and policy in alternating blocks, as a row of a result file."""
        name = self.baseline_backend(batch_size)
        arms = {
            "baseline": backend_arm(self._model, name),
            "policy": policy_arm(self._model, policy, backend=self._backend),
        }
        timings = self._time(arms, batch_size, blocks, NEW_TOKENS)
        ratio = timings.ratio("baseline", "policy")
        return {
            "batch_size": batch_size,
            "prompt_tokens": PROMPT_TOKENS,
            "new_tokens": NEW_TOKENS,
            "speedup": ratio.median,
            "speedup_95": [ratio.low, ratio.high],
            "baseline_backend": name,
            "baseline_throughput_tps": timings.throughput("baseline"),  # new tokens per second
            "throughput_tps": timings.throughput("policy"),
            "blocks": blocks,
        }

    def _time(self, arms: dict[str, Arm], batch_size: int, blocks: int, new_tokens: int) -> Timings:
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

        rows = np.array([self._prompts[i % len(self._prompts)] for i in range(batch_size)])
        prompts = torch.from_numpy(rows.astype(np.int64))  # (B, PROMPT_TOKENS)
        timings = time_arms(self._model, arms, [prompts], blocks=blocks, run=generate)
        return replace(timings, tokens=batch_size * new_tokens)
