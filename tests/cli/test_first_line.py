"""What a command loads before its first line: nothing that takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ["torch", "transformers", "pandas", "pyarrow", "scipy", "optuna", "plotly", "datasets"]

# Ends the process at the first line, and tells what is loaded by then.
SCRIPT = """
import json, os, sys
class FirstLine:
    def write(self, text):
        if text.strip():
            loaded = [name for name in {heavy} if name in sys.modules]
            print(json.dumps([text.strip(), loaded]), file=sys.__stdout__, flush=True)
            os._exit(0)
    def flush(self): pass
    def isatty(self): return False
sys.stdout = sys.stderr = FirstLine()
from var_moe.cli import main
main({words})
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A results folder, as far as it shows before anything is loaded."""
    folder = tmp_path_factory.mktemp("results")
    (folder / "best_config.json").write_text('{"policy": "top_p", "settings": {"p": 0.7}}')
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["evaluate", "--policy", "naee"],
        ["compare", "--policies", "top_p"],
        ["analyze", "--var_config", "RESULTS/best_config.json"],
        ["tune", "--validate", "RESULTS/best_config.json"],
        ["guard", "RESULTS"],
        ["certify", "RESULTS"],
        ["profile"],
        ["trace"],
        ["fit-compensation", "--profile", "RESULTS"],
        ["demo"],
        ["replay", "RESULTS"],
        ["export", "RESULTS"],
        ["doctor"],
    ],
    ids=lambda words: words[0],
)
def test_the_first_line_waits_for_nothing_heavy(words, results, tmp_path):
    words = [word.replace("RESULTS", str(results)) for word in words]
    script = SCRIPT.format(heavy=HEAVY, words=words)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    line, loaded = json.loads(done.stdout)
    assert not line.startswith("error")
    assert loaded == []
