"""A guard: ranges of a policy's routing statistics, calibrated on documents, and what to do then.

The range of a statistic is a confidence interval of its mean over documents; `routing.watch`
bets against the ranges while the model serves. Each has half of the false-alarm rate alpha: with
probability 1 - alpha / 2 all means lie in their ranges, and if they do, a stream raises an alarm
with probability alpha / 2 at most, ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from var_moe.config import check_number
from var_moe.errors import UsageError
from var_moe.routing.counts import Sums, statistic_names, statistics
from var_moe.routing.wager import Floats, mean_range
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, read_json

ACTIONS = ("report", "warn", "fallback")
LEAST_UNITS = 40  # documents for a calibration
_CLIPPED_AT = 3.0  # standard deviations from the mean; values beyond are clipped to it
_LEAST_SPREAD = 1e-3  # standard deviation taken for a statistic that hardly varies


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One of `counts.statistic_names` over documents.

    Values are clipped to [``bottom``, ``top``], so that no document raises an alarm alone;
    ``mean``, ``low`` and ``high`` are of clipped values.
    """

    name: str
    stake: float  # part of the money that is bet on it; 0: only reported
    units: int  # calibration documents that have it
    mean: float
    spread: float  # standard deviation over documents
    bottom: float
    top: float
    low: float  # calibrated range of the mean
    high: float

    def __post_init__(self) -> None:
        for name in ("stake", "mean", "spread", "bottom", "top", "low", "high"):
            check_number(f"Expected.{name}", getattr(self, name), low=0, high=1)
        if not self.bottom <= self.low <= self.high <= self.top or self.bottom == self.top:
            raise UsageError(f"Expected {self.name!r}: expected bottom <= low <= high <= top")


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The calibrated statistics of one policy on one kind of text.

    Args:
        statistics: those that are watched.
        alpha: false-alarm rate that the ranges are made for.
        layers: L of the model.
        policy: `policy_facts` of the policy.
        head: what it was calibrated on: model, data, provenance.
    """

    statistics: tuple[Expected, ...]
    alpha: float
    layers: int
    policy: Mapping[str, Any]
    head: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_alpha(self.alpha)
        check_number("Expectation.layers", self.layers, integer=True, low=1)
        known = statistic_names(self.layers)
        for expected in self.statistics:
            if expected.name not in known:
                raise UsageError(
                    f"Expectation.statistics: unknown {expected.name!r}; expected names such as "
                    f"{', '.join(known[:3])}"
                )
        if not self.statistics:
            raise UsageError("Expectation.statistics: expected at least one")

    @classmethod
    def of_units(
        cls,
        units: Sequence[Sums],
        *,
        alpha: float,
        policy: Mapping[str, Any],
        head: Mapping[str, Any] | None = None,
        shared_cache: bool = False,
    ) -> Expectation:
        """Calibrate on documents, in random order.

        Every fourth document decides where values are clipped, the others give the range of the
        mean, which is exact for independent documents. A statistic that fewer than `LEAST_UNITS`
        documents have (such as an agreement where little is offered) is left out.

        Args:
            units: (L, 14) sums of each.
            alpha: false-alarm rate.
            policy: `policy_facts` of the policy that decided.
            head: facts about them for the file.
            shared_cache: documents share a context cache. Statistics of the cached tier then
                depend on earlier documents, and are only reported.

        Raises:
            UsageError: there are fewer than `LEAST_UNITS`.
        """
        check_alpha(alpha)
        check_units(len(units))
        layers = len(units[0])
        values = np.stack([statistics(sums) for sums in units])  # (N, J)
        names = statistic_names(layers)
        aside = [j for j, name in enumerate(names) if shared_cache and name.endswith(".cached")]
        watched = tuple(
            _expected(names[j], values[:, j], stake=stake, alpha=alpha * (stake or 1) / 2)
            for j, stake in _stakes(values, aside).items()
        )
        return cls(statistics=watched, alpha=alpha, layers=layers, policy=policy, head=head or {})


def _stakes(values: Floats, aside: Sequence[int]) -> dict[int, float]:
    """Stakes by position in `statistic_names`; zero for those ``aside``.

    Half is for statistics over all layers, half for those of single layers. One that equals an
    earlier one in every document (of a tier that decides everything) is left out.
    """
    used = []
    for j in range(values.shape[1]):
        same = (np.array_equal(values[:, j], values[:, i], equal_nan=True) for i in range(j))
        if (~np.isnan(values[:, j])).sum() >= LEAST_UNITS and not any(same):
            used.append(j)
    whole = len(statistic_names(0))
    over_all = [j for j in used if j < whole and j not in aside]
    single = [j for j in used if j >= whole]
    groups = [group for group in (over_all, single) if group]
    stakes = {j: 1 / len(groups) / len(group) for group in groups for j in group}
    return {j: stakes.get(j, 0.0) for j in used}


def _expected(name: str, values: Floats, *, stake: float, alpha: float) -> Expected:
    own = values[~np.isnan(values)]
    clipping, rest = own[::4], np.delete(own, np.s_[::4])
    middle = float(clipping.mean())
    reach = _CLIPPED_AT * max(float(clipping.std(ddof=1)), _LEAST_SPREAD)
    bottom, top = max(middle - reach, 0.0), min(middle + reach, 1.0)
    width = top - bottom
    scaled = np.clip((rest - bottom) / width, 0, 1)
    low, high = mean_range(scaled, alpha)
    return Expected(
        name=name,
        stake=stake,
        units=len(own),
        mean=bottom + width * float(scaled.mean()),
        spread=float(rest.std(ddof=1)),
        bottom=bottom,
        top=top,
        low=bottom + width * low,
        high=bottom + width * high,
    )


def check_units(number: int) -> None:
    """Raise UsageError where there are too few documents to calibrate on."""
    if number < LEAST_UNITS:
        raise UsageError(f"{number} document(s): calibrating a guard needs at least {LEAST_UNITS}")


def check_answer(action: str, tolerance: float) -> None:
    """Raise UsageError unless a `Guard` takes these values."""
    if action not in ACTIONS:
        raise UsageError(f"Guard.action = {action!r}: expected one of {', '.join(ACTIONS)}")
    check_number("Guard.tolerance", tolerance, low=0)


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Watches a routed model's decisions: ``routed(model, policy, guard=guard)``.

    Args:
        expectation: calibrated by `calibrate_guard`, or read from a file.
        action: ``"report"`` (only figures in the session's report), ``"warn"`` (one Python
            warning), ``"fallback"`` (the warning, and from then on the model's own routing).
        tolerance: how far a mean may leave its calibrated range, in standard deviations over
            documents.
    """

    expectation: Expectation
    action: str = "warn"
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        check_answer(self.action, self.tolerance)

    def check(self, policy: Mapping[str, Any], *, layers: int) -> None:
        """Refuse another policy's (by its `policy_facts`) or model's guard.

        Raises:
            UsageError: names both.
        """
        expectation = self.expectation
        if expectation.layers != layers:
            raise UsageError(
                f"guard for {expectation.layers} MoE layers, the model has {layers}; calibrate "
                "one on this model"
            )
        for name in sorted({*expectation.policy, *policy}):
            mine, other = expectation.policy.get(name), policy.get(name)
            if mine != other:
                raise UsageError(
                    f"guard calibrated with policy {name} = {mine!r}, but this one has {other!r}; "
                    "calibrate one with this policy"
                )

    def save(self, path: str | Path) -> None:
        """Write a JSON file, whole or not at all."""
        atomic_write_json(path, {"schema_version": SCHEMA_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> Guard:
        """Read a file that `save` wrote.

        Raises:
            UsageError: it is none; names the file and the entry.
        """
        values = read_json(path, what="guard")
        if not isinstance(values, Mapping) or values.get("schema_version") != SCHEMA_VERSION:
            raise UsageError(f"{path}: no guard of schema version {SCHEMA_VERSION}")
        own = {name: value for name, value in values.items() if name != "schema_version"}
        try:
            expected = own.pop("expectation")
            rows = tuple(Expected(**row) for row in expected["statistics"])
            return cls(expectation=Expectation(**{**expected, "statistics": rows}), **own)
        except (TypeError, KeyError) as error:
            raise UsageError(f"{path}: no guard ({error})") from None
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None


def policy_facts(policy: Any) -> dict[str, Any]:
    """What tells one policy from another: its class, plain settings, and compensation."""
    facts: dict[str, Any] = {"class": type(policy).__name__}
    facts |= {
        name: value
        for name, value in sorted(vars(policy).items())
        if not name.startswith("_") and isinstance(value, int | float | str)
    }
    config = getattr(policy, "config", None)
    if config is not None:
        facts.update(config.to_dict())
    compensation = policy.compensation
    facts["compensation"] = None if compensation is None else compensation.hash
    return facts


def check_alpha(alpha: Any) -> None:
    """Raise UsageError unless it is a false-alarm rate in (0, 0.5]."""
    check_number("alpha", alpha, low=0, high=0.5, open_low=True)
