"""Full evaluations kept on disk by configuration, so that none is ever run twice."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from var_moe.config import VARConfig
from var_moe.evaluation.cost import CostModel
from var_moe.evaluation.evaluator import Evaluator, Quality, Speed
from var_moe.evaluation.perplexity import Degradation
from var_moe.evaluation.throughput import Ratio
from var_moe.optimization.objective import PolicyObjective
from var_moe.optimization.results import Evaluation, documented_score
from var_moe.routing.counts import RoutingReport
from var_moe.routing.var import VARPolicy


@dataclass(frozen=True)
class Known:
    """A measured configuration, and what it took when it was measured.

    Processor time is what a machine shared with other work leaves comparable.
    """

    quality: Quality
    seconds: float
    cpu_seconds: float


class Memo:
    """One JSON line per text and configuration.

    A kill loses the running evaluation alone: a torn last line is cut off when it is opened.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            path.write_bytes(b"".join(lines[:-1]))
        whole = [json.loads(line) for line in lines if line.endswith(b"\n")]
        self._known = {line["key"]: _read(line) for line in whole}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, text: str, config: VARConfig) -> Known | None:
        """What is known of a configuration on a text."""
        return self._known.get(_key(text, config))

    def add(self, text: str, config: VARConfig, known: Known) -> None:
        """Keep it; on disk when this returns."""
        line = {
            "key": _key(text, config),
            "seconds": known.seconds,
            "cpu_seconds": known.cpu_seconds,
            "change": asdict(known.quality.change),
            "report": asdict(known.quality.report),
        }
        self._file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        os.fsync(self._file.fileno())
        self._known[line["key"]] = known

    def close(self) -> None:
        """Give the file free."""
        self._file.close()


def _key(text: str, config: VARConfig) -> str:
    return f"{text} {json.dumps(config.to_dict(), sort_keys=True)}"


def _read(line: dict[str, Any]) -> Known:
    report = line["report"]
    quality = Quality(
        change=Degradation(**line["change"]),
        report=RoutingReport(
            tokens=report["tokens"],
            top_k=report["top_k"],
            tier_counts=tuple(tuple(row) for row in report["tier_counts"]),
            executed_pairs=tuple(report["executed_pairs"]),
        ),
    )
    return Known(quality, line["seconds"], line["cpu_seconds"])


@dataclass
class MemoEvaluator(Evaluator):
    """An evaluator that measures each VAR configuration once in the life of a memo.

    `speed` times nothing: it is what the cost model says of the executed pairs.

    Args:
        text: name of the text in the memo.
        memo: the memo.
        cost: cost model, needed by `speed`.
    """

    text: str = ""
    memo: Memo | None = None
    cost: CostModel | None = None

    def measured(self, policy: VARPolicy) -> Known:
        """Quality of a policy, and what measuring it took."""
        assert self.memo is not None
        known = self.memo.get(self.text, policy.config)
        if known is None:
            _ = self.baseline_losses  # once per text, in no evaluation's time
            started, cpu = time.perf_counter(), time.process_time()
            quality = super().quality(policy)
            known = Known(quality, time.perf_counter() - started, time.process_time() - cpu)
            self.memo.add(self.text, policy.config, known)
        return known

    def quality(self, policy: Any, **_options: Any) -> Quality:
        """Perplexity against the baseline, on the whole text."""
        return self.measured(policy).quality

    def speedup(self, policy: VARPolicy) -> float:
        """Predicted from the pairs that the policy executed on this text."""
        assert self.cost is not None
        report, residual = self.quality(policy).report, policy.config.uses_residuals
        return self.cost.speedup(report, decided=True, residual=residual)

    def speed(self, policy: Any, *, blocks: int, factors: bool = True) -> Speed:
        """The same in the form of a measurement."""
        assert self.cost is not None
        value = self.speedup(policy)
        tokens = self.cost.setting.batch_size * self.cost.setting.sequence
        return Speed(
            speedup=Ratio(value, value, value),
            backend_factor=None,
            skipping_factor=None,
            baseline_tps=tokens / self.cost.baseline,
            tps=tokens / self.cost.baseline * value,
            keep_all_tps=None,
            baseline_backend=self.baseline_backend,
            backend="none",
            blocks=0,
        )


class PredictedObjective(PolicyObjective):
    """VAR's objective with the predicted speedup for the timed one; the score is the documented.

    Its evaluator is a `MemoEvaluator`.
    """

    def evaluate(self, params: Any) -> Evaluation:
        """One full evaluation, from the memo where it was made before."""
        policy = self.policy(self.candidate(params))
        quality, speedup = self.evaluator.quality(policy), self.evaluator.speedup(policy)
        change, report = quality.change, quality.report
        return Evaluation(
            params=dict(params),
            score=documented_score(
                degradation=change.value,
                max_degradation=self.max_degradation,
                speedup=speedup,
                learned_pct=report.learned_pct,
            ),
            degradation=change.value,
            degradation_se=change.standard_error,
            speedup=speedup if change.value <= self.max_degradation else None,
            predicted_speedup=speedup,
            perplexity=change.perplexity,
            fast_pct=report.fast_pct,
            cached_pct=report.cached_pct,
            learned_pct=report.learned_pct,
            cache_hit_rate=report.cache_hit_rate,
            experts_per_token=report.experts_per_token,
            feasible=change.value <= self.max_degradation,
        )

    def known(self, params: Any) -> Known:
        """An evaluation with what it took when it was measured."""
        return self.evaluator.measured(self.policy(self.candidate(params)))
