"""A table with a Panda and objects given as data: the scene of the ``cubes`` and ``heldout`` worlds and of rendered scenes.

Build a ``Tabletop`` once with the things and textures that will be wanted, then change what is seen at run time without
rebuilding: ``place`` teleports things (and parks those not named out of sight), ``dress`` recolours and resizes,
``look`` changes textures, light and the agentview camera, ``reach`` poses the arm. Each takes well under a
millisecond (``reach`` a few), so the images themselves bound the rate. After any of them call ``forward``, once.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from . import render
from .things import CAMERAS, COLOURS, TABLE_HEIGHT, Area, Look, Scene, Shape, Thing

logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)  # notes at import
import robosuite  # noqa: E402
from robosuite.environments.manipulation.manipulation_env import ManipulationEnv  # noqa: E402
from robosuite.models.arenas import TableArena  # noqa: E402
from robosuite.models.objects import BallObject, BoxObject, CapsuleObject, CylinderObject  # noqa: E402
from robosuite.models.tasks import ManipulationTask  # noqa: E402
from robosuite.utils.mjcf_utils import xml_path_completion  # noqa: E402

__all__ = ["CAMERAS", "COLOURS", "TABLE_HEIGHT", "Area", "Look", "Scene", "Shape", "Tabletop", "Thing", "own_task"]

SETTINGS: dict[str, Any] = {
    "robots": "Panda",
    "use_camera_obs": False,
    "has_renderer": False,
    "has_offscreen_renderer": False,
    "ignore_done": True,
    "hard_reset": False,
    "renderer": "mujoco",
}
"""What every robosuite environment is made with: images are ours, time limits too, and a reset rebuilds nothing."""
RATE = 20.0
"""Hz, robosuite's own."""


class Tabletop(ManipulationEnv):
    """robosuite environment over a ``Scene``: Panda, OSC_POSE deltas, no automatic end, no observables of images.

    ``reset`` draws poses for all things from ``generator``; give a seeded one before. The arm's joint noise is drawn by
    robosuite from numpy's global generator: ``envs.robosuite`` seeds and restores that one too.
    """

    def __init__(self, scene: Scene, rate: float = RATE) -> None:
        self.scene = scene
        self.things = {thing.name: thing for thing in scene.things}
        self.generator = np.random.default_rng(0)
        super().__init__(initialization_noise="default", control_freq=rate, **SETTINGS)

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

    def visible(self, painter: render.Painter) -> dict[str, dict[str, int]]:
        """Thing -> camera -> how many pixels of its image show the thing."""
        seen = {camera: painter.geoms(self.sim.data._data, name) for camera, name in CAMERAS.items()}
        return {name: {camera: int(np.isin(ids, self._geoms(name)).sum()) for camera, ids in seen.items()} for name in self.things}

    def pixels(self, points: np.ndarray, camera: str) -> tuple[np.ndarray, np.ndarray]:
        """Normalised image coordinates (N, 2) and depth (N,) of world points (N, 3); see ``render.project``."""
        return render.project(self.sim.model._model, self.sim.data._data, CAMERAS[camera], points)


def own_task(kind: str, rate: float = RATE) -> Any:
    """robosuite's own environment of that name, such as ``Lift``."""
    return robosuite.make(kind, use_object_obs=False, control_freq=rate, **SETTINGS)


def _object(thing: Thing) -> Any:
    kind = {"cube": BoxObject, "ball": BallObject, "cylinder": CylinderObject, "plate": CylinderObject, "capsule": CapsuleObject}[
        thing.shape
    ]
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
