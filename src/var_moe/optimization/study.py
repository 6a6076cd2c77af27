"""A search: the study's next trial, its evaluation, and again; then its result.

Every method is a sampler (`optimization.samplers`), every trial lives in an Optuna storage
(`optimization.trial_log`), and any number of processes may run this loop on one study: what is
left is asked of the storage before each evaluation.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import (
    TYPE_CHECKING,
    Any,
    Protocol,
    TextIO,
    TypeAlias,
    TypedDict,
    Unpack,
    runtime_checkable,
)

import optuna

from var_moe.config import check_count, check_seed
from var_moe.optimization.candidate import documented_params
from var_moe.optimization.results import Evaluation, OptimizationResult
from var_moe.optimization.samplers import PointSampler
from var_moe.optimization.search_space import (
    SearchSpace,
    defaults,
    dimensions,
)
from var_moe.optimization.selection import (
    best_evaluation,
    has_converged,
    highest_score,
    nearest_miss,
)
from var_moe.optimization.trial_log import (
    SearchHeader,
    Storage,
    open_study,
    write_header,
)
from var_moe.optimization.trials import Trials
from var_moe.optimization.worker import Objective, ShouldStop, Worker, bound_of, mode_of
from var_moe.storage import jsonable
from var_moe.terminal import duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LOG = logging.getLogger(__name__)


OnEvaluation: TypeAlias = Callable[[Evaluation, int, int], None]
SamplerOf: TypeAlias = Callable[[SearchHeader], PointSampler]


@runtime_checkable
class Confirming(Protocol):
    """An objective that can measure a search's best again, on more text and for longer."""

    def confirm(self, result: OptimizationResult, /) -> OptimizationResult:
        """The result with the best configuration as measured again."""
        ...


class SearchOptions(TypedDict, total=False):
    """What every search takes besides its points; all of it may be left out.

    Args:
        seed: a fresh one by default; recorded in the result.
        storage: keeps each finished evaluation: the path of a file, the URL of a database, or a
            storage of Optuna; by default nothing is kept.
        resume: go on with the search in the storage, or join it: several processes can at once.
        mode: of the VARConfig in `best_params`; by default the objective's own, else verified.
        confirm: measure the best again on more text, where the objective can (`Confirming`); so
            by default.
        settings: JSON values that decide the results besides the space and the seed (model,
            data, profile); resuming with others is refused by name.
        on_evaluation: called with each new evaluation of this process, how many the search has
            by then, and the total.
        should_stop: asked before each evaluation; True ends the search early.
    """

    seed: int | None
    storage: Storage
    resume: bool
    mode: str | None
    confirm: bool
    settings: Mapping[str, Any] | None
    on_evaluation: OnEvaluation | None
    should_stop: ShouldStop | None


def run_search(
    objective: Objective,
    space: SearchSpace,
    sampler_of: SamplerOf,
    *,
    method: str,
    total: int,
    n_calls: int | None = None,
    total_flag: str = "--n_calls",
    own: Mapping[str, Any] | None = None,
    verbose: bool = True,
    **options: Unpack[SearchOptions],
) -> OptimizationResult:
    """Evaluate `total` points in all, together with whoever else is at work on the study.

    Whatever interrupts the search leaves everything finished in the storage and passes through.

    Args:
        objective: what is evaluated.
        space: the search space.
        sampler_of: the sampler of a search that has begun.
        method: its name, in the result and in the trial log.
        total: evaluations of a new search.
        n_calls: the number that was asked for; it counts for a resumed search as well, which goes
            on to the number that it was begun with by default.
        total_flag: the command-line option that lowers the number.
        own: the method's own settings, which decide the results too.
        verbose: progress on stderr.
        options: see `SearchOptions`.
    """
    started = time.perf_counter()
    total = check_count("n_calls", total if n_calls is None else n_calls)
    bound, mode = bound_of(objective), mode_of(objective, options.get("mode"))
    facts = {"mode": mode, "max_degradation": bound, **(own or {})}
    header = SearchHeader(
        method=method,
        seed=check_seed(options.get("seed")),
        total=total,
        space={d.name: d.to_dict() for d in dimensions(space)},
        settings=jsonable({**facts, **(options.get("settings") or {})}),
    )
    # Fails on a wrong mode now rather than after the last evaluation.
    documented_params(defaults(space), mode)
    opened = open_study(options.get("storage"), header, resume=options.get("resume", False))
    with opened as (study, header):
        if n_calls is not None:
            header = _to_total(study, header, total)
        before = Trials.of(study).evaluations
        progress = SearchProgress(
            total=header.total, finished=before, verbose=verbose, count_flag=total_flag
        )
        stop = options.get("should_stop")
        with Worker(study, sampler_of(header), bound=bound, stop=stop) as work, progress:
            for claim in iter(work.claim, None):
                evaluation = work.evaluate(claim, objective)
                if evaluation is None:
                    continue
                number = len(Trials.of(study).evaluations)
                progress.update(evaluation, number)
                if (listener := options.get("on_evaluation")) is not None:
                    listener(evaluation, number, header.total)
        evaluations = Trials.of(study).evaluations
    result = OptimizationResult(
        **_best(evaluations, space, mode),
        optimization_time=time.perf_counter()
        - started
        + sum(e.seconds + e.suggestion_seconds for e in before),
        evaluations=tuple(evaluations),
        converged=has_converged(evaluations),
        method=method.partition("-")[0],
        seed=header.seed,
        max_degradation=bound,
    )
    result.extra.update(
        suggestion_seconds=sum(e.suggestion_seconds for e in evaluations),
        total=header.total,
        failed=sum(e.failed for e in evaluations),
        resumed=len(before),
        stopped_early=len(evaluations) < header.total,
    )
    if options.get("confirm", True) and isinstance(objective, Confirming):
        return objective.confirm(result)
    return result


