"""What a tabletop scene is made of, as data: things, how they look, where they start. Imports no simulator."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Shape = Literal["cube", "ball", "cylinder", "plate", "capsule"]

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


PROPORTIONS: dict[Shape, tuple[float, ...]] = {
    "cube": (1.0, 1.0, 1.0),
    "ball": (1.0,),
    "cylinder": (0.7, 1.6),
    "plate": (1.35, 0.2),
    "capsule": (0.55, 0.45),
}
"""MuJoCo's geom size of a thing of size 1: half edges, radius, or radius and half height. Cylinders stand like cans, plates are flat
discs, and a capsule lies on its side."""


@dataclass(frozen=True)
class Thing:
    """An object. ``size`` in metres scales its ``PROPORTIONS``; of a cube it is half the edge."""

    name: str
    shape: Shape
    colour: str
    size: float = 0.021

    @property
    def dimensions(self) -> tuple[float, ...]:
        """MuJoCo's geom size."""
        return tuple(self.size * part for part in PROPORTIONS[self.shape])

    @property
    def rest(self) -> float:
        """Height of its centre above the table when it lies there."""
        return self.dimensions[0 if self.shape == "capsule" else -1]

    @property
    def width(self) -> float:
        """Distance between fingers that hold it."""
        return 2 * self.dimensions[0]


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
