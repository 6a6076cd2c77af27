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
from var_moe.errors import UsageError, one_line
from var_moe.models.identity import check_fits, difference
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


@dataclass(frozen=True, kw_only=True)
class RoutingProfile:
    """Statistics per (layer, token id), residual means, and where they come from.

    ``stats`` has the columns of ``routing_stats.parquet``: layer, token_id, token_str,
    frequency, mean/std/min/max_entropy (nats), mean/std_confidence, routing_consistency (share
    of occurrences whose first expert was top_expert), top_expert, leading_experts and
    leading_weights (mean routing mass). ``damages`` are by the name of the compensation that
    they were fitted with; ``learned`` is a compensation that was fitted with this profile.
    """

    stats: pd.DataFrame
    residuals: ResidualMeans
    head: dict[str, Any]
    ratios: RatioQuantiles  # for policy naee
    sensitivity: LayerSensitivity  # for policy per_layer_k
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
        experts, masses = (
            np.stack(stats[f"leading_{n}"].to_list()) for n in ("experts", "weights")
        )
        index[at] = torch.from_numpy(experts.astype(np.int64))
        weight[at] = torch.from_numpy(masses.astype(np.float32))
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
        given = {
            "table": self.table(),
            "residuals": self.residuals,
            "ratios": self.ratios,
            "sensitivity": self.sensitivity,
            "damage": self._damages().get(compensation or self.best_compensation()),
        }
        if compensation is not None:
            known = self.compensations()
            check_compensation(compensation, known)
            given["compensation"] = known[compensation]
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

    def _damages(self) -> dict[str, DamageModel]:
        learned = {LEARNED: self.learned.damage} if self.learned is not None else {}
        return {**self.damages, **learned}

    def with_compensation(self, fitted: FittedCompensation) -> RoutingProfile:
        """The same profile with another learned compensation; another model's is a UsageError."""
        fault = difference(fitted.head, self.head)
        if fault:
            raise UsageError(
                f"compensation of model {fitted.head['model']!r} does not fit the profile of "
                f"{self.head['model']!r}: {fault}"
            )
        return replace(self, learned=fitted)

    def check_loaded(self, loaded: LoadedModel) -> None:
        """Raise UsageError, naming both, unless the profile is of this model."""
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
        note = {"by_pair": json.dumps(self.residuals.by_pair)}
        atomic_write(folder / RESIDUALS_FILE, lambda path: save_file(tensors, path, metadata=note))
        peers = {"ratios": self.ratios.to_dict(), "sensitivity": self.sensitivity.to_dict()}
        atomic_write_json(folder / PEERS_FILE, peers)
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
                by_pair = json.loads(file.metadata()["by_pair"])
                tables = tuple(file.get_tensor(f"layer.{i}") for i in range(head["layers"]))
            residuals = ResidualMeans(table=tables, by_pair=by_pair, experts=head["experts"])
            peers = read_json(folder / PEERS_FILE, what="profile")
            ratios = RatioQuantiles.from_dict(peers["ratios"])
            sensitivity = LayerSensitivity.from_dict(peers["sensitivity"])
        except Exception as error:
            raise UsageError(
                f"{folder}: damaged profile ({one_line(error)}); make it again with "
                "`var-moe profile`"
            ) from None
        if profile_hash(stats, residuals, head) != head["hash"]:
            raise UsageError(
                f"{folder}: {STATS_FILE} or {RESIDUALS_FILE} does not belong to {HEAD_FILE}; "
                "make it again with `var-moe profile`"
            )
        profile = cls(
            stats=stats, residuals=residuals, head=head, ratios=ratios, sensitivity=sensitivity
        )
        if (folder / DAMAGE_FILE).is_file():
            damages = load_damages(folder / DAMAGE_FILE, profile.compensations())
            profile = replace(profile, damages=damages)
        if (folder / FOLDER).is_dir():
            fitted = load_compensation(folder / FOLDER)
            try:
                profile = profile.with_compensation(fitted)
            except UsageError as error:
                raise UsageError(f"{folder / FOLDER}: {error}; remove it") from None
        return profile


def check_compensation(name: str, possible: Collection[str]) -> None:
    """Raise UsageError, saying what makes it, unless a compensation is among the possible ones."""
    if name not in possible:
        why = {
            LEARNED: "; fit one with `var-moe fit-compensation --profile ...`",
            "means": " (means stand in where K = 2 alone)",
        }
        known = ", ".join(possible)
        raise UsageError(f"compensation {name!r}: expected one of {known}{why.get(name, '')}")


def profile_hash(stats: pd.DataFrame, residuals: ResidualMeans, head: dict[str, Any]) -> str:
    """Hash over the statistics, the residual means and the identity of model and text."""
    parts: list[str | bytes] = [str(head[key]) for key in ("model", "tokenizer_hash", "data_hash")]
    for column in ("layer", "token_id", "frequency", "mean_entropy", "top_expert"):
        parts.append(stats[column].to_numpy().astype(np.float64).tobytes())
    parts.append(np.concatenate(stats["leading_experts"].to_list()).astype(np.float64).tobytes())
    parts.extend(table.numpy().tobytes() for table in residuals.table)
    return sha256_of(parts)
