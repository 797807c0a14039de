"""Worlds of robosuite: a Panda at a table, OSC_POSE deltas at 20 Hz or another rate.

``robosuite/*`` are robosuite's own tasks with their own success tests; ``cubes/*`` share one scene, so that only the
words say what to do; ``heldout/*`` show another cube colour, table texture and camera pose.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..data import Camera, Contract, Vector
from ..errors import UserError
from . import experts, things
from .base import Expert, World
from .render import Painter, extrinsics, intrinsics
from .things import TABLE_HEIGHT, Look, Scene, Thing
from .view import DEFAULT, View

CAMERAS = things.CAMERAS | {name: name for name in ("sideview", "frontview", "birdview")}
"""Our camera names and MuJoCo's; those that robosuite's tables have too keep robosuite's name and pose."""
RATE = 20.0
"""Hz, where no other rate is asked for; ``max_steps`` of the tasks and ``SETTLE`` count steps of this rate."""
FASTEST = 500.0
"""Hz: robosuite simulates in steps of 2 ms, whole ones: 16 of them (31.25 Hz) where 30 Hz is asked for."""
SETTLE = 8
"""Control steps before an episode begins: robosuite drops its objects from the air, and the gripper opens."""
LIFTED = 0.04
"""robosuite's own margin: a cube is lifted when its centre is so many metres above the table top."""

HELD_OUT_LOOK = Look(table="light-wood", floor="wood-tiles", camera=(0.394, -0.315, 1.32))
"""A table texture and a camera pose (40 degrees round the table) that no training scene has."""


@dataclass(frozen=True)
class Task:
    """What a world asks for.

    Attributes:
        kind: what success means.
        target: name of the object to lift or to stack.
        base: name of the object to stack on.
    """

    instruction: str
    kind: Literal["lift", "stack"]
    target: str
    base: str | None = None
    max_steps: int = 80
    scene: Scene | None = None
    """``None``: robosuite's own environment of that kind."""


def _cubes(*colours: str, look: Look | None = None) -> Scene:
    return Scene(tuple(Thing(f"{colour} cube", "cube", colour) for colour in colours), look or Look())


TASKS: dict[str, Task] = {
    "robosuite/lift": Task("lift the red cube", "lift", "cube"),
    "robosuite/stack": Task("stack the red cube on the green cube", "stack", "cubeA", "cubeB", 200),
    "cubes/lift-red": Task("lift the red cube", "lift", "red cube", scene=_cubes("red", "green")),
    "cubes/lift-green": Task("lift the green cube", "lift", "green cube", scene=_cubes("red", "green")),
    "cubes/stack": Task("stack the red cube on the green cube", "stack", "red cube", "green cube", 150, _cubes("red", "green")),
    "heldout/lift-purple": Task("lift the purple cube", "lift", "purple cube", scene=_cubes("purple", "green", look=HELD_OUT_LOOK)),
    "heldout/lift-green": Task("lift the green cube", "lift", "green cube", scene=_cubes("purple", "green", look=HELD_OUT_LOOK)),
}


def contract(view: View) -> Contract:
    """The conventions that all robosuite worlds share. An action is a delta for one control step, so its unit is the same at any rate."""
    state = ("eef_x", "eef_y", "eef_z", *(f"rot6d_{i}" for i in range(6)), "gripper_width")
    return Contract(
        cameras=tuple(Camera(name=shot.camera, height=shot.height, width=shot.width, flip="none") for shot in view.shots),
        state=Vector(
            names=state, units=("m",) * 3 + ("1",) * 6 + ("m",), frame="world", rotation="rot6d", gripper="width, 0 closed", mode="absolute"
        ),
        action=Vector(
            names=("dx", "dy", "dz", "drx", "dry", "drz", "gripper"),
            units=("0.05 m",) * 3 + ("0.5 rad",) * 3 + ("1",),
            frame="base",
            rotation="axis_angle",
            gripper="-1 opens, +1 closes",
            mode="relative",
        ),
        rate=view.rate or RATE,
        render=view.render,
    )


