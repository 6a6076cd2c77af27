"""What is fixed before the certify part is opened: settings, candidates, study; and the ledger."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.certification.inference import QualityClaim
from var_moe.config import MAX_DEGRADATION, check_bound, check_count, check_number, check_seed
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import SpeedSetting
from var_moe.optimization.candidate import Candidate, load_candidate
from var_moe.optimization.results import CONFIG_FILE, NEAREST_MISS_FILE
from var_moe.optimization.selection import PARETO_FILE
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    jsonable,
    provenance,
    read_json,
    sha256_of,
)

FROZEN_FILE = "certificate_frozen.json"
LEDGER_FILE = "certify_ledger.json"
OPENED, FINISHED = "opened", "finished"
AT_MOST_CANDIDATES = 10
JUDGED_ON = ("certify", "test")
SAFER = (0.85, 0.7, 0.5, 0.3)
"""Strengths, relative to a configuration that has no front, of the safer ones beside it."""


@dataclass(frozen=True, kw_only=True)
class CertifySettings:
    """What is certified, and how.

    Args:
        max_degradation: the bound on the relative perplexity change.
        alpha: probability that any of the certificate's claims is wrong.
        sequential: units stream in until a claim is proven or refuted.
        ordered: candidates are ordered on the ordering part and tested in that order; else Holm.
        robust: claim it of each of several data sets, not of their union.
        candidates: how many are frozen at the most.
        max_learned_pct: also claim that the router decides a smaller share than this.
        blocks: timed blocks per arm for the speedup; 0 claims none.
        ordering_samples: documents of the ordering part that are scored.
        max_samples: documents of the certify part, a seeded sample; None takes all.
        split: the certify part.
        seed: of the units' order and of samples.
        setting: batch that throughput is measured on.

    Raises:
        UsageError: a value out of its range; names it.
    """

    max_degradation: float = MAX_DEGRADATION
    alpha: float = 0.05
    sequential: bool = False
    ordered: bool = True
    robust: bool = False
    candidates: int = AT_MOST_CANDIDATES
    max_learned_pct: float | None = None
    blocks: int = 20
    ordering_samples: int = 300
    max_samples: int | None = None
    split: str = "certify"
    seed: int = 0
    setting: SpeedSetting = field(default_factory=SpeedSetting)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if check_bound(self.max_degradation) == 0:
            raise UsageError(
                "max_degradation = 0: expected more than 0; that a loss is not one bit higher "
                "can't be certified from a sample of text"
            )
        if not (math.isfinite(self.alpha) and 0 < self.alpha < 0.5):
            raise UsageError(f"alpha = {self.alpha}: expected a number in (0, 0.5)")
        most = AT_MOST_CANDIDATES
        check_number("candidates", self.candidates, integer=True, low=1, high=most)
        if self.max_learned_pct is not None:
            share = self.max_learned_pct
            check_number("max_learned_pct", share, low=0, high=100, open_low=True)
        for name, least in (("blocks", 0), ("ordering_samples", 2), ("max_samples", 2)):
            check_count(name, getattr(self, name), least)
        if self.split not in JUDGED_ON:
            raise UsageError(
                f"split {self.split!r}: expected {' or '.join(JUDGED_ON)}; the others were tuned on"
            )
        if self.sequential and not self.ordered:
            raise UsageError("--sequential needs an order of the candidates: leave --unordered out")
        if self.sequential and self.robust:
            raise UsageError("--sequential decides on all text: leave --robust out")

    def quality(self, alpha: float) -> QualityClaim:
        """The claim about the degradation, where ``alpha`` is its part."""
        return QualityClaim(
            bound=self.max_degradation,
            alpha=alpha,
            confidence=1 - self.alpha,
            sequential=self.sequential,
        )

    def to_dict(self) -> dict[str, Any]:
        """For result files and the frozen study's hash."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        if not self.robust:  # as before there was a choice: frozen studies keep their hash
            values.pop("robust")
        return {**values, "setting": self.setting.to_dict()}


