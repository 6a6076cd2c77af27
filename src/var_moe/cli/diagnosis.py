"""What `var-moe doctor` finds out about this machine and installation."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True, kw_only=True)
class Package:
    """A library that var_moe uses.

    Args:
        name: as pip knows it.
        why: what it is needed for.
        install: the command that installs it; empty where var_moe does not work without it.
    """

    name: str
    why: str
    install: str = ""

    def to_dict(self) -> dict[str, Any]:
        """With the installed version, or the command that installs it."""
        version = version_of(self.name)
        return {
            "name": self.name,
            "version": version,
            "needed": not self.install,
            "why": self.why,
            "install": None if version else self.install or f"pip install {self.name}",
        }


PACKAGES = (
    Package(name="torch", why="tensors"),
    Package(name="transformers", why="models"),
    Package(name="accelerate", why="models on several devices"),
    Package(name="tokenizers", why="tokenizers"),
    Package(name="safetensors", why="files of tensors"),
    Package(name="huggingface_hub", why="the Hub"),
    Package(name="datasets", why="data sets of the Hub"),
    Package(name="numpy", why="numbers"),
    Package(name="scipy", why="statistics"),
    Package(name="pandas", why="profiles"),
    Package(name="pyarrow", why="profiles"),
    Package(name="optuna", why="the bayesian method"),
    Package(name="rich", why="tables"),
    Package(name="cyclopts", why="the command line"),
    Package(name="PyYAML", why="--options FILE"),
    Package(name="jinja2", why="certificates and reports"),
    *(Package(name=one.package, why=one.purpose, install=one.install) for one in OPTIONAL.values()),
)


def diagnose(*, time_backends: bool = True) -> dict[str, Any]:
    """Versions, device, threads, memory, backends, Hub; what is missing and what is slow.

    Args:
        time_backends: time a small experts layer with each backend, which takes a second or two.

    Returns:
        The result of ``var-moe doctor --json``. ``missing`` names what var_moe does not work
        without, ``slow`` says what costs time here, each in one line.
    """
    packages = [package.to_dict() for package in PACKAGES]
    missing = [row["name"] for row in packages if row["needed"] and not row["version"]]
    usable = not {"torch", "transformers"} & set(missing)
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "python": platform.python_version(),
        "packages": packages,
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


def machine() -> dict[str, Any]:
    """Devices and threads."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "device": "cuda" if cuda else "cpu",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
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

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "experts_implementation": "eager",
    }
    config = MixtralConfig(**sizes)
    dice = torch.Generator().manual_seed(0)
    module = MixtralExperts(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(0.0, HIDDEN**-0.5, generator=dice)
    scores = torch.randn((TOKENS, EXPERTS), generator=dice).softmax(dim=1)
    weight, index = scores.topk(TOP_K, dim=1)
    hidden = torch.randn((TOKENS, HIDDEN), generator=dice)
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
            "latency_ms": None if name in broken else 1000 * _typical(seconds[name]),
        }
        for name in arms
    ]


def _typical(seconds: list[float]) -> float:
    """The median without the warm-up, where there is more than that."""
    return median(seconds[1:] or seconds)


def slow_things(found: Mapping[str, Any]) -> list[str]:
    """What costs time on this machine, and what to do about it, a line each."""
    here, free = found["machine"], found["memory"]
    lines = []
    if here is not None and here["device"] == "cpu" and here["torch_threads"] < here["cores"]:
        why = f"OMP_NUM_THREADS={here['omp_num_threads']}" if here["omp_num_threads"] else ""
        lines.append(
            f"torch uses {here['torch_threads']} of {here['cores']} cores"
            + (f" ({why})" if why else "")
            + f": set OMP_NUM_THREADS={here['cores']}"
        )
    took = {row["name"]: row["latency_ms"] for row in found["dtypes"] if row["usable"]}
    for name, ms in took.items():
        if ms > SLOWER * took["float32"]:
            lines.append(
                f"{name} takes {ms / took['float32']:.1f} times as long as float32 in a matrix "
                "product here: --dtype float32"
            )
    timed = {row["name"]: row["latency_ms"] for row in found["backends"] if row["usable"]}
    standard = {name: ms for name, ms in timed.items() if not name.startswith("var_moe")}
    if standard:
        best = min(standard, key=lambda name: standard[name])
        for name in sorted(standard):
            if name != best and standard[name] > SLOWER * standard[best]:
                lines.append(
                    f"{name} takes {standard[name] / standard[best]:.1f} times as long as {best} "
                    "on a small layer: speedups count against the fastest one"
                )
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
