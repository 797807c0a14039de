"""The checker: it passes the registered worlds and catches broken ones."""

from typing import Any

import numpy as np
import pytest

from triune.data import Camera, Contract, Vector
from triune.envs import world_names
from triune.envs.base import World
from triune.envs.check import another_view, check_world
from triune.envs.view import choose

SAMPLE = ("cubes/stack", "metaworld/pick-place-v3")
IN_ANOTHER_VIEW = ("robosuite/lift", "metaworld/door-open-v3")


@pytest.mark.parametrize("name", SAMPLE)
def test_worlds_keep_their_promises(name: str) -> None:
    assert check_world(name) == []


@pytest.mark.parametrize("name", IN_ANOTHER_VIEW)
def test_worlds_keep_their_promises_in_another_view(name: str) -> None:
    view = another_view(name)
    assert len(view.shots) == 3 and (view.rate == 10) == name.startswith("robosuite")
    assert check_world(name, view) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", world_names())
def test_all_worlds_keep_their_promises(name: str) -> None:
    assert name in SAMPLE or check_world(name) == []
    assert name in IN_ANOTHER_VIEW or check_world(name, another_view(name)) == []


class Toy(World):
    """A point that moves; registered as nothing, so that the checker's own tests need no simulator."""

    breaks = ""

    def __init__(self) -> None:
        names = ("eef_x", "cube_x") if self.breaks == "privileged" else ("eef_x", "eef_y")
        contract = Contract(
            cameras=(Camera(name="agentview", height=8, width=8),),
            state=Vector(names=names),
            action=Vector(names=("dx", "dy", "dz", "gripper")),
            rate=10.0,
            render="fast",
        )
        words = "" if self.breaks == "words" else "go"
        super().__init__("metaworld/reach-v3", words, 50, contract, ([-9.0, -9.0], [9.0, 9.0]))
        self._place = np.zeros(2)
        self._asked = 0

    def privileged(self) -> dict[str, Any]:
        self._asked += self.breaks == "asking"
        return {"observation": [*self._place, *np.zeros(37)], "gripper": {}, "cameras": {"agentview": {}}}

    def _begin(self, seed: int) -> None:
        self._place = np.random.default_rng(0 if self.breaks == "starts" else seed).uniform(-1, 1, 2)
        self._place += np.random.default_rng().uniform(0, 0.1, 2) if self.breaks == "seed" else 0.0
        self._asked = 0

    def _advance(self, action: np.ndarray) -> tuple[float, bool]:
        self._place = self._place + 0.1 * action[:2] + 0.1 * self._asked
        return 0.0, np.bool_(False) if self.breaks == "bool" else False  # type: ignore[return-value]

    def _state(self) -> np.ndarray:
        return self._place

    def _images(self) -> dict[str, np.ndarray]:
        value = 0 if self.breaks == "black" else 1 + int(np.abs(self._place).sum() * 20) % 255
        return {"agentview": np.full((8, 8, 3), value, np.uint8)}


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        ("", None),
        ("privileged", "its state holds cube_x"),
        ("words", "it has no instruction"),
        ("starts", "only 1 of 5 seeds"),
        ("seed", "the same seed and actions give another agent_pos"),
        ("asking", "when privileged state is asked for"),
        ("bool", "is_success after 1 steps is a bool"),
        ("black", "its images are black"),
        ("view", "its contract has (Shot(camera='agentview', height=8, width=8),) where"),
    ],
)
def test_a_broken_promise_is_named(breaks: str, sentence: str | None) -> None:
    toy = type("Toy", (Toy,), {"breaks": breaks})
    found = check_world("toy", choose(cameras=["agentview"], size=9 if breaks == "view" else 8), make=lambda name, view: toy())
    if sentence is None:
        assert found == []
    else:
        assert any(sentence in problem for problem in found), found
