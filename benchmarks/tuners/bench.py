"""What all runs share: model, three texts, profile, cost model, trace, and the memo."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.tuners.memo import Memo, MemoEvaluator, PredictedObjective
from benchmarks.tuners.setting import SETUP_FILE, Setting

from var_moe.errors import UsageError, VarMoeError
from var_moe.evaluation.cost import CostModel, fit_cost_model
from var_moe.evaluation.evaluator import Evaluator
from var_moe.models.loading import load_model
from var_moe.optimization.candidate import VAR, Candidate
from var_moe.optimization.objective import PolicyObjective
from var_moe.optimization.preparation import halves, obtain_profile, read_text, sample_documents
from var_moe.optimization.replay_run import COST_FILE, TRACE_FOLDER, TraceForecaster
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, jsonable, provenance, read_json
from var_moe.tracing.record import record_trace
from var_moe.tracing.trace import RoutingTrace

MEMO_FILE = "evaluations.jsonl"
_COST_ERROR, _FITS, _BLOCKS = 0.05, 4, 10
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Everything that a run needs.

    Args:
        folder: of the results.
        setting: what is compared on.
        identity: the same with hashes, kept in each journal.
        objective: the search's; its evaluator scores the reduced text.
        ordering, test: evaluators of the other two texts.
        forecaster: of the reduced text, for replay.
        forecaster_seconds: what its trace and cost model took.
        memo: of all evaluations.
    """

    folder: Path
    setting: Setting
    identity: dict[str, Any]
    objective: PredictedObjective
    ordering: MemoEvaluator
    test: MemoEvaluator
    forecaster: TraceForecaster
    forecaster_seconds: float
    memo: Memo


def prepare(setting: Setting, folder: Path, *, profile: Path | None, say: Say) -> Bench:
    """Load and measure what is shared; what an earlier run left in the folder is taken over.

    Raises:
        UsageError: the folder holds runs of another setting; names what differs.
    """
    torch.set_num_threads(setting.threads)
    loaded = load_model(setting.model)
    validation = read_text(setting.dataset, "validation", loaded)
    tested = read_text(setting.dataset, "test", loaded)
    search_half, ordering_half = halves(validation.documents)
    texts = {
        "search": search_half[: setting.documents],
        "ordering": ordering_half[: setting.ordering_documents],
        "test": sample_documents(tested.documents, setting.test_documents),
    }
    found, _ = obtain_profile(loaded, setting.dataset, given=profile, folder=folder)
    identity = {
        **asdict(setting),
        "data_hash": validation.data_hash,
        "test_hash": tested.data_hash,
        "profile_hash": found.hash,
        "tokens": {name: sum(len(d.ids) for d in text) for name, text in texts.items()},
    }
    setup = _setup(folder, jsonable(identity))
    memo = Memo(folder / MEMO_FILE)
    evaluators = {
        name: MemoEvaluator(loaded, text, text=name, memo=memo) for name, text in texts.items()
    }
    search = evaluators["search"]
    # One backend for all baselines of all resumed runs: the last digits depend on it.
    if "backends_tps" in setup:
        search.__dict__["_fastest"] = (setup["baseline_backend"], setup["backends_tps"])
    fixed = {"mode": setting.mode}
    search.cost_policies = Candidate(policy=VAR, settings=fixed).cost_policies(found, loaded.top_k)
    objective = PredictedObjective(
        search, found, VAR, fixed=fixed, max_degradation=setting.max_degradation
    )
    setup["baseline_backend"] = search.baseline_backend
    setup["backends_tps"] = search.backend_throughputs
    cost = _cost_model(objective, folder, setup, say)
    for one in evaluators.values():
        one.cost = cost
        one.__dict__["_fastest"] = search.__dict__["_fastest"]
    trace = _trace(objective, folder, setup, setting.dataset, validation.data_hash)
    setup["baseline_perplexity"] = {n: e.baseline_losses.perplexity for n, e in evaluators.items()}
    atomic_write_json(folder / SETUP_FILE, jsonable(setup))
    say(
        f"{setting.documents} documents, {identity['tokens']['search']:,} tokens per evaluation; "
        f"cost model's error {100 * cost.error:.1f}%; {len(memo)} evaluations known"
    )
    return Bench(
        folder=folder,
        setting=setting,
        identity=identity,
        objective=objective,
        ordering=evaluators["ordering"],
        test=evaluators["test"],
        forecaster=TraceForecaster(
            {"none": trace},
            cost,
            policy=VAR,
            calibrations={"none": found.calibration()},
            fixed=fixed,
            decided=True,
        ),
        forecaster_seconds=setup["trace_s"] + setup["cost_model_s"],
        memo=memo,
    )


def _setup(folder: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The folder's setup, new or checked."""
    path = folder / SETUP_FILE
    if not path.is_file():
        return {
            "schema_version": SCHEMA_VERSION,
            "identity": identity,
            "provenance": provenance(),
        }
    setup: dict[str, Any] = read_json(path, what="setup of a comparison")
    for name, value in identity.items():
        before = setup["identity"].get(name)
        if before != value:
            raise UsageError(
                f"{path}: these runs were begun with {name} = {before!r}, now {value!r}; go on "
                "with the same or choose another --output"
            )
    return setup


def _cost_model(
    objective: PolicyObjective, folder: Path, setup: dict[str, Any], say: Say
) -> CostModel:
    """The folder's cost model, or a new one that timings confirm: all scores rest on it."""
    path = folder / COST_FILE
    if path.is_file() and "cost_model_s" in setup:
        values = read_json(path, what="cost model")
        return CostModel.from_dict(values, source=str(path))
    evaluator: Evaluator = objective.evaluator
    most, least = evaluator.cost_policies or (None, None)
    for attempt in range(_FITS):
        started = time.perf_counter()
        cost = fit_cost_model(evaluator, var_all=most, var_leading=least, blocks=_BLOCKS)
        setup["cost_model_s"] = time.perf_counter() - started
        say(f"cost model {attempt + 1}: error {100 * cost.error:.1f}%")
        if cost.error <= _COST_ERROR:
            break
    else:
        raise VarMoeError(
            f"the cost model's error stays above {100 * _COST_ERROR:.0f}%: the machine is too busy "
            "to time forwards; try again later, with --prepare_only at ordinary priority"
        )
    atomic_write_json(path, cost.to_dict())
    atomic_write_json(folder / SETUP_FILE, jsonable(setup))
    return cost


def _trace(
    objective: PolicyObjective, folder: Path, setup: dict[str, Any], dataset: str, data_hash: str
) -> RoutingTrace:
    place = folder / TRACE_FOLDER
    if "trace_s" in setup and place.is_dir():
        return RoutingTrace.load(place)
    started = time.perf_counter()
    trace = record_trace(
        objective.evaluator.loaded,
        objective.evaluator.documents,
        dataset=dataset,
        data_hash=data_hash,
        folder=place,
        profile=objective.profile,
        tokens_per_batch=objective.evaluator.tokens_per_batch,
    )
    setup["trace_s"] = time.perf_counter() - started
    atomic_write_json(folder / SETUP_FILE, jsonable(setup))
    return trace
