"""Experts on a GPU: our backends against the fastest of transformers', on real layer shapes.

    python -m benchmarks.gpu

Four experts layers of each shape with random weights in bfloat16, for prefill and decode, with a
new routing in every layer and forward. The table gives, for each backend of ours, how many times
as fast as the fastest of transformers' it is with 100, 67 and 50% of the pairs, skipping efficiency
(the time that skipping saves over the share of dropped pairs), and how often the host waits for the
device in a layer. It takes a few minutes on one GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from benchmarks.shapes import QUICK, SHAPES, SHARES, Shape, with_share
from torch import Tensor

from var_moe.execution.backends import open_backend

OURS = ("grouped", "sorted")
THEIRS = ("grouped_mm", "batched_mm", "eager")
MOST_BYTES = 8 * 2**30  # of copied weights, above which batched_mm is not tried
ROUTINGS = 4  # forwards of an arm in a round, each with its own


TOKENS = (2048, 256, 64, 16, 1)
QUICK_TOKENS = (64, 1)
LAYERS = 4
"""Of the stack that a forward runs through: no cache holds its weights."""


Decisions = list[list[tuple[Tensor, Tensor]]]
"""Of each forward and layer: (T, K) experts and weights."""


def routings(shape: Shape, layers: int, tokens: int, device: torch.device) -> Decisions:
    """Decisions of routers on random logits."""

    def one() -> tuple[Tensor, Tensor]:
        scores = torch.randn((tokens, shape.experts), device=device).softmax(dim=1)
        weight, index = scores.topk(shape.top_k, dim=1)
        return index, (weight / weight.sum(dim=1, keepdim=True)).to(torch.bfloat16)

    return [[one() for _ in range(layers)] for _ in range(ROUTINGS)]


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
    """How often the host waits for the device in one run of an arm."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in caught)


def measure(
    shape: Shape, stack: list[Any], tokens: int, rounds: int, device: torch.device
) -> list[str]:
    """Rows of the table."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    hidden = torch.randn((tokens, shape.hidden), dtype=torch.bfloat16, device=device)
    full = routings(shape, len(stack), tokens, device)
    original = type(stack[0]).forward.__wrapped__
    copied = tokens * shape.top_k * stack[0].gate_up_proj[0].numel() * 2
    arms: dict[str, Callable[[], object]] = {}

    def arm(function: Callable[..., Tensor], share: float = 1.0) -> Callable[[], object]:
        cut = [
            [(with_share(index, share), weight) for index, weight in forward] for forward in full
        ]

        def run() -> None:
            for forward in cut:
                for module, (index, weight) in zip(stack, forward, strict=True):
                    function(module, hidden, index, weight)

        return run

    for name in THEIRS:
        if name != "batched_mm" or copied <= MOST_BYTES:
            arms[name] = arm(ALL_EXPERTS_FUNCTIONS.get_interface(name, original))
    for name in OURS:
        backend = open_backend(name)
        arms |= {f"{name} {share:.0%}": arm(backend.run, share) for share in SHARES}
    cuda = device.type == "cuda"
    with torch.inference_mode():
        found = seconds(arms, rounds, torch.cuda.synchronize if cuda else lambda: None)
        calls = ROUTINGS * len(stack)
        synced = {n: waits(arms[f"{n} 67%"]) / calls if cuda else None for n in OURS}
    fastest = min((name for name in THEIRS if name in found), key=found.__getitem__)
    rows = []
    for name in OURS:
        own = [found[f"{name} {share:.0%}"] for share in SHARES]
        ratios = "  ".join(f"{found[fastest] / one:5.2f}" for one in own)
        saved = zip(own[1:], SHARES[1:], strict=True)
        efficiency = "  ".join(f"{(1 - one / own[0]) / (1 - s):5.2f}" for one, s in saved)
        wait = "   -" if synced[name] is None else f"{synced[name]:4.1f}"
        of_theirs = f"{fastest:10} {1000 * found[fastest] / calls:8.3f}"
        row = f"{shape.name:13} {tokens:5}  {of_theirs}  {name:8} {ratios}  {efficiency}  {wait}"
        rows.append(row)
    return rows


def main(words: list[str] | None = None) -> int:
    """Measure and print; 2 where there is no such device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=LAYERS)
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
    columns = "ours      100%    67%    50%   efficiency    waits"
    print(f"shape         tokens fastest        ms/layer  {columns}")
    for shape in QUICK if options.quick else SHAPES:
        stack = [shape.layer(torch.bfloat16, device) for _ in range(options.layers)]
        for tokens in QUICK_TOKENS if options.quick else TOKENS:
            print("\n".join(measure(shape, stack, tokens, options.rounds, device)), flush=True)
        del stack
    return 0


if __name__ == "__main__":
    sys.exit(main())
