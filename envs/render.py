"""Rendering MuJoCo scenes: one renderer for every world, two profiles, and the camera geometry behind its pixels.

Images are uint8 (H, W, 3) RGB and upright: x grows to the right, y downwards. ``fast`` switches off multisampling,
shadows and reflections and draws fine meshes with fewer triangles, which together is nearly all of a frame's cost on a
CPU (README.md has the numbers); ``default`` leaves the model as it is. The two look different, so a contract names the
profile that its data was made with.
"""

import os
import sys
from typing import Any

import numpy as np

from ..errors import UserError
from .view import SIDE, Size, check_profile

FINE = 1000
"""Meshes of more triangles than this are drawn simplified by ``fast``."""
CELL = 0.008
"""Metres: detail below this is left out; at 96 pixels a pixel of the table camera covers about as much."""

if sys.platform == "linux":  # no display is needed; must be set before mujoco is imported
    os.environ.setdefault("MUJOCO_GL", "egl")


class Painter:
    """Renders images of one MuJoCo model.

    The graphics context is made at the first image, so a world that is never looked at needs none, and it is made in
    the process that uses it. Images of all sizes are drawn into its one buffer.

    Args:
        model: ``mujoco.MjModel``. Camera poses, colours and materials may be changed at any time and show in the next image.
        size: of images of which no other is asked.
        profile: ``fast`` or ``default``.
        groups: geom groups to show; ``None`` keeps MuJoCo's choice.
        sites: show sites. Robosuite marks the grip point and its axis with them, which no real camera would see;
            Meta-World draws its goals with them, which the policy must see.
    """

    def __init__(
        self, model: Any, size: Size = SIDE, profile: str = "fast", groups: tuple[int, ...] | None = None, sites: bool = True
    ) -> None:
        check_profile(profile)
        self.model = model
        self.size = (size, size) if isinstance(size, int) else size
        self.profile = profile
        self._groups = groups
        self._sites = sites
        self._opened: Any = None
        self._option: Any = None

    def image(self, data: Any, camera: str, size: tuple[int, int] | None = None) -> np.ndarray:
        """What ``camera`` sees, uint8 (height, width, 3), upright. ``data`` must have been forwarded.

        Raises:
            UserError: there is no graphics library to draw with.
        """
        import mujoco

        renderer = self._renderer(size or self.size)
        renderer.update_scene(data, camera, self._option)
        if self.profile == "fast":
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = False
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = False
        return np.ascontiguousarray(renderer.render())

    def geoms(self, data: Any, camera: str) -> np.ndarray:
        """Which geom ``camera`` sees in each pixel, int32 (height, width), -1 where there is none."""
        import mujoco

        renderer = self._renderer(self.size)
        renderer.update_scene(data, camera, self._option)
        renderer.enable_segmentation_rendering()
        found, kind = np.moveaxis(renderer.render(), -1, 0)
        renderer.disable_segmentation_rendering()
        return np.where(kind == mujoco.mjtObj.mjOBJ_GEOM, found, -1)

    def close(self) -> None:
        """Free the graphics context; left to the interpreter's exit, EGL prints errors."""
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _renderer(self, size: tuple[int, int]) -> Any:
        """The ``mujoco.Renderer``, set to images of a size, (height, width).

        A renderer of its own for each size would load the model's meshes and textures again: 0.8 s and 140 MB for a robosuite world.
        What its size decides is the viewport; the buffer is as large as the model says.
        """
        import mujoco

        (height, width), buffer = size, self.model.vis.global_
        if height > buffer.offheight or width > buffer.offwidth:
            self.close()
        if self._opened is None:
            self._opened = self._open(height, width)
        self._opened._height, self._opened._width, self._opened._rect = height, width, mujoco.MjrRect(0, 0, width, height)
        return self._opened

    def _open(self, height: int, width: int) -> Any:
        import mujoco

        if self.profile == "fast":
            simplify_meshes(self.model)
            self.model.vis.quality.offsamples = 0  # these are read when the context is made
            self.model.vis.quality.shadowsize = 0
        buffer = self.model.vis.global_
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, height)
        self._option = mujoco.MjvOption()
        if self._groups is not None:
            self._option.geomgroup[:] = [group in self._groups for group in range(len(self._option.geomgroup))]
        if not self._sites:
            self._option.sitegroup[:] = 0
        try:
            return mujoco.Renderer(self.model, height, width)
        except mujoco.FatalError as error:
            backend = os.environ.get("MUJOCO_GL", "not set")
            raise UserError(
                f"MuJoCo cannot draw here (MUJOCO_GL is {backend}: {str(error).split(',')[0]}); install libegl1 and set MUJOCO_GL=egl, "
                "before Python starts if the program imports mujoco before triune"
            ) from error


