"""Names of worlds, and what builds them. Simulators are imported when their first world is made."""

import difflib
from importlib import import_module
from typing import Any

from ..errors import UserError
from .base import Expert, World

ROBOSUITE = (
    "robosuite/lift",
    "robosuite/stack",
    "cubes/lift-red",
    "cubes/lift-green",
    "cubes/stack",
    "heldout/lift-purple",
    "heldout/lift-green",
)


def world_names() -> tuple[str, ...]:
    """Every registered world."""
    from .metaworld import TASKS

    return (*ROBOSUITE, *TASKS)


def make_world(name: str, *, render: str = "fast", size: int = 96) -> World:
    """A world by name.

    Args:
        name: one of ``world_names()``.
        render: ``fast`` or ``default``; part of the world's contract.
        size: height and width of the images in pixels.

    Raises:
        UserError: there is no such world or profile (the message has the nearest name), or its simulator is not installed.
    """
    world: World = _module(name).make(name, render, size)
    return world


def make_expert(name: str) -> Expert:
    """The scripted expert of a world: a pure function of ``world.privileged()`` to a clipped action.

    Raises:
        UserError: as ``make_world``.
    """
    expert: Expert = _module(name).make_expert(name)
    return expert


def _module(name: str) -> Any:
    names = world_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        meant = f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(ROBOSUITE)}, metaworld/<task>-v3"
        raise UserError(f"there is no world '{name}'{meant}")
    simulator = "metaworld" if name.startswith("metaworld/") else "robosuite"
    try:
        return import_module(f".{simulator}", __package__)
    except ModuleNotFoundError as error:
        raise UserError(f"world '{name}' needs {simulator} ({error.name} is missing): pip install 'triune-vla[sim]'") from None
