"""Imports go down only, floor by floor; inside the package they are relative; every folder has one short door."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import triune

ROOT = Path(triune.__file__).parent
MAY_IMPORT = {
    "cli": {"cli", "eval", "policies", "envs", "data", "vla"},
    "eval": {"eval", "policies", "envs", "data", "vla"},
    "policies": {"policies", "vla", "data"},
    "envs": {"envs", "data"},
    "vla": {"vla"},
    "data": {"data"},
}
SHARED = {"", "errors", "config"}  # the root: the package itself, UserError, the config loader
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py"))]
NAMES_AT_A_DOOR = 12


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import in a file, also of those inside functions."""
    module = ("triune", *path.relative_to(ROOT).with_suffix("").parts)
    package = module[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            yield from ((node.lineno, origin if node.module else f"{origin}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for line, name in imported(path):
        if name.split(".")[0] == "triune":
            target = (name.split(".") + [""])[1]
            allowed = target in MAY_IMPORT[folder] | SHARED or (folder == "cli" and name in ("triune.UserError", "triune.__version__"))
            assert allowed, f"{path}:{line}: {folder}/ must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_inside_the_package_are_relative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not [name for name in names if name.split(".")[0] == "triune"], f"{path}:{node.lineno}: write this import relatively"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_each_folder_has_one_short_door(folder: str) -> None:
    door = importlib.import_module(f"triune.{folder}")
    assert 1 <= len(door.__all__) <= NAMES_AT_A_DOOR
    assert all(hasattr(door, name) for name in door.__all__)
    assert door.__doc__


HEAVY = ("torch", "transformers", "diffusers", "lerobot", "robosuite", "metaworld", "mujoco", "matplotlib", "pydantic", "numpy")
LIGHT_DOORS = {"triune": HEAVY, "triune.cli.main": HEAVY, "triune.data": HEAVY[:-2], "triune.envs": HEAVY[:-2]}


@pytest.mark.parametrize("module", LIGHT_DOORS)
def test_light_doors_load_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(set(sys.modules) & set({LIGHT_DOORS[module]!r})))"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []


def test_no_module_is_missing_from_the_floors() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders == set(MAY_IMPORT)
