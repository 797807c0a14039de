"""Worlds of Meta-World: all 50 v3 tasks of a Sawyer arm, end-effector deltas at 80 Hz.

``agentview`` is Meta-World's ``corner2`` camera moved to where LeRobot has it and turned upright; ``wrist`` is its
``gripperPOV``, ``sideview`` its ``corner`` turned upright, which looks from the other side of the table. Starts and goals are
drawn from the seed over the task's whole range, and the goal is in the experts' observation: the package's own ``gym.make``
ignores ``reset(seed=)`` and knows 50 starts.
"""

import warnings
from typing import Any

import numpy as np

from ..data import Camera, Contract, Vector
from ..errors import UserError
from .base import Expert, World
from .render import Painter, extrinsics, intrinsics
from .view import DEFAULT, View

CAMERAS = {"agentview": "corner2", "wrist": "gripperPOV", "sideview": "corner", "topview": "topview"}
"""Our camera names and Meta-World's."""
TURNED = ("agentview", "sideview")
"""Cameras whose own images stand on their heads."""
RATE = 80.0
"""Hz; the only one: Meta-World moves its arm by a mocap body, a fixed way for each control step."""
AGENTVIEW = (0.75, 0.075, 0.7)
"""Position of ``corner2`` in metres as LeRobot sets it: nearer than Meta-World's own."""
MAX_STEPS = 500

INSTRUCTIONS: dict[str, str] = {
    "assembly": "put the ring of the wrench over the peg",
    "basketball": "drop the basketball into the hoop",
    "bin-picking": "move the green block from one bin into the other",
    "box-close": "put the lid on the box",
    "button-press": "press the button on the wall",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "reach over the wall and press the button from above",
    "button-press-wall": "reach around the wall and press the button",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring of the wrench off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door by turning its latch",
    "door-open": "open the door",
    "door-unlock": "unlock the door by turning its latch",
    "drawer-close": "push the drawer shut",
    "drawer-open": "pull the drawer open",
    "faucet-close": "turn the faucet off",
    "faucet-open": "turn the faucet on",
    "hammer": "hit the nail with the hammer",
    "hand-insert": "put the gripper into the hole",
    "handle-press": "press the handle down",
    "handle-press-side": "press the handle down from the side",
    "handle-pull": "pull the handle up",
    "handle-pull-side": "pull the handle up from the side",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "insert the peg into the hole from the side",
    "peg-unplug-side": "pull the peg out of the hole",
    "pick-out-of-hole": "take the object out of the hole and bring it to the goal",
    "pick-place": "pick up the object and bring it to the goal",
    "pick-place-wall": "pick up the object and bring it over the wall to the goal",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-back": "slide the plate back out of the cabinet",
    "plate-slide-back-side": "slide the plate out of the cabinet sideways",
    "plate-slide-side": "slide the plate into the cabinet sideways",
    "push": "push the object to the goal",
    "push-back": "pull the object back to the goal",
    "push-wall": "push the object around the wall to the goal",
    "reach": "move the gripper to the goal",
    "reach-wall": "move the gripper over the wall to the goal",
    "shelf-place": "put the object onto the shelf",
    "soccer": "push the ball into the soccer goal",
    "stick-pull": "pull the thermos with the stick",
    "stick-push": "push the thermos with the stick",
    "sweep": "sweep the object off the table",
    "sweep-into": "sweep the object into the hole",
    "window-close": "slide the window closed",
    "window-open": "slide the window open",
}

TASKS = {f"metaworld/{task}-v3": instruction for task, instruction in INSTRUCTIONS.items()}


def contract(view: View) -> Contract:
    """The conventions that all Meta-World worlds share."""
    return Contract(
        cameras=tuple(Camera(name=shot.camera, height=shot.height, width=shot.width, flip="none") for shot in view.shots),
        state=Vector(
            names=("eef_x", "eef_y", "eef_z", "gripper"),
            units=("m", "m", "m", "1"),
            frame="world",
            gripper="opening, 0 closed, 1 open",
            mode="absolute",
        ),
        action=Vector(
            names=("dx", "dy", "dz", "gripper"),
            units=("0.01 m",) * 3 + ("1",),
            frame="world",
            gripper="-1 opens, +1 closes",
            mode="relative",
        ),
        rate=RATE,
        render=view.render,
    )


