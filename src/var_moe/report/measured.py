"""What ``tune --validate``, ``tune --seeds``, ``evaluate`` and ``guard`` measured, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Notes, Section, Table, section
from var_moe.report.folder import Results
from var_moe.report.wording import between, change, factor, percent, settings, speedup, tiers

_MET = {True: "yes", False: "no", None: "-"}


def held_out_section(results: Results) -> Section | None:
    """The configuration on text that nothing was chosen on."""
    found = results.get("validation")
    if found is None:
        return None
    text = found["text"]
    return section(
        "held-out",
        f"On {'text that was seen' if found.get('seen') else 'held-out text'} ({text['split']})",
        [
            _figures(found),
            Table(
                title="Success criteria",
                headings=("criterion", "measured", "met"),
                words=2,
                rows=[
                    (row["name"], row["measured"], _MET[row["met"]]) for row in found["criteria"]
                ],
            ),
            datasets_table(found.get("by_dataset") or ()),
            Notes(lines=found["notes"]) if found["notes"] else None,
        ],
        intro=f"{text['dataset']}, {text['split']}: {found['documents']:,} documents, perplexity "
        f"{found['baseline_perplexity']:.3f} of the unmodified model.",
    )


def _figures(found: Mapping[str, Any]) -> Table:
    control, noise = found["random_skip"], found["noise_floor"]
    back, skip = found["backend_factor"], found["skipping_factor"]
    rows = [
        ("perplexity", f"{found['perplexity']:.3f}"),
        ("change (95% upper bound)", change(found)),
        ("random skipping at as many experts, the control", percent(control["degradation"])),
        ("experts per token", f"{found['experts_per_token']:.3f} of {found['top_k']}"),
        (f"speedup against {found['baseline_backend']} [95%]", speedup(found)),
        ("  of which our path keeping all pairs", _ratio(back)),
        ("  of which skipping", _ratio(skip)),
        ("predicted from executed pairs", factor(found["predicted_speedup"])),
        ("single runs", ", ".join(factor(run["speedup"]) for run in found["runs"])),
        ("baseline against itself, the noise", _ratio(noise)),
    ]
    return Table(title="Measured", headings=("", ""), rows=rows)


def _ratio(value: Mapping[str, float]) -> str:
    return f"{factor(value['median'])} {between((value['low'], value['high']))}"


def datasets_table(rows: Any, *, title: str = "Each data set by itself") -> Table | None:
    """One row per data set, from what ``evaluation.evaluator.Apart.to_dict`` gives."""
    if not rows:
        return None
    return Table(
        title=title,
        headings=(
            *("data set", "documents", "perplexity before", "after", "change (95% upper)"),
            "experts per token",
        ),
        rows=[
            (
                row["dataset"],
                f"{row['documents']:,}",
                f"{row['baseline_perplexity']:.3f}",
                f"{row['perplexity']:.3f}",
                change(row),
                f"{row['experts_per_token']:.3f}",
            )
            for row in rows
        ],
    )


def seeds_section(results: Results) -> Section | None:
    """The winners of several seeds, one row each."""
    found = results.get("stability")
    if found is None:
        return None
    rows = [
        (
            str(run["seed"]),
            change(run),
            speedup(run),
            f"{run['experts_per_token']:.3f}",
            settings(run["config"]),
        )
        if run["found"]
        else (str(run["seed"]), "nothing kept the bound", "", "", "")
        for run in found["runs"]
    ]
    headings = ("seed", "change (95% upper)", "speedup [95%]", "experts per token", "winner")
    table = Table(title="Winners", headings=headings, rows=rows)
    return section("seeds", f"{len(rows)} seeds", [table])


def evaluation_section(results: Results) -> Section | None:
    """Policies beside the unmodified model."""
    found = results.get("evaluation")
    if found is None:
        return None
    text = found["text"]
    own = [row for row in found["rows"] if row["name"] != "baseline"]
    return section(
        "evaluation",
        "Beside the unmodified model",
        [
            Table(
                title="Measured on the same tokens",
                headings=(
                    *("", "perplexity", "change (95% upper)", "tokens/s", "speedup [95%]"),
                    *("experts per token", "fast / cached / learned, %"),
                ),
                rows=[_row(row) for row in found["rows"]],
            ),
            *(
                datasets_table(row.get("by_dataset"), title=f"{row['name']}, each data set")
                for row in own
            ),
            _generation(found),
        ],
        intro=f"{found['model']['name']} on {text['dataset']} ({text['split']}), "
        f"{found['documents']:,} documents.",
    )


def _row(row: Mapping[str, Any]) -> tuple[str, ...]:
    name, perplexity = row["name"], f"{row['perplexity']:.3f}"
    speed = "" if row.get("throughput_tps") is None else f"{row['throughput_tps']:,.0f}"
    experts = f"{row['experts_per_token']:.3f}"
    if name == "baseline":
        return (f"unmodified ({row['backend']})", perplexity, "", speed, "1", experts, "")
    return (name, perplexity, change(row), speed, speedup(row), experts, tiers(row))


def _generation(found: Mapping[str, Any]) -> Table | None:
    rows = [
        (
            row["name"],
            str(one["batch_size"]),
            str(one["new_tokens"]),
            f"{one['throughput_tps']:,.0f}",
            f"{factor(one['speedup'])} {between(one['speedup_95'])}",
            one["baseline_backend"],
        )
        for row in found["rows"]
        for one in row.get("decode") or ()
    ]
    if not rows:
        return None
    headings = ("", "batch", "new tokens", "tokens/s", "speedup [95%]", "against")
    return Table(title="Generation, greedy, with a KV cache", headings=headings, rows=rows)


def guard_section(results: Results) -> Section | None:
    """The data sets that were played to the guard."""
    found = results.get("guard")
    if found is None:
        return None
    rows = [
        (
            row["text"],
            f"{row['documents']:,}",
            "no" if row["alarm_at"] is None else f"after {row['alarm_at']:,}",
        )
        for row in found["checks"]
    ]
    return section(
        "guard",
        "The guard",
        [Table(title="Played to it", headings=("text", "documents", "alarm"), rows=rows)],
    )
