"""Names of worlds, and what builds them. Simulators are imported when their first world is made."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from ..errors import UserError
from .base import Expert, World
from .view import DEFAULT, SIDE, Sizes, View, choose

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


def camera_names(name: str) -> tuple[str, ...]:
    """The cameras that a world offers; ``agentview`` and ``wrist``, which all have, come first.

    Raises:
        UserError: there is no such world, or its simulator is not installed.
    """
    return tuple(_module(name).CAMERAS)


def make_world(
    name: str, *, render: str = "fast", size: Sizes = SIDE, cameras: Iterable[str] | None = None, rate: float | None = None
) -> World:
    """A world by name; what is chosen here becomes part of its contract.

    Args:
        name: one of ``world_names()``.
        render: ``fast`` or ``default``.
        size: of the images in pixels: the side of squares, (height, width), or camera -> one of these.
        cameras: any of ``camera_names(name)``, in the order of the contract; ``agentview`` and ``wrist`` unless given.
        rate: control rate in Hz; the world's own unless given.

    Raises:
        UserError: there is no such world, camera or profile (the message has the nearest name, or all), the world cannot run at that
            rate, or its simulator is not installed.
    """
    return build_world(name, choose(render=render, size=size, cameras=cameras, rate=rate))


def build_world(name: str, view: View = DEFAULT) -> World:
    """As ``make_world``, with what is chosen as one value."""
    module = _module(name)
    strange = [camera for camera in view.cameras if camera not in module.CAMERAS]
    if strange:
        raise UserError(f"world {name} has no camera '{strange[0]}'; it has {', '.join(module.CAMERAS)}")
    world: World = module.make(name, view)
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
