"""``var-moe tune --from``: another bound, answered from the front of a finished search."""

from __future__ import annotations

from pathlib import Path

from var_moe.cli.output import Answer
from var_moe.errors import UsageError


def answer(folder: Path, max_degradation: float | None, output: Path | None) -> Answer:
    """Another bound, answered from the front of a finished search."""
    from var_moe.cli.report import make_report
    from var_moe.cli.tables import front_answer, print_front
    from var_moe.optimization.results import CONFIG_FILE, METADATA_FILE
    from var_moe.optimization.selection import PARETO_FILE, answer_from
    from var_moe.storage import (
        SCHEMA_VERSION,
        atomic_write_json,
        check_output_folder,
        entries_of,
        provenance,
        read_json,
    )
    from var_moe.terminal import show, show_next

    if max_degradation is None:
        raise UsageError("--from needs --max_degradation: the bound to answer")
    best, points = answer_from(folder, max_degradation)
    place = output or folder / f"bound_{100 * max_degradation:g}pct"
    check_output_folder(place)
    metadata = read_json(folder / METADATA_FILE, what="metadata of a search")
    with entries_of(folder / METADATA_FILE):
        metadata["settings"] = {**metadata.get("settings", {}), "max_degradation": max_degradation}
        profile = metadata.get("profile", {})
        if (folder / "profile").is_dir():
            profile["path"] = str(folder / "profile")
    with entries_of(folder / PARETO_FILE):
        told = front_answer(best, max_degradation)
    metadata |= {"max_degradation": max_degradation, "answer": told, "answered_from": str(folder)}
    atomic_write_json(place / METADATA_FILE, metadata)
    atomic_write_json(place / CONFIG_FILE, best["config"])
    show(told)
    print_front(points, max_degradation=max_degradation)
    print(f"Saved: {place / CONFIG_FILE}")
    make_report(place)
    show_next("tune", "--validate", place / CONFIG_FILE)
    return Answer(
        {
            "schema_version": SCHEMA_VERSION,
            "max_degradation": max_degradation,
            "best": best,
            "points": points,
            "provenance": provenance(),
        }
    )
