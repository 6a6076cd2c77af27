"""Validation: one configuration on held-out text, with the search's own profile."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from var_moe.calibration.fitted_files import load_compensation
from var_moe.calibration.profile import RoutingProfile
from var_moe.config import MAX_DEGRADATION, check_bound
from var_moe.errors import UsageError
from var_moe.evaluation.evaluator import Evaluator, Progress, Speed, measure_by_dataset
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.growing import GrowingResult
from var_moe.optimization.candidate import load_candidate
from var_moe.optimization.preparation import PROFILE_FOLDER, read_text, sample_documents
from var_moe.optimization.results import METADATA_FILE
from var_moe.optimization.summary import success_criteria
from var_moe.routing.keeping import leading_count
from var_moe.routing.simple import RandomSkipPolicy
from var_moe.storage import SCHEMA_VERSION, entries_of, jsonable, provenance, read_json

if TYPE_CHECKING:
    from var_moe.models.loading import LoadedModel

VALIDATION_FILE = "validation_results.json"
RUNS = 3
BLOCKS = 10


def find_profile(config_path: Path, given: Path | None = None) -> RoutingProfile:
    """The profile that the search used, recognised by its hash.

    Args:
        config_path: the configuration; the search's metadata lie beside it.
        given: a profile folder, for a configuration that no search left.

    Raises:
        UsageError: there is none, or its hash is not the one that the search recorded.
    """
    profile = profile_beside(config_path, given)
    if profile is None:
        raise UsageError(
            f"{config_path}: no profile beside it; give the one it was tuned with as --profile "
            "FOLDER"
        )
    return profile


def profile_beside(config_path: Path, given: Path | None = None) -> RoutingProfile | None:
    """As `find_profile`, but None where there is no profile at all."""
    recorded: dict[str, Any] = {}
    with entries_of(config_path.parent / METADATA_FILE):
        recorded = dict(_metadata(config_path).get("profile") or {})
    places = [given] if given else [config_path.parent / PROFILE_FOLDER]
    if not given:  # beside the configuration first: a results folder may have been moved
        places += [Path(recorded["path"])] if recorded.get("path") else []
        # One of several seeds, which share a profile.
        places += [config_path.parent.parent / PROFILE_FOLDER] if recorded.get("hash") else []
    other = ""
    for place in places:
        if not given and not place.is_dir():
            continue
        profile = RoutingProfile.load(place)
        if recorded.get("hash") in (None, profile.hash):
            return profile
        other = (
            f"{place}: not the profile that {config_path} was found with (hash "
            f"{profile.hash[:12]}, expected {str(recorded['hash'])[:12]})"
        )
    if other:
        raise UsageError(other)
    return None


def _metadata(config_path: Path) -> dict[str, Any]:
    """What the search says of itself beside its configuration, if one did."""
    path = config_path.parent / METADATA_FILE
    known: dict[str, Any] = read_json(path, what="metadata of a search") if path.is_file() else {}
    return known


def validate(
    loaded: LoadedModel,
    config_path: Path,
    *,
    dataset: str,
    split: str = "test",
    max_degradation: float = MAX_DEGRADATION,
    robust: bool = False,
    output: Path | None = None,
    profile_path: Path | None = None,
    compensation: Path | None = None,
    max_samples: int | None = None,
    mode: str | None = None,
    runs: int = RUNS,
    blocks: int = BLOCKS,
    setting: SpeedSetting | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a configuration on held-out text, and write ``validation_results.json`` meanwhile.

    Perplexity is deterministic, so it is scored once, on all documents; throughput is
    measured in ``runs`` separate runs of alternating blocks.

    Args:
        loaded: the model.
        config_path: ``best_config.json`` of any search, or a VARConfig file.
        dataset, split: of the text; each of several data sets (``a,b,c``) is reported apart, and
            so is each source of a single one.
        max_degradation: bound on the relative perplexity change.
        robust: hold the bound against the worst of several data sets.
        output: folder for the result; the configuration's own by default.
        profile_path: profile folder, where none lies beside the configuration.
        compensation: folder of the learned compensation, where it is not the profile's own.
        max_samples: score at most so many documents (a seeded sample).
        mode: overrides the configuration's mode, for a file with the six fields alone.
        runs, blocks: throughput runs, and timed blocks per arm of each.
        setting: batch that throughput is measured on.
        progress: called with a stage's name, steps done and in all.

    Raises:
        UsageError: a file is missing or wrong, or the profile is not the search's.
    """
    from var_moe.data.documents import require_documents

    bound = check_bound(max_degradation)
    if runs < 3:
        raise UsageError(f"runs = {runs}: expected at least 3, to tell a spread")
    config = load_candidate(config_path).in_mode(mode)
    profile = find_profile(config_path, profile_path)
    profile.check_loaded(loaded)
    if compensation is not None:
        profile = profile.with_compensation(load_compensation(compensation, loaded))
    text = read_text(dataset, split, loaded)
    documents = sample_documents(text.documents, max_samples)
    require_documents(documents, 2, "comparing perplexities")
    evaluator = Evaluator(
        loaded,
        documents,
        setting=setting or SpeedSetting(),
        progress=progress,
        robust=robust,
        cost_policies=config.cost_policies(profile, loaded.top_k),
    )
    result: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "config": config.to_dict(),
        "text": text.to_dict(),
        "max_degradation": bound,
        "robust": robust,
        "profile_hash": profile.hash,
        "seen": _seen(text.data_hash, config_path, profile),
        "model": {"name": loaded.name, "revision": loaded.revision, "dtype": loaded.dtype},
        "provenance": provenance(),
    }
    path = (output or config_path.parent) / VALIDATION_FILE
    with GrowingResult(path) as kept:

        def known(missing: str | None = None, **figures: Any) -> dict[str, Any]:
            result.update(figures)
            return kept.save(jsonable(result), missing=missing)

        quality = evaluator.quality(config.make(profile))
        executed = quality.report.experts_per_token
        known("the data sets apart, the control, throughput", **quality.to_dict())
        by_dataset = measure_by_dataset(evaluator, config.make(profile))
        known("the control, throughput", by_dataset=by_dataset)
        random = _random_skip(executed, evaluator.top_k)
        control = evaluator.quality(random, what="random skip: perplexity")
        known(
            "throughput",
            random_skip=control.to_dict(),
            setting=evaluator.setting.to_dict(),
            notes=result["seen"],
        )
        speeds: list[Speed] = []
        while len(speeds) < runs:
            speeds.append(evaluator.speed(config.make(profile), blocks=blocks))
            ran = [one.to_dict() for one in speeds]
            known(f"throughput after {len(speeds)} of {runs} runs", runs=ran)
        noise = evaluator.noise_floor(blocks=blocks)
        speeds.sort(key=lambda one: one.speedup.median)
        middle = speeds[len(speeds) // 2]
        spread = speeds[-1].speedup.median - speeds[0].speedup.median
        return known(
            **middle.to_dict(),
            notes=[*result["seen"], *evaluator.timing_notes()],
            predicted_speedup=evaluator.predicted_speedup(executed),
            noise_floor=noise.to_dict(),
            speedup_spread=spread / middle.speedup.median,
            criteria=success_criteria(
                degradation=quality.judged.value,
                upper=quality.judged.upper,
                max_degradation=bound,
                speedups=[one.speedup for one in speeds],
                learned_pct=quality.report.learned_pct,
            ),
        )


def _seen(data_hash: str, config_path: Path, profile: RoutingProfile) -> list[str]:
    """Why the text is not held out: it was profiled, or the search chose on it."""
    uses = {
        "was profiled": profile.head["data_hash"],
        "is what the search chose on": (_metadata(config_path).get("validation") or {}).get(
            "data_hash"
        ),
    }
    return [f"this text {use}, so it is not held out" for use in uses if uses[use] == data_hash]


def _random_skip(executed: float, top_k: int) -> RandomSkipPolicy:
    """The control: cuts as many pairs, at random."""
    share = (top_k - executed) / max(1, top_k - leading_count(top_k))
    return RandomSkipPolicy(min(max(share, 0.0), 1.0))
