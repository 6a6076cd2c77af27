"""Compiles ``kernel/`` for this machine and loads it: once, the file is kept for later runs."""

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
from typing import Any

SOURCES = Path(__file__).with_name("kernel")
OPTIONS = (
    *("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-std=c++17", "-fopenmp", "-fPIC", "-shared"),
)
SECONDS = 120.0
"""Longest time that compiling may take."""
_LOG = logging.getLogger(__name__)


class Product(ctypes.Structure):
    """``Product`` of the source: a product's weights."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weights", "bias")),
        *((name, ctypes.c_int64) for name in ("depth", "width")),
        *((name, ctypes.c_int32) for name in ("stored", "activation")),
        *((name, ctypes.c_float) for name in ("limit", "alpha")),
    )


class Matrix(ctypes.Structure):
    """``Matrix`` of the source: (experts, rows, columns) and the steps between neighbours."""

    _fields_ = (
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("experts", "rows", "columns")),
        *((name, ctypes.c_int64) for name in ("expert_step", "row_step", "column_step")),
    )


class Layer(ctypes.Structure):
    """``Layer`` of the source: what is the same in every forward."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("wide", "by_pair")),
        *((name, ctypes.c_int64) for name in ("experts", "top_k")),
        *((name, Product) for name in ("first", "second")),
        ("vectors", ctypes.c_void_p),
        *((name, Product) for name in ("down", "up")),
    )


class Call(ctypes.Structure):
    """``Call`` of the source: one forward."""

    _fields_ = (
        *((n, ctypes.c_void_p) for n in ("hidden", "index", "kept", "weight", "out", "scratch")),
        ("tokens", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


_LAYER, _CALL = ctypes.POINTER(Layer), ctypes.POINTER(Call)
_FUNCTIONS: dict[str, tuple[list[Any], Any]] = {
    "instructions": ([], ctypes.c_char_p),
    "panel_columns": ([], ctypes.c_int64),
    "sums_in_two_ways": ([ctypes.c_int32], ctypes.c_int32),
    "serves": ([ctypes.c_int32], ctypes.c_int32),
    "pack_matrix": (
        [ctypes.POINTER(Matrix), *[ctypes.c_int32] * 3, ctypes.c_void_p, ctypes.c_int32],
        None,
    ),
    "scratch_bytes": ([_LAYER, ctypes.c_int64], ctypes.c_int64),
    "run_layer": ([_LAYER, _CALL], None),
    "run_step": ([_LAYER, _CALL, ctypes.c_int32, ctypes.POINTER(ctypes.c_int64)], None),
}


@cache
def library() -> ctypes.CDLL | str:
    """The compiled functions, or in one line why there are none.

    The environment variable ``CXX`` names the compiler, ``c++`` without it; ``CXX=none`` does
    without.
    """
    compiler = _compiler()
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


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _load(path: Path) -> ctypes.CDLL:
    functions = ctypes.CDLL(str(path))
    for name, (arguments, result) in _FUNCTIONS.items():
        function = getattr(functions, name)
        function.argtypes, function.restype = arguments, result
    return functions


def _compiled(compiler: list[str]) -> Path:
    """The library of this source, compiler and processor."""
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True, timeout=SECONDS
    ).stdout
    sources = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.is_file()]
    named = (*sources, version, *OPTIONS, _processor())
    key = hashlib.sha256("\0".join(named).encode()).hexdigest()[:16]
    path = _folder() / f"fused-{key}.so"
    if not path.exists():
        _LOG.info("compiling the experts kernel for this machine (once, some seconds)")
        start = time.perf_counter()
        descriptor, name = tempfile.mkstemp(dir=path.parent, suffix=".so")
        os.close(descriptor)
        try:
            subprocess.run(
                [*compiler, *OPTIONS, str(SOURCES / "layer.cpp"), "-o", name],
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
