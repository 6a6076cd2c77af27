"""What is fixed before the certify part is opened: settings, candidates, study; and the ledger."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.certification.inference import (
    LEARNED,
    QUALITY,
    SPEEDUP,
    QualityClaim,
    blocks_needed,
    split_alpha,
)
from var_moe.config import MAX_DEGRADATION, check_count, check_number, check_seed
from var_moe.errors import UsageError
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.optimization.candidate import Candidate, load_candidate
from var_moe.optimization.results import CONFIG_FILE, NEAREST_MISS_FILE
from var_moe.optimization.selection import PARETO_FILE
from var_moe.storage import (
    SCHEMA_VERSION,
    atomic_write_json,
    entries_of,
    jsonable,
    provenance,
    read_json,
    sha256_of,
)

FROZEN_FILE = "certificate_frozen.json"
LEDGER_FILE = "certify_ledger.json"
OPENED, FINISHED = "opened", "finished"
AT_MOST_CANDIDATES = 10


@dataclass(frozen=True, kw_only=True)
class CertifySettings:
    """What is certified, and how.

    Args:
        max_degradation: the bound on the relative perplexity change.
        alpha: probability that any of the certificate's claims is wrong.
        robust: claim it of each of several data sets, not of their union.
        candidates: how many are frozen at the most.
        max_learned_pct: also claim that the router decides a smaller share than this.
        blocks: timed blocks per arm for the speedup; 0 claims none.
        max_samples: documents of the certify part, a seeded sample; None takes all.
        seed: of the units' order and of samples.
        setting: batch that throughput is measured on.

    Raises:
        UsageError: a value out of its range; names it.
    """

    max_degradation: float = MAX_DEGRADATION
    alpha: float = 0.05
    robust: bool = False
    candidates: int = AT_MOST_CANDIDATES
    max_learned_pct: float | None = None
    blocks: int = 20
    max_samples: int | None = None
    seed: int = 0
    setting: SpeedSetting = field(default_factory=SpeedSetting)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        # A sample of text can't show that a loss does not rise at all.
        check_number("max_degradation", self.max_degradation, low=0, open_low=True)
        if not 0 < self.alpha < 0.5:
            raise UsageError(f"alpha = {self.alpha}: expected a number in (0, 0.5)")
        most = AT_MOST_CANDIDATES
        check_number("candidates", self.candidates, integer=True, low=1, high=most)
        if self.max_learned_pct is not None:
            share = self.max_learned_pct
            check_number("max_learned_pct", share, low=0, high=100, open_low=True)
        check_count("blocks", self.blocks, 0)
        check_count("max_samples", self.max_samples, 2)


def find_candidates(folder: Path, *, max_degradation: float, at_most: int) -> dict[str, Candidate]:
    """The tuner's choice and safer configurations of its front, by name.

    Of the front's points that the search believes to keep the bound, those whose degradations
    are spread most evenly.

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
    """The points of a front, the safest first."""
    saved = read_json(path, what="front of a search")
    with entries_of(path):
        if saved["schema_version"] != SCHEMA_VERSION:
            raise UsageError(f"{path}: not a front of schema {SCHEMA_VERSION}; search again")
        rows: list[Mapping[str, Any]] = [row for row in saved["points"] if row["config"]]
        return sorted(rows, key=lambda row: float(row["degradation"]))


def _spread(
    rows: Sequence[Mapping[str, Any]], bound: float, at_most: int
) -> list[tuple[int, Mapping[str, Any]]]:
    """Points below the bound at evenly spaced degradations, each with its place from 1.

    Where none is below the bound, the safest.
    """
    below = [row for row in rows if row["degradation"] < bound] or rows[:1]
    if not below or at_most < 1:
        return []
    values = np.array([float(row["degradation"]) for row in below])
    targets = np.linspace(values[0], values[-1], at_most)
    places = sorted({int(np.abs(values - target).argmin()) for target in targets})
    return [(at + 1, below[at]) for at in places]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is fixed before the certify part is read.

    Args:
        candidates: by name.
        settings: what is claimed of them.
        identity: what it is about: model, data set, profile.

    Raises:
        UsageError: too few timed blocks for a bound of the speedup.
    """

    candidates: Mapping[str, Candidate]
    settings: CertifySettings
    identity: Mapping[str, Any]

    def __post_init__(self) -> None:
        blocks, level = self.settings.blocks, self.claims.get(SPEEDUP)
        if level is not None and blocks < blocks_needed(level):
            raise UsageError(
                f"blocks = {blocks}: a speedup bound at {100 * level:g}% needs at least "
                f"{blocks_needed(level)} blocks, or 0 for no speedup claim"
            )

    @property
    def claims(self) -> Mapping[str, float]:
        """Each claim that will be made, with its part of alpha."""
        routed = any(one.policy != "native" for one in self.candidates.values())
        names = [QUALITY]
        if self.settings.blocks and routed:
            names.append(SPEEDUP)
        if self.settings.max_learned_pct is not None:
            names.append(LEARNED)
        return split_alpha(self.settings.alpha, names)

    @property
    def quality(self) -> QualityClaim:
        """What is tested of every candidate."""
        return QualityClaim(
            bound=self.settings.max_degradation,
            alpha=self.claims[QUALITY],
            confidence=1 - self.settings.alpha,
        )

    def to_dict(self) -> dict[str, Any]:
        """What is hashed, for result files."""
        named = self.candidates.items()
        content = {
            "candidates": [{"name": name, "config": one.to_dict()} for name, one in named],
            "settings": {**asdict(self.settings), "setting": self.settings.setting.to_dict()},
            "identity": self.identity,
        }
        return dict(jsonable(content))

    @property
    def hash(self) -> str:
        """Identity of the study: another candidate, bound or alpha makes another study."""
        return sha256_of([json.dumps(self.to_dict(), sort_keys=True)])

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
            **self.to_dict(),
            "order": jsonable(order),
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

    def check_unused(self, data_hash: str, study: str) -> None:
        """Refuse a part that was opened for another study, or tested to the end for this one.

        A study that was interrupted goes on.

        Raises:
            UsageError: it was; names the ledger.
        """
        for one in self.entries():
            going_on = one["study"] == study and one["state"] != FINISHED
            if one["data_hash"] == data_hash and not going_on:
                why = "this study was tested on this certify part before; see its certificate"
                if one["study"] != study:
                    why = (
                        "this certify part was opened before, for other candidates or settings "
                        f"(study {str(one['study'])[:12]}, {one.get('opened_at', 'no date')})"
                    )
                raise UsageError(
                    f"{self.path}: {why}; each text can be used for one certificate only: take "
                    "other text"
                )

    def open(self, data_hash: str, study: str, **facts: Any) -> None:
        """Note that the part is opened for a study; an interrupted one has its entry."""
        entries = self.entries()
        if not any((one["data_hash"], one["study"]) == (data_hash, study) for one in entries):
            entry = {"data_hash": data_hash, "study": study, "state": OPENED, "opened_at": _now()}
            self._write([*entries, {**entry, **facts}])

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
