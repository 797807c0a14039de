"""A robot of lerobot without hardware: joints that go where they are sent, one camera. Importing it makes lerobot know ``mock_arm``."""

import functools
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lerobot.robots import Robot, RobotConfig

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")


@RobotConfig.register_subclass("mock_arm")
@dataclass
class MockArmConfig(RobotConfig):
    """``blind_after``: observations after which looking takes ``blind_seconds``, as of a camera that hangs."""

    size: int = 64
    blind_after: int = 1_000_000_000
    blind_seconds: float = 0.0
    sent: list[dict[str, float]] = field(default_factory=list)


class MockArm(Robot):
    """Remembers what it was sent."""

    config_class = MockArmConfig
    name = "mock_arm"
    arms: "list[MockArm]" = []

    def __init__(self, config: MockArmConfig) -> None:
        super().__init__(config)
        self.config, self.connected, self.looked = config, False, 0
        self.joints = dict.fromkeys(JOINTS, 0.0)
        self.sent: list[dict[str, float]] = []
        MockArm.arms.append(self)

    @functools.cached_property
    def observation_features(self) -> dict[str, Any]:
        return {f"{joint}.pos": float for joint in JOINTS} | dict.fromkeys(("top", "wrist"), (self.config.size, self.config.size, 3))

    @functools.cached_property
    def action_features(self) -> dict[str, Any]:
        return {f"{joint}.pos": float for joint in JOINTS}

    @property
    def is_connected(self) -> bool:
        return self.connected

    @property
    def is_calibrated(self) -> bool:
        return True

    def connect(self, calibrate: bool = True) -> None:
        self.connected = True

    def calibrate(self) -> None:
        """There is nothing to calibrate."""

    def configure(self) -> None:
        """There is nothing to configure."""

    def get_observation(self) -> dict[str, Any]:
        assert self.connected
        self.looked += 1
        if self.looked == self.config.blind_after:
            time.sleep(self.config.blind_seconds)
        image = np.full((self.config.size, self.config.size, 3), self.looked % 256, np.uint8)
        return {f"{joint}.pos": value for joint, value in self.joints.items()} | {"top": image, "wrist": image}

    def send_action(self, action: dict[str, float]) -> dict[str, float]:
        assert self.connected and set(action) == set(self.action_features)
        self.sent.append(dict(action))
        self.joints = {joint: action[f"{joint}.pos"] for joint in JOINTS}
        return action

    def disconnect(self) -> None:
        self.connected = False
