"""``var-moe doctor``: what is installed, what this machine is, what is slow and why."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from var_moe.cli.output import Answer, table


def doctor() -> Answer:
    """Say what is installed, which device and backends there are, and what is slow and why.

    The exit code is 1 where something is missing that var_moe does not work without.
    """
    print("looking at packages, device and backends ...", file=sys.stderr, flush=True)
    from var_moe.cli.diagnosis import diagnose

    found = diagnose()
    _print(found)
    return Answer(found, code=1 if found["missing"] else 0)


def _print(found: Mapping[str, Any]) -> None:
    from var_moe.cli.diagnosis import EXPERTS, HIDDEN, INTERMEDIATE, TOKENS, TOP_K
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
