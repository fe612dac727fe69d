"""The house has floors, a folder each: imports point down only, and two libraries have one door."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hydralv_tune"
FLOORS = (
    "numerics",
    "config",
    "data",
    "artifacts",
    "trial",
    "study",
    "launch",
    "results",
    "api",
    "cli",
)
GROUND = FLOORS[0]
UNDER_THE_ROOF = {"__main__", "__init__", "studies"}  # `studies`: a name of version 0.1.0
MODULES = sorted(PACKAGE.rglob("*.py"))
DOORS = {"optuna": "study", "ray": "launch"}


def named(path: Path) -> str:
    """Return a module's path as people say it."""
    return path.relative_to(PACKAGE).with_suffix("").as_posix()


def floor_of(path: Path) -> int:
    """Return the floor of a module, above all floors for the entry points."""
    first = path.relative_to(PACKAGE).parts[0]
    if first.removesuffix(".py") in UNDER_THE_ROOF:
        return len(FLOORS)
    assert first in FLOORS, f"{named(path)} stands on no floor"
    return FLOORS.index(first)


def imported(path: Path) -> set[str]:
    """Return every dotted name that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{named(path)}:{node.lineno} imports relatively; name the package")
    return names


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_imports_point_down_only(path: Path) -> None:
    own = floor_of(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "hydralv_tune" and len(parts) > 1 and parts[1] in FLOORS:
            assert FLOORS.index(parts[1]) <= own, f"{named(path)} imports {name}"


def uses(room: str) -> dict[str, set[str]]:
    """Return for each module of a room which others of it its code imports, anywhere in it."""
    paths = {f"hydralv_tune.{named(path).replace('/', '.')}": path for path in MODULES}
    members = {n.removesuffix(".__init__"): p for n, p in paths.items() if n.split(".")[1] == room}
    graph: dict[str, set[str]] = {}
    for name, path in members.items():
        found = {n if n in members else n.rpartition(".")[0] for n in imported(path)}
        graph[name] = (found & set(members)) - {name}
    return graph


@pytest.mark.parametrize("room", FLOORS)
def test_no_room_has_an_import_circle(room: str) -> None:
    graph = uses(room)
    assert len(graph) > 1, f"{room} is empty: the test reads the wrong folder"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" imports ".join(reversed(circle.args[1])))


@pytest.mark.parametrize("path", sorted((PACKAGE / GROUND).rglob("*.py")), ids=named)
def test_numerics_know_no_files_no_config_no_study(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"optuna", "ray", "pydantic", "yaml", "h5py", "tifffile", "zarr"}


@pytest.mark.parametrize("library", DOORS)
def test_one_package_alone_imports(library: str) -> None:
    doors = {named(p) for p in MODULES if library in {n.split(".")[0] for n in imported(p)}}
    assert doors, f"nothing imports {library}: the test reads the wrong folder"
    assert all(door.startswith(f"{DOORS[library]}/") for door in doors), doors


PUBLIC_BY_USE = {"_exit", "_replace"}  # of `os` and of named tuples
OWN_FILES = {"study/optuna_private", "launch/ray_private"}


@pytest.mark.parametrize("room", ["study", "launch", "results", "cli", "api"])
def test_what_is_private_to_a_library_is_used_in_one_file(room: str) -> None:
    trees = {path: ast.parse(path.read_text()) for path in MODULES}
    own = {
        node.attr if isinstance(node, ast.Attribute) else node.name
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        or (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name) and node.value.id == "self")
    }  # fmt: skip
    for path in (PACKAGE / room).rglob("*.py"):
        if named(path) in OWN_FILES:
            continue
        for node in ast.walk(trees[path]):
            name = node.attr if isinstance(node, ast.Attribute) else ""
            if name.startswith("_") and not name.startswith("__"):
                assert name in own | PUBLIC_BY_USE, f"{named(path)}:{node.lineno} uses {name}"
