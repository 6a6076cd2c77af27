"""What ``tune --validate``, ``tune --seeds``, ``evaluate`` and ``guard`` measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Facts, Notes, Section, Table, section
from var_moe.report.folder import Results
from var_moe.report.theme import between, change, factor, percent, settings, speedup, tiers

_MET = {True: "yes", False: "no", None: "-"}


def held_out_section(results: Results) -> Section:
    """The configuration on text that nothing was chosen on."""
    validation = results["validation"]
    text = validation["text"]
    kind = "text that was seen" if validation.get("seen") else "held-out text"
    criteria: dict[str, Any] = {
        "criterion": "{name}",
        "measured": "{measured}",
        "met": lambda row: _MET[row["met"]],
    }
    figures = {
        "perplexity": f"{validation['perplexity']:.3f}",
        "change (95% upper bound)": change(validation),
        "random skipping at as many experts, the control": percent(
            validation["random_skip"]["degradation"]
        ),
        "experts per token": f"{validation['experts_per_token']:.3f} of {validation['top_k']}",
        f"speedup against {validation['baseline_backend']} [95%]": speedup(validation),
        "of which our path keeping all pairs": _ratio(validation["backend_factor"]),
        "of which skipping": _ratio(validation["skipping_factor"]),
        "predicted from executed pairs": factor(validation["predicted_speedup"]),
        "single runs": ", ".join(factor(run["speedup"]) for run in validation["runs"]),
        "baseline against itself, the noise": _ratio(validation["noise_floor"]),
    }
    return section(
        "held-out",
        f"On {kind} ({text['split']})",
        Facts("Measured", figures),
        Table.of("Success criteria", validation["criteria"], criteria, words=2),
        datasets_table(validation.get("by_dataset")),
        Notes("", validation["notes"]),
        intro=f"{text['dataset']}, {text['split']}: {validation['documents']:,} documents, "
        f"perplexity {validation['baseline_perplexity']:.3f} of the unmodified model.",
    )


def _ratio(value: Mapping[str, float]) -> str:
    return f"{factor(value['median'])} {between((value['low'], value['high']))}"


def datasets_table(rows: Any, *, title: str = "Each data set by itself") -> Table | None:
    """One row per data set, from ``evaluation.evaluator.measure_by_dataset``."""
    return Table.of(
        title,
        rows or (),
        {
            "data set": "{dataset}",
            "documents": "{documents:,}",
            "perplexity before": "{baseline_perplexity:.3f}",
            "after": "{perplexity:.3f}",
            "change (95% upper)": change,
            "experts per token": "{experts_per_token:.3f}",
        },
    )


def seeds_section(results: Results) -> Section:
    """The winners of several seeds, one row each."""
    runs = results["stability"]["runs"]

    def known(one: Any, otherwise: str = "") -> Any:
        return lambda run: one(run) if run["found"] else otherwise

    columns = {
        "seed": "{seed}",
        "change (95% upper)": known(change, "nothing kept the bound"),
        "speedup [95%]": known(speedup),
        "experts per token": known("{experts_per_token:.3f}".format_map),
        "winner": known(lambda run: settings(run["config"])),
    }
    return section("seeds", f"{len(runs)} seeds", Table.of("Winners", runs, columns))


def evaluation_section(results: Results) -> Section:
    """Policies beside the unmodified model."""
    evaluation = results["evaluation"]
    text, (baseline, *others) = evaluation["text"], evaluation["rows"]

    def other(one: Any, of_baseline: str = "") -> Any:
        return lambda row: of_baseline if row is baseline else one(row)

    columns = {
        "": other("{name}".format_map, f"unmodified ({baseline['backend']})"),
        "perplexity": "{perplexity:.3f}",
        "change (95% upper)": other(change),
        "tokens/s": lambda r: f"{r['throughput_tps']:,.0f}" if r.get("throughput_tps") else "",
        "speedup [95%]": other(speedup, "1"),
        "experts per token": "{experts_per_token:.3f}",
        "fast / cached / learned, %": other(tiers),
    }
    generation: dict[str, Any] = {
        "": "{name}",
        "batch": "{batch_size}",
        "new tokens": "{new_tokens}",
        "tokens/s": "{throughput_tps:,.0f}",
        "speedup [95%]": speedup,
        "against": "{baseline_backend}",
    }
    decoded = [{"name": r["name"], **one} for r in others for one in r.get("decode") or ()]
    return section(
        "evaluation",
        "Beside the unmodified model",
        Table.of("Measured on the same tokens", evaluation["rows"], columns),
        *(
            datasets_table(row.get("by_dataset"), title=f"{row['name']}, each data set")
            for row in others
        ),
        Table.of("Generation, greedy, with a KV cache", decoded, generation),
        intro=f"{evaluation['model']['name']} on {text['dataset']} ({text['split']}), "
        f"{evaluation['documents']:,} documents.",
    )


def guard_section(results: Results) -> Section:
    """The data sets that were played to the guard."""
    columns: dict[str, Any] = {
        "text": "{text}",
        "documents": "{documents:,}",
        "alarm": lambda row: (
            "no" if row["alarm_at"] is None else "after {alarm_at:,}".format_map(row)
        ),
    }
    return section(
        "guard", "The guard", Table.of("On other text", results["guard"]["checks"], columns)
    )
