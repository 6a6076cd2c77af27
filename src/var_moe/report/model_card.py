"""The README of an exported configuration: what it is, what is certified, how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from var_moe.report.blocks import environment


def model_card(head: Mapping[str, Any], *, folder: str) -> str:
    """Markdown with the Hub's own front matter.

    Args:
        head: what ``var_moe.json`` holds.
        folder: name by which the example loads it.
    """
    about = head["model"]
    # Of a local model its folder's name alone: where it lay says nothing elsewhere.
    name = about["model"] if about["revision"] else Path(about["model"]).name
    local = not about["revision"] and about["model"] != "demo"
    template = environment(html=False).get_template("model_card.md.jinja")
    card: str = template.render(
        **{"certificate": None, **head},
        folder=folder,
        name=name,
        place=f"path/to/{name}" if local else about["model"],
    )
    return card
