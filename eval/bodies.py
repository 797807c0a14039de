"""What a policy drives on the wall clock: a simulated world, a recorded episode, a robot of lerobot. One shape for all of them."""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from ..data import Contract, Dataset, Observation, open_dataset
from ..data.robot import Robot, load_robot
from ..envs import build_world
from ..envs.view import choose
from ..errors import UserError


class Body(ABC):
    """A robot as a control loop sees it.

    Attributes:
        name: for reports.
        rate: control rate in Hz.
        contract: cameras, state and actions, compared with the policy's.
        waits: whether time stands still for it where nothing is done; a robot's goes on.
    """

    name: str
    rate: float
    contract: Contract
    waits: bool = True

    @abstractmethod
    def begin(self, seed: int) -> None:
        """Begin an episode. What a ``seed`` decides is the body's: a start of a world, an episode of a dataset, nothing of a robot."""

    @abstractmethod
    def look(self) -> Observation:
        """The newest observation."""

    @abstractmethod
    def act(self, action: np.ndarray) -> None:
        """Send one action (A,)."""

    @abstractmethod
    def hold(self, action: np.ndarray | None) -> None:
        """Stay for one tick; ``action`` (A,) is what keeps the robot where it is, if that is known."""

    @property
    @abstractmethod
    def over(self) -> bool:
        """Whether the episode has ended by itself."""

    @property
    def success(self) -> bool | None:
        """Whether the task is, or was, done; ``None`` where nobody knows."""
        return None

    def facts(self) -> dict[str, Any]:
        """What else is to be said of the episode."""
        return {}

    def close(self) -> None:  # noqa: B027 - most have nothing to let go
        """Let go."""


class WorldBody(Body):
    """A simulated world, seen as the policy's contract says; an action takes it one control step further."""

    def __init__(self, name: str, like: Contract | None = None) -> None:
        self.world = build_world(name, choose(like=like))
        self.name, self.rate, self.contract = name, self.world.rate, self.world.contract

    def begin(self, seed: int) -> None:
        self._seen, info = self.world.reset(seed=seed)
        self._steps, self._success, self._truncated = 0, bool(info["is_success"]), False

    def look(self) -> Observation:
        return self.world.observation(self._seen, self._steps / self.rate)

    def act(self, action: np.ndarray) -> None:
        self._seen, _, _, self._truncated, info = self.world.step(action)
        self._steps += 1
        self._success = self._success or bool(info["is_success"])

    def hold(self, action: np.ndarray | None) -> None:
        if action is not None:
            self.act(action)

    @property
    def over(self) -> bool:
        return self._success or self._truncated

    @property
    def success(self) -> bool:
        return self._success

    def close(self) -> None:
        self.world.close()


class EpisodeBody(Body):
    """An episode of a dataset: it shows what was recorded whatever is done, and says how far the actions are from the recorded ones.

    Args:
        robot: the mapping of the dataset, where its names are not those of the policy.
    """

    def __init__(self, path: str, robot: str | None = None) -> None:
        dataset = open_dataset(path)
        self.dataset: Dataset = dataset if robot is None else load_robot(robot).view(dataset)
        if not self.dataset.fps > 0:
            raise UserError(f"{path} does not say its control rate; name a mapping with `rate:` by --mapping")
        self.name, self.rate, self.contract = f"{path}", self.dataset.fps, self.dataset.contract

    def begin(self, seed: int) -> None:
        self._episode = self.dataset.episodes[seed % len(self.dataset.episodes)]
        self._at, self._errors = 0, np.zeros((0, self.contract.action.size))

    def look(self) -> Observation:
        row = self._episode.start + min(self._at, self._episode.length - 1)
        images = {name: self.dataset.frames(name, [row])[0] for name in self.dataset.cameras}
        return Observation(images, self.dataset.vectors["observation.state"][row], self._episode.task, self._at / self.rate)

    def act(self, action: np.ndarray) -> None:
        recorded = self.dataset.vectors["action"][self._episode.start + self._at]
        self._errors = np.concatenate([self._errors, np.abs(action - recorded)[None]])
        self._at += 1

    def hold(self, action: np.ndarray | None) -> None:
        self._at += 1  # what was recorded went on

    @property
    def over(self) -> bool:
        return self._at >= self._episode.length

    def facts(self) -> dict[str, Any]:
        means = self._errors.mean(axis=0) if len(self._errors) else np.zeros(0)
        named = zip(self.contract.action.names, means, strict=False)
        return {"episode": self._episode.index, "error": {name: float(mean) for name, mean in named}}


