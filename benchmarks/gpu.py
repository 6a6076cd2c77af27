"""Experts on a GPU: our backends against the fastest of transformers', on real layer shapes.

    python benchmarks/gpu.py

One experts layer of OLMoE-1B-7B and of Mixtral-8x7B with random weights in bfloat16, for prefill
and decode, with a new routing in every forward. The table gives, for each backend of ours, how
many times as fast as the fastest of transformers' it is with 100, 67 and 50% of the pairs, and how
often the host waits for the device in a layer. It takes a few minutes on one GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import ExpertsBackend

SHARES = (1.0, 0.67, 0.5)
OURS = ("grouped", "sorted")
THEIRS = ("grouped_mm", "batched_mm", "eager")
MOST_BYTES = 8 * 2**30  # of copied weights, above which batched_mm is not tried
ROUTINGS = 8  # forwards of an arm in a round, each with its own


@dataclass(frozen=True)
class Shape:
    """An experts layer."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int

    def layer(self, device: torch.device) -> Any:
        """It has Mixtral's experts: gate, up and down, without biases, as OLMoE's are, too."""
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        config = MixtralConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_local_experts=self.experts,
            num_experts_per_tok=self.top_k,
        )
        with torch.device(device):
            module = MixtralExperts(config).to(torch.bfloat16).eval().requires_grad_(False)
            for parameter in module.parameters():
                parameter.normal_(0.0, self.hidden**-0.5)
        return module


SHAPES = (Shape("OLMoE-1B-7B", 2048, 1024, 64, 8), Shape("Mixtral-8x7B", 4096, 14336, 8, 2))
TOKENS = (2048, 256, 16, 1)
QUICK_SHAPES = (Shape("small", 64, 32, 8, 2),)
QUICK_TOKENS = (64, 1)


def routings(shape: Shape, tokens: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Decisions of a router on random logits: (T, K) experts and weights."""
    made = []
    for _ in range(ROUTINGS):
        scores = torch.randn((tokens, shape.experts), device=device).softmax(dim=1)
        weight, index = scores.topk(shape.top_k, dim=1)
        made.append((index, (weight / weight.sum(dim=1, keepdim=True)).to(torch.bfloat16)))
    return made


def with_share(index: Tensor, share: float, rng: torch.Generator | None = None) -> Tensor:
    """The same with a random share of all pairs; each token keeps its first."""
    spared = max(0.0, (share * index.shape[1] - 1) / (index.shape[1] - 1))
    keep = torch.rand(index.shape, generator=rng, device=index.device) < spared
    keep[:, 0] = True
    return torch.where(keep, index, -1)


def seconds(arms: Mapping[str, Callable[[], object]], rounds: int, wait: Callable[[], None]) -> Any:
    """Median seconds of each arm, over rounds in alternating order after one of warm-up."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(-1, rounds):
        for name in list(arms) if number % 2 else list(arms)[::-1]:
            wait()
            start = time.perf_counter()
            arms[name]()
            wait()
            if number >= 0:
                found[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in found.items()}


def waits(run: Callable[[], object]) -> float:
    """How often the host waits for the device in one forward of an arm."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught) / ROUTINGS


def measure(shape: Shape, module: Any, tokens: int, rounds: int, device: torch.device) -> list[str]:
    """Rows of the table."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    hidden = torch.randn((tokens, shape.hidden), dtype=torch.bfloat16, device=device)
    full = routings(shape, tokens, device)
    original = type(module).forward.__wrapped__
    copied = tokens * shape.top_k * module.gate_up_proj[0].numel() * 2
    arms: dict[str, Callable[[], object]] = {}

    def theirs(function: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: [function(module, hidden, index, weight) for index, weight in full]

    def ours(backend: ExpertsBackend, share: float) -> Callable[[], object]:
        cut = [
            (index if share == 1 else with_share(index, share), weight) for index, weight in full
        ]
        return lambda: [backend.run(module, hidden, index, weight) for index, weight in cut]

    for name in THEIRS:
        if name != "batched_mm" or copied <= MOST_BYTES:
            arms[name] = theirs(ALL_EXPERTS_FUNCTIONS.get_interface(name, original))
    for name in OURS:
        backend = open_backend(name)
        arms |= {f"{name} {share:.0%}": ours(backend, share) for share in SHARES}
    cuda = device.type == "cuda"
    with torch.inference_mode():
        found = seconds(arms, rounds, torch.cuda.synchronize if cuda else lambda: None)
        synced = {name: waits(arms[f"{name} 67%"]) if cuda else None for name in OURS}
    fastest = min((name for name in THEIRS if name in found), key=found.__getitem__)
    rows = []
    for name in OURS:
        ratios = "  ".join(f"{found[fastest] / found[f'{name} {s:.0%}']:5.2f}" for s in SHARES)
        wait = "   -" if synced[name] is None else f"{synced[name]:4.1f}"
        of_theirs = f"{fastest:10} {1000 * found[fastest] / ROUTINGS:8.3f}"
        rows.append(f"{shape.name:13} {tokens:5}  {of_theirs}  {name:8} {ratios}  {wait}")
    return rows


def main(words: list[str] | None = None) -> int:
    """Measure and print; 2 where there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="small shapes, to try it out")
    options = parser.parse_args(words)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU here: run it where there is one, or try --device cpu --quick", file=sys.stderr
        )
        return 2
    torch.manual_seed(0)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, bfloat16; times as fast as transformers' fastest")
    print("shape         tokens fastest        ms/layer  ours      100%    67%    50%  waits")
    for shape in QUICK_SHAPES if options.quick else SHAPES:
        module = shape.layer(device)
        for tokens in QUICK_TOKENS if options.quick else TOKENS:
            print("\n".join(measure(shape, module, tokens, options.rounds, device)), flush=True)
        del module
    return 0


if __name__ == "__main__":
    sys.exit(main())
