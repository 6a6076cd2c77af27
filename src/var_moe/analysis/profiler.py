"""`GPUProfiler`: named, nested stretches of work, timed by torch's profiler, with peak memory."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from var_moe.errors import UsageError
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, provenance
from var_moe.terminal import figures_table, show

SEPARATOR = "/"
_MARK = "var_moe::"
os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else each run of the profiler says so on stderr
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True, kw_only=True)
class Span:
    """One run of a marked stretch.

    ``ms`` is wall time on CPU, on CUDA that of the kernels that were launched inside; ``start``
    and ``end`` are wall time, in ms. ``inner`` are the marked stretches just inside; ``operators``
    the tensor operators of its own, in order.
    """

    name: str
    ms: float
    start: float
    end: float
    inner: list[Span] = field(default_factory=list)
    operators: list[Span] = field(default_factory=list)

    @property
    def own_ms(self) -> float:
        """Without the stretches inside."""
        return self.ms - sum(one.ms for one in self.inner)


def mark(name: str) -> Any:
    """A context that marks a stretch for `recorded`; without it, nothing is recorded."""
    return record_function(_MARK + name)


@contextmanager
def recorded(device: torch.device) -> Iterator[list[Span]]:
    """Record what runs inside; when it ends, the list holds the outermost marked stretches."""
    cuda = device.type == "cuda"
    spans: list[Span] = []
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    run = torch_profile(activities=kinds, acc_events=True)
    try:
        with run:
            yield spans
    finally:
        _sort([event for event in run.events() if event.cpu_parent is None], spans, [], cuda)


def _sort(events: Sequence[Any], spans: list[Span], operators: list[Span], cuda: bool) -> None:
    """Put marked events in ``spans``, others in ``operators``; marks may lie below those."""
    for event in sorted(events, key=lambda one: one.time_range.start):
        span = Span(
            name=event.name.removeprefix(_MARK),
            ms=(event.device_time_total if cuda else event.cpu_time_total) / 1000,
            start=event.time_range.start / 1000,
            end=event.time_range.end / 1000,
        )
        if event.name.startswith(_MARK):
            spans.append(span)
            _sort(event.cpu_children, span.inner, span.operators, cuda)
        else:
            operators.append(span)
            _sort(event.cpu_children, spans, [], cuda)


class GPUProfiler:
    """Times stretches of work by name: ``with profiler.profile("name"):``.

    Stretches nest: one inside another is reported as ``outer/inner``. Each outermost one is a run
    of torch's profiler. Times are wall time on CPU, and time of the kernels on CUDA.

    Args:
        device: where the work runs; by default CUDA where there is one, else the CPU.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._memory = PeakMemory(self.device)
        self._spans: list[Span] = []
        self._open: list[str] = []
        self._peaks: dict[str, int] = {}

    @contextmanager
    def profile(self, name: str) -> Iterator[None]:
        """Time what is done inside.

        Raises:
            UsageError: the name is empty or holds a slash, which stands for nesting.
        """
        if not name or SEPARATOR in name:
            raise UsageError(f"profile name {name!r}: expected some text without {SEPARATOR!r}")
        self._open.append(name)
        path = SEPARATOR.join(self._open)
        spans: list[Span] = []
        try:
            outermost = len(self._open) == 1
            with recorded(self.device) if outermost else nullcontext(spans) as spans, mark(name):
                yield
        finally:
            self._open.pop()
            self._spans += spans
            self._peaks[path] = max(self._peaks.get(path, 0), self._memory.bytes())

    def reset(self) -> None:
        """Forget all that was timed, and the peak of memory.

        Raises:
            UsageError: a stretch is running.
        """
        if self._open:
            raise UsageError(f"profiler.reset() inside {self._open[-1]!r}: leave it first")
        self._spans, self._peaks = [], {}
        self._memory.restart()

    def get_report(self) -> dict[str, Any]:
        """Statistics of each finished stretch, and memory.

        Returns:
            ``sections``: path -> count, total_ms, mean_ms, std_ms, p50_ms, p99_ms,
            peak_memory_bytes; ``memory``: the peak of all.
        """
        runs: dict[str, list[float]] = {}

        def collect(spans: Sequence[Span], above: str) -> None:
            for span in spans:
                runs.setdefault(above + span.name, []).append(span.ms)
                collect(span.inner, above + span.name + SEPARATOR)

        collect(self._spans, "")
        return {
            "schema_version": SCHEMA_VERSION,
            "device": str(self.device),
            "sections": {
                path: {**summary(values), "peak_memory_bytes": self._peaks[path]}
                for path, values in runs.items()
            },
            "memory": self._memory.to_dict(),
        }

    def print_summary(self) -> None:
        """Print the report as a table, inner stretches indented."""
        figures = ("total_ms", "mean_ms", "std_ms", "p50_ms", "p99_ms")
        table = figures_table("Profile", "section", "runs", "total ms", *figures[1:])
        for path, row in self.get_report()["sections"].items():
            *outer, name = path.split(SEPARATOR)
            cells = [f"{row[key]:.3f}" for key in figures]
            table.add_row("  " * len(outer) + name, str(row["count"]), *cells)
        show(table)

    def save_report(self, path: str | Path) -> None:
        """Write the report as JSON, with where it was made."""
        atomic_write_json(path, {**self.get_report(), "provenance": provenance()})


class PeakMemory:
    """The most memory that was in use since `restart`, in bytes.

    On CUDA, what its allocator held. Else the resident memory of the process: since `restart`
    where Linux can forget an earlier peak, and otherwise since the process began; `kind` says
    which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.kind = "cuda_allocated" if device.type == "cuda" else "resident_of_process"
        self.restart()

    def restart(self) -> None:
        """Forget the peak so far."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        with suppress(OSError):
            _CLEAR.write_text("5")  # see proc(5): resets the peak of the resident set
            if "VmHWM" in _STATUS.read_text():
                self.kind = "resident"

    def bytes(self) -> int:
        """The peak."""
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device))
        if self.kind == "resident":
            line = next(x for x in _STATUS.read_text().splitlines() if x.startswith("VmHWM"))
            return 1024 * int(line.split()[1])
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def to_dict(self) -> dict[str, Any]:
        """For result files."""
        return {"peak_bytes": self.bytes(), "kind": self.kind}


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Statistics of some milliseconds: count, total, mean, standard deviation, p50, p99."""
    taken = np.asarray(values, dtype=np.float64)
    return {
        "count": len(taken),
        "total_ms": float(taken.sum()),
        "mean_ms": float(taken.mean()),
        "std_ms": float(taken.std(ddof=1)) if len(taken) > 1 else 0.0,
        "p50_ms": float(np.quantile(taken, 0.5)),
        "p99_ms": float(np.quantile(taken, 0.99)),
    }
