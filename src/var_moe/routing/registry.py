"""Routing policies by name. A policy's module is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, cast

from var_moe.config import plain
from var_moe.errors import UsageError

if TYPE_CHECKING:
    from var_moe.routing.base import RoutingPolicy, Sweep

CALIBRATION = {
    "table": "the static table of a profile (RoutingTable)",
    "residuals": "the residual means of a profile (ResidualMeans)",
    "ratios": "per-layer quantiles of w_j / w_1 (RatioQuantiles)",
    "damage": "predicted damages of cuts (DamageModel); make the profile with `var-moe profile`",
    "sensitivity": "the loss of running k experts, per layer (LayerSensitivity)",
}
"""What a policy may need from calibration text, by the name under which it asks for it."""


@dataclass(frozen=True, kw_only=True)
class PolicySpec:
    """How a policy is made.

    Args:
        name: under which it is asked for.
        target: ``"module:class"``.
        summary: one line for people.
        needs: names of `CALIBRATION` that it is made from.
        settings: fixed settings, where several policies share a class.
        settings_type: ``"module:class"`` of its settings, if they have a type: with `from_dict`,
            which checks them and fills in defaults, and `to_dict`.
        variant_of: the policy that is this one with these settings.
        replay: ``"module:class"`` of its own `tracing.replay.Replayer`. Without one, the policy's
            code decides on the trace.
    """

    name: str
    target: str
    summary: str
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    settings_type: str | None = None
    variant_of: str | None = None
    replay: str | None = None

    def load(self) -> type[RoutingPolicy]:
        """The policy's class."""
        return cast("type[RoutingPolicy]", resolve_name(self.target))

    @property
    def replayable(self) -> bool:
        """Whether a trace tells what its decisions cost, so that it can be searched by replay."""
        return self.replay is not None or self.load().cuts_only

    def needed(self, settings: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of `CALIBRATION` that the policy needs with these settings."""
        return self.load().needed({**settings, **self.settings}, self.needs)

    def complete(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as a file holds them: with a type, checked and with its defaults."""
        self._check_own(settings)
        whole = {**settings, **self.settings}
        if self.settings_type is None:
            return whole
        return cast("dict[str, Any]", resolve_name(self.settings_type).from_dict(whole).to_dict())

    def _check_own(self, settings: Mapping[str, Any]) -> None:
        for name, value in self.settings.items():
            if settings.get(name, value) != value:
                raise UsageError(
                    f"policy {self.name!r}: {name} = {settings[name]!r}: expected {value!r}"
                )

    def search_space(self, top_k: int) -> dict[str, dict[str, Any]]:
        """What a tuner may vary, for a model with K = ``top_k``; empty: nothing."""
        return self.load().search_space(top_k)

    def sweeps(self, top_k: int) -> dict[str, Sweep]:
        """Ways from mild to hard; see `RoutingPolicy.sweeps`."""
        return self.load().sweeps(top_k)

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise UsageError for what `make` would refuse, as far as it shows without calibration."""
        self.load().check_settings({**settings, **self.settings}, self.needs)

    def make(
        self, settings: Mapping[str, Any], calibration: Mapping[str, Any] | None = None
    ) -> RoutingPolicy:
        """Make the policy.

        Args:
            settings: its values, such as a point of its search space.
            calibration: by the names of `CALIBRATION`, and ``compensation``, which stands in for
                the pairs that the policy drops; what it does not ask for is ignored.

        Raises:
            UsageError: a setting is unknown, missing or out of its range, or an input is missing.
        """
        if not isinstance(calibration, Mapping | None):
            kind = type(calibration).__name__
            raise UsageError(
                f"policy {self.name!r}: calibration is {kind}: expected what "
                "RoutingProfile.calibration() returns"
            )
        settings = plain(settings)
        self._check_own(settings)
        given = {name: value for name, value in (calibration or {}).items() if value is not None}
        needed = self.needed(settings)
        for name in needed:
            if name not in given:
                raise UsageError(f"policy {self.name!r} needs {name!r}: {CALIBRATION[name]}")
        asked = {name: given[name] for name in needed}
        policy = self.load().build({**settings, **self.settings}, asked)
        compensation = given.get("compensation")
        return policy if compensation is None else policy.compensated(compensation)


_SPECS: dict[str, PolicySpec] = {}


def register(spec: PolicySpec) -> None:
    """Make a policy known by its name, which must not be taken."""
    if spec.name in _SPECS:
        raise UsageError(f"policy {spec.name!r} is registered already ({_SPECS[spec.name].target})")
    for name in spec.needs:
        if name not in CALIBRATION:
            raise UsageError(
                f"policy {spec.name!r} asks for {name!r}; expected one of {', '.join(CALIBRATION)}"
            )
    _SPECS[spec.name] = spec


def policy_names() -> tuple[str, ...]:
    """All names, in the order in which they were registered."""
    return tuple(_SPECS)


def policy_spec(name: str) -> PolicySpec:
    """The policy of that name; a UsageError suggests the nearest one."""
    if isinstance(name, str) and name in _SPECS:
        return _SPECS[name]
    near = get_close_matches(str(name), _SPECS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"policy {name!r}: {hint}expected one of {', '.join(_SPECS)}")


def make_policy(
    name: str, settings: Mapping[str, Any], calibration: Mapping[str, Any] | None = None
) -> RoutingPolicy:
    """The policy ``name`` with these settings and calibration inputs; see `PolicySpec.make`."""
    return policy_spec(name).make(settings, calibration)


for _spec in (
    PolicySpec(
        name="native",
        target="var_moe.routing.simple:NativePolicy",
        summary="all K experts: the unmodified model",
    ),
    PolicySpec(
        name="fixed_k",
        target="var_moe.routing.simple:FixedKPolicy",
        summary="the first k experts of every token",
    ),
    PolicySpec(
        name="random_skip",
        target="var_moe.routing.simple:RandomSkipPolicy",
        summary="control: cuts a random share of decisions",
    ),
    PolicySpec(
        name="naee",
        target="var_moe.routing.naee:NAEEPolicy",
        summary="skips experts below a calibrated share of the first one's weight",
        needs=("ratios",),
    ),
    PolicySpec(
        name="ser",
        target="var_moe.routing.simple:SERPolicy",
        summary="keeps Kmin experts, others only near the first one's weight",
    ),
    PolicySpec(
        name="top_p",
        target="var_moe.routing.simple:TopPPolicy",
        summary="the fewest experts that reach a routing mass",
    ),
    PolicySpec(
        name="per_layer_k",
        target="var_moe.routing.per_layer_k:PerLayerKPolicy",
        summary="a budget of experts shared out over layers by sensitivity",
        needs=("sensitivity",),
    ),
    PolicySpec(
        name="damage",
        target="var_moe.routing.damage:DamagePolicy",
        summary="VAR: cuts what is predicted to cost least, with a compensation for the rest",
        needs=("damage",),
    ),
    PolicySpec(
        name="var",
        target="var_moe.routing.var:VARPolicy",
        settings_type="var_moe.config:VARConfig",
        summary="VAR: six thresholds of a table, a cache and the router, in plain or verified mode",
        needs=("table", "residuals"),
        replay="var_moe.tracing.replay:TraceReplay",
    ),
    PolicySpec(
        name="var_plain",
        target="var_moe.routing.var:VARPolicy",
        settings_type="var_moe.config:VARConfig",
        summary="VAR: the table's and the cache's experts run unseen",
        needs=("table",),
        settings={"mode": "plain"},
        variant_of="var",
    ),
    PolicySpec(
        name="var_verified",
        target="var_moe.routing.var:VARPolicy",
        settings_type="var_moe.config:VARConfig",
        summary="VAR: table and cache license a cut, the router chooses",
        needs=("table", "residuals"),
        settings={"mode": "verified"},
        variant_of="var",
    ),
):
    register(_spec)
