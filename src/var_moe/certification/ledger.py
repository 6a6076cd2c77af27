"""Which texts a results folder has been certified on: a text confirms once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from var_moe.errors import UsageError
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, read_json

LEDGER_FILE = "certify_ledger.json"
OPENED, FINISHED = "opened", "finished"


@dataclass(frozen=True)
class Ledger:
    """The ledger of a results folder; an entry per study that opened a certify part."""

    folder: Path

    @property
    def path(self) -> Path:
        """Its file."""
        return self.folder / LEDGER_FILE

    def entries(self) -> list[dict[str, Any]]:
        """All entries, the first first.

        Raises:
            UsageError: the file is damaged; a ledger that can't be read must not be ignored.
        """
        if not self.path.exists():
            return []
        saved = read_json(self.path, what="ledger of certificates")
        entries = saved.get("entries") if isinstance(saved, dict) else None
        if not isinstance(entries, list) or not all(
            isinstance(one, dict) and {"data_hash", "study", "state"} <= set(one) for one in entries
        ):
            raise UsageError(f"{self.path}: not a ledger of certificates; restore it")
        return entries

    def objection(self, data_hash: str, study: str, *, reuse: bool) -> str | None:
        """Whether the part may still confirm a study.

        Returns:
            Why the certificate is not confirmatory: the part was opened for another study
            before, or tested to the end for this one. None where it is; an interrupted study
            goes on.

        Raises:
            UsageError: it is not, and ``reuse`` does not allow that.
        """
        before = [one for one in self.entries() if one["data_hash"] == data_hash]
        why = _objection(before, study)
        if why and not reuse:
            raise UsageError(
                f"{self.path}: {why}; take other text, or --reuse, which marks the certificate "
                "as not confirmatory"
            )
        return why

    def open(
        self, data_hash: str, study: str, text: Mapping[str, Any], *, confirmatory: bool
    ) -> None:
        """Note that the part is opened for a study; an interrupted one has its entry."""
        entries = self.entries()
        if any((one["data_hash"], one["study"]) == (data_hash, study) for one in entries):
            return
        entry = {
            "data_hash": data_hash,
            "study": study,
            "state": OPENED,
            "opened_at": _now(),
            "confirmatory": confirmatory,
            **{key: text[key] for key in ("dataset", "split", "documents")},
        }
        self._write([*entries, entry])

    def finish(self, data_hash: str, study: str, *, certified: bool) -> None:
        """Note that the study tested the part to its end."""
        entries = self.entries()
        for one in entries:
            if (one["data_hash"], one["study"]) == (data_hash, study):
                one.update(state=FINISHED, certified=certified, finished_at=_now())
        self._write(entries)

    def _write(self, entries: list[dict[str, Any]]) -> None:
        atomic_write_json(self.path, {"schema_version": SCHEMA_VERSION, "entries": entries})


def _objection(before: list[dict[str, Any]], study: str) -> str | None:
    others = [one for one in before if one["study"] != study]
    if others:
        return (
            "this certify part was opened before, for other candidates or settings "
            f"(study {str(others[0]['study'])[:12]}, {others[0].get('opened_at', 'no date')})"
        )
    if any(one["state"] == FINISHED for one in before):
        return "this study was tested on this certify part before; see its certificate"
    return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
