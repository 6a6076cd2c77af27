"""What `tune` is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from var_moe.config import check_seed
from var_moe.errors import UsageError
from var_moe.evaluation.compare import SpeedSetting
from var_moe.optimization.judgement import check_robust
from var_moe.optimization.objective_protocol import check_bound
from var_moe.optimization.policy_forecast import not_replayable
from var_moe.optimization.results import jsonable
from var_moe.optimization.search_space import SEARCH_SPACE, SearchSpace
from var_moe.profiling.collect import DEFAULT_TOKENS
from var_moe.routing.registry import policy_spec
from var_moe.storage import check_output_folder

METHODS = ("replay", "bayesian", "grid", "random")
DEFAULT_SAMPLES = 200
_AT_LEAST = {
    **dict.fromkeys(("n_calls", "n_points", "final_blocks", "candidates"), 1),
    **dict.fromkeys(("max_samples", "final_samples"), 2),  # an error needs two documents
    "calibration_tokens": 1,
}


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """What `tune` is asked to do; the defaults are the documented ones.

    Args:
        method, engine: how points are chosen; the engine is for the bayesian method.
        exhaustive: the grid runs the model for each of its points; else their forecasts choose
            `n_calls` of them, as for the method replay.
        dataset: name or path, or several as ``a,b,c``; its calibration split is profiled, its
            validation split judges.
        robust: judge the worst of several data sets, not all text together.
        n_calls: full evaluations; of the exhaustive grid all points are.
        n_points: values per dimension of the grid.
        max_degradation: bound on the relative perplexity change.
        output: folder for the results.
        shared: folder of the profile, trace and cost model; by default the output's.
        seed: of the search; None draws a fresh one, which is recorded.
        mode: ``"verified"`` or ``"plain"``.
        policy: another policy's name, to tune that one in place of VAR, in its own `space`.
        compensation: name of what stands in for the experts that the policy drops.
        compensation_folder: where a learned one lies, if not with the profile.
        max_samples: documents of the search half that each evaluation scores.
        final_samples: documents of the ordering half for the last measurement; None takes all.
        space: search space.
        resume: go on with the search in `output`.
        profile: a ready profile folder.
        calibration_tokens: size of a fresh profile.
        final_blocks: timed blocks per arm of the last measurement.
        candidates: how many candidates are measured again at the most.
        setting: batch that throughput is measured on.
    """

    method: str = "bayesian"
    engine: str = "optuna"
    exhaustive: bool = True
    dataset: str = "demo"
    robust: bool = False
    n_calls: int = 50
    n_points: int = 3
    max_degradation: float = 0.01
    output: Path = Path("results/phase3")
    shared: Path | None = None
    seed: int | None = None
    mode: str = "verified"
    policy: str | None = None
    compensation: str | None = None
    compensation_folder: Path | None = None
    max_samples: int = DEFAULT_SAMPLES
    final_samples: int | None = None
    space: SearchSpace = field(default_factory=lambda: dict(SEARCH_SPACE))
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
    def by_replay(self) -> bool:
        """Whether forecasts from a trace choose what is evaluated."""
        return self.method == "replay" or (self.method == "grid" and not self.exhaustive)

    def __post_init__(self) -> None:
        check_bound(self.max_degradation)
        if self.method not in METHODS:
            raise UsageError(f"method {self.method!r}: expected one of {', '.join(METHODS)}")
        if self.by_replay and self.policy and not policy_spec(self.policy).cuts_only:
            raise UsageError(not_replayable(self.policy))
        check_seed(self.seed)
        check_robust(self.robust, self.dataset)
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{name} = {value}: expected at least {least}")
        check_output_folder(self.output)

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["setting"] = self.setting.to_dict()
        found: dict[str, Any] = jsonable(values)
        return found
