"""The tour runs to its end on the bundled model."""

from __future__ import annotations

import pytest

from var_moe import load_exported
from var_moe.cli import main


@pytest.mark.slow
def test_the_tour_ends_in_a_folder_to_take_along(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path), "--quiet"]) == 0
    said = capsys.readouterr().out
    for words in ("1/4", "2/4", "3/4", "4/4", "experts per token", "Next:"):
        assert words in said
    assert load_exported(tmp_path / "export").head["policy"] == "damage"
