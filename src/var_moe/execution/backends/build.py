"""Compiles ``fused.cpp`` for this machine and loads it: once, the file is kept for later runs."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("fused.cpp")
OPTIONS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=c++17", "-fopenmp", "-fPIC", "-shared"),
)
SECONDS = 120.0
"""Longest time that compiling may take."""
_LOG = logging.getLogger(__name__)

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "sort_pairs": [_POINTER, *[_LONG] * 3, *[_POINTER] * 3],
    "products_of": [
        *[_INT] * 2,
        *[_POINTER] * 4,
        _LONG,
        *[_POINTER] * 2,
        *[_LONG] * 2,
        _INT,
        *[_FLOAT] * 2,
        _POINTER,
        _INT,
    ],
    "combine_of": [_INT, *[_POINTER] * 3, *[_LONG] * 3, _POINTER, _INT],
}


@cache
def library() -> ctypes.CDLL | str:
    """The compiled functions, or in one line why there are none.

    The environment variable ``CXX`` names the compiler, ``c++`` without it; ``CXX=none`` does
    without.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if sys.platform == "win32":
        return "not on Windows"
    try:
        return _load(_compiled(compiler))
    except FileNotFoundError:
        return f"no C++ compiler ({compiler[0]}): install g++, or set CXX"
    except subprocess.TimeoutExpired:
        return f"{compiler[0]} took more than {SECONDS:.0f} s"
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line]
        return f"{compiler[0]} failed: {(lines or ['no message'])[0].strip()}"
    except (OSError, AttributeError) as error:
        return str(error)


def _load(path: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(path))
    for name, arguments in _ARGUMENTS.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, None
    functions.instructions.restype = ctypes.c_char_p
    functions.panel_columns.restype = functions.slack_rows.restype = _LONG
    return functions


def _compiled(compiler: list[str]) -> Path:
    """The library of this source, compiler and processor."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    named = (SOURCE.read_text(), version, *OPTIONS, _processor())
    key = hashlib.sha256("\0".join(named).encode()).hexdigest()[:16]
    path = _folder() / f"fused-{key}.so"
    if not path.exists():
        _LOG.info("compiling the experts kernel for this machine (once, some seconds)")
        start = time.perf_counter()
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
        os.close(descriptor)
        try:
            subprocess.run(
                [*compiler, *OPTIONS, str(SOURCE), "-o", name],
                capture_output=True,
                text=True,
                check=True,
                timeout=SECONDS,
            )
            ctypes.CDLL(name)  # what cannot be loaded is not kept
            Path(name).replace(path)  # at once: another process may look for it
        finally:
            Path(name).unlink(missing_ok=True)
        _LOG.info("compiled in %.1f s: %s", time.perf_counter() - start, path)
    return path


def _folder() -> Path:
    """Where compiled libraries are kept: the user's cache, else a folder for this process."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "var_moe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return Path(tempfile.mkdtemp(prefix="var_moe-"))


def _processor() -> str:
    """What tells two processors apart, for which ``-march=native`` means different things."""
    described = Path("/proc/cpuinfo")
    if described.exists():
        lines = described.read_text().splitlines()
        found = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
        return "\n".join(sorted(set(found)))
    return f"{platform.machine()} {platform.processor()}"
