"""What the package exports: one list at runtime and for type checkers, and nothing misspelt."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import var_moe


def typed_imports() -> dict[str, str]:
    """Name -> module below the package, from the imports that only type checkers see."""
    tree = ast.parse(Path(var_moe.__file__).read_text(encoding="utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and not node.orelse
    )
    return {
        alias.name: str(node.module).removeprefix("var_moe.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_type_checkers_see_what_runs() -> None:
    assert typed_imports() == var_moe._PLACES
    assert sorted(var_moe.__all__) == sorted(var_moe._PLACES)


@pytest.mark.parametrize("name", var_moe.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(var_moe, name)
    assert value is not None
    # A package's name for a function would be hidden by its module of that name.
    assert not inspect.ismodule(value)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tuen'"):
        _ = var_moe.tuen  # type: ignore[attr-defined]


@pytest.mark.slow
def test_a_misspelt_name_fails_type_checking(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    root = Path(__file__).parents[1]
    script = tmp_path / "script.py"
    script.write_text("import var_moe\nfrom var_moe import load_model, tuen\nvar_moe.rooted\n")
    # By the project's settings, so that what `make lint` has read of the package serves again.
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", str(script)],
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert checked.returncode == 1, checked.stdout + checked.stderr
    assert 'has no attribute "tuen"' in checked.stdout
    assert 'has no attribute "rooted"' in checked.stdout
    assert "load_model" not in checked.stdout


def test_the_version_stands_in_one_place() -> None:
    assert metadata.version("var-moe") == var_moe.__version__
    root = Path(__file__).parents[1]
    assert var_moe.__version__ not in (root / "pyproject.toml").read_text(encoding="utf-8")
    assert f"version: {var_moe.__version__}" in (root / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {var_moe.__version__}" in (root / "CHANGELOG.md").read_text(encoding="utf-8")
