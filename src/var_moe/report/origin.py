"""Where a report's results come from, the command that repeats them, and what is not whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from var_moe.report.blocks import Facts, Notes, Section, section
from var_moe.report.folder import FILES, Results
from var_moe.report.theme import settings

_OF_ANOTHER = ("search", "front", "components")  # written with a file that says the same


def origin_section(results: Results) -> Section:
    """Provenance, notes of the search, and how to repeat it."""
    metadata = results.get("metadata") or {}
    facts = {"folder": str(results.folder), **_search_facts(metadata)}
    commands = []
    for key, part in results.parts.items():
        if key in _OF_ANOTHER or "provenance" not in part:
            continue
        origin = part["provenance"]
        command = str(origin.get("command") or "")
        if command and part is metadata and "--seed" not in command and "--resume" not in command:
            command += f" --seed {part['seed']}"  # the one that it drew
        commands.append(command)
        versions = ", ".join(
            f"{package} {one}" for package, one in origin["versions"].items() if one
        )
        hardware = ", ".join(map(str, origin["hardware"].values()))
        commit = (origin["commit"] or "unknown")[:12]
        facts[FILES[key]] = f"{versions}; Python {origin['python']}; commit {commit}; {hardware}"
        if part.get("text"):
            facts[f"text of {FILES[key]}"] = _text(part["text"])
    return section(
        "origin",
        "Where this comes from",
        Notes("To repeat it", [line for line in dict.fromkeys(commands) if line]),
        Notes("Notes", metadata.get("notes") or ()),
        Facts("Provenance", facts),
    )


def _search_facts(metadata: Mapping[str, Any]) -> dict[str, str]:
    if "identity" not in metadata:  # no search, or a program's own
        return {"seed": str(metadata["seed"])} if metadata else {}
    identity, profile = metadata["identity"], metadata.get("profile", {})
    facts = {
        "model": f"{identity['model']} {identity['revision'] or ''} ({identity['dtype']}, "
        f"{identity['device']})",
        "validation text": _text(metadata["validation"]),
        "timed batch": settings(identity["setting"]),
        "seed": str(metadata["seed"]),
        "compensation": identity.get("compensation_hash") or "none",
    }
    if profile.get("hash"):
        tokens = f"{profile['tokens']:,} tokens of {profile['dataset']}"
        facts["profile"] = f"{tokens}, {profile['hash']}"
    return facts


def _text(text: Mapping[str, Any]) -> str:
    return (
        f"{text['dataset']}, {text['split']}: {text['documents']:,} documents, "
        f"{text['tokens']:,} tokens ({text['note']}), {text['data_hash']}"
    )


def left_out_section(results: Results) -> Section:
    """A line for each file that is not whole, or that an earlier search in the folder left.

    What an unfinished file holds of rows stands in its own section.
    """
    return section("left-out", "Unfinished, or left out", Notes("", results.left_out))
