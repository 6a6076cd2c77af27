"""What a routed forward costs and where its time goes, as ratios of interleaved runs.

    python benchmarks/forward.py --model demo --profile results/phase3/profile \
        --config results/phase3/best_config.json --output results/benchmarks

1. noise: the baseline against itself;
2. overhead: our path keeping all pairs, and with a single pair dropped (so that compaction
   runs for certain), against the fastest Hugging Face backend;
3. speed at random skipping of 0 to 100% of the second experts, against what the executed
   pairs predict;
4. where the time goes: attention, router, policy, experts, head, and the rest;
5. generation with a KV cache, batch 1 and 16: the policy's share, and VAR against the baseline.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from var_moe.calibration.profile import RoutingProfile
from var_moe.config import VARConfig
from var_moe.data.encoding import encode
from var_moe.data.text import load_text
from var_moe.evaluation.evaluator import Evaluator
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.evaluation.throughput import backend_arm, policy_arm, time_arms
from var_moe.execution.session import routed
from var_moe.models.loading import load_model
from var_moe.models.moe_layers import experts_modules
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.decision import ForwardContext, Routing
from var_moe.routing.simple import NativePolicy, RandomSkipPolicy
from var_moe.routing.var import VARPolicy
from var_moe.storage import atomic_write_json, provenance


class DropOnePair(NativePolicy):
    """Keep-all but for one pair per layer, so that compaction can't be skipped."""

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        routing = super().route(context, layer, index, weight)
        index = index.clone()
        index[0, -1] = -1
        return Routing(index=index, weight=weight, tier=routing.tier)


class Timed(RoutingPolicy):
    """A policy whose own time is added up."""

    def __init__(self, inner: RoutingPolicy, clock: dict[str, float]) -> None:
        self.inner, self.clock = inner, clock
        self.context_window = inner.context_window

    def begin(self, context: ForwardContext) -> None:
        start = time.perf_counter()
        self.inner.begin(context)
        self.clock["policy: context cache"] += time.perf_counter() - start

    def route(self, context: ForwardContext, layer: int, index: Tensor, weight: Tensor) -> Routing:
        start = time.perf_counter()
        routing = self.inner.route(context, layer, index, weight)
        self.clock["policy: decisions"] += time.perf_counter() - start
        return routing

    def reset(self) -> None:
        self.inner.reset()


@contextmanager
def watched(model: Any, clock: dict[str, float]) -> Iterator[None]:
    """Add up the time of the model's parts by forward hooks (CPU: every call is done on return)."""
    parts: list[tuple[str, Any]] = [("experts", m) for _, m in experts_modules(model)]
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            parts.append(("attention", module))
        elif name.endswith((".gate", ".router")):
            parts.append(("router", module))
        elif name.endswith("lm_head"):
            parts.append(("head", module))
    handles, started = [], {}

    def before(part: Any) -> Any:
        def hook(*_: Any) -> None:
            started[id(part)] = time.perf_counter()

        return hook

    def after(label: str, part: Any) -> Any:
        def hook(*_: Any) -> None:
            clock[label] += time.perf_counter() - started[id(part)]

        return hook

    for label, module in parts:
        handles.append(module.register_forward_pre_hook(before(module)))
        handles.append(module.register_forward_hook(after(label, module)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def where_time_goes(
    model: Any, batches: list[Tensor], policy: RoutingPolicy | None, backend: str, rounds: int
) -> dict[str, float]:
    """Milliseconds per forward and part; ``policy`` None is the unmodified model."""
    clock: dict[str, float] = defaultdict(float)
    if policy is None:
        arm: Any = backend_arm(model, backend)()
    else:
        arm = routed(model, Timed(policy, clock))
    with arm as session, watched(model, clock), torch.inference_mode():
        model(input_ids=batches[0], use_cache=False)
        clock.clear()
        for _ in range(rounds):
            if session is not None:
                session.reset()
            for ids in batches:
                start = time.perf_counter()
                model(input_ids=ids, use_cache=False)
                clock["total"] += time.perf_counter() - start
    # The experts' hook also covers the policy's decisions, which are made inside.
    clock["experts"] -= clock.get("policy: decisions", 0.0)
    known = sum(value for name, value in clock.items() if name != "total")
    clock["rest (norms, embedding, residual adds)"] = clock["total"] - known
    forwards = rounds * len(batches)
    return {name: 1000 * value / forwards for name, value in clock.items()}


def policy_share_of_decoding(model: Any, policy: RoutingPolicy, prompts: Tensor) -> float:
    """The policy's own time in a greedy generation of 128 tokens, as a share of the whole."""
    clock: dict[str, float] = defaultdict(float)
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompts)}
    with routed(model, Timed(policy, clock)) as session:
        model.generate(prompts, max_new_tokens=8, **options)
        session.reset()
        clock.clear()
        start = time.perf_counter()
        model.generate(prompts, max_new_tokens=128, min_new_tokens=128, **options)
        total = time.perf_counter() - start
    return sum(clock.values()) / total


