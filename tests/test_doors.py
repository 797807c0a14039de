"""Every folder has one short public door, and the doors that the command line passes load nothing heavy."""

import importlib
import inspect
import subprocess
import sys

import pytest

PROMISED = {
    "data": {"ActionChunk", "Contract", "Observation", "open_dataset"},
    "envs": {"World", "make_expert", "make_world", "world_names"},
    "eval": {"evaluate", "write_report"},
    "policies": {"Plan", "Policy", "Request", "load_policy"},
    "vla": {"Spec", "build", "load_spec"},
}
FOLDERS = tuple(PROMISED)
MOST_NAMES = 12
HEAVY = ("torch", "transformers", "diffusers", "lerobot", "datasets", "robosuite", "metaworld", "mujoco", "matplotlib")
LIGHT = {
    "triune": (*HEAVY, "numpy", "pydantic", "yaml", "rich"),
    "triune.cli.main": (*HEAVY, "numpy", "pydantic", "yaml"),
    "triune.config": (*HEAVY, "numpy"),
    "triune.data": HEAVY,
    "triune.envs": HEAVY,
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_folder_has_one_short_door(folder: str) -> None:
    door = importlib.import_module(f"triune.{folder}")
    assert 1 <= len(door.__all__) <= MOST_NAMES
    assert len(set(door.__all__)) == len(door.__all__)
    assert PROMISED[folder] <= set(door.__all__)
    assert [name for name in door.__all__ if not hasattr(door, name)] == []
    assert door.__doc__


@pytest.mark.parametrize("folder", FOLDERS)
def test_everything_at_a_door_is_documented(folder: str) -> None:
    door = importlib.import_module(f"triune.{folder}")
    things = [getattr(door, name) for name in door.__all__]
    assert [thing for thing in things if (inspect.isclass(thing) or inspect.isfunction(thing)) and not thing.__doc__] == []


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_nothing_heavy(module: str) -> None:
    script = f"import sys, {module}; print(*sorted(set(sys.modules) & set({LIGHT[module]!r})))"
    loaded = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert loaded == []