def simplify_meshes(model: Any, cell: float = CELL, fine: int = FINE) -> None:
    """Draw fine meshes with fewer triangles: vertices in the same cell of a grid become one (Rossignac and Borrel, 1993).

    Only meshes that nothing collides with are touched, so the physics stays as it is. Doing it twice changes nothing more.
    Of a graphics context that exists already the pictures stay as they were.
    """
    solid = {int(model.geom_dataid[g]) for g in range(model.ngeom) if model.geom_contype[g] or model.geom_conaffinity[g]}
    for mesh in range(model.nmesh):
        faces = slice(int(model.mesh_faceadr[mesh]), int(model.mesh_faceadr[mesh] + model.mesh_facenum[mesh]))
        if mesh in solid or model.mesh_facenum[mesh] <= fine:
            continue
        vertices = slice(int(model.mesh_vertadr[mesh]), int(model.mesh_vertadr[mesh] + model.mesh_vertnum[mesh]))
        cells = np.floor(model.mesh_vert[vertices] / cell).astype(np.int64)
        _, first, inverse = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        merged = first[inverse.ravel()][model.mesh_face[faces]]
        corners = np.sort(merged, axis=1)
        _, distinct = np.unique(corners, axis=0, return_index=True)
        kept = np.sort(distinct)
        kept = kept[(np.diff(corners[kept], axis=1) > 0).all(1)]  # a triangle that lost a corner is gone
        end = faces.start + len(kept)
        model.mesh_face[faces.start : end] = merged[kept]
        for name in ("mesh_facenormal", "mesh_facetexcoord"):
            array = getattr(model, name)
            array[faces.start : end] = array[faces][kept]
        model.mesh_facenum[mesh] = len(kept)


def intrinsics(model: Any, camera: str, height: int, width: int) -> np.ndarray:
    """Pinhole matrix (3, 3) in pixels. The height alone fixes the focal length: a wider image shows more at its sides."""
    focal = 0.5 * height / np.tan(np.radians(float(model.cam_fovy[camera_id(model, camera)])) / 2)
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])


def extrinsics(model: Any, data: Any, camera: str) -> np.ndarray:
    """World-to-camera transform (4, 4) in metres; camera axes are x right, y down, z forward."""
    index = camera_id(model, camera)
    rotation = data.cam_xmat[index].reshape(3, 3) * np.array([1.0, -1.0, -1.0])  # MuJoCo's camera looks along -z, y up
    pose = np.eye(4)
    pose[:3, :3] = rotation.T
    pose[:3, 3] = -rotation.T @ data.cam_xpos[index]
    return pose


def project(model: Any, data: Any, camera: str, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where world points fall in the image of ``camera``.

    Args:
        points: (N, 3) in metres.

    Returns:
        normalised image coordinates (N, 2): x to the right, y downwards, (0, 0) the upper left and (1, 1) the lower
        right corner of the upright square image; and depth (N,) in metres along the viewing direction. A point with
        depth <= 0 lies behind the camera, and one outside [0, 1] lies outside the image.
    """
    points = np.asarray(points, dtype=float).reshape(-1, 3)
    seen = points @ (pose := extrinsics(model, data, camera))[:3, :3].T + pose[:3, 3]
    focal = intrinsics(model, camera, 1, 1)[0, 0]
    depth = seen[:, 2]
    safe = np.where(np.abs(depth) < 1e-9, 1e-9, depth)
    return 0.5 + focal * seen[:, :2] / safe[:, None], depth


def camera_id(model: Any, camera: str) -> int:
    """MuJoCo's index of a camera.

    Raises:
        UserError: the model has no such camera; the message lists those it has.
    """
    import mujoco

    names = [mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_CAMERA, i) for i in range(model.ncam)]
    if camera not in names:
        raise UserError(f"there is no camera '{camera}'; this model has {', '.join(map(str, names))}")
    return names.index(camera)


def look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Quaternion (w, x, y, z) of a MuJoCo camera at ``position`` that looks at ``target`` with the world's z upwards."""
    import mujoco

    back = np.asarray(position, dtype=float) - np.asarray(target, dtype=float)
    back /= np.linalg.norm(back)
    right = np.cross([0.0, 0.0, 1.0], back)
    if np.linalg.norm(right) < 1e-6:  # straight down: the world's -y points right
        right = np.array([0.0, -1.0, 0.0])
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(back, right), back], axis=1).ravel())
    return quaternion
