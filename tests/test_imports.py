"""Imports point down only, and importing the package stays light (design: rooms)."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import var_moe

PACKAGE = Path(var_moe.__file__).parent

# A room may import those of lower levels; rooms of one level may import each other one way.
LEVELS = (
    ("errors",),
    ("storage", "hub", "demo", "terminal", "extras", "growing", "memory"),
    ("config",),
    ("routing", "models"),
    ("execution",),
    ("serving",),
    ("data",),
    ("evaluation",),
    ("tracing",),
    ("calibration",),
    ("report", "optimization", "analysis"),
    ("certification", "lm_eval"),
    ("cli",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}

# What the package's own __init__ and __main__ do is not an import of a room.
FACADE = ("__init__", "__main__")
OWN_NAMES = (["__version__"],)  # which the package's __init__ holds itself

Import = tuple[str, str]  # the file's place below the package, the dotted name it imports


def imported_names(source: str, package: str) -> Iterator[str]:
    """Every module that ``source`` imports, at any depth; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1]
            parts = [*(base if node.level else []), *([node.module] if node.module else [])]
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def all_imports() -> list[Import]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE)
        package = ".".join(["var_moe", *place.parent.parts])
        found += [
            (place.as_posix(), name)
            for name in imported_names(path.read_text(encoding="utf-8"), package)
        ]
    return found


def room_of(place: str) -> str:
    return place.split("/")[0].removesuffix(".py")


def room_imports(imports: list[Import]) -> list[tuple[str, str, str]]:
    """(file, its room, the room it imports), where these are two different rooms."""
    edges = []
    for place, name in imports:
        top, *rest = name.split(".")
        room = room_of(place)
        if top != "var_moe" or rest in OWN_NAMES or room in FACADE:
            continue
        if rest[:1] != [room]:
            edges.append((place, room, rest[0] if rest else "var_moe itself"))
    return edges


def layer_faults(imports: list[Import]) -> list[str]:
    edges = room_imports(imports)
    pairs = {(room, other) for _, room, other in edges}
    faults = []
    for place, room, other in edges:
        if room not in LEVEL or other not in LEVEL:
            unknown = other if room in LEVEL else room
            faults.append(f"{place} imports {other}: {unknown!r} is no room of LEVELS")
        elif LEVEL[other] > LEVEL[room]:
            faults.append(f"{place} imports {other}, which is above {room}")
        elif LEVEL[other] == LEVEL[room] and (other, room) in pairs:
            faults.append(f"{place} imports {other}, and {other} imports {room}")
    return sorted(set(faults))


def outsiders(imports: list[Import], below: str) -> set[str]:
    """Top-level modules, other than ours and Python's, that files below ``below`` import."""
    tops = {name.split(".")[0] for place, name in imports if place.startswith(below)}
    return tops - set(sys.stdlib_module_names) - {"var_moe"}


def test_imports_point_down() -> None:
    assert layer_faults(all_imports()) == []


@pytest.mark.parametrize(
    ("imports", "faults"),
    [
        ([("cli/tune.py", "var_moe.optimization.run")], 0),
        ([("routing/var.py", "var_moe.config.VARConfig")], 0),
        ([("routing/var.py", "var_moe.execution.session")], 1),
        ([("config.py", "var_moe.routing.base")], 1),
        ([("evaluation/text.py", "var_moe.optimization.results")], 1),
        ([("evaluation/text.py", "var_moe.VARConfig")], 1),
        ([("execution/session.py", "var_moe.attic.thing")], 1),
        ([("execution/dispatch.py", "var_moe.routing.base")], 0),
        (
            [
                ("models/loading.py", "var_moe.routing.base"),
                ("routing/var.py", "var_moe.models.loading"),
            ],
            2,
        ),
        ([("__init__.py", "var_moe.cli")], 0),
        ([("cli/main.py", "var_moe.__version__")], 0),
    ],
)
def test_the_rule_finds_what_it_should(imports: list[Import], faults: int) -> None:
    assert len(layer_faults(imports)) == faults


def test_names_are_read_from_every_form_of_import() -> None:
    source = "import a.b, c\nfrom d.e import f as g\ndef h():\n    from . import i\n"
    source += "    from .j import k\n    from ..l import m\n"
    names = ["a.b", "c", "d.e.f", "var_moe.x.i", "var_moe.x.j.k", "var_moe.l.m"]
    assert sorted(imported_names(source, "var_moe.x")) == sorted(names)


def test_routing_imports_array_libraries_alone() -> None:
    imports = all_imports()
    assert outsiders(imports, "routing/") == {"torch", "numpy"}
    rooms = {other for _, room, other in room_imports(imports) if room == "routing"}
    assert rooms <= {"config", "errors", "storage"}


def test_the_oracle_shares_no_code_with_the_router() -> None:
    source = (Path(__file__).parent / "oracle.py").read_text(encoding="utf-8")
    tops = {name.split(".")[0] for name in imported_names(source, "")}
    assert tops - set(sys.stdlib_module_names) == {"var_moe"}
    assert [name for name in imported_names(source, "") if name.startswith("var_moe")] == [
        "var_moe.config.VARConfig"
    ]


def test_report_reads_results_without_loading_a_model() -> None:
    imports = all_imports()
    assert not outsiders(imports, "report/") & {"torch", "transformers"}
    rooms = {other for _, room, other in room_imports(imports) if room == "report"}
    assert not rooms & {"models", "execution"}


def test_the_documented_import_path_is_not_used_inside() -> None:
    assert [place for place, name in all_imports() if name.split(".")[0] == "optimization"] == []


@pytest.mark.parametrize(
    "module",
    ["var_moe", "var_moe.config", "var_moe.errors", "var_moe.cli", "var_moe.routing.registry"],
)
def test_importing_is_light(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert loaded.isdisjoint({"torch", "transformers", "optuna", "pandas", "datasets"})