def _to_total(study: optuna.Study, header: SearchHeader, total: int) -> SearchHeader:
    """The header with another number of evaluations, where that was asked for."""
    done = Trials.of(study).taken
    if total < done:
        _LOG.warning("%d evaluations are done, more than the %d asked for", done, total)
    if max(total, done) != header.total:
        header = replace(header, total=max(total, done))
        write_header(study, header)
    return header


def _best(evaluations: list[Evaluation], space: SearchSpace, mode: str) -> dict[str, Any]:
    """The best of a result: the winner, or the default and what comes nearest to the bound."""
    best = best_evaluation(evaluations)
    if best is not None:
        return {"best_params": documented_params(best.params, mode), "best_score": best.score}
    miss = nearest_miss(evaluations)
    return {
        "best_params": documented_params(defaults(space), mode),
        "best_score": highest_score(evaluations),
        "extra": {} if miss is None else {"nearest_miss": miss.to_dict()},
    }


SLOW_AFTER = 3


SLOW_SECONDS = 600.0


class SearchProgress:
    """One line per evaluation, and above a terminal's last line a bar with the time left.

    Args:
        total: evaluations planned.
        finished: evaluations taken over from an earlier run.
        verbose: False says nothing at all.
        count_flag: the option that lowers the number of evaluations, for the hint.
        stream: where to write; stderr by default.
    """

    def __init__(
        self,
        *,
        total: int,
        finished: Sequence[Evaluation],
        verbose: bool = True,
        count_flag: str = "--n_calls",
        stream: TextIO | None = None,
    ) -> None:
        self._total = total
        self._verbose = verbose
        self._count_flag = count_flag
        self._stream = sys.stderr if stream is None else stream
        self._durations: list[float] = []
        self._best: float | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        for evaluation in finished:
            self._note_best(evaluation)
        self._finished = len(finished)

    def __enter__(self) -> SearchProgress:
        if self._verbose and self._stream.isatty():
            self._start_bar()
        if self._verbose and self._finished:
            self._say(f"resuming: {self._finished} of {self._total} evaluations are done")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, evaluation: Evaluation, number: int) -> None:
        """Tell about evaluation `number`, counted from 1."""
        self._durations.append(evaluation.seconds + evaluation.suggestion_seconds)
        self._note_best(evaluation)
        left = self.seconds_left(number)
        if not self._verbose:
            return
        self._say(f"{self._line(evaluation, number)} | ETA {duration(left)}")
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=number, eta=duration(left))
        if len(self._durations) == SLOW_AFTER and left > SLOW_SECONDS:
            self._say(self._hint(number, left))

    def seconds_left(self, number: int) -> float:
        """Estimated seconds from evaluation `number` on, by this run's mean."""
        mean = sum(self._durations) / len(self._durations) if self._durations else 0.0
        return mean * max(0, self._total - number)

    def _note_best(self, evaluation: Evaluation) -> None:
        if evaluation.eligible and evaluation.score is not None:
            old = self._best
            self._best = evaluation.score if old is None else max(old, evaluation.score)

    def _line(self, evaluation: Evaluation, number: int) -> str:
        best = "best -" if self._best is None else f"best {self._best:.4g}"
        count = f"[{number:>{len(str(self._total))}}/{self._total}]"
        return f"{count} {_outcome(evaluation)} | {best} | {duration(evaluation.seconds)}"

    def _hint(self, number: int, left: float) -> str:
        each = sum(self._durations) / len(self._durations)
        return (
            f"Slow optimization: about {duration(left)} left for {self._total - number} "
            f"evaluations of {duration(each)} each; {self._count_flag} lowers their number, "
            f"--max-samples the text of each"
        )

    def _start_bar(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from var_moe.terminal import console

        self._bar = Progress(
            TextColumn("optimizing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("ETA {task.fields[eta]}"),
            console=console(self._stream),
        )
        self._task = self._bar.add_task(
            "optimizing", total=self._total, completed=self._finished, eta="-"
        )
        self._bar.start()

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)


def _outcome(evaluation: Evaluation) -> str:
    if evaluation.failed:
        return f"failed: {evaluation.error}"
    if evaluation.degradation is None:
        return f"score {evaluation.score:.6g}"
    parts = [f"degradation {100 * evaluation.degradation:+.2f}%"]
    if evaluation.feasible is False:
        parts.append("over the bound")
    if evaluation.speedup is not None:
        parts.append(f"speedup {evaluation.speedup:.3f}x")
    elif evaluation.predicted_speedup is not None:
        parts.append(f"predicted speedup {evaluation.predicted_speedup:.3f}x")
    if evaluation.experts_per_token is not None:
        parts.append(f"{evaluation.experts_per_token:.2f} experts per token")
    return ", ".join(parts)
