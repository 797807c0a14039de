"""A table with a Panda and objects given as data: the scene of the ``cubes`` and ``heldout`` worlds and of rendered scenes.

Build a ``Tabletop`` once with the things and textures that will be wanted, then change what is seen at run time without
rebuilding: ``place`` teleports things (and parks those not named out of sight), ``dress`` recolours and resizes,
``look`` changes textures, light and the agentview camera, ``reach`` poses the arm. Each takes well under a
millisecond (``reach`` a few), so the images themselves bound the rate. After any of them call ``forward``, once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from . import render

logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)  # notes at import
from robosuite.environments.manipulation.manipulation_env import ManipulationEnv  # noqa: E402
from robosuite.models.arenas import TableArena  # noqa: E402
from robosuite.models.objects import BallObject, BoxObject, CapsuleObject, CylinderObject  # noqa: E402
from robosuite.models.tasks import ManipulationTask  # noqa: E402
from robosuite.utils.mjcf_utils import xml_path_completion  # noqa: E402

Shape = Literal["cube", "ball", "cylinder", "capsule"]
SHAPES: tuple[Shape, ...] = ("cube", "ball", "cylinder", "capsule")

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.08, 0.08),
    "green": (0.08, 0.65, 0.12),
    "blue": (0.10, 0.20, 0.85),
    "yellow": (0.95, 0.85, 0.08),
    "purple": (0.50, 0.10, 0.70),
    "orange": (0.95, 0.45, 0.05),
    "cyan": (0.10, 0.80, 0.85),
    "white": (0.95, 0.95, 0.95),
}
"""Colour names and their RGB in [0, 1], before lighting."""

TABLE_HEIGHT = 0.8
"""Height of the table top in metres; the world's origin is on the floor below the table's centre."""

CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""Our camera names and MuJoCo's."""

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Thing:
    """An object. ``size`` in metres: half the edge of a cube, the radius of a ball, radius and half height of a
    cylinder, and half the length of a capsule (whose radius is 0.55 of it, lying on its side)."""

    name: str
    shape: Shape
    colour: str
    size: float = 0.021

    @property
    def rest(self) -> float:
        """Height of its centre above the table when it lies there."""
        return 0.55 * self.size if self.shape == "capsule" else self.size

    @property
    def dimensions(self) -> tuple[float, ...]:
        """MuJoCo's geom size."""
        return {
            "cube": (self.size,) * 3,
            "ball": (self.size,),
            "cylinder": (self.size,) * 2,
            "capsule": (0.55 * self.size, 0.45 * self.size),
        }[self.shape]


@dataclass(frozen=True)
class Look:
    """How a scene looks. Textures are file names of robosuite's ``models/assets/textures`` without ``.png``.

    Attributes:
        table, floor, wall: textures.
        camera, target: position of the agentview camera and the point that it looks at, in metres, world frame.
        fovy: its vertical field of view in degrees.
        light: diffuse intensity of the lamp; 0.8 is robosuite's look.
    """

    table: str = "ceramic"
    floor: str = "light-gray-floor-tile"
    wall: str = "light-gray-plaster"
    camera: Triple = (0.5, 0.0, 1.35)
    target: Triple = (-0.02, 0.0, 0.86)
    fovy: float = 42.0
    light: float = 0.8

    @property
    def textures(self) -> tuple[str, ...]:
        return (self.table, self.floor, self.wall)


