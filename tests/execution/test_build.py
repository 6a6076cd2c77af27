"""Compiling the kernel: once, and where it cannot be, one line that says why."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_experts import decision, experts, in_float64, inputs

from var_moe.execution.backends import automatic, build, fused

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a kernel for Unix")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "var_moe"


def compiler(folder, monkeypatch, body):
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo one && exit 0\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("CXX", str(path))


def test_without_a_compiler(cache, monkeypatch, make_tiny_mixtral):
    monkeypatch.setenv("CXX", "no-such-compiler")
    why = build.library.__wrapped__()
    assert why == "no C++ compiler (no-such-compiler): install g++, or set CXX"
    monkeypatch.setattr(build, "library", lambda: why)
    assert not fused.can_run(torch.float32)
    assert fused.instructions() == why
    assert automatic(make_tiny_mixtral(top_k=2)) != "fused"


def test_a_compiler_that_fails_says_why_and_leaves_nothing(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "echo 'layer.cpp:1: error: no such option' >&2; exit 1")
    assert build.library.__wrapped__().endswith("failed: layer.cpp:1: error: no such option")
    assert list(cache.iterdir()) == []


def test_a_compiler_that_hangs(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exec sleep 30")
    monkeypatch.setattr(build, "SECONDS", 0.2)
    assert build.library.__wrapped__().endswith("took more than 0 s")


def test_what_is_no_library(cache, tmp_path, monkeypatch):
    compiler(tmp_path, monkeypatch, "exit 0")  # leaves an empty file
    assert "too short" in build.library.__wrapped__()
    assert list(cache.iterdir()) == []


@pytest.mark.skipif(isinstance(build.library(), str), reason="no C++ compiler here")
def test_compiled_once_for_a_processor_and_a_compiler(cache, monkeypatch):
    first = build._compiled(build._compiler())
    assert first.parent == cache
    made = first.stat().st_mtime_ns
    assert build._compiled(build._compiler()) == first
    assert first.stat().st_mtime_ns == made
    monkeypatch.setattr(build, "_processor", lambda: "another one")
    assert build._compiled(build._compiler()) != first
    assert [path.suffix for path in cache.iterdir()] == [".so", ".so"]


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    folder = build._folder()
    assert folder.is_dir()
    assert os.access(folder, os.W_OK)
    folder.rmdir()


@pytest.mark.skipif(isinstance(build.library(), str), reason="no C++ compiler here")
def test_one_pool_of_threads_with_torch():
    """Two OpenMP libraries in a process would wait for each other's threads."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("not on Linux")
    script = (
        "from var_moe.execution.backends import build; build.library()\n"
        "lines = open('/proc/self/maps').read().splitlines()\n"
        "print(len({line.split()[-1] for line in lines if 'gomp' in line}))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"


def supported(option):
    names = {"-march=haswell": "avx2", "-march=skylake-avx512": "avx512dq", "-march=x86-64": "sse2"}
    cpu = Path("/proc/cpuinfo")
    return names.get(option, "avx512dq") in (cpu.read_text() if cpu.exists() else "").split()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.skipif(isinstance(build.library(), str), reason="no C++ compiler here")
@pytest.mark.parametrize(
    ("option", "name"),
    [
        ("-march=x86-64", "plain vectors"),
        ("-march=haswell", "AVX2"),
        ("-march=skylake-avx512", "AVX-512"),
        ("-DEMULATE_AMX", "AMX"),  # matrix tiles as plain loops
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_processors_kernels(option, name, dtype, cache, monkeypatch):
    if not supported(option):
        pytest.skip(f"this processor does not run {name}")
    monkeypatch.setattr(build, "OPTIONS", (*build.OPTIONS, option))
    library = build._load(build._compiled(build._compiler()))
    monkeypatch.setattr(build, "library", lambda: library)
    assert fused.instructions() == name
    for hidden, inner, tokens in ((66, 24, 1), (34, 90, 200), (4500, 32, 150)):
        module = experts(hidden=hidden, inner=inner, dtype=dtype)
        index, weight = decision(tokens, 2, 5, seed=tokens)
        rows = inputs(tokens, hidden, dtype)
        got = fused.FusedBackend().run(module, rows, index, weight)
        expected = in_float64(module, rows, index, weight)
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        assert (got.double() - expected).norm() <= tolerance * expected.norm()