class RobosuiteWorld(World):
    """A robosuite environment as a world. The simulator is built at the first reset, which takes some seconds.

    Args:
        name: one of ``TASKS``.
        view: cameras among ``CAMERAS``, and any rate up to ``FASTEST``. An episode lasts as many seconds at every rate.

    Raises:
        UserError: the rate is higher.
    """

    def __init__(self, name: str, view: View = DEFAULT) -> None:
        if view.rate is not None and view.rate > FASTEST:
            raise UserError(f"world {name} runs at {FASTEST:g} Hz at most, so not at {view.rate:g}: robosuite simulates in steps of 2 ms")
        self.task = TASKS[name]
        self.view = view
        reach = ([-2.0] * 3 + [-1.0] * 6 + [-0.01], [2.0] * 3 + [1.0] * 6 + [0.1])
        super().__init__(name, self.task.instruction, self._steps_of(self.task.max_steps), contract(view), reach)
        self._env: Any = None
        self._painter: Painter | None = None
        self._items: dict[str, Any] = {}

    def become(self, name: str) -> bool:
        """See ``World.become``: tasks in the same scene share its simulator."""
        task = TASKS.get(name)
        if task is None or task.scene is None or task.scene != self.task.scene:
            return super().become(name)
        self.task, self.name, self.task_description, self.max_steps = task, name, task.instruction, self._steps_of(task.max_steps)
        self._steps = None
        return True

    def close(self) -> None:
        if self._painter is not None:
            self._painter.close()
        if self._env is not None:
            self._env.close()
        self._env = self._painter = None
        self._steps = None

    def privileged(self) -> dict[str, Any]:
        """See ``World.privileged``. Lengths in metres, world frame.

        ``objects``: name -> ``position`` (3,), ``rotation`` (3, 3), ``size`` (half edge), ``colour``, ``shape``;
        ``gripper``: ``position`` between the finger tips, ``rotation`` (3, 3), ``width``; ``table``: height of its top;
        ``kind``, ``target``, ``base``: what the task asks for.
        """
        model, data = self._env.sim.model._model, self._env.sim.data._data
        cameras = {
            shot.camera: {
                "intrinsics": intrinsics(model, CAMERAS[shot.camera], shot.height, shot.width).tolist(),
                "extrinsics": extrinsics(model, data, CAMERAS[shot.camera]).tolist(),
            }
            for shot in self.view.shots
        }
        position, rotation, width = self._gripper()
        return {
            "objects": {name: self._object(name) for name in self._items},
            "gripper": {"position": position.tolist(), "rotation": rotation.tolist(), "width": width},
            "cameras": cameras,
            "table": TABLE_HEIGHT,
            "kind": self.task.kind,
            "target": self.task.target,
            "base": self.task.base,
        }

    def _begin(self, seed: int) -> None:
        if self._env is None:
            self._build()
        with numpy_seeded(seed):
            if self.task.scene is not None:
                self._env.generator = np.random.default_rng((seed, 3))
            self._env.reset()
        for _ in range(self._steps_of(SETTLE)):
            self._env.step(np.array([0, 0, 0, 0, 0, 0, -1.0]))

    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        self._env.step(action)
        success = self._lifted() if self.task.kind == "lift" else self._stacked()
        return float(success), success

    def _state(self) -> np.ndarray:
        position, rotation, width = self._gripper()
        return np.concatenate([position, rotation[:, 0], rotation[:, 1], [width]])

    def _images(self) -> dict[str, np.ndarray]:
        if self._painter is None:
            self._painter = Painter(self._env.sim.model._model, profile=self.view.render, groups=(1,))
        data = self._env.sim.data._data
        return {shot.camera: self._painter.image(data, CAMERAS[shot.camera], (shot.height, shot.width)) for shot in self.view.shots}

    def _steps_of(self, steps: int) -> int:
        """Control steps of this world that last as long as ``steps`` at ``RATE``."""
        return max(1, round(steps * (self.view.rate or RATE) / RATE))

    def _build(self) -> None:
        from .tabletop import Tabletop, own_task

        with numpy_seeded(0):  # robosuite draws the sizes of its cubes while it builds
            if self.task.scene is not None:
                self._env = Tabletop(self.task.scene, self.rate)
                self._items = dict(self._env.objects)
                return
            self._env = own_task(self.task.kind.capitalize(), self.rate)
            self._items = {"cube": self._env.cube} if self.task.kind == "lift" else {"cubeA": self._env.cubeA, "cubeB": self._env.cubeB}

    def _gripper(self) -> tuple[np.ndarray, np.ndarray, float]:
        robot, data = self._env.robots[0], self._env.sim.data
        site = robot.eef_site_id["right"]
        fingers = data.qpos[robot._ref_gripper_joint_pos_indexes["right"]]
        return np.array(data.site_xpos[site]), np.array(data.site_xmat[site]).reshape(3, 3), float(fingers[0] - fingers[1])

    def _object(self, name: str) -> dict[str, Any]:
        data = self._env.sim.data
        body = self._env.sim.model.body_name2id(self._items[name].root_body)
        colour = {"cube": "red", "cubeA": "red", "cubeB": "green"}.get(name) or self._env.things[name].colour
        return {
            "position": data.body_xpos[body].tolist(),
            "rotation": data.body_xmat[body].reshape(3, 3).tolist(),
            "size": float(self._items[name].size[0]),
            "colour": colour,
            "shape": "cube",
        }

    def _height(self, name: str) -> float:
        return float(self._env.sim.data.body_xpos[self._env.sim.model.body_name2id(self._items[name].root_body)][2])

    def _lifted(self) -> bool:
        return self._height(self.task.target) > TABLE_HEIGHT + LIFTED

    def _stacked(self) -> bool:
        """robosuite's own test: lifted, touching the other, and let go."""
        assert self.task.base is not None
        target, base = self._items[self.task.target], self._items[self.task.base]
        grasped = self._env._check_grasp(gripper=self._env.robots[0].gripper, object_geoms=target)
        return self._lifted() and not grasped and bool(self._env.check_contact(target, base))


def make(name: str, view: View) -> RobosuiteWorld:
    """The world of that name in ``TASKS``."""
    return RobosuiteWorld(name, view)


def make_expert(name: str) -> Expert:
    """The scripted expert of that world."""
    return experts.expert


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """robosuite draws from numpy's global generator: seed it within, and leave it as it was."""
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002
