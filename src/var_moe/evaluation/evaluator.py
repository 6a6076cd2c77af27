"""Policies against the unmodified model: quality on the same tokens, speed in the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any

from torch import Tensor

from var_moe.evaluation.perplexity import (
    LEAST,
    Degradation,
    DocumentLosses,
    Worst,
    datasets_of,
    degradation,
    document_losses,
    groups_of,
    worst_of,
)
from var_moe.evaluation.speed_setting import SpeedSetting
from var_moe.evaluation.throughput import (
    CHOOSING_BLOCKS,
    Arm,
    ArmGroup,
    Ratio,
    Timings,
    backend_arm,
    policy_arm,
    time_groups,
    usable_backends,
)
from var_moe.execution.backends import open_backend
from var_moe.execution.backends.base import ExpertsBackend
from var_moe.execution.session import Session
from var_moe.models.moe_layers import experts_shape
from var_moe.routing.base import RoutingPolicy
from var_moe.routing.counts import RoutingReport
from var_moe.routing.keeping import leading_count
from var_moe.routing.simple import FixedKPolicy, NativePolicy

if TYPE_CHECKING:
    from var_moe.data.documents import EncodedDocument
    from var_moe.models.loading import LoadedModel

_CHOOSING_TOKENS = 16  # generated to find the fastest of transformers' backends
Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done, and steps in all."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A policy's degradation on a text, and its routing there."""

    change: Degradation
    report: RoutingReport
    worst: Worst | None = None  # set where the worst of several data sets is judged

    @property
    def judged(self) -> Degradation:
        """What a bound applies to: the change of the worst data set, else that of all text."""
        return self.worst.change if self.worst is not None else self.change

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        worst = self.worst.to_dict() if self.worst is not None else {}
        return {**self.change.to_dict(), **worst, **self.report.to_dict()}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A policy's measured speedup with its two factors: speedup ~ backend x skipping."""

    speedup: Ratio  # baseline time / VAR time
    backend_factor: Ratio | None  # baseline time / our path keeping all pairs
    skipping_factor: Ratio | None  # our path keeping all pairs / VAR time
    baseline_tps: float
    tps: float
    keep_all_tps: float | None
    baseline_backend: str
    backend: str  # the one that ran the executed pairs
    blocks: int

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {
            "speedup": self.speedup.median,
            "speedup_95": [self.speedup.low, self.speedup.high],
            "backend_factor": self.backend_factor and self.backend_factor.to_dict(),
            "skipping_factor": self.skipping_factor and self.skipping_factor.to_dict(),
            "baseline_throughput_tps": self.baseline_tps,
            "keep_all_throughput_tps": self.keep_all_tps,
            "throughput_tps": self.tps,
            "baseline_backend": self.baseline_backend,
            "backend": self.backend,
            "blocks": self.blocks,
        }


