"""Scripted experts of the robosuite worlds, and how often the expert of any world succeeds.

Each is a pure function of ``World.privileged()``: what to do follows from where things are and how far the gripper is
closed, never from a counter. So an expert can take over, or label, any state that a policy or noise has led to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .registry import make_expert, make_world

GAIN = 16.0
"""Commanded fraction of 5 cm a step per metre of error; above 20 the arm overshoots, at 10 lifting takes 50 steps."""
TURN = 4.0
"""Commanded fraction of 0.5 rad a step per radian of error."""
CLEARANCE = 0.08
"""Height in metres at which the open gripper passes over things."""
CARRY = 0.06
"""Height in metres above its place at which a cube is carried."""


@dataclass(frozen=True)
class Rate:
    """How an expert did in a world.

    Attributes:
        episodes: one per seed.
        steps: control steps until the first success, of the episodes that had one.
        failures: seeds of the others.
    """

    name: str
    episodes: int
    steps: tuple[int, ...]
    failures: tuple[int, ...]

    @property
    def successes(self) -> int:
        return len(self.steps)


def success_rate(name: str, seeds: Iterable[int]) -> Rate:
    """Run the expert of a world, one episode per seed; only first and last frames are rendered.

    Raises:
        UserError: there is no such world.
    """
    seeds = tuple(seeds)
    world, act = make_world(name), make_expert(name)
    steps, failures = [], []
    try:
        for seed in seeds:
            world.reset(seed=seed)
            _, info, _ = world.expert_chunk(act, world.max_steps)
            if info["is_success"]:
                steps.append(int(info["steps"]))
            else:
                failures.append(seed)
    finally:
        world.close()
    return Rate(name, len(seeds), tuple(steps), tuple(failures))


def expert(privileged: dict[str, Any]) -> np.ndarray:
    """Action (7,) float32 in [-1, 1] for a ``lift`` or ``stack`` task."""
    return _lift(privileged) if privileged["kind"] == "lift" else _stack(privileged)


def _lift(privileged: dict[str, Any]) -> np.ndarray:
    cube = _Cube(privileged, privileged["target"])
    if cube.held:
        return cube.act(cube.gripper + [0, 0, 0.10], close=True)
    return cube.pick()


def _stack(privileged: dict[str, Any]) -> np.ndarray:
    cube = _Cube(privileged, privileged["target"])
    below = privileged["objects"][privileged["base"]]
    place = np.array(below["position"]) + [0, 0, below["size"] + cube.size]
    away = float(np.linalg.norm(cube.position[:2] - place[:2]))
    above = float(cube.position[2] - place[2])
    if away < 0.02 and abs(above) < 0.012 and not (cube.held and (away > 0.008 or above > 0.006)):
        # it rests in its place: let go, and once the fingers are clear of it rise
        rise = 0.10 if cube.opening > 0.02 else 0.0
        return cube.act(cube.gripper + [0, 0, rise], close=False)
    if not cube.held:
        return cube.pick()
    hang = cube.gripper - cube.position
    low = place[2] + float(np.clip(4 * (away - 0.006), 0.002, CARRY))
    goal = np.array([*place[:2], low])
    if away > 0.03 and above < 0.5 * CARRY:  # first up, then over
        goal[:2] = cube.position[:2]
    return cube.act(goal + hang, close=True)


class _Cube:
    """The cube to pick, as the gripper sees it."""

    def __init__(self, privileged: dict[str, Any], name: str) -> None:
        item, gripper = privileged["objects"][name], privileged["gripper"]
        self.position = np.array(item["position"])
        self.size = float(item["size"])
        self.gripper = np.array(gripper["position"])
        self.opening = float(gripper["width"]) - 2 * self.size
        rotation = np.array(gripper["rotation"])
        sides = np.array(item["rotation"])[:2, np.argsort(np.abs(np.array(item["rotation"])[2]))[:2]]  # edges that lie flat
        yaw = float(np.arctan2(sides[1, 0], sides[0, 0]))
        yaw -= np.pi / 2 * np.round(yaw / (np.pi / 2))  # a cube looks the same after a quarter turn
        goal = np.array([[-np.sin(yaw), np.cos(yaw), 0], [np.cos(yaw), np.sin(yaw), 0], [0, 0, -1.0]])
        self.turn = _rotation_vector(goal @ rotation.T)
        self.away = float(np.linalg.norm((self.position - self.gripper)[:2]))
        self.above = float(self.gripper[2] - self.position[2])

    @property
    def around(self) -> bool:
        """The finger tips are at the cube's sides."""
        return self.away < 0.012 and abs(self.above) < 0.015

    @property
    def held(self) -> bool:
        return self.away < 0.02 and abs(self.above) < 0.02 and self.opening < 0.004

    def pick(self) -> np.ndarray:
        """Go over the cube, down a funnel that narrows towards it, and close."""
        if self.around and np.linalg.norm(self.turn) < 0.2:
            return self.act(self.position, close=True)
        wrong = max(self.away - 0.008, 0.1 * (float(np.linalg.norm(self.turn)) - 0.15), 0.0)
        height = min(5 * wrong, CLEARANCE)
        if self.opening < 0.015 and self.above > 0.02:  # the fingers must open before they go down
            height = CLEARANCE
        goal = self.position + [0, 0, height]
        if self.above < 0.6 * height and self.above < 0.045:  # beside something: first up, then over
            goal[:2] = self.gripper[:2]
        return self.act(goal, close=False)

    def act(self, goal: np.ndarray, close: bool) -> np.ndarray:
        """Servo the finger tips towards ``goal`` (3,), fingers pointing down and along the cube's sides."""
        move = np.clip(GAIN * (goal - self.gripper), -1, 1)
        turn = np.clip(TURN * self.turn, -1, 1)
        return np.concatenate([move, turn, [1.0 if close else -1.0]]).astype(np.float32)


def _rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle (3,) of a rotation matrix with an angle below pi."""
    sine = 0.5 * np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    length = float(np.linalg.norm(sine))
    angle = float(np.arctan2(length, 0.5 * (np.trace(rotation) - 1)))
    return sine if length < 1e-9 else sine * (angle / length)
