"""``var-moe doctor``: what is installed, what this machine is, what is slow and why."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.cli.output import CommandResult, table
from var_moe.extras import OPTIONAL
from var_moe.storage import SCHEMA_VERSION, provenance, version_of

if TYPE_CHECKING:
    from torch import Tensor

HUB_SECONDS = 2.0
HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 128, 512, 8, 2, 256
"""Sizes of the layer that is timed."""
SLOWER = 1.2  # what is called slower: above the noise of a layer that takes milliseconds
DEMO_MIB = 2048  # memory that the demo needs
NEEDED = (
    *("torch", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub"),
    *("datasets", "numpy", "scipy", "pandas", "pyarrow", "optuna", "rich", "cyclopts"),
    *("PyYAML", "jinja2"),
)
"""What var_moe does not work without, by names for pip."""


def doctor() -> CommandResult:
    """Say what is installed, which device and backends there are, and what is slow and why.

    The exit code is 1 where something is missing that var_moe does not work without.
    """
    print("looking at packages, device and backends ...", file=sys.stderr, flush=True)
    found = diagnose()
    _print(found)
    return CommandResult(found, code=1 if found["missing"] else 0)


def _print(found: Mapping[str, Any]) -> None:
    from var_moe.terminal import show

    columns = {"package": "{name}", "version": "{version}", "for": "{why}", "install": "{install}"}
    rows = [{name: value or "-" for name, value in row.items()} for row in found["packages"]]
    show(table("Installed", columns, rows))
    if found["backends"]:
        title = (
            f"Experts backends on one layer ({TOKENS:,} tokens, {TOP_K} of {EXPERTS} experts, "
            f"{HIDDEN} x {INTERMEDIATE})"
        )
        backends = sorted(found["backends"], key=lambda row: row["latency_ms"] or float("inf"))
        rows = [{**row, "why_not": row["why_not"] or ""} for row in backends]
        show(table(title, {"backend": "{name}", "ms": "{latency_ms:.2f}", "": "{why_not}"}, rows))
    here, hub, missing = found["machine"], found["hub"], ", ".join(found["missing"])
    if here:
        print(
            f"Device: {', '.join(here['devices']) or 'cpu'}; {here['cores']} cores, torch uses "
            f"{here['torch_threads']} threads; memory: {here['memory_mib']:,.0f} MiB"
        )
        print(f"Experts kernel for the CPU: {here['fused_kernel']}")
    if hub:
        print(f"Hub: {hub['state']}")
        print(f"Cache: {hub['cache']} ({hub['cached_models']} models)")
    show(*(f"Slow: {line}" for line in found["slow"]))
    print(f"Missing: {missing}" if missing else "Nothing that is needed is missing.")


def diagnose() -> dict[str, Any]:
    """The result of ``var-moe doctor --json``.

    ``missing`` names what var_moe does not work without, ``slow`` says what costs time here, each
    in one line. With torch or transformers missing nothing is timed.
    """
    libraries = packages()
    missing = [row["name"] for row in libraries if row["needed"] and not row["version"]]
    usable = not {"torch", "transformers"} & set(missing)
    found: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "python": platform.python_version(),
        "packages": libraries,
        "missing": missing,
        "hub": hub_state() if "huggingface_hub" not in missing else None,
        "machine": machine() if usable else None,
        "backends": backends() if usable else [],
        "dtypes": dtypes() if usable else [],
        "provenance": provenance(),
    }
    return {**found, "slow": slow_things(found)}


def packages() -> list[dict[str, Any]]:
    """The libraries that var_moe uses, each with its version or the command that installs it."""
    rows = [(name, "", True, f"pip install {name}") for name in NEEDED]
    rows += [(one.package, one.purpose, False, one.install) for one in OPTIONAL.values()]
    found = []
    for name, why, needed, install in rows:
        version = version_of(name)
        row = {"name": name, "version": version, "needed": needed, "why": why}
        found.append({**row, "install": None if version else install})
    return found


def machine() -> dict[str, Any]:
    """Devices, threads and memory."""
    import torch

    from var_moe.execution.backends.fused import instructions
    from var_moe.memory import memory_limit

    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cores": len(affinity(0)) if affinity else os.cpu_count() or 1,
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_mib": memory_limit() / 2**20,
        "fused_kernel": instructions(),
    }


def hub_state() -> dict[str, Any]:
    """Whether the Hub answers, and where what was fetched from it lies."""
    from huggingface_hub import constants

    from var_moe import hub

    silent = hub.offline()
    reachable = not silent and hub.answers(HUB_SECONDS)
    why = "offline mode (HF_HUB_OFFLINE is set)" if silent else f"no answer in {HUB_SECONDS:g} s"
    alone = f"{why}: only what is in the cache can be loaded"
    cache = Path(constants.HF_HUB_CACHE)
    return {
        "offline": silent,
        "reachable": reachable,
        "state": f"{constants.ENDPOINT} answers" if reachable else alone,
        "cache": str(cache),
        "cached_models": len(list(cache.glob("models--*"))),
    }


def backends() -> list[dict[str, Any]]:
    """Each experts backend on one small layer: its time, or why it does not run here."""
    import torch
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    from var_moe.execution.backends import IMPLEMENTATION, OWN, open_backend
    from var_moe.execution.backends.fused import can_run
    from var_moe.execution.backends.packed import has_kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = module, hidden, _, _ = _layer(device)
    original = type(module).forward.__wrapped__
    names = ["eager", *(name for name in ALL_EXPERTS_FUNCTIONS if name != IMPLEMENTATION)]
    cannot = {"packed": not has_kernels(hidden.dtype), "fused": not can_run(hidden.dtype)}
    own = [name for name in OWN if not (cannot.get(name) or (name in cannot and device != "cpu"))]
    functions = {name: ALL_EXPERTS_FUNCTIONS.get_interface(name, original) for name in names}
    functions |= {f"var_moe {name}": open_backend(name).run for name in own}
    return [_timed(name, partial(run, *layer)) for name, run in functions.items()]


def dtypes() -> list[dict[str, Any]]:
    """A matrix product in each dtype."""
    import torch

    one = torch.ones((TOKENS, INTERMEDIATE), device="cuda" if torch.cuda.is_available() else "cpu")
    factors = {name: one.to(getattr(torch, name)) for name in ("float32", "bfloat16", "float16")}
    return [_timed(name, partial(torch.mm, it, it.t())) for name, it in factors.items()]


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


def _timed(name: str, run: Callable[[], Any]) -> dict[str, Any]:
    """Median time after a warm-up, or why it does not run."""
    import torch
    from torch.utils.benchmark import Timer

    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    try:
        with torch.inference_mode():
            median = timer.blocked_autorange(min_run_time=0.1).median
    except Exception as error:  # whatever a backend's own kernels raise
        why_not = " ".join(str(error).split())[:120] or type(error).__name__
        return {"name": name, "usable": False, "why_not": why_not, "latency_ms": None}
    return {"name": name, "usable": True, "why_not": None, "latency_ms": 1000 * median}


def slow_things(found: Mapping[str, Any]) -> list[str]:
    """What costs time on this machine, and what to do about it, a line each."""
    here = found["machine"]
    if here is None:
        return []
    lines, cores = [], here["cores"]
    if not here["devices"] and here["torch_threads"] < cores:
        why = f" (OMP_NUM_THREADS={here['omp_num_threads']})" if here["omp_num_threads"] else ""
        lines.append(
            f"torch uses {here['torch_threads']} of {cores} cores{why}: set OMP_NUM_THREADS={cores}"
        )
    for what, of, advice in (
        ("dtypes", "in a matrix product here", "--dtype float32"),
        ("backends", "on a small layer", "speedups count against the fastest one"),
    ):
        took = {row["name"]: row["latency_ms"] for row in found[what] if row["usable"]}
        took = {name: ms for name, ms in took.items() if not name.startswith("var_moe")}
        best = "float32" if what == "dtypes" else min(took, key=lambda name: took[name], default="")
        lines += [
            f"{name} takes {ms / took[best]:.1f} times as long as {best} {of}: {advice}"
            for name, ms in took.items()
            if ms > SLOWER * took[best]
        ]
    if 0 < here["memory_mib"] < DEMO_MIB:
        lines.append(f"{here['memory_mib']:,.0f} MiB of memory: the demo needs about {DEMO_MIB:,}")
    return lines
