"""What a search chooses among: a VAR configuration, or settings of another policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.registry import policy_spec
from var_moe.storage import read_json


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Settings of a policy of the registry.

    Args:
        policy: its name.
        settings: by the names of its search space.

    Raises:
        UsageError: no such policy.
    """

    policy: str
    settings: Mapping[str, Any]

    def __post_init__(self) -> None:
        policy_spec(self.policy)

    def documented(self) -> dict[str, Any]:
        """The settings alone."""
        return dict(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        return {"policy": self.policy, "settings": dict(self.settings)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> PolicySettings:
        """Read what `to_dict` gave; anything else is a UsageError."""
        if set(values) != {"policy", "settings"} or not isinstance(values["settings"], Mapping):
            raise UsageError(f"{source}: expected the two entries 'policy' and 'settings'")
        return cls(policy=str(values["policy"]), settings=values["settings"])


Candidate: TypeAlias = VARConfig | PolicySettings


def kind_of(candidate: Candidate) -> str:
    """What it configures, in a few words."""
    if isinstance(candidate, VARConfig):
        return f"mode {candidate.mode}"
    return f"policy {candidate.policy}"


def load_candidate(path: str | Path) -> Candidate:
    """Read ``best_config.json`` of any search, or a VARConfig file.

    Raises:
        UsageError: it is neither; names the file and the entry.
    """
    values = read_json(path, what="VAR configuration")
    if isinstance(values, Mapping) and "policy" in values:
        return PolicySettings.from_dict(values, source=str(path))
    return VARConfig.load(path)