def find_candidates(
    folder: Path, *, max_degradation: float, at_most: int, top_k: int
) -> dict[str, Candidate]:
    """The tuner's choice and safer configurations of its front, at most so many, by name.

    Of the points that the search believes to keep the bound, those whose degradations are
    spread most evenly. Without a front, milder settings stand beside the tuner's choice.

    Raises:
        UsageError: the folder holds no configuration, or a file of it is damaged.
    """
    best, miss, front = (folder / name for name in (CONFIG_FILE, NEAREST_MISS_FILE, PARETO_FILE))
    named: dict[str, Candidate] = {}
    if best.is_file():
        named["best"] = load_candidate(best)
    elif miss.is_file() and not front.is_file():
        named["nearest miss"] = load_candidate(miss)
    if front.is_file():
        for place, row in _spread(_front_rows(front), max_degradation, at_most - len(named)):
            name = str(row.get("name") or "")
            one = Candidate.from_dict(row["config"], source=str(front))
            named[name if name and name not in named else f"front {place}"] = one
    else:
        for one in list(named.values()):
            named |= _milder(one, top_k)
    if not named:
        raise UsageError(
            f"{folder}: neither {PARETO_FILE} nor {CONFIG_FILE}; expected the results folder of "
            "`var-moe tune`"
        )
    distinct: dict[str, tuple[str, Candidate]] = {}
    for name, one in named.items():
        apart = one.per_document()
        distinct.setdefault(json.dumps(apart.to_dict(), sort_keys=True), (name, apart))
    return dict(list(distinct.values())[:at_most])


def _front_rows(path: Path) -> list[Mapping[str, Any]]:
    saved = read_json(path, what="front of a search")
    if not isinstance(saved, dict) or saved.get("schema_version") != SCHEMA_VERSION:
        raise UsageError(f"{path}: not a front of schema {SCHEMA_VERSION}; run the search again")
    rows = saved.get("points")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and {"config", "degradation"} <= set(row) for row in rows
    ):
        raise UsageError(f"{path}: expected 'points' with 'config' and 'degradation'")
    return rows


def _spread(
    rows: Sequence[Mapping[str, Any]], bound: float, at_most: int
) -> list[tuple[int, Mapping[str, Any]]]:
    """Points below the bound at evenly spaced degradations, each with its place from 1.

    Where none is below the bound, the safest.
    """
    ordered = sorted(rows, key=lambda row: float(row["degradation"]))
    below = [row for row in ordered if row["degradation"] < bound] or ordered[:1]
    if not below or at_most < 1:
        return []
    values = np.array([float(row["degradation"]) for row in below])
    targets = np.linspace(values[0], values[-1], at_most)
    places = sorted({int(np.abs(values - target).argmin()) for target in targets})
    return [(at + 1, below[at]) for at in places]


def _milder(config: Candidate, top_k: int) -> dict[str, Candidate]:
    """The same configuration turned down, where its policy can be."""
    turned = {
        strength: config.spec.load().milder(config.settings, strength, top_k) for strength in SAFER
    }
    return {
        f"safer {strength:g}": replace(config, settings=settings)
        for strength, settings in turned.items()
        if settings is not None
    }


@dataclass(frozen=True, kw_only=True)
class Study:
    """What was fixed before the certify part was read.

    ``identity`` says what it is about: model, data set, profile.
    """

    candidates: Mapping[str, Candidate]
    settings: Mapping[str, Any]
    identity: Mapping[str, Any]

    def content(self) -> dict[str, Any]:
        """What is hashed, for result files."""
        named = self.candidates.items()
        content = {
            "candidates": [{"name": name, "config": one.to_dict()} for name, one in named],
            "settings": dict(self.settings),
            "identity": dict(self.identity),
        }
        return dict(jsonable(content))

    @property
    def hash(self) -> str:
        """Identity of the study: another candidate, bound or alpha makes another study."""
        return sha256_of([json.dumps(self.content(), sort_keys=True)])

    def freeze(self, folder: Path) -> list[dict[str, Any]] | None:
        """Write the study's file; an equal study that was frozen before is left as it is.

        Returns:
            The order that an equal study was given before, if it was: an order must not change
            once the certify part may have been opened.
        """
        path = folder / FROZEN_FILE
        saved = read_json(path, what="frozen study") if path.is_file() else None
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
            **self.content(),
            "order": None if order is None else jsonable(list(order)),
            "provenance": provenance(),
        }
        atomic_write_json(folder / FROZEN_FILE, value)


class Ledger:
    """The ledger of a results folder; an entry per study that opened a certify part."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LEDGER_FILE

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
        other = next((one for one in before if one["study"] != study), None)
        why = None
        if other is not None:
            why = (
                "this certify part was opened before, for other candidates or settings "
                f"(study {str(other['study'])[:12]}, {other.get('opened_at', 'no date')})"
            )
        elif any(one["state"] == FINISHED for one in before):
            why = "this study was tested on this certify part before; see its certificate"
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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
