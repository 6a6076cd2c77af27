"""What `tune` is asked to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from var_moe.calibration.collect import DEFAULT_TOKENS
from var_moe.config import MAX_DEGRADATION, check_bound, check_count, check_seed
from var_moe.data.text import check_robust
from var_moe.errors import UsageError
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.extras import require
from var_moe.optimization.candidate import VAR
from var_moe.optimization.search_space import SearchSpace, check_grid, parse_bounds
from var_moe.optimization.trial_log import LOG_NAME, shown
from var_moe.routing.registry import PolicySpec, policy_spec
from var_moe.storage import check_output_folder, jsonable

METHODS = ("replay", "bayesian", "grid", "random")
BEST_POLICY = "damage"
CALLS, FORECAST_CALLS = 50, 10
_AT_LEAST = {
    **dict.fromkeys(("n_calls", "n_points", "final_blocks", "candidates"), 1),
    **dict.fromkeys(("max_samples", "final_samples"), 2),  # an error needs two documents
    "calibration_tokens": 1,
}


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What `tune` is asked to do, by the command line and in Python; the defaults of both.

    What is left out is the policy's own: its search space, replay where a trace tells what its
    decisions cost, and how much is evaluated.

    Args:
        policy: its name; ``"var"`` for VAR's six thresholds. By default ``"damage"``, or ``"var"``
            where `mode`, `method`, `space` or `bounds` is given.
        method, engine: how points are chosen; the engine is for the bayesian method.
        exhaustive: the grid runs the model for each of its points; else their forecasts choose
            `n_calls` of them, as for the method replay. Without a fast replay (only ``"var"`` has
            one) it always does.
        dataset: name or path, or several as ``a,b,c``; its calibration split is profiled, its
            validation split judges.
        robust: judge the worst of several data sets, not all text together.
        n_calls: full evaluations, of the exhaustive grid all points; by default 10 where forecasts
            choose them, else 50; resumed, as many as the search was begun with.
        n_points: values per dimension of the grid; 5 by default, 3 with `exhaustive`.
        max_degradation: bound on the relative perplexity change.
        output: folder for the results.
        shared: folder of the profile, trace and cost model; by default the output's.
        storage: of the trials: a file, or the URL of a database, which several processes can
            share; by default ``optuna_study.log`` in the output folder.
        seed: of the search; None draws a fresh one, which is recorded.
        mode: VAR's: ``"verified"`` (default) or ``"plain"``.
        compensation: name of what stands in for the experts that the policy drops; by default
            all that the profile has are searched.
        compensation_folder: where a learned one lies, if not with the profile.
        max_samples: documents of the search half that each evaluation scores.
        final_samples: documents of the ordering half for the last measurement; None takes all.
        space: search space.
        bounds: changes of it, as ``name=low:high``.
        resume: go on with the search in `output`.
        profile: a ready profile folder.
        calibration_tokens: size of a fresh profile.
        final_blocks: timed blocks per arm of the last measurement.
        candidates: how many candidates are measured again at the most.
        setting: batch that throughput is measured on.
    """

    policy: str | None = None
    method: str | None = None
    engine: str = "optuna"
    exhaustive: bool = False
    dataset: str = "demo"
    robust: bool = False
    n_calls: int | None = None
    n_points: int | None = None
    max_degradation: float = MAX_DEGRADATION
    output: Path = Path("results/phase3")
    shared: Path | None = None
    storage: str | None = None
    seed: int | None = None
    mode: str | None = None
    compensation: str | None = None
    compensation_folder: Path | None = None
    max_samples: int = 200
    final_samples: int | None = None
    space: SearchSpace | None = None
    bounds: Sequence[str] = ()
    resume: bool = False
    profile: Path | None = None
    calibration_tokens: int = DEFAULT_TOKENS
    final_blocks: int = 10
    candidates: int = 8
    setting: SpeedSetting = field(default_factory=SpeedSetting)

    @property
    def preparations(self) -> Path:
        """Folder of the profile, trace and cost model."""
        return self.shared or self.output

    @property
    def trial_log(self) -> str | Path:
        """Where the trials are kept."""
        return self.storage or self.output / LOG_NAME

    @property
    def by_replay(self) -> bool:
        """Whether forecasts from a trace choose what is evaluated."""
        return self.method == "replay" or (self.method == "grid" and not self.exhaustive)

    @property
    def calls(self) -> int:
        """Full evaluations of a new search."""
        default = FORECAST_CALLS if self.by_replay else CALLS
        return default if self.n_calls is None else self.n_calls

    @property
    def points(self) -> int:
        """Values per dimension of the grid."""
        return (3 if self.exhaustive else 5) if self.n_points is None else self.n_points

    def space_for(self, top_k: int) -> SearchSpace:
        """What is searched on a model with K = ``top_k``.

        Raises:
            UsageError: the space or its bounds are not valid.
        """
        return parse_bounds(self.bounds, self.space or self.spec.search_space(top_k))

    @property
    def spec(self) -> PolicySpec:
        """The policy's entry in the registry."""
        return policy_spec(str(self.policy))

    @property
    def fixed(self) -> dict[str, Any]:
        """Settings of the policy that the search does not change."""
        return {} if self.mode is None else {"mode": self.mode}

    def _take_defaults(self) -> None:
        """Fill in what the policy decides."""
        asked = (self.policy, self.mode, self.method, self.space)
        best = all(one is None for one in asked) and not self.bounds
        given = policy_spec(BEST_POLICY if best else self.policy or VAR)
        spec, own = policy_spec(given.variant_of or given.name), given.complete({}).get("mode")
        fixed = "mode" in given.settings or own is None
        if self.mode is not None and fixed and own != self.mode:
            raise UsageError(
                f"mode {self.mode!r} does not belong to policy {self.policy!r}: leave one out"
            )
        if self.mode is not None:
            given.complete({"mode": self.mode})
        if not spec.search_space(2):
            raise UsageError(f"policy {spec.name!r} has nothing to tune")
        if spec.replay is not None and self.compensation is not None:
            raise UsageError("a compensation needs a policy that drops experts, such as damage")
        for name, value in {
            "policy": spec.name,
            "mode": self.mode or own,
            "method": self.method or ("replay" if spec.replayable else "bayesian"),
            "exhaustive": self.exhaustive or spec.replay is None,
        }.items():
            object.__setattr__(self, name, value)

    def __post_init__(self) -> None:
        self._take_defaults()
        for name in ("output", "shared", "profile", "compensation_folder"):
            if isinstance(value := getattr(self, name), str):
                object.__setattr__(self, name, Path(value))
        check_bound(self.max_degradation)
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.by_replay and not self.spec.replayable:
            raise UsageError(not_replayable(self.spec.name))
        check_seed(self.seed)
        check_robust(self.robust, self.dataset)
        for name, least in _AT_LEAST.items():
            check_count(name, getattr(self, name), least)
        try:
            space = self.space_for(2)  # a policy's names are the same for every K
        except UsageError as error:
            raise UsageError(f"{error} (policy {self.policy}; --policy takes another)") from None
        if self.method == "grid":
            check_grid(space, self.points)
        if self.method == "bayesian" and self.engine == "skopt":
            require("skopt")
        check_output_folder(self.output)

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["setting"] = self.setting.to_dict()
        values["storage"] = shown(self.trial_log)
        values |= {"n_calls": self.calls, "n_points": self.points}
        return dict(jsonable(values))


def not_replayable(policy: str) -> str:
    """Why a policy is not searched by replay, and what to do."""
    return (
        f"policy {policy!r} is not searched by replay: a trace does not tell what its decisions "
        "cost; use --method bayesian"
    )
