"""Imports go down only, floor by floor, and inside the package they are relative."""

import ast
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
APART = {ROOT / "policies" / "client", ROOT / "policies" / "plugin"}  # distributions of their own, for robots and for lerobot
FILES = [path for folder in MAY_IMPORT for path in sorted((ROOT / folder).rglob("*.py")) if not APART & set(path.parents)]


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
            known = {"triune.__version__"} | ({"triune.UserError"} if folder == "cli" else set())
            allowed = target in MAY_IMPORT[folder] | SHARED or name in known
            assert allowed, f"{path}:{line}: {folder}/ must not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_inside_the_package_are_relative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        assert not [name for name in names if name.split(".")[0] == "triune"], f"{path}:{node.lineno}: write this import relatively"


def test_no_module_is_missing_from_the_floors() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests"}
    assert folders == set(MAY_IMPORT)
