"""What a search chooses among, a file holds and a command takes: a policy with its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.config import DOCUMENTED_FIELDS, VARConfig
from var_moe.errors import UsageError
from var_moe.routing.registry import PolicySpec, policy_spec
from var_moe.storage import read_json

if TYPE_CHECKING:
    from var_moe.calibration.profile import RoutingProfile
    from var_moe.routing.base import RoutingPolicy

VAR = "var"
"""The policy whose settings are a `VARConfig`, and whose file is flat: no more than these."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy of the registry with its settings.

    A variant is its policy with the variant's settings: ``var_plain`` becomes ``var`` with ``mode``
    plain.

    Args:
        policy: name in the registry.
        settings: by the names of its search space.
        compensation: name of what stands in for dropped experts (`RoutingProfile.compensations`);
            None leaves it to the policy.
        source: the file that it was read from, which an error names.

    Raises:
        UsageError: no such policy, or VAR's settings are not valid.
    """

    policy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    compensation: str | None = None
    source: str | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        with self._named():
            given = policy_spec(self.policy)
            settings = given.complete(self.settings)
        object.__setattr__(self, "policy", given.variant_of or given.name)
        object.__setattr__(self, "settings", settings)

    @property
    def spec(self) -> PolicySpec:
        """The policy's entry in the registry."""
        return policy_spec(self.policy)

    @property
    def kind(self) -> str:
        """What it configures, in a few words."""
        words = [f"policy {self.policy}"]
        if "mode" in self.settings:
            words.append(f"mode {self.settings['mode']}")
        if self.compensation not in (None, "none"):
            words.append(f"compensation {self.compensation}")
        return ", ".join(words)

    @property
    def needs(self) -> frozenset[str]:
        """What it needs of a profile, by the names of `routing.registry.CALIBRATION`."""
        helped = ("compensation",) if self.compensation not in (None, "none") else ()
        return frozenset((*self.spec.needed(self.settings), *helped))

    def make(self, profile: RoutingProfile | None) -> RoutingPolicy:
        """The policy, with empty caches; ``profile`` may be None where `needs` is empty.

        Raises:
            UsageError: a setting is wrong or the profile lacks something; names the file.
        """
        calibration = {} if profile is None else profile.calibration(self.compensation)
        with self._named():
            return self.spec.make(self.settings, calibration)

    def cost_policies(
        self, profile: RoutingProfile | None, top_k: int
    ) -> tuple[RoutingPolicy, RoutingPolicy] | None:
        """Policies that do all of this one's work, and run all pairs or only the leading ones.

        None where that work is not worth timing: deciding takes next to nothing.
        """
        extremes = self.spec.load().cost_settings(self.settings)
        if extremes is not None:
            nothing, everything = (replace(self, settings=one).make(profile) for one in extremes)
            return nothing, everything
        if self.compensation is None and "damage" not in self.needs:
            return None
        from var_moe.routing.keeping import leading_count
        from var_moe.routing.simple import Overhead

        everything = Overhead(self.make(profile), leading_count(top_k))
        return Overhead(self.make(profile), top_k), everything

    def in_mode(self, mode: str | None) -> Candidate:
        """The candidate in VAR's mode ``mode``; unchanged for None.

        Raises:
            UsageError: its policy has no mode; names the file.
        """
        if mode is None or self.settings.get("mode") == mode:
            return self
        if "mode" not in self.settings:
            raise UsageError(
                f"{self.source}: settings of policy {self.policy!r} have no mode; leave --mode out"
            )
        return replace(self, settings={**self.settings, "mode": mode, "residuals": None})

    def per_document(self) -> Candidate:
        """The candidate whose decisions in a document depend on that document alone."""
        return replace(self, settings=self.spec.load().per_document(self.settings))

    def documented(self) -> dict[str, Any]:
        """The settings that are searched."""
        space = self.spec.search_space(2)  # names are the same for every K
        return {name: value for name, value in self.settings.items() if name in space}

    def as_best_params(self) -> VARConfig | Candidate:
        """As `OptimizationResult.best_params` documents it: a VARConfig for VAR, else itself."""
        return VARConfig.from_dict(self.settings) if self._is_flat else self

    @property
    def _is_flat(self) -> bool:
        return self.policy == VAR and self.compensation is None

    def to_dict(self) -> dict[str, Any]:
        """For a file: VAR's settings alone, any other policy with its name."""
        if self._is_flat:
            return dict(self.settings)
        extra = {} if self.compensation is None else {"compensation": self.compensation}
        return {"policy": self.policy, "settings": dict(self.settings), **extra}

    @classmethod
    def from_dict(cls, values: Any, *, source: str) -> Candidate:
        """Read what `to_dict` gave, or VAR's six documented fields.

        Raises:
            UsageError: it is none of these; names ``source`` and the entry.
        """
        if not isinstance(values, Mapping) or "policy" not in values:
            config = VARConfig.from_dict(values, source=source)
            return cls(policy=VAR, settings=config.to_dict(), source=source)
        own = set(values) - {"compensation"}
        if own != {"policy", "settings"} or not isinstance(values["settings"], Mapping):
            raise UsageError(
                f"{source}: expected the entries 'policy' and 'settings', and perhaps "
                "'compensation'"
            )
        return cls(**{**values, "policy": str(values["policy"])}, source=source)

    @classmethod
    def of(cls, given: Candidate | VARConfig) -> Candidate:
        """What Python code may give for a candidate."""
        return cls(policy=VAR, settings=given.to_dict()) if isinstance(given, VARConfig) else given

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except UsageError as error:
            if self.source is None:
                raise
            raise UsageError(f"{self.source}: {error}") from None


def preset(name: str, mode: str | None = None) -> Candidate:
    """VAR's preset of that name, or ``keep_all``: the unmodified model.

    Raises:
        UsageError: there is none.
    """
    if name == "keep_all":
        return Candidate(policy="native")
    return Candidate.of(VARConfig.preset(name)).in_mode(mode)


def load_candidate(path: str | Path) -> Candidate:
    """Read a configuration that any command wrote, or a VARConfig file.

    Of ``nearest_miss.json`` the configuration is a part.

    Raises:
        UsageError: it is none of these; names the file and the entry.
    """
    values = read_json(path, what="VAR configuration")
    if isinstance(values, Mapping) and isinstance(values.get("config"), Mapping):
        values = values["config"]
    return Candidate.from_dict(values, source=str(path))


def documented_params(params: Mapping[str, Any], mode: str) -> VARConfig | dict[str, Any]:
    """A point as `OptimizationResult.best_params` documents it.

    A VARConfig in ``mode`` where the point has its documented fields alone, else the point.
    """
    if set(params) <= set(DOCUMENTED_FIELDS):
        return VARConfig.from_dict({**params, "mode": mode})
    return dict(params)
