"""Tables and files from finished runs, without the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.tuners.plot import html_plot, svg_plot
from benchmarks.tuners.setting import LABELS, SETUP_FILE

from var_moe.errors import UsageError
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    atomic_write_text,
    read_json,
)

UNMODIFIED = 1.0
"""Score of the unmodified model: what a search without a feasible point has so far."""

Run = Mapping[str, Any]


def read_runs(folder: Path) -> list[Run]:
    """All finished runs, seed by seed, in the order of `LABELS`."""
    runs = [read_json(path, what="run") for path in sorted(folder.glob("runs/seed-*/*.json"))]
    names = list(LABELS)
    return sorted(runs, key=lambda run: (run["seed"], names.index(run["method"])))


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Per method: quartiles over seeds, shares of feasible runs, and the curve of best scores."""
    found: dict[str, Any] = {}
    for method in LABELS:
        own = [run for run in runs if run["method"] == method]
        if not own:
            continue
        curves = [_filled(run["best_score"]) for run in own]
        length = min(len(curve) for curve in curves)
        stacked = np.array([curve[:length] for curve in curves])
        found[method] = {
            "label": LABELS[method],
            "seeds": [run["seed"] for run in own],
            "evaluations": quartiles(run["evaluations"] for run in own),
            "search_score": quartiles(curve[-1] for curve in curves),
            "ordering_score": quartiles(run["ordering"]["score"] for run in own),
            "test_score": quartiles(run["test"]["score"] for run in own),
            "ordering_speedup": quartiles(run["ordering"]["speedup"] for run in own),
            "test_speedup": quartiles(run["test"]["speedup"] for run in own),
            "test_degradation": quartiles(run["test"]["degradation"] for run in own),
            "passed_ordering": share(run["passed_ordering"] for run in own),
            "feasible_on_test": share(
                run["passed_ordering"] and run["test"]["feasible"] for run in own
            ),
            "feasible_on_test_point": share(
                run["passed_ordering"] and run["test"]["feasible_point"] for run in own
            ),
            **{name: quartiles(run["seconds"][name] for run in own) for name in own[0]["seconds"]},
            "best_score_after": {
                "low": np.quantile(stacked, 0.25, axis=0).tolist(),
                "median": np.median(stacked, axis=0).tolist(),
                "high": np.quantile(stacked, 0.75, axis=0).tolist(),
            },
        }
    return found


def quartiles(values: Any) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(np.fromiter(values, dtype=float), (0.25, 0.5, 0.75)).tolist()
    return {"low": low, "median": median, "high": high}


def share(values: Any) -> float:
    """Share of true values."""
    return float(np.mean([bool(value) for value in values]))


def paired(runs: Sequence[Run], method: str, other: str) -> dict[str, Any] | None:
    """``method`` against ``other`` on the seeds that both have finished."""
    by_seed: dict[int, dict[str, Run]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], {})[run["method"]] = run
    pairs = [(one[method], one[other]) for one in by_seed.values() if {method, other} <= set(one)]
    if not pairs:
        return None
    found: dict[str, Any] = {"method": method, "other": other, "seeds": len(pairs)}
    for text in ("ordering", "test"):
        difference = [a[text]["score"] - b[text]["score"] for a, b in pairs]
        found[f"{text}_score_difference"] = quartiles(difference)
        found[f"{text}_no_worse"] = share(value >= 0 for value in difference)
    return found


def table(methods: Mapping[str, Any]) -> str:
    """The summary as a Markdown table."""
    head = (
        "method", "seeds", "evaluations", "score, ordering", "score, test", "speedup, test",
        "passed ordering", "feasible on test: bound", "point", "seconds", "of them suggesting",
    )  # fmt: skip
    rows = [head, ("---",) * len(head)]
    for one in methods.values():
        rows.append(
            (
                one["label"],
                str(len(one["seeds"])),
                f"{one['evaluations']['median']:.0f}",
                _span(one["ordering_score"], 3),
                _span(one["test_score"], 3),
                _span(one["test_speedup"], 3),
                f"{one['passed_ordering']:.0%}",
                f"{one['feasible_on_test']:.0%}",
                f"{one['feasible_on_test_point']:.0%}",
                _span(one["total_s"], 0),
                _span(one["suggestions_s"], 1),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_summary(folder: Path) -> str:
    """Write ``results.json``, ``table.md`` and the plots of the runs so far; the text to show.

    Raises:
        UsageError: there is no finished run.
    """
    runs = read_runs(folder)
    if not runs:
        raise UsageError(f"{folder}: no finished run; start the comparison without --summary_only")
    setup = read_json(folder / SETUP_FILE, what="setup of a comparison")
    methods = summarise(runs)
    against = [paired(runs, "replay", other) for other in LABELS if other != "replay"]
    against = [one for one in against if one]
    text = "\n".join([table(methods), "", *_sentences(against), "", _caption(setup)])
    atomic_write_json(
        folder / "results.json",
        {
            "schema_version": SCHEMA_VERSION,
            "setup": setup,
            "methods": methods,
            "replay_against": against,
            "runs": runs,
        },
    )
    atomic_write_text(folder / "table.md", text + "\n")
    curves = {one["label"]: one["best_score_after"] for one in methods.values()}
    atomic_write_text(folder / "best_score.svg", svg_plot(curves))
    html_plot(curves, folder / "best_score.html")
    return text


def _filled(curve: Sequence[float | None]) -> list[float]:
    return [UNMODIFIED if value is None else value for value in curve]


def _span(values: Mapping[str, float], digits: int) -> str:
    low, median, high = (f"{values[name]:.{digits}f}" for name in ("low", "median", "high"))
    return f"{median} [{low}, {high}]"


def _sentences(against: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"- replay - {LABELS[one['other']]}, same seed ({one['seeds']}): ordering "
        f"{_span(one['ordering_score_difference'], 4)}, no worse in {one['ordering_no_worse']:.0%};"
        f" test {_span(one['test_score_difference'], 4)}, no worse in {one['test_no_worse']:.0%}"
        for one in against
    ]


def _caption(setup: Mapping[str, Any]) -> str:
    identity = setup["identity"]
    tokens = identity["tokens"]
    return (
        f"Median [quartiles] over seeds. Each evaluation scores {identity['documents']} documents "
        f"({tokens['search']:,} tokens) of the search half of validation; the final configuration "
        f"is chosen on {identity['ordering_documents']} documents ({tokens['ordering']:,} tokens) "
        f"of the ordering half by its upper bound, and measured on {identity['test_documents']} "
        f"documents ({tokens['test']:,} tokens) of test. Speedups are the cost model's, from "
        f"executed pairs. Seconds of replay include its trace ({setup['trace_s']:.0f} s) and the "
        f"cost model ({setup['cost_model_s']:.0f} s); {identity['threads']} thread(s). A run "
        "counts as feasible on test only if it passed the ordering text."
    )