def main() -> None:
    """Run all five and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    args = parser.parse_args()

    loaded = load_model(args.model)
    documents = encode(load_text(args.dataset, "validation"), loaded.tokenizer)
    evaluator = Evaluator(loaded, documents)
    model, base = loaded.model, evaluator.baseline_backend
    batches = evaluator.timing_batches(args.blocks)
    profile = RoutingProfile.load(args.profile)
    profile.check_loaded(loaded)
    config = VARConfig.load(args.config)
    var = VARPolicy(config, profile.table(), residuals=profile.residuals)
    result: dict[str, Any] = {"baseline_backend": base, "provenance": provenance()}
    result["backends_tokens_per_second"] = evaluator.backend_throughputs

    arms: dict[str, Any] = {
        "baseline": backend_arm(model, base),
        "baseline again": backend_arm(model, base),
        "keep-all": policy_arm(model, None),
        "keep-all, one pair dropped": policy_arm(model, DropOnePair()),
        "VAR": policy_arm(model, var),
    }
    shares = (0.25, 0.5, 0.75, 1.0)
    for share in shares:
        arms[f"random skip {share:.0%}"] = policy_arm(model, RandomSkipPolicy(share))
    timings = time_arms(
        model, arms, batches, blocks=args.blocks, forwards=evaluator.setting.forwards
    )
    result["time_against_baseline"] = {}
    print(f"baseline: {base}; time relative to it, median of {args.blocks} blocks [95%]")
    for name in list(arms)[1:]:
        ratio = timings.ratio(name, "baseline")
        result["time_against_baseline"][name] = ratio.to_dict()
        print(f"  {name:30} {ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]")
    keep = float(np.median(timings.seconds["keep-all"]))
    least = float(np.median(timings.seconds["random skip 100%"]))
    print("linear in executed pairs: predicted and measured speedup over keep-all")
    for share in shares:
        measured = timings.ratio("keep-all", f"random skip {share:.0%}").median
        predicted = keep / (keep + (least - keep) * share)
        print(f"  {2 - share:.2f} experts per token: {predicted:.3f} {measured:.3f}")

    result["where_time_goes_ms"] = {}
    for name, policy in (("baseline", None), ("keep-all", NativePolicy()), ("VAR", var)):
        parts = where_time_goes(model, batches[:2], policy, base, args.blocks)
        result["where_time_goes_ms"][name] = parts
        print(f"{name}: {parts['total']:.1f} ms per forward")
        for part, value in sorted(parts.items(), key=lambda item: -item[1]):
            if part != "total":
                print(f"  {part:40} {value:7.2f} ms {100 * value / parts['total']:5.1f}%")

    result["decoding"] = []
    for size in (1, 16):
        decoding = evaluator.with_setting(SpeedSetting.of("decode", size))
        measured = decoding.speed(var, blocks=max(3, args.blocks // 3))
        speed = {**decoding.setting.to_dict(), **measured.to_dict()}
        prompts = torch.tensor([d.ids[:32].tolist() for d in documents[:size]])
        share = policy_share_of_decoding(model, var, prompts)
        result["decoding"].append({**speed, "policy_share": share})
        low, high = speed["speedup_95"]
        print(
            f"generation, batch {size}: VAR {speed['speedup']:.3f}x of "
            f"{speed['baseline_backend']} [{low:.3f}, {high:.3f}], "
            f"policy {100 * share:.1f}%"
        )
    atomic_write_json(args.output / "forward.json", result)


if __name__ == "__main__":
    main()
