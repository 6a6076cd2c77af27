"""``var-moe doctor``: what is installed, what this machine is, what is slow and why."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from var_moe.cli.output import Answer, table
from var_moe.extras import OPTIONAL
from var_moe.storage import SCHEMA_VERSION, provenance, version_of

if TYPE_CHECKING:
    from torch import Tensor

HUB_SECONDS = 2.0
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 128, 512, 8, 2, 256
"""Sizes of the layer that is timed."""
ROUNDS = 5
PATIENCE_SECONDS = 0.2
"""A backend whose first run takes longer is not run again: some copy weights for every pair."""
SLOWER = 1.1  # what is called slower: above the noise of a layer that takes milliseconds
NEEDED = {
    "torch": "tensors",
    "transformers": "models",
    "accelerate": "models on several devices",
    "tokenizers": "tokenizers",
    "safetensors": "files of tensors",
    "huggingface_hub": "the Hub",
    "datasets": "data sets of the Hub",
    "numpy": "numbers",
    "scipy": "statistics",
    "pandas": "profiles",
    "pyarrow": "profiles",
    "optuna": "the search",
    "rich": "tables",
    "cyclopts": "the command line",
    "PyYAML": "--options FILE",
    "jinja2": "certificates and reports",
}
"""What each library is for that var_moe does not work without, by its name for pip."""


def doctor() -> Answer:
    """Say what is installed, which device and backends there are, and what is slow and why.

    The exit code is 1 where something is missing that var_moe does not work without.
    """
    print("looking at packages, device and backends ...", file=sys.stderr, flush=True)
    found = diagnose()
    _print(found)
    return Answer(found, code=1 if found["missing"] else 0)


def _print(found: Mapping[str, Any]) -> None:
    from var_moe.terminal import show

    columns = {"package": "{name}", "version": "{shown}", "for": "{why}", "install": "{install}"}
    rows = [
        {
            **row,
            "shown": row["version"] or ("MISSING" if row["needed"] else "-"),
            "install": row["install"] or "",
        }
        for row in found["packages"]
    ]
    show(table("Installed", columns, rows))
    if found["backends"]:
        title = (
            f"Experts backends on one layer ({TOKENS:,} tokens, {TOP_K} of {EXPERTS} experts, "
            f"{HIDDEN} x {INTERMEDIATE})"
        )
        backends = sorted(found["backends"], key=lambda row: row["latency_ms"] or float("inf"))
        rows = [{**row, "why_not": row["why_not"] or ""} for row in backends]
        show(table(title, {"backend": "{name}", "ms": "{latency_ms:.2f}", "": "{why_not}"}, rows))
    show(*_about(found), *(f"Slow: {line}" for line in found["slow"]))
    if found["missing"]:
        line = f"Missing: {', '.join(found['missing'])}; see `install` above"
    else:
        line = "Nothing that is needed is missing."
    show(line)


def _about(found: Mapping[str, Any]) -> list[str]:
    """Machine, memory and Hub, a line each."""
    lines = []
    here, free, hub = found["machine"], found["memory"], found["hub"]
    if here is not None:
        devices = ", ".join(here["devices"]) or "cpu"
        omp = here["omp_num_threads"] or "not set"
        lines.append(
            f"Device: {devices}; {here['cores']} cores, torch uses {here['torch_threads']} threads "
            f"(OMP_NUM_THREADS {omp})"
        )
    if free["available_mib"] is not None:
        lines.append(
            f"Memory: {free['available_mib']:,.0f} of {free['total_mib']:,.0f} MiB free, "
            f"{free['swap_used_mib']:,.0f} MiB of swap in use"
        )
    if hub["offline"]:
        state = "offline mode (HF_HUB_OFFLINE is set): only what is in the cache can be loaded"
    elif hub["reachable"]:
        state = f"{hub['endpoint']} answers"
    else:
        state = "no answer within 2 s: only what is in the cache can be loaded"
    lines.append(f"Hub: {state}")
    lines.append(f"Cache: {hub['cache']} ({hub['cached_models']} models)")
    return lines


def diagnose(*, time_backends: bool = True) -> dict[str, Any]:
    """Versions, device, threads, memory, backends, Hub; what is missing and what is slow.

    Args:
        time_backends: time a small experts layer with each backend, which takes a second or two.

    Returns:
        The result of ``var-moe doctor --json``. ``missing`` names what var_moe does not work
        without, ``slow`` says what costs time here, each in one line.
    """
    libraries = packages()
    missing = [row["name"] for row in libraries if row["needed"] and not row["version"]]
    usable = not {"torch", "transformers"} & set(missing)
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "python": platform.python_version(),
        "packages": libraries,
        "missing": missing,
        "memory": memory(),
        "hub": hub_state(),
        "machine": machine() if "torch" not in missing else None,
        "backends": backends() if usable and time_backends else [],
        "dtypes": dtypes() if usable and time_backends else [],
        "provenance": provenance(),
    }
    found["slow"] = slow_things(found)
    return found


def packages() -> list[dict[str, Any]]:
    """The libraries that var_moe uses, each with its version or the command that installs it."""
    rows = [(name, why, True, f"pip install {name}") for name, why in NEEDED.items()]
    rows += [(one.package, one.purpose, False, one.install) for one in OPTIONAL.values()]
    versions = {name: version_of(name) for name, *_ in rows}
    return [
        {
            "name": name,
            "version": versions[name],
            "needed": needed,
            "why": why,
            "install": None if versions[name] else install,
        }
        for name, why, needed, install in rows
    ]


def machine() -> dict[str, Any]:
    """Devices and threads."""
    import torch

    cuda, cores = torch.cuda.is_available(), os.cpu_count() or 1
    return {
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "device": "cuda" if cuda else "cpu",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "bfloat16": bool(cuda and torch.cuda.is_bf16_supported()),
    }


def memory(place: Path = Path("/proc/meminfo")) -> dict[str, float | None]:
    """Free memory and swap in use, in MiB; None where the system does not tell."""
    if not place.is_file():
        return {"total_mib": None, "available_mib": None, "swap_used_mib": None}
    kib = {}
    for line in place.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        kib[name] = float(value.split()[0])
    swap = kib.get("SwapTotal", 0.0) - kib.get("SwapFree", 0.0)
    return {
        "total_mib": kib["MemTotal"] / 1024,
        "available_mib": kib.get("MemAvailable", kib["MemFree"]) / 1024,
        "swap_used_mib": swap / 1024,
    }


def hub_state() -> dict[str, Any]:
    """Whether the Hub answers, and where what was fetched from it lies."""
    try:
        from huggingface_hub import constants
    except ImportError:
        return {"offline": None, "reachable": None, "cache": None, "cached_models": None}
    from var_moe import hub

    silent = hub.offline()
    cache = Path(constants.HF_HUB_CACHE)
    return {
        "endpoint": constants.ENDPOINT,
        "offline": silent,
        "reachable": not silent and hub.answers(HUB_SECONDS),
        "cache": str(cache),
        "cached_models": len(list(cache.glob("models--*"))),
    }


def backends() -> list[dict[str, Any]]:
    """Each experts backend on one small layer: its time, or why it does not run here.

    All run the same tokens in turn, so that a busy machine hits all alike; the median counts.
    """
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from var_moe.execution.backends import IMPLEMENTATION, open_backend
    from var_moe.execution.backends.packed import has_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    module, hidden, index, weight = _layer(device)
    original = type(module).forward.__wrapped__
    names = ["eager", *(name for name in ALL_EXPERTS_FUNCTIONS if name != IMPLEMENTATION)]
    arms: dict[str, Any] = {}
    for name in names:
        function = ALL_EXPERTS_FUNCTIONS.get_interface(name, original)
        arms[name] = lambda function=function: function(module, hidden, index, weight)
    packed = device == "cpu" and has_kernels(hidden.dtype)
    for name in ("sorted", "packed") if packed else ("sorted",):
        own = open_backend(name)
        arms[f"var_moe {name}"] = lambda own=own: own.run(module, hidden, index, weight)
    return _timed(arms, device)


def dtypes() -> list[dict[str, Any]]:
    """A matrix product in each dtype."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    one = torch.ones((TOKENS, INTERMEDIATE), device=device)
    arms: dict[str, Any] = {}
    for name in ("float32", "bfloat16", "float16"):
        factor = one.to(getattr(torch, name))
        arms[name] = lambda factor=factor: factor @ factor.t()
    return _timed(arms, device)


