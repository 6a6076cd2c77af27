"""The result files of a search."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_moe.optimization.progress import duration
from var_moe.optimization.results import OptimizationResult, jsonable
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    atomic_write_text,
    check_output_folder,
    provenance,
)

CONFIG_FILE = "best_config.json"
RESULTS_FILE = "optimization_results.json"
METADATA_FILE = "optimization_metadata.json"
SUMMARY_FILE = "optimization_summary.txt"
NEAREST_MISS_FILE = "nearest_miss.json"
UNFINISHED = "unfinished"
"""In a result's `extra`: why its best was not measured again, so that there is none to save."""


def save_optimization_results(
    result: OptimizationResult,
    dir: str | Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    summary: str | None = None,
) -> None:
    """Write a search's files into the folder `dir`, each whole or not at all.

    ``best_config.json``, ``optimization_results.json``, ``optimization_metadata.json`` and
    ``optimization_summary.txt``. Where nothing was feasible, ``nearest_miss.json`` takes the
    place of ``best_config.json``; where every evaluation failed there is neither. One that an
    earlier search left is removed. What
    JSON has no word for (NaN) is written as null.

    Args:
        result: the search.
        dir: folder, created if needed.
        metadata: further entries of the metadata, over those that are always there.
        summary: text of the summary; a short one by default.

    Raises:
        UsageError: `dir` is a file or cannot be written.
    """
    folder = check_output_folder(dir)
    origin = provenance()
    best = result.best_params
    config = jsonable(best) if isinstance(best, dict) else best.to_dict()
    failed = bool(result.evaluations) and all(one.failed for one in result.evaluations)
    found = not failed and not {"nearest_miss", UNFINISHED} & set(result.extra)
    atomic_write_json(
        folder / RESULTS_FILE,
        {
            "schema_version": SCHEMA_VERSION,
            "best_score": jsonable(result.best_score),
            "best_params": config if found else None,
            "optimization_time": jsonable(result.optimization_time),
            "num_evaluations": result.num_evaluations,
            "converged": result.converged,
            "method": result.method,
            "seed": result.seed,
            "all_results": result.all_results,
            "provenance": origin,
        },
    )
    atomic_write_json(
        folder / METADATA_FILE,
        jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "method": result.method,
                "seed": result.seed,
                "max_degradation": result.max_degradation,
                "search": result.extra,
                "provenance": origin,
                **(metadata or {}),
            }
        ),
    )
    atomic_write_text(folder / SUMMARY_FILE, summary or default_summary(result))
    if found:
        (folder / NEAREST_MISS_FILE).unlink(missing_ok=True)
        atomic_write_json(folder / CONFIG_FILE, config)
    else:
        (folder / CONFIG_FILE).unlink(missing_ok=True)
        (folder / NEAREST_MISS_FILE).unlink(missing_ok=True)
        if "nearest_miss" in result.extra:
            atomic_write_json(folder / NEAREST_MISS_FILE, jsonable(result.extra["nearest_miss"]))


def default_summary(result: OptimizationResult) -> str:
    """A few lines for people about a search of any objective."""
    best = result.best_params
    params = best if isinstance(best, dict) else best.documented()
    failed = sum(e.failed for e in result.evaluations)
    lines = [
        f"{result.method} search, seed {result.seed}",
        f"{result.num_evaluations} evaluations ({failed} failed) in "
        f"{duration(result.optimization_time)}",
        f"best score: {result.best_score:.6g}",
        f"converged: {'yes' if result.converged else 'no'}",
    ]
    if UNFINISHED in result.extra:
        lines.append(f"Not finished, so no best_config.json: {result.extra[UNFINISHED]}")
    elif failed and failed == len(result.evaluations):
        lines.append("Every evaluation failed; no best_config.json")
    elif "nearest_miss" not in result.extra:
        lines += ["best parameters:", *(f"  {name} = {value}" for name, value in params.items())]
    else:
        degradation = 100 * result.extra["nearest_miss"]["degradation"]
        lines.append(
            "All configurations violate the constraint; no best_config.json. Smallest "
            f"degradation: {degradation:.2f}% ({NEAREST_MISS_FILE})"
        )
    return "\n".join(lines) + "\n"
