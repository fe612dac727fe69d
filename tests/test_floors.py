"""The house has floors: imports point down only, and two libraries have one door each."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "hydralv_tune"
FLOORS = {
    0: {"metrics", "targets", "flood", "decoding", "losses", "architectures", "rsunet",
        "augmentation", "normalisation", "phantom"},
    1: {"errors", "yaml_io", "config", "space"},
    2: {"volumes", "formats", "inspection", "records", "figures", "pictures"},
    3: {"sampling", "training", "prediction", "sweep", "trial", "planning"},
    4: {"study", "launch", "export", "report", "dashboard", "doctor"},
    5: {"console", "live_view", "cli_data", "cli_trial", "cli_study", "cli", "__main__"},
}  # fmt: skip
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}
MODULES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """Return the module that a file is, or the package that it belongs to."""
    inside = path.relative_to(PACKAGE)
    return inside.parts[0] if len(inside.parts) > 1 else path.stem


def imported(path: Path) -> set[str]:
    """Return every dotted name that a file imports, at the top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            pytest.fail(f"{path.name}:{node.lineno} imports relatively; name the package")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_point_down_only(path: Path) -> None:
    module = module_of(path)
    if module == "__init__":
        return
    assert module in FLOOR_OF, f"{path.name} stands on no floor; add it to FLOORS"
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "hydralv_tune" and len(parts) > 1 and parts[1] in FLOOR_OF:
            assert FLOOR_OF[parts[1]] <= FLOOR_OF[module], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_numerics_know_no_files_no_config_no_study(path: Path) -> None:
    if FLOOR_OF.get(module_of(path)) != 0:
        return
    roots = {name.split(".")[0] for name in imported(path)}
    assert not roots & {"optuna", "ray", "pydantic", "yaml", "h5py", "tifffile", "zarr"}


@pytest.mark.parametrize(
    ("library", "door"), [("optuna", "study"), ("ray", "launch")], ids=["optuna", "ray"]
)
def test_one_file_alone_imports(library: str, door: str) -> None:
    doors = {module_of(p) for p in MODULES if library in {n.split(".")[0] for n in imported(p)}}
    assert doors <= {door}
