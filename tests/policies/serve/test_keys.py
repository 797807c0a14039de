"""Names of clients and names of the contract."""

import asyncio
from typing import Any

import numpy as np
import pytest
from triune_client.wire import DEFAULT, EncodedImage, unpack

from triune.config import CONFIGS, load
from triune.data import Camera, Contract
from triune.data.contract import Vector
from triune.errors import UserError
from triune.policies.serve import Serve
from triune.policies.serve.exchange import Refusal
from triune.policies.serve.keys import Keys, flatten, groups, picture

from .golden import said
from .test_golden import FRAMES


def contract(cameras: tuple[str, ...], state: int | tuple[str, ...], **more: Any) -> Contract:
    names = tuple(f"state_{i}" for i in range(state)) if isinstance(state, int) else state
    return Contract(
        cameras=tuple(Camera(name=name) for name in cameras), state=Vector(names=names), action=Vector(names=("a", "b")), **more
    )


def read(keys: Keys, tree: Any, wanted: Contract) -> Any:
    return asyncio.run(keys.read(tree, wanted, DEFAULT))


@pytest.mark.parametrize(
    ("preset", "cameras", "state"),
    [
        ("droid", ("exterior_image_1_left", "wrist_image_left"), 8),
        ("libero", ("image", "wrist_image"), 8),
        ("aloha", ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"), 14),
    ],
)
def test_presets_read_what_the_client_of_openpi_packs(preset: str, cameras: tuple[str, ...], state: int) -> None:
    keys = load(Serve, CONFIGS / "serve" / f"openpi_{preset}.yaml").keys
    wanted = contract(cameras, state)
    keys.check(wanted)
    message = unpack(FRAMES[f"openpi {preset}"])
    seen = read(keys, message, wanted)
    assert {name: image.shape for name, image in seen.images.items()} == dict.fromkeys(cameras, (6, 8, 3))
    np.testing.assert_array_equal(seen.images[cameras[1]], said.picture(1))
    assert seen.state.shape == (state,) and seen.instruction == ("" if preset == "aloha" else "do something")
    if preset != "aloha":  # nothing has to be said where the names are usual
        usual = contract(cameras, tuple(f"joint_position_{i}" for i in range(7)) + ("gripper_position",) if preset == "droid" else state)
        again = read(Keys(), message, usual)
        np.testing.assert_array_equal(again.state, seen.state)
        assert again.images.keys() == seen.images.keys()


def test_names_of_lerobot_and_parts() -> None:
    image = said.picture(0)
    lerobot = {
        "observation.images.top": image.transpose(2, 0, 1) / np.float32(255),
        "observation.state": [0.0, 1.0],
        "task": np.array(["lift"]),
    }
    seen = read(Keys(), lerobot, contract(("top",), 2))
    np.testing.assert_array_equal(seen.images["top"], image)
    assert seen.state.tolist() == [0, 1] and seen.instruction == "lift"
    robot = {
        "front": EncodedImage(image.tobytes(), "raw", (6, 8, 3)),
        "shoulder.pos": 0.25,
        "gripper.pos": np.float32(1),
        "prompt": "go",
        "timestamp": 3.5,
    }
    seen = read(Keys(), robot, contract(("front",), ("shoulder.pos", "gripper.pos")))
    np.testing.assert_array_equal(seen.images["front"], image)
    assert seen.state.tolist() == [0.25, 1] and seen.timestamp == 3.5


def test_optional_cameras_and_what_is_not_there() -> None:
    image = said.picture(0)
    cameras = (Camera(name="top"), Camera(name="side", optional=True))
    wanted = contract((), 0).model_copy(update={"cameras": cameras})
    assert list(read(Keys(instruction=""), {"top": image}, wanted).images) == ["top"]
    with pytest.raises(
        Refusal, match=r"lacks a picture of camera 'side'; it has top. Send it, or say its key to the server: keys.cameras.side"
    ):
        read(Keys(cameras={"side": "left"}, instruction=""), {"top": image}, wanted)
    with pytest.raises(Refusal, match="lacks the state; it has images/top"):
        read(Keys(instruction=""), {"images": {"top": image}}, contract(("top",), 3))
    for bad in (
        3,
        "text",
        None,
        np.zeros((4, 4), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.full((4, 4, 3), 2.0),
        np.full((4, 4, 3), np.nan),
    ):
        with pytest.raises(Refusal, match="camera 'top'"):
            picture(bad, "top")
    uneven = ([1, np.zeros(2)], [np.zeros(1), np.zeros(2)], [1, np.zeros((1, 1, 6), np.uint8)])
    for state in ({"a": {}}, [[1], [1, 2]], ["x"], np.array(["x"]), *uneven):
        with pytest.raises(Refusal):
            read(Keys(instruction=""), {"top": image, "state": state}, contract(("top",), 1))


def test_a_config_that_does_not_fit_the_policy_is_refused() -> None:
    with pytest.raises(UserError, match="names wrist, and the cameras of the policy are top"):
        Keys(cameras={"wrist": "x"}).check(contract(("top",), 1))
    with pytest.raises(UserError, match="3 numbers together, and an action of the policy has 2"):
        Keys(actions={"arm": 3}).check(contract(("top",), 1))


def test_names_that_count_are_groups() -> None:
    assert groups(("x", "rotation_0", "rotation_1", "gripper")) == {"x": 1, "rotation": 2, "gripper": 1}
    assert groups(("a_0", "b_0", "b_1", "a_1", "c_3", "c_4")) == {"a": 1, "b": 2, "a_1": 1, "c_3": 1, "c_4": 1}
    assert flatten({"a": {"b.c": 1, "d": {}}, "e": 2}) == {"a/b/c": 1, "e": 2}