@dataclass
class Evaluator:
    """Measures policies on one model and one text against the unmodified model.

    The baseline's losses, its fastest backend and the cost of an executed pair are measured
    once, when first needed.
    """

    loaded: LoadedModel
    documents: Sequence[EncodedDocument]
    setting: SpeedSetting = field(default_factory=SpeedSetting)
    tokens_per_batch: int = 4096
    backend: str | ExpertsBackend = "auto"
    progress: Progress | None = None
    cost_policies: tuple[RoutingPolicy, RoutingPolicy] | None = None
    """Policies that run all pairs and only the leading ones, for `predicted_speedup`; by default
    without any routing cost of their own."""
    robust: bool = False
    """Whether bounds apply to the worst of several data sets."""
    _turns: Iterator[int] = field(default_factory=count, init=False, repr=False)
    _timed_tokens: int = field(default=0, init=False, repr=False)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.loaded.model

    @cached_property
    def top_k(self) -> int:
        """K of the unmodified model."""
        return self.loaded.top_k

    @cached_property
    def running_backend(self) -> ExpertsBackend:
        """Who runs the pairs of every policy: its copies of weights are made once."""
        if isinstance(self.backend, str):
            return open_backend(self.backend, self.model)
        return self.backend

    @property
    def timed_setting(self) -> SpeedSetting:
        """The setting, with rows that the model's window holds."""
        return replace(self.setting, sequence=min(self.setting.sequence, self.loaded.window))

    def timing_batches(self, blocks: int) -> list[Tensor]:
        """Batches (B, S) for so many timed blocks: other rows of the text at each call."""
        return list(self._group({}, blocks).batches)

    def _group(self, arms: Mapping[str, Arm], blocks: int) -> ArmGroup:
        return self.timed_setting.group(self.documents, arms, blocks=blocks, turn=next(self._turns))

    @cached_property
    def _fastest(self) -> tuple[str, dict[str, float]]:
        setting = replace(self.timed_setting, forwards=1)
        if setting.decodes:
            setting = replace(setting, new_tokens=min(setting.new_tokens, _CHOOSING_TOKENS))
        largest = setting.batch_size * setting.sequence  # of generating: reading the prompts
        names = usable_backends(self.model, largest, self.top_k)
        arms = {name: backend_arm(self.model, name) for name in names}
        group = setting.group(self.documents, arms, blocks=CHOOSING_BLOCKS, turn=next(self._turns))
        (timings,) = time_groups(self.model, [group], blocks=CHOOSING_BLOCKS)
        speeds = {name: timings.throughput(name) for name in names}
        return max(speeds, key=speeds.__getitem__), speeds

    @property
    def baseline_backend(self) -> str:
        """The fastest of transformers' experts backends here."""
        return self._fastest[0]

    @property
    def backend_throughputs(self) -> dict[str, float]:
        """Tokens per second of each of transformers' backends."""
        return self._fastest[1]

    def _baseline(self) -> AbstractContextManager[None]:
        return backend_arm(self.model, self.baseline_backend)()

    def _routed(self, policy: RoutingPolicy) -> Arm:
        return policy_arm(self.model, policy, backend=self.running_backend)

    @cached_property
    def baseline_losses(self) -> DocumentLosses:
        """Losses of the unmodified model, on its fastest backend."""
        with self._baseline():
            return self._losses("baseline perplexity")

    def _losses(self, what: str, session: Session | None = None) -> DocumentLosses:
        return document_losses(
            self.model,
            self.documents,
            window=self.loaded.window,
            tokens_per_batch=self.tokens_per_batch,
            progress=self._progress(what),
            session=session,
        )

    def _progress(self, what: str) -> Callable[[int, int], None] | None:
        report = self.progress
        return (lambda done, total: report(what, done, total)) if report else None

    def losses(
        self, policy: RoutingPolicy, *, what: str = "perplexity"
    ) -> tuple[DocumentLosses, RoutingReport]:
        """A policy's loss of each document, from empty caches, and its routing."""
        with self._routed(policy)() as session:
            session.reset()
            return self._losses(what, session), session.report()

    def quality(self, policy: RoutingPolicy, *, what: str = "perplexity") -> Quality:
        """Perplexity of a policy against the baseline, from empty caches."""
        baseline = self.baseline_losses
        losses, report = self.losses(policy, what=what)
        groups = datasets_of(self.documents) if self.robust else {}
        return Quality(
            change=degradation(baseline, losses),
            report=report,
            worst=worst_of(baseline, losses, groups) if groups else None,
        )

    def speed(self, policy: RoutingPolicy, *, blocks: int, factors: bool = True) -> Speed:
        """Throughput of a policy against the baseline, in alternating blocks.

        With ``factors``, our path keeping all pairs is timed in the same run.
        """
        arms = {"keep_all": self._routed(NativePolicy())} if factors else {}
        timings = self._time("throughput", blocks, {**arms, "policy": self._routed(policy)})
        return Speed(
            speedup=timings.ratio("baseline", "policy"),
            backend_factor=timings.ratio("baseline", "keep_all") if factors else None,
            skipping_factor=timings.ratio("keep_all", "policy") if factors else None,
            baseline_tps=timings.throughput("baseline"),
            tps=timings.throughput("policy"),
            keep_all_tps=timings.throughput("keep_all") if factors else None,
            baseline_backend=self.baseline_backend,
            backend=self.running_backend.name,
            blocks=blocks,
        )

    def _time(self, what: str, blocks: int, arms: dict[str, Arm]) -> Timings:
        """Time the baseline and these arms."""
        group = self._group({"baseline": self._baseline, **arms}, blocks)
        (timings,) = time_groups(self.model, [group], blocks=blocks, progress=self._progress(what))
        self._timed_tokens = max(self._timed_tokens, sum(b.numel() for b in group.batches))
        return timings

    def noise_floor(self, *, blocks: int) -> Ratio:
        """Baseline against baseline: the ratio that the measurement shows where there is none."""
        timings = self._time("noise floor", blocks, {"again": self._baseline})
        return timings.ratio("baseline", "again")

    @cached_property
    def _pair_cost(self) -> tuple[float, float]:
        """Relative forward time (baseline = 1) at K and at ceil(K/2) experts per token."""
        leading = FixedKPolicy(leading_count(self.top_k))
        most, least = self.cost_policies or (NativePolicy(), leading)
        arms = {"all": self._routed(most), "half": self._routed(least)}
        timings = self._time("cost of an expert", 5, arms)
        at_all, at_half = (1 / timings.ratio("baseline", arm).median for arm in arms)
        return at_all, at_half

    def predicted_speedup(self, experts_per_token: float) -> float:
        """Speedup that the executed pairs alone predict: time is linear in experts per token."""
        at_all, at_half = self._pair_cost
        half = leading_count(self.top_k)
        if half == self.top_k:
            return 1 / at_all
        share = (experts_per_token - half) / (self.top_k - half)
        return 1 / (at_half + (at_all - at_half) * share)

    def timing_notes(self) -> list[str]:
        """What a reader of the speedups so far must know about the text they were measured on."""
        have = sum(len(document.ids) for document in self.documents)
        need = self._timed_tokens
        if have >= need:
            return []
        return [
            f"throughput was measured on {have:,} tokens of text repeated to {need:,}: contexts "
            "recur more than in real text, so the cache and the speedup look better than they are"
        ]

    def geometry(self) -> dict[str, int]:
        """L, E and K of the model."""
        shape = experts_shape(self.model)
        return {"layers": shape["layers"], "experts": shape["experts"], "top_k": self.top_k}

    def with_documents(self, documents: Sequence[EncodedDocument]) -> Evaluator:
        """The same measurements on other text; the backends and the pair cost are kept."""
        return self._with(("_fastest", "_pair_cost", "running_backend"), documents=documents)

    def with_setting(self, setting: SpeedSetting) -> Evaluator:
        """The same text, with speeds in another setting."""
        return self._with(("baseline_losses", "running_backend"), setting=setting)

    def _with(self, kept: Sequence[str], **changes: Any) -> Evaluator:
        other = replace(self, **changes)
        for name in kept:
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other


def measure_by_dataset(
    evaluator: Evaluator, policy: RoutingPolicy, *, what: str = ""
) -> list[dict[str, Any]]:
    """Rows of a policy on each data set of the evaluator's text, or on each source of a single one.

    Each is scored in a pass of its own, from empty caches: the result that it would have as the
    whole text. A data set of fewer than two documents is left out; one source gives no rows.
    ``what`` is the policy's name, for the progress.
    """
    rows = []
    for name, at in groups_of(evaluator.documents).items():
        if len(at) < LEAST:
            continue
        part = evaluator.with_documents([evaluator.documents[i] for i in at])
        part.baseline_losses = evaluator.baseline_losses.at(at)
        label = f"{what}: {name}" if what else name
        rows.append({"dataset": name, **part.quality(policy, what=label).to_dict()})
    return rows
