"""What the search was about that left a configuration: the defaults of what comes after it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from var_moe.config import MAX_DEGRADATION


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A search's model, dataset, bound and judgement; of an unknown one, those of the demo."""

    model: str = "demo"
    dataset: str = "demo"
    max_degradation: float = MAX_DEGRADATION
    robust: bool = False


def search_of(config: Path) -> Searched:
    """That of the search, as far as the file beside its configuration says so."""
    from var_moe.optimization.saving import METADATA_FILE
    from var_moe.storage import entries_of, read_json

    beside = config.parent / METADATA_FILE
    if not beside.is_file():
        return Searched()
    metadata = read_json(beside, what="metadata of a search")
    with entries_of(beside):
        known = {**metadata.get("identity", {}), **metadata.get("settings", {})}
    names = ("model", "dataset", "max_degradation", "robust")
    return Searched(**{key: known[key] for key in names if key in known})
