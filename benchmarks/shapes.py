"""Experts layers of real models on a CPU: our backend against transformers', row by row.

    python -m benchmarks.shapes --output results/shapes

One experts layer of each shape with random weights, and a new routing of random logits in every
forward. All arms of a row take turns in one process (A B B A ...), each round on the routing of
that round. A row says, for one dtype and number of tokens:

- how many times as fast as the fastest of transformers' backends we are with all, 67% and 50% of
  the pairs;
- skipping efficiency: the time that skipping saves over the share of dropped pairs;
- the share of this machine's limit that we reach with all pairs: of its matrix product for many
  tokens, of its memory bandwidth for few (both measured between the same rounds);
- how many distinct experts a forward reads;
- the first, second and third forward over the steady state.

Rows are saved as they are measured; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import ExpertsBackend
from var_moe.models.moe_layers import weights_of
from var_moe.storage import atomic_write_json, provenance

SHARES = (1.0, 0.67, 0.5)
TOKENS = (2048, 256, 16, 1)
DTYPES = ("bfloat16", "float32")
THEIRS = ("eager", "grouped_mm", "batched_mm")
MOST_COPIED = 2**30  # bytes of weights that batched_mm copies, above which it is not tried
FEW_TOKENS_ROUNDS = 6  # times as many: short forwards are noisy
WARM_UP = 3  # forwards, each on a routing of its own, before rounds count


@dataclass(frozen=True)
class Shape:
    """An experts layer of a published model.

    Args:
        name: of the model.
        family: module and class of its experts in transformers, and of its configuration.
        settings: of that configuration.
        experts, top_k: E and K.
    """

    name: str
    family: tuple[str, str, str]
    settings: Mapping[str, Any]
    experts: int
    top_k: int

    def layer(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Any:
        """The experts module with random weights."""
        import importlib

        import transformers

        module, cls, config = self.family
        made = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        settings = getattr(transformers, config)(**self.settings, experts_implementation="eager")
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                layer = getattr(made, cls)(settings).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)
        for parameter in layer.parameters():
            parameter.normal_(0.0, self.hidden**-0.5)
        return layer

    @property
    def hidden(self) -> int:
        """D."""
        return int(self.settings["hidden_size"])

    def routing(self, tokens: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """A softmax router's decision on random logits: (T, K) experts and float32 weights."""
        scores = torch.randn((tokens, self.experts), generator=rng).softmax(dim=1)
        weight, index = scores.topk(self.top_k, dim=1)
        return index, weight / weight.sum(dim=1, keepdim=True)


SHAPES = (
    Shape(
        "OLMoE-1B-7B",
        ("olmoe", "OlmoeExperts", "OlmoeConfig"),
        {"hidden_size": 2048, "intermediate_size": 1024, "num_local_experts": 64},
        experts=64,
        top_k=8,
    ),
    Shape(
        "Qwen3-30B-A3B",
        ("qwen3_moe", "Qwen3MoeExperts", "Qwen3MoeConfig"),
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128},
        experts=128,
        top_k=8,
    ),
    Shape(
        "GPT-OSS-20B",
        ("gpt_oss", "GptOssExperts", "GptOssConfig"),
        {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32},
        experts=32,
        top_k=4,
    ),
    Shape(
        "Mixtral-8x7B",
        ("mixtral", "MixtralExperts", "MixtralConfig"),
        {"hidden_size": 4096, "intermediate_size": 14336, "num_local_experts": 8},
        experts=8,
        top_k=2,
    ),
)
QUICK = (
    Shape(
        "small",
        ("mixtral", "MixtralExperts", "MixtralConfig"),
        {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 8},
        experts=8,
        top_k=2,
    ),
)


def with_share(index: Tensor, share: float, rng: torch.Generator | None = None) -> Tensor:
    """The same (T, K) choices with a random share of all pairs; each token keeps its first."""
    spared = max(0.0, (share * index.shape[1] - 1) / (index.shape[1] - 1))
    keep = torch.rand(index.shape, generator=rng, device=index.device) < spared
    keep[:, 0] = True
    return torch.where(keep, index, -1)


