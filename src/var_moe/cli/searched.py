"""What the search was about that left a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEFAULT_BOUND = 0.01


def search_of(config: Path) -> dict[str, Any]:
    """Model, dataset, bound and judgement of that search, where it says so."""
    from var_moe.optimization.saving import METADATA_FILE
    from var_moe.storage import read_json

    beside = config.parent / METADATA_FILE
    if not beside.is_file():
        return {}
    metadata = read_json(beside, what="metadata of a search")
    known = {**metadata.get("identity", {}), **metadata.get("settings", {})}
    names = ("model", "dataset", "max_degradation", "robust")
    return {key: known[key] for key in names if key in known}
