"""RoutingProfile: routing statistics of one model on calibration text, and its folder."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from var_moe.calibration.fitted_files import (
    DAMAGE_FILE,
    FOLDER,
    LEARNED,
    FittedCompensation,
    load_compensation,
    load_damages,
    save_damages,
)
from var_moe.errors import UsageError
from var_moe.models.identity import check_fits
from var_moe.routing.base import check_keys
from var_moe.routing.compensation import Compensation, ResidualMeans
from var_moe.routing.damage import DamageModel
from var_moe.routing.naee import RatioQuantiles
from var_moe.routing.per_layer_k import LayerSensitivity
from var_moe.routing.var import RoutingTable
from var_moe.storage import SCHEMA_VERSION, atomic_write, atomic_write_json, read_json, sha256_of

if TYPE_CHECKING:
    import pandas as pd

    from var_moe.models.loading import LoadedModel

STATS_FILE = "routing_stats.parquet"
RESIDUALS_FILE = "residuals.safetensors"
PEERS_FILE = "peers.json"
HEAD_FILE = "profile.json"
_KEPT = "own weights"  # how kept experts were weighted when the residual means were fitted


@dataclass(frozen=True, kw_only=True)
class PeerCalibration:
    """Inputs of the policies `naee` and `per_layer_k`, of one model on one text."""

    ratios: RatioQuantiles
    sensitivity: LayerSensitivity

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {"ratios": self.ratios.to_dict(), "sensitivity": self.sensitivity.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PeerCalibration:
        """Read what `to_dict` gave; a missing or unknown key is a UsageError."""
        check_keys(cls, values)
        return cls(
            ratios=RatioQuantiles.from_dict(values["ratios"]),
            sensitivity=LayerSensitivity.from_dict(values["sensitivity"]),
        )


@dataclass(frozen=True, kw_only=True)
class RoutingProfile:
    """Statistics per (layer, token id), residual means, and where they come from.

    ``stats`` has the columns of ``routing_stats.parquet``: layer, token_id, token_str,
    frequency, mean/std/min/max_entropy (nats), mean/std_confidence, routing_consistency (share
    of occurrences whose first expert was top_expert), top_expert, leading_experts and
    leading_weights (mean routing mass). ``peers`` is what other policies than VAR need; a
    profile that an earlier version made has none. ``damages`` are what the damage policy needs,
    by the name of the compensation that they were fitted with; ``learned`` is a compensation
    that was fitted with this profile.
    """

    stats: pd.DataFrame
    residuals: ResidualMeans
    head: dict[str, Any]
    peers: PeerCalibration | None = None
    damages: Mapping[str, DamageModel] = field(default_factory=dict)
    learned: FittedCompensation | None = None

    @property
    def layers(self) -> int:
        """L, the number of MoE layers."""
        return int(self.head["layers"])

    @property
    def hash(self) -> str:
        """Identity of the content: which model, which text, which statistics."""
        return str(self.head["hash"])

    def table(self) -> RoutingTable:
        """The statistics as dense tensors for the fast path. (L, V)"""
        stats, layers = self.stats, self.layers
        vocabulary = int(self.head["vocabulary"])
        leading = int(self.head["leading"])
        at = (
            torch.tensor(stats["layer"].to_numpy(np.int64)),
            torch.tensor(stats["token_id"].to_numpy(np.int64)),
        )
        count = torch.zeros((layers, vocabulary), dtype=torch.float64)
        entropy = torch.full((layers, vocabulary), torch.inf, dtype=torch.float64)
        index = torch.zeros((layers, vocabulary, leading), dtype=torch.int64)
        weight = torch.ones((layers, vocabulary, leading), dtype=torch.float32)
        count[at] = torch.tensor(stats["frequency"].to_numpy(np.float64))
        entropy[at] = torch.tensor(stats["mean_entropy"].to_numpy(np.float64))
        index[at] = torch.from_numpy(np.stack(stats["leading_experts"].to_list()).astype(np.int64))
        weight[at] = torch.from_numpy(
            np.stack(stats["leading_weights"].to_list()).astype(np.float32)
        )
        return RoutingTable(count=count, entropy=entropy, index=index, weight=weight)

    def calibration(self, compensation: str | None = None) -> dict[str, Any]:
        """All that a policy may ask for, by the names of `routing.registry.CALIBRATION`.

        Args:
            compensation: ``"none"``, ``"means"`` or ``"learned"``: what stands in for dropped
                experts, with any policy. By default each policy does as it is made: the damage
                policy takes the best compensation that there is, others have none.

        Raises:
            UsageError: there is no such compensation.
        """
        peers = self.peers
        given = {
            "table": self.table(),
            "residuals": self.residuals,
            "ratios": peers and peers.ratios,
            "sensitivity": peers and peers.sensitivity,
            "damage": self._damages().get(compensation or self.best_compensation()),
        }
        if compensation is not None:
            given["compensation"] = self.compensation(compensation)
        return given

    def best_compensation(self) -> str:
        """Name of the best compensation that damages were fitted with."""
        known = self._damages()
        return next((name for name in reversed(self.compensations()) if name in known), "none")

    def compensations(self) -> dict[str, Compensation | None]:
        """What can stand in for dropped experts here, by name, from the plainest to the best."""
        known: dict[str, Compensation | None] = {"none": None}
        if self.residuals.by_pair:
            known["means"] = Compensation.of_residual_means(self.residuals)
        if self.learned is not None:
            known[LEARNED] = self.learned.compensation
        return known

    def compensation(self, name: str) -> Compensation | None:
        """The compensation of that name.

        Raises:
            UsageError: there is none; says what makes it.
        """
        known = self.compensations()
        check_compensation(name, known)
        return known[name]

    def _damages(self) -> dict[str, DamageModel]:
        learned = {LEARNED: self.learned.damage} if self.learned is not None else {}
        return {**self.damages, **learned}

    def with_compensation(self, fitted: FittedCompensation) -> RoutingProfile:
        """The same profile with another learned compensation.

        Raises:
            UsageError: it is another model's.
        """
        fitted.check_same_model(self.head)
        return replace(self, learned=fitted)

    def check_loaded(self, loaded: LoadedModel) -> None:
        """Refuse a profile of another model.

        Raises:
            UsageError: names the profile's model and the one at hand.
        """
        check_fits("profile", self.head, loaded)

    def save(self, folder: str | Path) -> None:
        """Write the folder; the head comes last, so that a folder with a head is whole."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (HEAD_FILE, PEERS_FILE, DAMAGE_FILE):
            (folder / name).unlink(missing_ok=True)
        atomic_write(
            folder / STATS_FILE,
            lambda path: self.stats.to_parquet(path, index=False, compression="zstd"),
        )
        tensors = {f"layer.{i}": table for i, table in enumerate(self.residuals.table)}
        note = {"by_pair": json.dumps(self.residuals.by_pair), "kept": _KEPT}
        atomic_write(folder / RESIDUALS_FILE, lambda path: save_file(tensors, path, metadata=note))
        if self.peers is not None:
            atomic_write_json(folder / PEERS_FILE, self.peers.to_dict())
        if self.damages:
            save_damages(self.damages, folder / DAMAGE_FILE)
        if self.learned is not None:
            self.learned.save(folder / FOLDER)
        atomic_write_json(folder / HEAD_FILE, self.head)

    @classmethod
    def load(cls, folder: str | Path) -> RoutingProfile:
        """Read a folder that `save` wrote.

        Raises:
            UsageError: no such folder, not a profile, or its parts do not belong together.
        """
        import pandas as pd
        from safetensors import safe_open

        folder = Path(folder)
        if not folder.is_dir():
            raise UsageError(f"{folder}: no such profile folder; make one with `var-moe profile`")
        head = read_json(folder / HEAD_FILE, what="routing profile")
        if not isinstance(head, dict) or head.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(f"{folder / HEAD_FILE}: not a profile of schema {SCHEMA_VERSION}")
        try:
            stats = pd.read_parquet(folder / STATS_FILE)
            with safe_open(folder / RESIDUALS_FILE, framework="pt") as file:
                note = file.metadata()
                by_pair = json.loads(note["by_pair"])
                tables = tuple(file.get_tensor(f"layer.{i}") for i in range(head["layers"]))
            peers = None
            if (folder / PEERS_FILE).is_file():
                peers = PeerCalibration.from_dict(read_json(folder / PEERS_FILE, what="profile"))
        except Exception as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UsageError(
                f"{folder}: damaged profile ({first}); make it again with `var-moe profile`"
            ) from None
        if note.get("kept") != _KEPT:
            raise UsageError(
                f"{folder}: made by an earlier version, which fitted residual means otherwise; "
                "make it again with `var-moe profile`"
            )
        residuals = ResidualMeans(table=tables, by_pair=by_pair, experts=head["experts"])
        profile = cls(stats=stats, residuals=residuals, head=head, peers=peers)
        if profile_hash(stats, residuals, head) != head["hash"]:
            raise UsageError(
                f"{folder}: {STATS_FILE} or {RESIDUALS_FILE} does not belong to {HEAD_FILE}; "
                "make it again with `var-moe profile`"
            )
        return profile._with_fitted(folder)

    def _with_fitted(self, folder: Path) -> RoutingProfile:
        """The same with the damages and the compensation that lie in its folder."""
        profile = self
        if (folder / DAMAGE_FILE).is_file():
            damages = load_damages(folder / DAMAGE_FILE, self.compensations())
            profile = replace(profile, damages=damages)
        if (folder / FOLDER).is_dir():
            fitted = load_compensation(folder / FOLDER)
            try:
                profile = profile.with_compensation(fitted)
            except UsageError as error:
                raise UsageError(f"{folder / FOLDER}: {error}; remove it") from None
        return profile


def check_compensation(name: str, possible: Collection[str]) -> None:
    """Refuse a compensation that is not among the possible ones.

    Raises:
        UsageError: says what makes it, or why there is none.
    """
    if name in possible:
        return
    if name == LEARNED:
        raise UsageError(
            "compensation 'learned': this profile has none; fit one with "
            "`var-moe fit-compensation --profile ...`"
        )
    why = " (means stand in where K = 2 alone)" if name == "means" else ""
    raise UsageError(f"compensation {name!r}: expected one of {', '.join(possible)}{why}")


def profile_hash(stats: pd.DataFrame, residuals: ResidualMeans, head: dict[str, Any]) -> str:
    """Hash over the statistics, the residual means and the identity of model and text."""
    parts: list[str | bytes] = [str(head[key]) for key in ("model", "tokenizer_hash", "data_hash")]
    for column in ("layer", "token_id", "frequency", "mean_entropy", "top_expert"):
        parts.append(stats[column].to_numpy().astype(np.float64).tobytes())
    parts.append(np.concatenate(stats["leading_experts"].to_list()).astype(np.float64).tobytes())
    parts.extend(table.numpy().tobytes() for table in residuals.table)
    return sha256_of(parts)
