"""Policies compared at equal experts per token.

The strength of each policy is turned until it runs the wanted number; there it is measured. An
earlier comparison can be measured again on other text with its settings unchanged, as a held-out
text must be.

A row is what ``comparison.json`` holds of one policy at one setting: ``policy``, ``dial`` (the
sweep that was turned; empty where the policy has one), ``compensation`` (None: the policy's own),
``target_experts_per_token``, ``settings``, the quality, and the speed (None until `timed`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Evaluator, Progress
from var_moe.routing.base import Sweep
from var_moe.routing.registry import PolicySpec, policy_spec
from var_moe.storage import read_json

CONTROL = "random_skip"
SHARES = (0.875, 0.75, 0.625)
"""Of K: experts per token at which policies are compared unless told otherwise."""
CLOSE = 0.01  # relative distance from the wanted experts per token at which turning stops
REACHED = 0.04  # relative distance above which a policy has no point there
_TURNS = 8

COMPARISON_FILE = "comparison.json"
_CHOICE = ("policy", "dial", "compensation", "target_experts_per_token", "settings")

Row = dict[str, Any]


def check_targets(targets: Sequence[float] | None, top_k: int) -> tuple[float, ...]:
    """Experts per token to compare at, most first; by default `SHARES` of K.

    Raises:
        UsageError: a target is not between 1 and K.
    """
    chosen = targets or [max(1.0, share * top_k) for share in SHARES]
    for target in chosen:
        check_number("experts", target, low=1, high=top_k)
    return tuple(sorted(set(chosen), reverse=True))


def sweep(
    evaluator: Evaluator,
    turning: Evaluator,
    names: Sequence[str],
    calibration: Mapping[str, Any],
    *,
    targets: Sequence[float],
    compensation: str | None = None,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Score each policy where it runs the wanted experts per token; `timed` adds the speed.

    Args:
        evaluator: the text that is judged on.
        turning: the same model on a small part of the text, to find settings.
        names: of the registry.
        calibration: what policies may ask for, by the names of `registry.CALIBRATION`.
        targets: experts per token.
        compensation: name of the one in the calibration, for the rows.
        progress: called with what is done, rows done and in all.

    Yields:
        Rows, policy by policy; none for a target that a policy can't reach.

    Raises:
        UsageError: a policy is unknown, or asks for what the calibration lacks.
    """
    ways = [
        (spec, dial, turn)
        for spec in map(policy_spec, names)
        for dial, turn in spec.sweeps(evaluator.top_k).items()
    ]
    done, total = 0, len(ways) * len(targets)
    for spec, dial, turn in ways:
        seen: dict[float, float] = {}
        for target in targets:
            if progress:
                progress(f"{spec.name} {dial}".strip(), done, total)
            done += 1
            strength = _turned(turning, spec, turn, calibration, target, seen)
            if abs(seen[strength] / target - 1) <= REACHED:
                choice = (spec.name, dial, compensation, target, turn(strength))
                yield _scored(evaluator, dict(zip(_CHOICE, choice, strict=True)), calibration)
    if progress:
        progress("policies", total, total)


def _scored(evaluator: Evaluator, choice: Row, calibration: Mapping[str, Any]) -> Row:
    quality = evaluator.quality(policy_spec(choice["policy"]).make(choice["settings"], calibration))
    name, dial, compensation = (choice[key] for key in ("policy", "dial", "compensation"))
    name += f" ({dial})" if dial else ""
    name += f" + {compensation}" if compensation is not None else ""
    return {"name": name, **choice, **quality.to_dict(), "speedup": None, "speedup_95": None}


def timed(evaluator: Evaluator, row: Row, calibration: Mapping[str, Any], *, blocks: int) -> Row:
    """A row of `sweep` with its speed; ``calibration`` is what it was made with."""
    made = policy_spec(row["policy"]).make(row["settings"], calibration)
    return {**row, **evaluator.speed(made, blocks=blocks, factors=False).to_dict()}


def _turned(
    evaluator: Evaluator,
    spec: PolicySpec,
    turn: Sweep,
    calibration: Mapping[str, Any],
    target: float,
    seen: dict[float, float],
) -> float:
    """The strength that comes nearest to the target, by bisection from those in ``seen``."""

    def run(strength: float) -> None:
        if strength not in seen:
            policy = spec.make(turn(strength), calibration)
            seen[strength] = evaluator.quality(policy).report.experts_per_token

    def nearest() -> float:
        return min(seen, key=lambda strength: abs(seen[strength] - target))

    run(0.0)
    run(1.0)
    for _ in range(_TURNS):
        above = max((s for s in seen if seen[s] >= target), default=None)
        below = min((s for s in seen if seen[s] < target), default=None)
        if above is None or below is None or abs(seen[nearest()] / target - 1) <= CLOSE:
            break
        run((above + below) / 2)
    return nearest()


def control_at(rows: Sequence[Row], experts_per_token: float, top_k: int) -> float | None:
    """Degradation of random skipping at this many experts per token, between rows by a line.

    None outside the measured range.
    """
    known = [
        (row["experts_per_token"], row["degradation"]) for row in rows if row["policy"] == CONTROL
    ]
    counts, costs = zip(*sorted([(float(top_k), 0.0), *known]), strict=True)
    if not counts[0] <= experts_per_token <= counts[-1]:
        return None
    return float(np.interp(experts_per_token, counts, costs))


def check_made(names: Sequence[str], calibration: Mapping[str, Any], *, top_k: int) -> None:
    """Refuse a policy that can't be made with this calibration, before anything is measured.

    Raises:
        UsageError: says what it lacks.
    """
    for spec in map(policy_spec, names):
        for turn in spec.sweeps(top_k).values():
            spec.make(turn(0.0), calibration)


def require_policies(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each a known policy with a sweep.

    Raises:
        UsageError: an unknown policy, or one without a sweep.
    """
    for name in names:
        if not policy_spec(name).sweeps(2):
            raise UsageError(f"policy {name!r} has no strength to vary: leave it out of --policies")
    return tuple(dict.fromkeys(names))


def earlier_comparison(folder: Path) -> dict[str, Any]:
    """What `compare` saved in a folder.

    Raises:
        UsageError: there is none, or its rows lack what measuring again needs.
    """
    path = folder / COMPARISON_FILE
    if not path.is_file():
        raise UsageError(
            f"{folder}: no {COMPARISON_FILE} there; expected the --output of `var-moe compare`"
        )
    earlier: dict[str, Any] = read_json(path)
    rows = earlier.get("rows")
    if not rows or any(name not in row for row in rows for name in _CHOICE):
        raise UsageError(
            f"{path}: its rows lack one of {', '.join(_CHOICE)}; make it again with "
            "`var-moe compare`"
        )
    return earlier


def measure_again(
    evaluator: Evaluator,
    rows: Sequence[Row],
    calibration: Callable[[str | None], Mapping[str, Any]],
    *,
    progress: Progress | None = None,
) -> Iterator[Row]:
    """Score the rows of an earlier ``comparison.json``, each with its own settings.

    ``calibration`` gives what policies may ask for, by the name of a compensation.
    """
    for done, row in enumerate(rows):
        if progress:
            progress(str(row.get("name", row["policy"])), done, len(rows))
        choice = {key: row[key] for key in _CHOICE}
        yield _scored(evaluator, choice, calibration(row["compensation"]))
    if progress:
        progress("policies", len(rows), len(rows))
