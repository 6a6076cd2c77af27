"""The benchmark for a GPU: it runs small on a CPU, and says where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import gpu


def test_one_table(capsys):
    assert gpu.main(["--device", "cpu", "--quick", "--rounds", "1"]) == 0
    title, head, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith("CPU")
    assert head.split()[-1] == "waits"
    assert len(rows) == len(gpu.QUICK) * len(gpu.QUICK_TOKENS) * len(gpu.OURS)
    for row in rows:
        ratios = row.split()[5:8]
        assert all(float(ratio) > 0 for ratio in ratios)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
