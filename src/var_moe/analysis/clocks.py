"""Marks in time and peak memory, on CPU and on CUDA, behind one face."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Clock(Protocol):
    """Takes marks while work runs; tells what lies between them when it is done."""

    def mark(self) -> Any:
        """A mark at this place in the work."""

    def wait(self) -> None:
        """Wait until all marked work is done; only then ask for milliseconds."""

    def milliseconds(self, start: Any, end: Any) -> float:
        """Time between two marks."""


class CPUClock:
    """Every call is done when it returns."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        """Nothing is under way."""

    def milliseconds(self, start: float, end: float) -> float:
        return 1000 * (end - start)


class CUDAClock:
    """Events in the device's stream: marking does not wait for it.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def milliseconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end))


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return CUDAClock(device) if device.type == "cuda" else CPUClock()


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
        try:
            _CLEAR.write_text("5")  # see proc(5): resets the peak of the resident set
        except OSError:
            return
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