def _layer(device: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """An experts module of Mixtral with random weights, and a router's decision for it."""
    import torch
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    eager: dict[str, Any] = {"experts_implementation": "eager"}
    config = MixtralConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        **eager,
    )
    rng = torch.Generator().manual_seed(0)
    module = MixtralExperts(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(0.0, HIDDEN**-0.5, generator=rng)
    scores = torch.randn((TOKENS, EXPERTS), generator=rng).softmax(dim=1)
    weight, index = scores.topk(TOP_K, dim=1)
    hidden = torch.randn((TOKENS, HIDDEN), generator=rng)
    return module.to(device), hidden.to(device), index.to(device), weight.to(device)


def _timed(arms: Mapping[str, Any], device: str) -> list[dict[str, Any]]:
    """Median time of each arm after a round of warm-up, or why it does not run."""
    import torch

    seconds: dict[str, list[float]] = {name: [] for name in arms}
    broken: dict[str, str] = {}
    with torch.inference_mode():
        for _round in range(1 + ROUNDS):
            for name, run in arms.items():
                if name in broken or seconds[name][:1] > [PATIENCE_SECONDS]:
                    continue
                start = time.perf_counter()
                try:
                    run()
                except Exception as error:  # whatever a backend's own kernels raise
                    broken[name] = " ".join(str(error).split())[:120] or type(error).__name__
                    continue
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
    return [
        {
            "name": name,
            "usable": name not in broken,
            "why_not": broken.get(name),
            # The median without the warm-up, where there is more than that.
            "latency_ms": None
            if name in broken
            else 1000 * median(seconds[name][1:] or seconds[name]),
        }
        for name in arms
    ]


def slow_things(found: Mapping[str, Any]) -> list[str]:
    """What costs time on this machine, and what to do about it, a line each."""
    here, free, lines = found["machine"], found["memory"], []
    if here is not None and here["device"] == "cpu" and here["torch_threads"] < here["cores"]:
        omp = here["omp_num_threads"]
        why = f" (OMP_NUM_THREADS={omp})" if omp else ""
        lines.append(
            f"torch uses {here['torch_threads']} of {here['cores']} cores{why}: "
            f"set OMP_NUM_THREADS={here['cores']}"
        )
    took, timed = (
        {row["name"]: row["latency_ms"] for row in found[what] if row["usable"]}
        for what in ("dtypes", "backends")
    )
    lines += [
        f"{name} takes {ms / took['float32']:.1f} times as long as float32 in a matrix product "
        "here: --dtype float32"
        for name, ms in took.items()
        if ms > SLOWER * took["float32"]
    ]
    standard = {name: ms for name, ms in timed.items() if not name.startswith("var_moe")}
    best = min(standard, key=lambda name: standard[name], default="")
    lines += [
        f"{name} takes {standard[name] / standard[best]:.1f} times as long as {best} on a small "
        "layer: speedups count against the fastest one"
        for name in sorted(standard)
        if standard[name] > SLOWER * standard[best]
    ]
    if free["swap_used_mib"] and free["swap_used_mib"] > 100:
        lines.append(
            f"{free['swap_used_mib']:,.0f} MiB of swap are in use: timings on a machine that "
            "swaps say little"
        )
    if free["available_mib"] is not None and free["available_mib"] < 2048:
        lines.append(
            f"{free['available_mib']:,.0f} MiB of memory are free: the demo needs about 2,048"
        )
    return lines
