"""Optional libraries: one line where one is missing, with an extra that there is."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from var_moe.cli import main
from var_moe.cli.doctor import NEEDED
from var_moe.errors import UsageError
from var_moe.extras import OPTIONAL, require

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def names(requirements):
    return {re.split(r"[\[<>=~! ]", one)[0].lower().replace("_", "-") for one in requirements}


@pytest.mark.parametrize("module", OPTIONAL)
def test_a_missing_library_is_one_line_with_its_extra(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    wanted = OPTIONAL[module]
    with pytest.raises(UsageError) as found:
        require(module)
    assert str(found.value) == (
        f"{wanted.purpose} needs {wanted.package}: pip install 'var-moe[{wanted.extra}]'"
    )
    assert wanted.package.lower().replace("_", "-") in names(EXTRAS[wanted.extra])


def test_a_broken_library_is_one_line_with_its_cause(monkeypatch, tmp_path):
    (tmp_path / "kaleido.py").write_text("raise RuntimeError('no\\nbrowser')")
    monkeypatch.delitem(sys.modules, "kaleido", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=r"cannot be imported \(RuntimeError: no browser\): pip"):
        require("kaleido")


def test_the_harness_is_asked_for_in_one_line():
    code = "import sys; sys.modules['lm_eval'] = None; from var_moe.cli import main; "
    code += "sys.exit(main(['lm-eval', '--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: var-moe lm-eval needs lm_eval: pip install 'var-moe[eval]'\n"


def test_missing_kaleido_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "kaleido", None)
    assert main(["report", str(tmp_path), "--figures", "png"]) == 2
    assert "pip install 'var-moe[figures]'" in capsys.readouterr().err


def test_every_extra_that_is_named_exists():
    texts = [*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "README.md"]
    found = set()
    for path in texts:
        found |= set(re.findall(r"(?:var-moe|\"\.)\[([a-z]+)\]", path.read_text("utf-8")))
    assert found
    assert found <= EXTRAS.keys()


def test_what_the_doctor_calls_needed_is_a_dependency():
    needed = names(NEEDED)
    assert needed - {"huggingface-hub"} <= names(PROJECT["dependencies"])
