"""How much a search's answer depends on its seed: spread of scores and settings, agreement."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.optimization.agreement import agreement
from var_moe.optimization.criteria import STABLE_WITHIN
from var_moe.optimization.results import jsonable
from var_moe.optimization.search_space import Dimension, dimensions
from var_moe.optimization.seed_runs import SeedRun
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, provenance

STABILITY_FILE = "stability.json"
ONE_WINNER = (
    "all seeds found one configuration: the best scores differ by what timing it makes of it, "
    "and by nothing else"
)


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean, standard deviation (n - 1), smallest and largest of some values."""

    mean: float
    deviation: float
    low: float
    high: float
    middle: float  # median

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least two values.

        Raises:
            UsageError: there are fewer.
        """
        if len(values) < 2:
            raise UsageError(f"{len(values)} value: a spread needs at least 2")
        return cls(
            mean=statistics.fmean(values),
            deviation=statistics.stdev(values),
            low=min(values),
            high=max(values),
            middle=statistics.median(values),
        )

    @property
    def relative(self) -> float:
        """(max - min) / median: what the documented criterion is about."""
        return (self.high - self.low) / self.middle

    def to_dict(self) -> dict[str, float]:
        """For result files; in the values' own unit."""
        return {
            "mean": self.mean,
            "standard_deviation": self.deviation,
            "min": self.low,
            "max": self.high,
        }


def parameter_spread(dimension: Dimension, values: Sequence[float]) -> dict[str, Any]:
    """Spread of a parameter: in its own unit, and as a share of the range that was searched.

    On a logarithmic scale the share is one of the range's logarithm.
    """
    low, high = dimension.low, dimension.high
    found = {
        "name": dimension.name,
        "values": list(values),
        **Spread.of(values).to_dict(),
        "searched_low": low,
        "searched_high": high,
        "logarithmic": dimension.log,
    }
    reach = Dimension(
        name=dimension.name,
        integer=False,
        low=min(values),
        high=max(values),
        default=min(values),
        log=dimension.log,
    )
    share = reach.span / dimension.span if dimension.span else 0.0
    return {**found, "spread_share_of_range": share}


def stability(
    runs: Sequence[SeedRun],
    *,
    profile: Path | None = None,
    differences: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The report on some runs, which `seed_runs.read_runs` has found to belong together.

    Args:
        runs: at least two.
        profile: profile folder, where none lies in the results folders.
        differences: paired differences of the winners' perplexities on common documents, where
            they were measured.
    """
    found = [run for run in runs if run.winner is not None]
    notes = []
    if len(found) < len(runs):
        lost = ", ".join(str(run.seed) for run in runs if run.winner is None)
        notes.append(f"nothing kept the bound with seed {lost}: left out of the spreads")
    score, parameters = None, []
    if len(found) > 1:
        score = Spread.of([run.best_score for run in found])
        parameters = [
            parameter_spread(one, [_setting(run, one.name) for run in found])
            for one in dimensions(found[0].known("space"))
            if isinstance(one, Dimension)
        ]
    if len(found) > 1 and all(run.winner == found[0].winner for run in found):
        notes.append(ONE_WINNER)
    stand_ins = {run.seed: run.compensation for run in found}
    if len(set(stand_ins.values())) > 1:
        named = ", ".join(f"{name} with seed {seed}" for seed, name in stand_ins.items())
        notes.append(f"the winners' compensations differ: {named}")
    compared, why = agreement(found, profile=profile)
    if why:
        notes.append(why)
    if len({run.known_documents for run in found}) > 1:
        notes.append("the winners were measured on different numbers of documents")
    return _report(runs, found, score, parameters, compared, differences, notes)


def _report(
    runs: Sequence[SeedRun],
    found: Sequence[SeedRun],
    score: Spread | None,
    parameters: Sequence[Mapping[str, Any]],
    compared: Mapping[str, Any] | None,
    differences: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    first = runs[0]
    stable = score is not None and len(found) == len(runs) and score.relative < STABLE_WITHIN
    report: dict[str, Any] = jsonable(
        {
            "schema_version": SCHEMA_VERSION,
            "seeds": [run.seed for run in runs],
            "search": {
                name: first.known(name)
                for name in (
                    *("model", "revision", "dtype", "dataset", "data_hash", "robust"),
                    *("max_degradation", "policy", "mode", "method", "n_calls"),
                )
            },
            "runs": [_row(run) for run in runs],
            "best_score": None
            if score is None
            else {**score.to_dict(), "spread_relative": score.relative},
            # Free of timings: the score's spread is partly that of the machine.
            "experts_per_token": _executed(found),
            "criterion": {
                "name": f"every seed keeps the bound, best scores within {100 * STABLE_WITHIN:g}%",
                "spread_relative_below": STABLE_WITHIN,
                "met": stable,
            },
            "parameters": list(parameters),
            "agreement": compared,
            "perplexity_differences": list(differences),
            "notes": list(notes),
            "provenance": provenance(),
        }
    )
    return report


def _executed(found: Sequence[SeedRun]) -> dict[str, float] | None:
    if len(found) < 2:
        return None
    spread = Spread.of([float(run.measured["experts_per_token"]) for run in found])
    return {**spread.to_dict(), "spread_relative": spread.relative}


def _row(run: SeedRun) -> dict[str, Any]:
    measured = run.measured
    row: dict[str, Any] = {"seed": run.seed, "folder": str(run.folder), "found": bool(measured)}
    if run.winner is None:
        return row
    names = (
        *("degradation", "degradation_standard_error", "degradation_upper_95", "documents"),
        *("worst_dataset", "worst_degradation", "worst_degradation_upper_95"),
        *("experts_per_token", "learned_pct", "speedup", "speedup_95"),
    )
    figures = {name: measured[name] for name in names if name in measured}
    return {**row, "best_score": run.best_score, "config": run.winner.to_dict(), **figures}


def _setting(run: SeedRun, name: str) -> float:
    assert run.winner is not None
    return float(run.winner.documented()[name])


def save_stability(folder: Path, report: Mapping[str, Any]) -> Path:
    """Write ``stability.json``; returns its path."""
    path = folder / STABILITY_FILE
    atomic_write_json(path, dict(report))
    return path
