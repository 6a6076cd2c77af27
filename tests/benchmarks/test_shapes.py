"""The benchmark of real layer shapes, on a small one."""

from __future__ import annotations

import json

import pytest

from benchmarks import shapes


@pytest.mark.slow
def test_rows_are_measured_once_and_kept(tmp_path, capsys):
    words = ["--quick", "--dtype", "float32", "--rounds", "2", "--output", str(tmp_path)]
    assert shapes.main(words) == 0
    first = json.loads((tmp_path / "shapes.json").read_text())["rows"]
    assert [row["tokens"] for row in first] == list(shapes.TOKENS)
    for row in first:
        assert row["shares"]["100%"]["pairs_share"] == 1
        assert row["shares"]["50%"]["pairs_share"] == pytest.approx(0.5, abs=0.2)
        assert 0 < row["distinct_experts"] <= 8
    printed = capsys.readouterr().out
    assert shapes.main(words) == 0  # nothing is measured again
    assert capsys.readouterr().out == printed
    assert json.loads((tmp_path / "shapes.json").read_text())["rows"] == first
