"""The study, frozen before the certify part is read: candidates, settings, later their order."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from var_moe.certification.candidates import Named
from var_moe.optimization.results import jsonable
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, provenance, read_json, sha256_of

FROZEN_FILE = "certificate_frozen.json"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What was fixed before the certify part was read.

    ``identity`` says what it is about: model, data set, profile.
    """

    candidates: Sequence[Named]
    settings: Mapping[str, Any]
    identity: Mapping[str, Any]

    def _content(self) -> dict[str, Any]:
        found: dict[str, Any] = jsonable(
            {
                "candidates": [one.to_dict() for one in self.candidates],
                "settings": dict(self.settings),
                "identity": dict(self.identity),
            }
        )
        return found

    @property
    def hash(self) -> str:
        """Identity of the study: another candidate, bound or alpha makes another study."""
        return sha256_of([json.dumps(self._content(), sort_keys=True)])

    def freeze(self, folder: Path) -> list[dict[str, Any]] | None:
        """Write the study's file; an equal study that was frozen before is left as it is.

        Returns:
            The order that an equal study was given before, if it was: an order must not change
            once the certify part may have been opened.
        """
        path = folder / FROZEN_FILE
        if path.is_file():
            saved = read_json(path, what="frozen study")
            if isinstance(saved, dict) and saved.get("hash") == self.hash:
                order = saved.get("order")
                return order if isinstance(order, list) else None
        self.write(folder, None)
        return None

    def write(self, folder: Path, order: Sequence[Mapping[str, Any]] | None) -> None:
        """Write the study with its order."""
        value = {
            "schema_version": SCHEMA_VERSION,
            "hash": self.hash,
            **self._content(),
            "order": jsonable([dict(row) for row in order]) if order is not None else None,
            "provenance": provenance(),
        }
        atomic_write_json(folder / FROZEN_FILE, value)
