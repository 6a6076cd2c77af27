"""Throughput of generation: greedy decoding with a KV cache, apart from scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from var_moe.evaluation.throughput import (
    Arm,
    Ratio,
    backend_arm,
    policy_arm,
    time_arms,
    usable_backends,
)
from var_moe.routing.base import RoutingPolicy

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument

BATCH_SIZES = (1, 16)
_CHOOSING_TOKENS, _CHOOSING_BLOCKS = 16, 3


@dataclass(frozen=True, kw_only=True)
class DecodeSetting:
    """What decoding is timed on; recorded with every result."""

    batch_size: int
    prompt_tokens: int = 32
    new_tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class DecodeSpeed:
    """A policy's decoding throughput against the unmodified model's, prompts included."""

    setting: DecodeSetting
    speedup: Ratio
    baseline_backend: str  # the fastest for this batch size
    baseline_tps: float  # new tokens per second
    tps: float
    blocks: int

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "batch_size": self.setting.batch_size,
            "prompt_tokens": self.setting.prompt_tokens,
            "new_tokens": self.setting.new_tokens,
            "speedup": self.speedup.median,
            "speedup_95": [self.speedup.low, self.speedup.high],
            "baseline_backend": self.baseline_backend,
            "baseline_throughput_tps": self.baseline_tps,
            "throughput_tps": self.tps,
            "blocks": self.blocks,
        }


class Decoding:
    """Times policies on prompts from a text; the baseline's backend is measured once per size.

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
        backend: str = "auto",
    ) -> None:
        self._model, self._documents = model, documents
        self._top_k, self._backend = top_k, backend
        self._fastest: dict[int, str] = {}

    def baseline_backend(self, setting: DecodeSetting) -> str:
        """The fastest of transformers' experts backends at this batch size."""
        size = setting.batch_size
        if size not in self._fastest:
            names = usable_backends(self._model, size, self._top_k)
            arms = {name: backend_arm(self._model, name) for name in names}
            timings = self._time(arms, setting, _CHOOSING_BLOCKS, _CHOOSING_TOKENS)
            self._fastest[size] = max(names, key=timings.throughput)
        return self._fastest[size]

    def speed(self, policy: RoutingPolicy, setting: DecodeSetting, *, blocks: int) -> DecodeSpeed:
        """Decode greedily, baseline and policy in alternating blocks."""
        name = self.baseline_backend(setting)
        arms = {
            "baseline": backend_arm(self._model, name),
            "policy": policy_arm(self._model, policy, backend=self._backend),
        }
        timings = self._time(arms, setting, blocks, setting.new_tokens)
        return DecodeSpeed(
            setting=setting,
            speedup=timings.ratio("baseline", "policy"),
            baseline_backend=name,
            baseline_tps=timings.throughput("baseline"),
            tps=timings.throughput("policy"),
            blocks=blocks,
        )

    def _time(
        self, arms: dict[str, Arm], setting: DecodeSetting, blocks: int, new_tokens: int
    ) -> Any:
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

        return time_arms(
            self._model,
            arms,
            [self._prompts(setting)],
            blocks=blocks,
            run=generate,
            tokens=setting.batch_size * new_tokens,
        )

    def _prompts(self, setting: DecodeSetting) -> Tensor:
        """(B, prompt_tokens) first tokens of documents that are long enough."""
        length = setting.prompt_tokens
        found = [d.ids[:length].tolist() for d in self._documents if len(d.ids) >= length]
        if not found:
            joined = [int(i) for d in self._documents for i in d.ids]
            found = [(joined * (length // max(len(joined), 1) + 1))[:length]]
        rows = [found[i % len(found)] for i in range(setting.batch_size)]
        return torch.tensor(rows, dtype=torch.int64)