class RobotBody(Body):
    """A robot of lerobot, by the mapping that its datasets have: cameras and slots name the features that lerobot would record.

    Args:
        options: of the robot's configuration, such as ``port``; ``type`` says which one.
        instruction: the task in words.
    """

    waits = False

    def __init__(self, options: dict[str, Any], mapping: str, instruction: str) -> None:
        self.mapping: Robot = load_robot(mapping)
        self.robot = _make_robot(options)
        self.instruction, self.name, self.contract = instruction, f"{options['type']} ({mapping})", self.mapping.contract
        if self.mapping.rate is None:
            raise UserError(f"the mapping {mapping} does not say the control rate; write `rate:` (Hz) into it")
        self.rate = self.mapping.rate
        self._keys = {
            "observation.state": [key for key, kind in self.robot.observation_features.items() if kind is float],
            "action": [key for key, kind in self.robot.action_features.items() if kind is float],
        }
        for part, feature in ((self.mapping.state, "observation.state"), (self.mapping.action, "action")):
            for slot in part.slots:
                if slot.place[0] != feature or slot.place[1] >= len(self._keys[feature]):
                    raise UserError(
                        f"slot {slot.name} of the mapping {mapping} is {slot.source}, and {self.name} has {len(self._keys[feature])} "
                        f"numbers in {feature} ({', '.join(self._keys[feature])}); mend the mapping"
                    )
        unfilled = set(range(len(self._keys["action"]))) - {slot.place[1] for slot in self.mapping.action.slots}
        if unfilled:
            missing = ", ".join(self._keys["action"][i] for i in sorted(unfilled))
            raise UserError(f"the mapping {mapping} has no slot for {missing} of {self.name}, which needs all of its actions")
        self.robot.connect()
        self._ticks = 0

    def begin(self, seed: int) -> None:
        self._ticks = 0

    def look(self) -> Observation:
        seen = self.robot.get_observation()
        values = [float(seen[key]) for key in self._keys["observation.state"]]
        state = np.array([values[slot.place[1]] for slot in self.mapping.state.slots], np.float32)
        images = {name: _upright(seen[c.source.rpartition(".")[2]], c) for name, c in self.mapping.cameras.items()}
        self._ticks += 1
        return Observation(images, state, self.instruction, (self._ticks - 1) / self.rate)

    def act(self, action: np.ndarray) -> None:
        values = {self._keys["action"][slot.place[1]]: float(v) for slot, v in zip(self.mapping.action.slots, action, strict=True)}
        self.robot.send_action(values)

    def hold(self, action: np.ndarray | None) -> None:
        if action is not None:
            self.act(action)

    @property
    def over(self) -> bool:
        return False

    def close(self) -> None:
        if self.robot.is_connected:
            self.robot.disconnect()


def _make_robot(options: dict[str, Any]) -> Any:
    """lerobot's robot of a configuration."""
    try:
        import draccus
        import lerobot.robots as package
        from lerobot.robots import RobotConfig, make_robot_from_config
        from lerobot.utils.import_utils import register_third_party_plugins
    except ImportError as error:
        raise UserError(f"robots come from lerobot, which is not here ({error}): pip install 'triune-vla[lerobot]'") from None
    register_third_party_plugins()
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg and RobotConfig.get_known_choices().get(options["type"]) is None:
            try:
                importlib.import_module(f"{package.__name__}.{module.name}")
            except ImportError:
                continue  # a robot whose own packages are not installed is not the one that is asked for, or is named below
    known = RobotConfig.get_known_choices()
    if options["type"] not in known:
        raise UserError(f"lerobot knows no robot '{options['type']}'; known: {', '.join(sorted(known))}; install its plugin or its extra")
    try:
        config = draccus.decode(known[options["type"]], {key: value for key, value in options.items() if key != "type"})
    except draccus.ParsingError as error:
        raise UserError(f"the options of {options['type']} are not right: {error}") from None
    return make_robot_from_config(config)


def _upright(image: np.ndarray, camera: Any) -> np.ndarray:
    """A frame as the policy sees it: upright RGB."""
    turned = {"vertical": image[::-1], "horizontal": image[:, ::-1], "rotate180": image[::-1, ::-1]}.get(camera.flip or "none", image)
    return np.ascontiguousarray(turned[..., ::-1] if camera.colour == "bgr" else turned)


def open_body(
    *, world: str | None, episode: str | None, robot: dict[str, Any] | None, mapping: str | None, instruction: str, like: Contract | None
) -> Body:
    """The one body that is named.

    Raises:
        UserError: none or several are named, or what is named cannot be opened.
    """
    named = [kind for kind, value in (("--world", world), ("--episode", episode), ("--robot", robot)) if value is not None]
    if len(named) != 1:
        raise UserError(f"name one thing to drive: --world, --episode or --robot; {' and '.join(named) or 'none'} was given")
    if world is not None:
        return WorldBody(world, like)
    if episode is not None:
        return EpisodeBody(episode, mapping)
    assert robot is not None
    if mapping is None:
        raise UserError("a robot needs --mapping: which of its cameras and numbers are which (configs/robot/so100.yaml is one)")
    if not instruction:
        raise UserError("a robot needs --instruction: what to do, in words")
    return RobotBody(robot, mapping, instruction)
