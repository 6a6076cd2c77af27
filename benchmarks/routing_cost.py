"""What deciding and compacting cost, against what skipped experts save, as they grow.

    python -m benchmarks.routing_cost --output results/benchmarks

On one experts layer of random weights (hidden 128, intermediate 1,024, as in the demo) and random
routing, all ratios of interleaved runs:

1. pairs: time with 75% and 50% of the pairs against all of them, for each backend;
2. ours, fused and sorted: all pairs against transformers' own eager loop and grouped_mm;
3. policy: VAR's decisions (verified, with table, cache, residual means) against the fused layer.

T runs from 256 to 16,384 tokens, E over 8, 64 and 128 experts, K over 2 and 8.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.shapes import with_share
from torch import Tensor

from var_moe.config import VARConfig
from var_moe.execution.backends import open_backend
from var_moe.routing.compensation import ResidualMeans
from var_moe.routing.decision import ForwardContext
from var_moe.routing.keeping import leading_count
from var_moe.routing.var import RoutingTable, VARPolicy
from var_moe.storage import atomic_write_json, provenance

HIDDEN, INTERMEDIATE, VOCABULARY = 128, 1024, 4096
TOKENS = (256, 1024, 4096, 16384)
SHAPES = ((8, 2), (64, 2), (64, 8), (128, 8))
SEQUENCE = 256
OWN = ("fused", "sorted")


def experts_layer(experts: int, top_k: int) -> Any:
    """An experts module of Mixtral with random weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        experts_implementation="eager",
    )
    module = MixtralExperts(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(0.0, HIDDEN**-0.5)
    return module


def router(tokens: int, experts: int, top_k: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A softmax router's choices on random logits: (T, K) experts and weights."""
    scores = torch.randn((tokens, experts), generator=rng).softmax(dim=1)
    weight, index = scores.topk(top_k, dim=1)
    return index, weight / weight.sum(dim=1, keepdim=True)


def var_policy(experts: int, top_k: int, rng: torch.Generator) -> VARPolicy:
    """Verified VAR with every part in use: half of the ids on the fast path."""
    lead = leading_count(top_k)
    shape = (1, VOCABULARY)
    table = RoutingTable(
        count=torch.full(shape, 100.0, dtype=torch.float64),
        entropy=torch.rand(shape, generator=rng, dtype=torch.float64),
        index=torch.rand((*shape, experts), generator=rng).argsort(dim=2)[..., :lead],
        weight=torch.rand((*shape, lead), generator=rng),
    )
    rows = experts**2 if top_k == 2 else experts
    means = ResidualMeans(
        table=(torch.zeros((rows + 1, HIDDEN)),), by_pair=top_k == 2, experts=experts
    )
    return VARPolicy(VARConfig(frequency_threshold=10), table, residuals=means)


def interleaved(arms: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each arm, round by round (A B B A ...), after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    names = list(arms)
    for number in range(-1, rounds):
        for name in names if number % 2 else names[::-1]:
            start = time.perf_counter()
            arms[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def measure(tokens: int, experts: int, top_k: int, rounds: int) -> dict[str, Any]:
    """All ratios for one size."""
    rng = torch.Generator().manual_seed(0)
    module = experts_layer(experts, top_k)
    hidden = torch.randn((tokens, HIDDEN), generator=rng)
    index, weight = router(tokens, experts, top_k, rng)
    # Token ids with a heavy tail, as in text.
    ids = (torch.rand((tokens,), generator=rng).pow(3) * VOCABULARY).long()
    context = ForwardContext.of(ids.view(-1, min(SEQUENCE, tokens)))
    policy = var_policy(experts, top_k, rng)
    backends = {name: open_backend(name) for name in (*OWN, "grouped_mm", "eager")}
    original = type(module).forward.__wrapped__

    def decide() -> None:
        policy.begin(context)
        policy.route(context, 0, index, weight)

    arms: dict[str, Callable[[], object]] = {
        "transformers eager": lambda: original(module, hidden, index, weight),
        "policy": decide,
    }
    for name, backend in backends.items():
        for share in (1.0, 0.75, 0.5):
            kept = index if share == 1 else with_share(index, share, rng)

            def run(kept: Tensor = kept, backend: Any = backend) -> object:
                return backend.run(module, hidden, kept, weight)

            arms[f"{name} {share:.0%}"] = run
    with torch.inference_mode():
        seconds = interleaved(arms, rounds)
        begin = interleaved({"begin": lambda: policy.begin(context)}, rounds)["begin"]

    def ratio(over: str, under: str) -> float:
        return float(np.median(seconds[over] / seconds[under]))

    return {
        "tokens": tokens,
        "experts": experts,
        "top_k": top_k,
        "over_eager": {name: ratio(f"{name} 100%", "transformers eager") for name in OWN},
        "over_grouped_mm": {name: ratio(f"{name} 100%", "grouped_mm 100%") for name in OWN},
        "time_at_share": {
            name: {share: ratio(f"{name} {share}", f"{name} 100%") for share in ("75%", "50%")}
            for name in backends
        },
        # The cache's walk serves all layers; a decision is made in each.
        "decision_over_layer": ratio("policy", "fused 100%")
        - float(np.median(begin / seconds["fused 100%"])),
        "walk_over_layer": float(np.median(begin / seconds["fused 100%"])),
    }


def main() -> None:
    """Measure all sizes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    options = parser.parse_args()
    rows = []
    print(
        "     T   E  K | fused, sorted / eager  / grouped | pairs 75% 50%: fused  sorted"
        "  grouped_mm  eager | decision walk, of a fused layer"
    )
    for experts, top_k in SHAPES:
        for tokens in options.tokens:
            row = measure(tokens, experts, top_k, options.rounds)
            rows.append(row)
            shares = "  ".join(
                f"{values['75%']:.2f} {values['50%']:.2f}"
                for values in row["time_at_share"].values()
            )
            print(
                f"{tokens:6d} {experts:3d} {top_k:2d} | "
                f"{row['over_eager']['fused']:.2f} {row['over_eager']['sorted']:.2f}  "
                f"{row['over_grouped_mm']['fused']:.2f} {row['over_grouped_mm']['sorted']:.2f} | "
                f"{shares} | "
                f"{row['decision_over_layer']:.3f} {row['walk_over_layer']:.3f}",
                flush=True,
            )
    options.output.mkdir(parents=True, exist_ok=True)
    result = {"schema_version": 1, "rows": rows, "provenance": provenance()}
    atomic_write_json(options.output / "routing_cost.json", result)


if __name__ == "__main__":
    main()
