"""Made-up data sets on disk."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

WORDS = (
    *("the", "router", "sends", "a", "token", "to", "an", "expert", "and", "table"),
    *("cache", "window", "speed", "model", "index"),
)


def write_data_set(
    folder: Path,
    sizes: Mapping[str, int],
    dice: random.Random,
    *,
    words: Sequence[str] = WORDS,
    length: int,
    mark: str = "",
) -> None:
    """A folder with a file for each split: so many documents of so many words, after a mark."""
    folder.mkdir()
    for split, count in sizes.items():
        rows = [{"text": mark + " ".join(dice.choices(words, k=length))} for _ in range(count)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(lines)
