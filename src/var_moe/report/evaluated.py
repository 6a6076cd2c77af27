"""What ``var-moe evaluate`` measured: the unmodified model beside policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Section, Table, section
from var_moe.report.folder import Results
from var_moe.report.held_out import datasets_table
from var_moe.report.wording import between, change, factor, speedup, tiers


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