@dataclass(frozen=True)
class Area:
    """Where things start.

    Attributes:
        x, y: ranges of a thing's centre in metres from the table's centre; x points away from the robot, y to its left.
        yaw: largest rotation about z either way, radians. Below 45 degrees a cube has one nearest grasp.
        gap: least distance between two centres in metres, so that the open gripper (12 cm over all) fits between.
    """

    x: tuple[float, float] = (-0.08, 0.08)
    y: tuple[float, float] = (-0.12, 0.12)
    yaw: float = float(np.pi / 6)
    gap: float = 0.10

    def sample(self, generator: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
        """``count`` poses (x, y, yaw) at least ``gap`` apart.

        Raises:
            ValueError: the area is too small for so many.
        """
        for _ in range(10_000):
            points = generator.uniform((self.x[0], self.y[0]), (self.x[1], self.y[1]), size=(count, 2))
            distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + np.eye(count) * self.gap
            if (distance >= self.gap).all():
                return [
                    (float(x), float(y), float(yaw))
                    for (x, y), yaw in zip(points, generator.uniform(-self.yaw, self.yaw, count), strict=True)
                ]
        raise ValueError(f"{count} things do not fit into {self} at least {self.gap} m apart")


@dataclass(frozen=True)
class Scene:
    """What a ``Tabletop`` is built from."""

    things: tuple[Thing, ...]
    look: Look = field(default_factory=Look)
    area: Area = field(default_factory=Area)
    textures: tuple[str, ...] = ()
    """Textures, beside those of ``look``, that a later ``look`` may ask for."""


class Tabletop(ManipulationEnv):
    """robosuite environment over a ``Scene``: Panda, OSC_POSE deltas, 20 Hz, no automatic end, no observables of images.

    ``reset`` draws poses for all things from ``generator``; give a seeded one before. The arm's joint noise is drawn by
    robosuite from numpy's global generator: ``envs.robosuite`` seeds and restores that one too.
    """

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.things = {thing.name: thing for thing in scene.things}
        self.generator = np.random.default_rng(0)
        super().__init__(
            robots="Panda", initialization_noise="default", use_camera_obs=False, has_renderer=False, has_offscreen_renderer=False,
            control_freq=20, ignore_done=True, hard_reset=False, renderer="mujoco",
        )  # fmt: skip

    # What robosuite asks of a task

    def reward(self, action: Any = None) -> float:
        return 0.0

    def _load_model(self) -> None:
        super()._load_model()
        robot = self.robots[0].robot_model
        robot.set_base_xpos(robot.base_xpos_offset["table"](0.8))
        arena = TableArena(table_full_size=(0.8, 0.8, 0.05), table_offset=(0, 0, TABLE_HEIGHT))
        arena.set_origin([0, 0, 0])
        for texture in dict.fromkeys((*self.scene.look.textures, *self.scene.textures)):
            _add_texture(arena, texture)
        self.objects = {thing.name: _object(thing) for thing in self.scene.things}
        self.model = ManipulationTask(mujoco_arena=arena, mujoco_robots=[robot], mujoco_objects=list(self.objects.values()))

    def _reset_internal(self) -> None:
        super()._reset_internal()
        self.look(self.scene.look)
        poses = self.scene.area.sample(self.generator, len(self.things))
        self.place(dict(zip(self.things, poses, strict=True)))

    # Things

    def place(self, poses: Mapping[str, Sequence[float]]) -> None:
        """Teleport things to rest at (x, y, yaw) or (x, y, yaw, height), in metres from the table's centre and radians.

        ``height`` is that of the centre above where it rests, for a thing that is held or stacked. Things not named are
        parked out of sight.
        """
        for index, (name, thing) in enumerate(self.things.items()):
            x, y, yaw, *height = poses.get(name, (0.5 * index, 0.0, 0.0, -10.0))
            half = yaw / 2
            turn = np.array([np.cos(half), 0, 0, np.sin(half)])
            if thing.shape == "capsule":  # its axis is z: lay it along x, then turn
                turn = np.sqrt(0.5) * np.array([np.cos(half), -np.sin(half), np.cos(half), np.sin(half)])
            position = (x, y, TABLE_HEIGHT + thing.rest + (height[0] if height else 0.0))
            self.sim.data.set_joint_qpos(self.objects[name].joints[0], np.concatenate([position, turn]))
            self.sim.data.set_joint_qvel(self.objects[name].joints[0], np.zeros(6))

    def dress(self, name: str, colour: str | None = None, size: float | None = None) -> None:
        """Recolour or resize a thing (before ``place``: the rest height follows). Mass stays that of the built size."""
        old = self.things[name]
        thing = self.things[name] = Thing(name, old.shape, colour or old.colour, size or old.size)
        for geom in self._geoms(name):
            self.sim.model.geom_rgba[geom, :3] = COLOURS[thing.colour]
            self.sim.model.geom_size[geom, : len(thing.dimensions)] = thing.dimensions
            self.sim.model.geom_rbound[geom] *= thing.size / old.size

    def position(self, name: str) -> np.ndarray:
        """Centre of a thing (3,), metres, world frame."""
        return np.array(self.sim.data.body_xpos[self.sim.model.body_name2id(self.objects[name].root_body)])

    def rotation(self, name: str) -> np.ndarray:
        """Rotation matrix (3, 3) of a thing, world frame."""
        return np.array(self.sim.data.body_xmat[self.sim.model.body_name2id(self.objects[name].root_body)]).reshape(3, 3)

    def _geoms(self, name: str) -> list[int]:
        item = self.objects[name]
        return [self.sim.model.geom_name2id(geom) for geom in (*item.visual_geoms, *item.contact_geoms)]

    # Looks

    def look(self, look: Look) -> None:
        """Change textures, light and the agentview camera. Textures must have been named in the scene.

        Raises:
            KeyError: a texture that the scene was not built with.
        """
        model = self.sim.model
        for geom, texture in {"table_visual": look.table, "floor": look.floor}.items():
            model.geom_matid[model.geom_name2id(geom)] = self._material(texture)
        for geom in (name for name in model.geom_names if name and name.startswith("wall_")):
            model.geom_matid[model.geom_name2id(geom)] = self._material(look.wall)
        camera = model.camera_name2id("agentview")
        model.cam_pos[camera] = look.camera
        model.cam_quat[camera] = render.look_at(np.array(look.camera), np.array(look.target))
        model.cam_fovy[camera] = look.fovy
        model.light_diffuse[:] = look.light

    def _material(self, texture: str) -> int:
        import mujoco

        index = mujoco.mj_name2id(self.sim.model._model, mujoco.mjtObj.mjOBJ_MATERIAL, f"look_{texture}")
        if index < 0:
            raise KeyError(f"texture '{texture}' is not among those that this scene was built with")
        return int(index)

    # The arm

    @property
    def eef(self) -> np.ndarray:
        """Point between the finger tips (3,), metres, world frame."""
        return np.array(self.sim.data.site_xpos[self.robots[0].eef_site_id["right"]])

    def reach(self, position: Sequence[float], yaw: float = 0.0, width: float = 0.08, steps: int = 40) -> bool:
        """Pose the arm so that the finger tips meet at ``position`` pointing down, by damped least squares.

        Args:
            position: (3,) metres, world frame; a cube is held with its centre there.
            yaw: turn of the fingers about z; at 0 they open along y.
            width: distance between the fingers in metres, 0 to 0.08.

        Returns:
            whether the pose was reached within 2 mm.
        """
        import mujoco

        robot, model, data = self.robots[0], self.sim.model._model, self.sim.data._data
        joints, dofs, site = robot._ref_joint_pos_indexes, robot._ref_joint_vel_indexes, robot.eef_site_id["right"]
        data.qpos[joints] = robot.init_qpos
        data.qpos[robot._ref_gripper_joint_pos_indexes["right"]] = np.array([0.5, -0.5]) * width
        goal = np.array([[-np.sin(yaw), np.cos(yaw), 0], [np.cos(yaw), np.sin(yaw), 0], [0, 0, -1.0]])
        linear, angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        lower, upper = model.jnt_range[robot._ref_joint_indexes].T
        for _ in range(steps):
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            frame = data.site_xmat[site].reshape(3, 3)
            turn = 0.5 * np.cross(frame, goal, axis=0).sum(axis=1)
            error = np.concatenate([np.asarray(position) - data.site_xpos[site], turn])
            if np.linalg.norm(error[:3]) < 5e-4 and np.linalg.norm(turn) < 5e-3:
                break
            mujoco.mj_jacSite(model, data, linear, angular, site)
            jacobian = np.concatenate([linear[:, dofs], angular[:, dofs]])
            step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-4 * np.eye(6), error)
            data.qpos[joints] = np.clip(data.qpos[joints] + np.clip(step, -0.3, 0.3), lower, upper)
        mujoco.mj_kinematics(model, data)
        return bool(np.linalg.norm(np.asarray(position) - data.site_xpos[site]) < 2e-3)

    # Images

    def forward(self) -> None:
        """Let changes of poses, colours and cameras take effect."""
        self.sim.forward()

    def painter(self, size: int = 96, profile: str = "fast") -> render.Painter:
        """A renderer of this scene; close it when done."""
        return render.Painter(self.sim.model._model, size, profile, groups=(1,), sites=False)

    def images(self, painter: render.Painter) -> dict[str, np.ndarray]:
        """One upright image per camera."""
        return {name: painter.image(self.sim.data._data, camera) for name, camera in CAMERAS.items()}

    def pixels(self, points: np.ndarray, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image coordinates (N, 2) and depth (N,) of world points (N, 3); see ``render.project``."""
        return render.project(self.sim.model._model, self.sim.data._data, CAMERAS[camera], points)


def _object(thing: Thing) -> Any:
    kind = {"cube": BoxObject, "ball": BallObject, "cylinder": CylinderObject, "capsule": CapsuleObject}[thing.shape]
    return kind(name=thing.name, size=list(thing.dimensions), rgba=[*COLOURS[thing.colour], 1.0])


def _add_texture(arena: Any, texture: str) -> None:
    """A material ``look_<texture>`` from one of robosuite's texture files."""
    from xml.etree.ElementTree import SubElement

    file = xml_path_completion(f"textures/{texture}.png")
    SubElement(arena.asset, "texture", {"name": f"tex_{texture}", "type": "cube", "file": file})
    SubElement(
        arena.asset,
        "material",
        {"name": f"look_{texture}", "texture": f"tex_{texture}", "reflectance": "0", "specular": "0.2", "shininess": "0"},
    )
