"""Where a report's results come from, the command that repeats them, and what is not whole."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from var_moe.growing import INCOMPLETE
from var_moe.report.blocks import Facts, Notes, Section, section
from var_moe.report.folder import FILES, Results
from var_moe.report.theme import change, setting

_TOLD = (
    *("metadata", "validation", "certificate", "stability"),
    *("comparison", "evaluation", "analysis", "routing"),
)
"""Parts with a provenance, in the order of the page."""


def origin_section(results: Results) -> Section:
    """Provenance, notes of the search, and how to repeat it."""
    metadata = results.get("metadata") or {}
    told = [_command(results, name) for name in _TOLD if results.get(name)]
    commands = list(dict.fromkeys(line for line in told if line))
    return section(
        "origin",
        "Where this comes from",
        [
            Notes(title="To repeat it", lines=commands) if commands else None,
            Notes(title="Notes", lines=metadata["notes"]) if metadata.get("notes") else None,
            Facts(title="Provenance", rows=_facts(results)),
        ],
    )


def _command(results: Results, name: str) -> str:
    """The command as it was given, with the seed that it drew; "" where it is not known."""
    part = results.get(name)
    command = str(part.get("provenance", {}).get("command") or "")
    seed = part.get("seed")
    if not command or seed is None or name != "metadata":
        return command
    words = shlex.split(command)
    if any(word.split("=")[0] in ("--seed", "--seeds", "--resume") for word in words):
        return command
    return f"{command} --seed {seed}"


def _facts(results: Results) -> dict[str, str]:
    facts: dict[str, str] = {"folder": str(results.folder)}
    metadata = results.get("metadata")
    if metadata:
        facts |= _search_facts(metadata)
    for name in _TOLD:
        part = results.get(name)
        if part is None:
            continue
        origin = part["provenance"]
        versions = ", ".join(
            f"{package} {version}" for package, version in origin["versions"].items() if version
        )
        hardware = ", ".join(str(value) for value in origin["hardware"].values())
        commit = (origin["commit"] or "unknown")[:12]
        facts[FILES[name]] = f"{versions}; Python {origin['python']}; commit {commit}; {hardware}"
        if part.get("text"):
            facts[f"text of {FILES[name]}"] = _text(part["text"])
    return facts


def _search_facts(metadata: Mapping[str, Any]) -> dict[str, str]:
    if "identity" not in metadata:
        return {"seed": str(metadata["seed"])}  # a program's own search
    identity, profile = metadata["identity"], metadata.get("profile", {})
    measured = ", ".join(f"{name} {setting(one)}" for name, one in identity["setting"].items())
    facts = {
        "model": f"{identity['model']} {identity['revision'] or ''} ({identity['dtype']}, "
        f"{identity['device']})",
        "validation text": _text(metadata["validation"]),
        "timed batch": measured,
        "seed": str(metadata["seed"]),
    }
    if profile.get("hash"):
        tokens = f"{profile['tokens']:,} tokens of {profile['dataset']}"
        facts["profile"] = f"{tokens}, {profile['hash']}"
    if identity.get("compensation_hash"):
        facts["compensation"] = identity["compensation_hash"]
    return facts


def _text(text: Mapping[str, Any]) -> str:
    return (
        f"{text['dataset']}, {text['split']}: {text['documents']:,} documents, "
        f"{text['tokens']:,} tokens ({text['note']}), {text['data_hash']}"
    )


def left_out_section(results: Results) -> Section | None:
    """A line for each file that is not whole, or that an earlier search in the folder left.

    What an unfinished file holds of rows stands in its own section.
    """
    unfinished = [_line(FILES[name], part) for name, part in results.unfinished.items()]
    foreign = [f"{FILES[name]}: of another profile than the search's." for name in results.foreign]
    if not unfinished and not foreign:
        return None
    again = "A command ended before all was measured; the same command measures it again"
    return section(
        "left-out",
        "Unfinished, or left out",
        [
            Notes(title=again, lines=unfinished) if unfinished else None,
            Notes(title="What is of other results", lines=foreign) if foreign else None,
        ],
    )


def _line(file: str, part: Mapping[str, Any]) -> str:
    known = ""
    if part.get("degradation") is not None:
        known = f"; perplexity {change(part)} at {part['experts_per_token']:.3f} experts per token"
    return f"{file}: without {part[INCOMPLETE]}{known}."
