"""What a search chooses among: a VAR configuration, or settings of another policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from var_moe.config import VARConfig
from var_moe.errors import UsageError
from var_moe.routing.registry import make_policy, policy_spec
from var_moe.storage import read_json

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.routing.base import RoutingPolicy


@dataclass(frozen=True, kw_only=True)
class PolicySettings:
    """Settings of a policy of the registry.

    Args:
        policy: its name.
        settings: by the names of its search space.
        compensation: name of what stands in for dropped experts (`RoutingProfile.compensations`);
            None leaves it to the policy.
        source: the file that it was read from, which an error names.

    Raises:
        UsageError: no such policy.
    """

    policy: str
    settings: Mapping[str, Any]
    compensation: str | None = None
    source: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        with self._named():
            policy_spec(self.policy)

    def make(self, calibration: Callable[[str | None], Mapping[str, Any]]) -> RoutingPolicy:
        """The policy; `calibration` gives its other inputs, by the compensation's name."""
        with self._named():
            return make_policy(self.policy, self.settings, calibration(self.compensation))

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            if self.source is None:
                raise
            raise UsageError(f"{self.source}: {error}") from None

    def documented(self) -> dict[str, Any]:
        """The settings alone."""
        return dict(self.settings)

    def to_dict(self) -> dict[str, Any]:
        """For a file."""
        extra = {} if self.compensation is None else {"compensation": self.compensation}
        return {"policy": self.policy, "settings": dict(self.settings), **extra}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> PolicySettings:
        """Read what `to_dict` gave; anything else is a UsageError."""
        own = set(values) - {"compensation"}
        if own != {"policy", "settings"} or not isinstance(values["settings"], Mapping):
            raise UsageError(
                f"{source}: expected the entries 'policy' and 'settings', and perhaps "
                "'compensation'"
            )
        return cls(
            policy=str(values["policy"]),
            settings=values["settings"],
            compensation=values.get("compensation"),
            source=source,
        )


Candidate: TypeAlias = VARConfig | PolicySettings


def kind_of(candidate: Candidate) -> str:
    """What it configures, in a few words."""
    if isinstance(candidate, VARConfig):
        return f"mode {candidate.mode}"
    helped = candidate.compensation not in (None, "none")
    return f"policy {candidate.policy}" + (
        f", compensation {candidate.compensation}" if helped else ""
    )


def candidate_from(values: Any, *, source: str) -> Candidate:
    """A candidate from the entries of a file, or of a part of one.

    Raises:
        UsageError: it is none; names ``source`` and the entry.
    """
    if isinstance(values, Mapping) and "policy" in values:
        return PolicySettings.from_dict(values, source=source)
    return VARConfig.from_dict(values, source=source)


def load_candidate(path: str | Path) -> Candidate:
    """Read a configuration that any command wrote, or a VARConfig file.

    It is ``best_config.json``, ``certified_config.json``, or ``nearest_miss.json``, of which the
    configuration is a part.

    Raises:
        UsageError: it is none of these; names the file and the entry.
    """
    values = read_json(path, what="VAR configuration")
    if isinstance(values, Mapping) and isinstance(values.get("config"), Mapping):
        values = values["config"]
    return candidate_from(values, source=str(path))


def in_mode(candidate: Candidate, mode: str | None, *, source: str) -> Candidate:
    """The candidate in VAR's mode ``mode``, or as it is; for files with the six fields alone.

    Raises:
        UsageError: it is not VAR's; names ``source``.
    """
    if isinstance(candidate, PolicySettings) and mode is not None:
        raise UsageError(
            f"{source}: settings of policy {candidate.policy!r} have no mode; leave --mode out"
        )
    if isinstance(candidate, PolicySettings) or mode in (None, candidate.mode):
        return candidate
    return candidate.replace(mode=mode, residuals=None)


def needs_of(candidate: Candidate) -> frozenset[str]:
    """What it needs of a profile, by the names of `routing.registry.CALIBRATION`.

    ``compensation`` is among them where it names one. Empty: it needs no profile.
    """
    if isinstance(candidate, VARConfig):
        return frozenset(("table", "residuals") if candidate.uses_residuals else ("table",))
    helped = candidate.compensation not in (None, "none")
    return frozenset((*policy_spec(candidate.policy).needs, *(("compensation",) * helped)))


def policy_of(candidate: Candidate, profile: RoutingProfile | None) -> RoutingPolicy:
    """The policy that a candidate configures, with what a profile was calibrated to.

    Args:
        candidate: what to make.
        profile: of the model; None where `needs_of` says that none is needed.
    """
    if isinstance(candidate, VARConfig):
        from var_moe.routing.var import VARPolicy

        assert profile is not None
        return VARPolicy(candidate, profile.table(), residuals=profile.residuals)
    return candidate.make((lambda _name: {}) if profile is None else profile.calibration)