def transformers_arm(module: Any, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """One of transformers' experts backends as a function of (hidden, index, weight)."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    function = ALL_EXPERTS_FUNCTIONS.get_interface(name, type(module).forward.__wrapped__)
    return lambda hidden, index, weight: function(module, hidden, index, weight)


def limits(module: Any, dtype: torch.dtype, rows: int) -> dict[str, Callable[[], object]]:
    """What bounds a layer here: a matrix product of its own sizes, and copying its weights."""
    first = weights_of(module)[0][0]
    first = first if module.is_transposed else first.t()
    left = torch.randn((rows, first.shape[0])).to(dtype)
    out = torch.empty((rows, first.shape[1]), dtype=dtype)
    source = weights_of(module)[0].reshape(-1)[: 2**27]
    target = torch.empty_like(source)
    right = first.contiguous()
    return {
        "product": lambda: torch.mm(left, right, out=out),
        "copy": lambda: target.copy_(source),
    }


def measure(
    shape: Shape, module: Any, backend: ExpertsBackend, tokens: int, rounds: int, seed: int = 0
) -> dict[str, Any]:
    """One row: all arms in turn, on a fresh routing in every round."""
    dtype = module.down_proj.dtype
    start = time.perf_counter()
    one = torch.zeros((1, shape.top_k), dtype=torch.int64)
    with torch.inference_mode():  # makes the copies of the weights, if any
        backend.run(module, torch.zeros((1, shape.hidden), dtype=dtype), one, one.to(dtype))
    copying = time.perf_counter() - start
    rng = torch.Generator().manual_seed(seed)
    bounds = limits(module, dtype, 2048)
    copied = tokens * shape.top_k * weights_of(module)[0][0].numel() * dtype.itemsize
    theirs = [name for name in THEIRS if name != "batched_mm" or copied <= MOST_COPIED]
    arms: dict[str, Callable[[Tensor, Tensor, Tensor], object]] = {
        **{name: transformers_arm(module, name) for name in theirs},
        **{
            f"ours {share:.0%}": lambda hidden, index, weight: backend.run(
                module, hidden, index, weight
            )
            for share in SHARES
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*arms, *bounds)}
    kept: dict[str, list[tuple[int, int]]] = {name: [] for name in arms}
    with torch.inference_mode():
        for number in range(-WARM_UP, rounds):
            hidden = torch.randn((tokens, shape.hidden), generator=rng).to(dtype)
            index, weight = shape.routing(tokens, rng)
            weight = weight.to(dtype)
            cuts = {f"ours {s:.0%}": with_share(index, s, rng) for s in SHARES}
            for name in list(arms) if number % 2 else list(arms)[::-1]:
                own = cuts.get(name, index)
                start = time.perf_counter()
                arms[name](hidden, own, weight)
                seconds[name].append(time.perf_counter() - start)
                kept[name].append((int((own >= 0).sum()), len(own[own >= 0].unique())))
            for name, bound in bounds.items():
                start = time.perf_counter()
                bound()
                seconds[name].append(time.perf_counter() - start)
    return {**row(shape, module, tokens, seconds, kept), "copying_s": copying}


def row(
    shape: Shape,
    module: Any,
    tokens: int,
    seconds: Mapping[str, list[float]],
    kept: Mapping[str, list[tuple[int, int]]],
) -> dict[str, Any]:
    """What a row of the table says, from the seconds of all rounds."""
    steady = {name: np.array(values[WARM_UP:]) for name, values in seconds.items()}
    median = {name: float(np.median(values)) for name, values in steady.items()}
    theirs = {name: median[name] for name in THEIRS if name in median}
    fastest = min(theirs, key=theirs.__getitem__)
    first, second = (weight[0] for weight in weights_of(module))
    per_pair = first.numel() + second.numel()
    full, (pairs, _) = "ours 100%", kept["ours 100%"][-1]
    distinct = float(np.mean([experts for _, experts in kept[full]]))
    size = first.element_size()
    product_flops = 2 * 2048 * first.numel() / median["product"]
    bandwidth = 2 * min(2**27, weights_of(module)[0].numel()) * size / median["copy"]
    shares: dict[str, Any] = {}
    for share in SHARES:
        name = f"ours {share:.0%}"
        ran = float(np.mean([count for count, _ in kept[name][WARM_UP:]])) / pairs
        saved = 1 - steady[name] / steady[full]
        shares[f"{share:.0%}"] = {
            "pairs_share": ran,
            "distinct_experts": float(np.mean([experts for _, experts in kept[name]])),
            "times_as_fast": float(np.median(steady[fastest] / steady[name])),
            "skipping_efficiency": float(np.median(saved)) / (1 - ran) if ran < 1 else None,
        }
    return {
        "shape": shape.name,
        "dtype": str(module.down_proj.dtype).removeprefix("torch."),
        "tokens": tokens,
        "seconds": median,
        "fastest_of_transformers": fastest,
        "shares": shares,
        "distinct_experts": distinct,
        "share_of_product": 2 * pairs * per_pair / median[full] / product_flops,
        "share_of_bandwidth": distinct * per_pair * size / median[full] / bandwidth,
        "product_gflops": product_flops / 1e9,
        "copy_gb_per_s": bandwidth / 1e9,
        "first_over_steady": [seconds[full][n] / median[full] for n in range(WARM_UP)],
        "rounds": len(steady[full]),
    }


HEAD = (
    "| shape | dtype | tokens | fastest of theirs | ours 100 / 67 / 50% | efficiency 67 / 50% "
    "| of product | of bandwidth | distinct experts | forwards 1, 2, 3 over steady |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def as_line(row: Mapping[str, Any]) -> str:
    """A row of the table."""
    shares = row["shares"].values()
    fast = " / ".join(f"{one['times_as_fast']:.2f}" for one in shares)
    efficiency = " / ".join(
        f"{one['skipping_efficiency']:.2f}" for one in shares if one["skipping_efficiency"]
    )
    first = ", ".join(f"{ratio:.2f}" for ratio in row["first_over_steady"])
    return (
        f"| {row['shape']} | {row['dtype']} | {row['tokens']:,} | {row['fastest_of_transformers']} "
        f"| {fast} | {efficiency} | {row['share_of_product']:.0%} "
        f"| {row['share_of_bandwidth']:.0%} | {row['distinct_experts']:.0f} | {first} |"
    )


def main(words: list[str] | None = None) -> int:
    """Measure what is not there yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/shapes"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--backend", default="fused")
    parser.add_argument("--dtype", choices=DTYPES, help="one alone")
    parser.add_argument("--shape", help="one alone, by its name")
    parser.add_argument("--quick", action="store_true", help="a small shape, to try it out")
    options = parser.parse_args(words)
    path = options.output / "shapes.json"
    saved = json.loads(path.read_text()) if path.exists() else {"rows": []}
    rows = {(r["shape"], r["dtype"], r["tokens"], r["backend"]): r for r in saved["rows"]}
    shapes = [s for s in (QUICK if options.quick else SHAPES) if options.shape in (None, s.name)]
    print(HEAD, flush=True)
    for shape, dtype in product(shapes, [options.dtype] if options.dtype else DTYPES):
        module = backend = None
        for tokens in TOKENS:
            key = (shape.name, dtype, tokens, options.backend)
            if key not in rows:
                if module is None or backend is None:
                    torch.manual_seed(0)
                    module = shape.layer(getattr(torch, dtype))
                    backend = open_backend(options.backend)
                rounds = options.rounds * (FEW_TOKENS_ROUNDS if tokens <= 16 else 1)
                measured = measure(shape, module, backend, tokens, rounds)
                rows[key] = {"backend": options.backend, **measured}
                atomic_write_json(path, {"rows": list(rows.values()), "provenance": provenance()})
            print(as_line(rows[key]), flush=True)
        del module, backend
        gc.collect()
    return 0


if __name__ == "__main__":
    sys.exit(main())