class MetaWorld(World):
    """A Meta-World task as a world. The simulator is built at the first reset.

    Args:
        name: one of ``TASKS``.
        view: cameras among ``CAMERAS``.

    Raises:
        UserError: the view has another rate than ``RATE``.
    """

    def __init__(self, name: str, view: View = DEFAULT) -> None:
        if view.rate not in (None, RATE):
            raise UserError(f"world {name} runs at {RATE:g} Hz and at no other rate, so not at {view.rate:g}")
        super().__init__(name, TASKS[name], MAX_STEPS, contract(view), ([-2.0] * 3 + [-1.0], [2.0] * 3 + [1.0]))
        self.view = view
        self._env: Any = None
        self._painter: Painter | None = None
        self._seen = np.zeros(39)

    def close(self) -> None:
        if self._painter is not None:
            self._painter.close()
        if self._env is not None:
            self._env.close()
        self._env = self._painter = None
        self._steps = None

    def privileged(self) -> dict[str, Any]:
        """See ``World.privileged``. ``observation`` is Meta-World's own vector (39,): gripper, object poses, goal."""
        model, data = self._env.model, self._env.data
        cameras = {}
        for shot in self.view.shots:
            turn = np.diag([-1.0, -1.0, 1.0, 1.0]) if shot.camera in TURNED else np.eye(4)  # as its image is
            cameras[shot.camera] = {
                "intrinsics": intrinsics(model, CAMERAS[shot.camera], shot.height, shot.width).tolist(),
                "extrinsics": (turn @ extrinsics(model, data, CAMERAS[shot.camera])).tolist(),
            }
        return {
            "observation": self._seen.tolist(),
            "gripper": {"position": self._seen[:3].tolist(), "opening": float(self._seen[3])},
            "cameras": cameras,
        }

    def _begin(self, seed: int) -> None:
        import mujoco

        if self._env is None:
            self._build()
        self._env.seed(seed)
        self._seen, _ = self._env.reset()
        mujoco.mj_kinematics(self._env.model, self._env.data)  # it moves the goal's mark last: without this the old one is drawn

    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        self._seen, reward, _, _, info = self._env.step(action)
        return float(reward), bool(info["success"])

    def _state(self) -> np.ndarray:
        return self._seen[:4]

    def _images(self) -> dict[str, np.ndarray]:
        if self._painter is None:
            self._painter = Painter(self._env.model, profile=self.view.render)
        images = {}
        for shot in self.view.shots:
            image = self._painter.image(self._env.data, CAMERAS[shot.camera], (shot.height, shot.width))
            images[shot.camera] = np.ascontiguousarray(image[::-1, ::-1]) if shot.camera in TURNED else image
        return images

    def _build(self) -> None:
        from metaworld import ALL_V3_ENVIRONMENTS

        env = ALL_V3_ENVIRONMENTS[self.name.removeprefix("metaworld/")]()
        env._set_task_called = True
        env._freeze_rand_vec, env.seeded_rand_vec = False, True
        env._partially_observable = False
        env.__dict__.pop("sawyer_observation_space", None)  # cached with the goal hidden: it would clip the goal to zero
        env.model.camera("corner2").pos[:] = AGENTVIEW
        self._env = env


def make(name: str, view: View) -> MetaWorld:
    """The world of that name in ``TASKS``."""
    return MetaWorld(name, view)


def make_expert(name: str) -> Expert:
    """Meta-World's own scripted policy of a task, clipped to the action space; it keeps no state."""
    from metaworld.policies import ENV_POLICY_MAP

    policy = ENV_POLICY_MAP[name.removeprefix("metaworld/")]()

    def expert(privileged: dict[str, Any]) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Constant.s. may be too high")  # its actions are clipped here
            action = policy.get_action(np.array(privileged["observation"]))
        return np.clip(action, -1.0, 1.0).astype(np.float32)

    return expert
