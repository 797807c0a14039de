"""The fast render profile: fewer triangles, the same physics, nearly the same pictures."""

import os
import subprocess
import sys

import numpy as np

from triune.envs.render import Painter, simplify_meshes

SCENE = """
<mujoco>
  <asset><mesh name="seen" vertex="{0}"/><mesh name="solid" vertex="{0}"/></asset>
  <worldbody>
    <light pos="0 -3 3" dir="0 1 -1"/><camera name="eye" pos="0 -1 0" xyaxes="1 0 0 0 0 1"/>
    <geom type="mesh" mesh="seen" contype="0" conaffinity="0" rgba="1 0 0 1"/>
    <body pos="0 0 5"><freejoint/><geom type="mesh" mesh="solid"/></body>
  </worldbody>
</mujoco>
"""


def test_fine_meshes_that_nothing_touches_are_simplified() -> None:
    import mujoco

    points = np.random.default_rng(0).normal(size=(1000, 3))
    points *= 0.2 / np.linalg.norm(points, axis=1, keepdims=True)
    model = mujoco.MjModel.from_xml_string(SCENE.format(" ".join(f"{value:.5f}" for value in points.ravel())))
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    pictures, counts = [], [model.mesh_facenum.copy()]
    for _ in range(3):
        painter = Painter(model, 96, "default")
        pictures.append(painter.image(data, "eye"))
        painter.close()
        simplify_meshes(model, cell=0.03)
        counts.append(model.mesh_facenum.copy())
    assert counts[1][0] < 0.6 * counts[0][0] and (counts[1] == counts[2]).all()
    assert counts[1][1] == counts[0][1], "what can be touched stays as it is"
    difference = np.abs(pictures[0].astype(int) - pictures[1]).mean()
    assert 0 < difference < 4, difference
    assert (pictures[1] == pictures[2]).all()


def test_mujoco_imported_first_without_a_display_is_explained() -> None:
    code = """
import mujoco
from triune.envs.render import Painter
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><camera name="eye"/></worldbody></mujoco>')
Painter(model).image(mujoco.MjData(model), "eye")
"""
    clean = {name: value for name, value in os.environ.items() if name not in ("MUJOCO_GL", "DISPLAY", "WAYLAND_DISPLAY")}
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=clean, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "MuJoCo cannot draw here (MUJOCO_GL is " in ended.stderr and "set MUJOCO_GL=egl" in ended.stderr
