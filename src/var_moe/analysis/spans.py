"""`GPUProfiler`: named, nested stretches of work, timed on CPU or GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from var_moe.analysis.clocks import PeakMemory, clock_of
from var_moe.errors import UsageError
from var_moe.storage import SCHEMA_VERSION, atomic_write_json, provenance
from var_moe.terminal import show

SEPARATOR = "/"


@dataclass
class _Span:
    """One run of a stretch; ``inner`` are the spans just inside it."""

    name: str
    start: Any
    end: Any
    inner: list[_Span]


class GPUProfiler:
    """Times stretches of work by name: ``with profiler.profile("name"):``.

    Stretches nest: one inside another is reported as ``outer/inner``. On CUDA they are marked by
    events, which make nothing wait; the device is waited for once, when a report is asked for.

    Args:
        device: where the work runs; by default CUDA where there is one, else the CPU.
    """

    def __init__(self, device: str | torch.device | None = None) -> None:
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self._clock = clock_of(self.device)
        self._memory = PeakMemory(self.device)
        self._roots: list[_Span] = []
        self._open: list[_Span] = []
        self._peaks: dict[str, int] = {}

    @contextmanager
    def profile(self, name: str) -> Iterator[None]:
        """Time what is done inside.

        Raises:
            UsageError: the name is empty or holds a slash, which stands for nesting.
        """
        if not name or SEPARATOR in name:
            raise UsageError(f"profile name {name!r}: expected some text without {SEPARATOR!r}")
        path = SEPARATOR.join([*(span.name for span in self._open), name])
        self.enter(name)
        try:
            yield
        finally:
            self.leave()
            self._peaks[path] = max(self._peaks.get(path, 0), self._memory.bytes())

    def enter(self, name: str) -> None:
        """Begin a stretch where no ``with`` can stand, as in hooks; memory is not looked at."""
        span = _Span(name, self._clock.mark(), None, [])
        (self._open[-1].inner if self._open else self._roots).append(span)
        self._open.append(span)

    def leave(self) -> None:
        """End the stretch that was begun last."""
        self._open.pop().end = self._clock.mark()

    def reset(self) -> None:
        """Forget all that was timed, and the peak of memory.

        Raises:
            UsageError: a stretch is running.
        """
        if self._open:
            raise UsageError(f"profiler.reset() inside {self._open[-1].name!r}: leave it first")
        self._roots, self._peaks = [], {}
        self._memory.restart()

    def runs(self, *, own: bool = False) -> dict[str, list[float]]:
        """Milliseconds of each run of each stretch, by its path (waits for the device).

        Args:
            own: leave out what the stretches inside took.
        """
        self._clock.wait()
        found: dict[str, list[float]] = {}
        self._collect(self._roots, (), found, own)
        return found

    def _collect(
        self,
        spans: Sequence[_Span],
        path: tuple[str, ...],
        found: dict[str, list[float]],
        own: bool,
    ) -> None:
        for span in spans:
            if span.end is None:
                continue
            here = (*path, span.name)
            took = self._clock.milliseconds(span.start, span.end)
            if own:
                took -= sum(
                    self._clock.milliseconds(one.start, one.end)
                    for one in span.inner
                    if one.end is not None
                )
            found.setdefault(SEPARATOR.join(here), []).append(took)
            self._collect(span.inner, here, found, own)

    def get_report(self) -> dict[str, Any]:
        """Statistics of each stretch, and memory.

        Returns:
            ``sections``: path -> count, total_ms, mean_ms, std_ms, p50_ms, p99_ms, and
            peak_memory_bytes where it was looked at; ``memory``: the peak of all.
        """
        sections: dict[str, dict[str, Any]] = {}
        for path, values in self.runs().items():
            sections[path] = summary(values)
            if path in self._peaks:
                sections[path]["peak_memory_bytes"] = self._peaks[path]
        return {
            "schema_version": SCHEMA_VERSION,
            "device": str(self.device),
            "sections": sections,
            "memory": self._memory.to_dict(),
        }

    def print_summary(self) -> None:
        """Print the report as a table."""
        show(section_table(self.get_report()["sections"]))

    def save_report(self, path: str | Path) -> None:
        """Write the report as JSON, with where it was made."""
        atomic_write_json(path, {**self.get_report(), "provenance": provenance()})


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


def section_table(sections: Mapping[str, Mapping[str, Any]]) -> Any:
    """The stretches as a rich table, inner ones indented."""
    from rich.table import Table

    table = Table(title="Profile", title_justify="left")
    for heading in ("section", "runs", "total ms", "mean ms", "std", "p50", "p99"):
        table.add_column(heading, justify="left" if heading == "section" else "right")
    for path, row in sections.items():
        *outer, name = path.split(SEPARATOR)
        names = ("total_ms", "mean_ms", "std_ms", "p50_ms", "p99_ms")
        table.add_row(
            "  " * len(outer) + name, str(row["count"]), *(f"{row[key]:.3f}" for key in names)
        )
    return table
