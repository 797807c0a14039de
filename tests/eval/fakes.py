"""A tiny deterministic world, a pool that plays it in this process, and a policy that really needs pixels and words.

The world is a white page with a red and a green square; a dot has to reach the one that the instruction names.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triune.data import ActionChunk, Camera, Contract, Observation, Vector
from triune.data.statistics import save_statistics, statistics_of
from triune.envs.view import DEFAULT, View
from triune.policies.base import Plan, Policy, Request

RATE = 10.0
CONTRACT = Contract(
    cameras=(Camera(name="top", height=32, width=32), Camera(name="side", height=32, width=32)),
    state=Vector(names=("x", "y")),
    action=Vector(names=("dx", "dy", "gripper")),
    rate=RATE,
    render="fast",
    chunk=6,
    executed=4,
)
RGB = {"red": (200, 30, 30), "green": (30, 160, 30), "blue": (30, 30, 200)}


class FakeWorld:
    """Reach one of two squares in at most ``max_steps`` steps; the dot starts in the middle."""

    max_steps = 24

    def __init__(self, name: str, view: View = DEFAULT) -> None:
        self.name, self.view = name, view
        self.colour = name.rpartition("-")[2]
        self.task_description = f"reach the {self.colour} square"
        self.rate, self.contract = RATE, CONTRACT

    def reset(self, seed: int) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        angle = generator.uniform(0, 2 * np.pi)
        self.goals = {
            "red": 11 * np.array([np.cos(angle), np.sin(angle)]) + 16,
            "green": -11 * np.array([np.cos(angle), np.sin(angle)]) + 16,
        }
        self.at, self.steps = np.array([16.0, 16.0]), 0
        return self.pixels()

    def pixels(self) -> dict[str, np.ndarray]:
        page = np.full((32, 32, 3), 255, np.uint8)
        for colour, place in [*self.goals.items(), ("blue", self.at)]:
            x, y = np.clip(place.round().astype(int), 2, 29)
            page[y - 2 : y + 3, x - 2 : x + 3] = RGB[colour]
        return {"top": page, "side": np.ascontiguousarray(page[::-1])}

    def step(self, action: np.ndarray) -> bool:
        self.at = np.clip(self.at + np.clip(action[:2], -1.5, 1.5), 0, 31)
        self.steps += 1
        return bool(np.abs(self.at - self.goals[self.colour]).max() < 2)

    def expert(self) -> np.ndarray:
        return np.array([*(self.goals[self.colour] - self.at), 0.0])

    def privileged(self) -> dict[str, Any]:
        return {"goals": self.goals}

    def close(self) -> None:
        return None


@dataclass
class FakeAnswer:
    slot: int
    observation: Observation | None
    info: dict[str, Any]
    frames: list[dict[str, np.ndarray]]
    error: str | None


@dataclass
class FakePool:
    """Answers come in an order and in portions that depend on the number of workers, as from real processes."""

    workers: int = 1
    broken: tuple[int, ...] = ()  # seeds whose world dies at its first step
    worlds: dict[int, FakeWorld] = field(default_factory=dict)
    seeds: dict[int, int] = field(default_factory=dict)
    ready: list[FakeAnswer] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        self.order = random.Random(self.workers)

    def __enter__(self) -> "FakePool":
        return self

    def __exit__(self, *problem: object) -> None:
        self.closed = True

    def reset(self, slot: int, world: str, seed: int, view: View = DEFAULT) -> None:
        self.worlds[slot], self.seeds[slot] = FakeWorld(world), seed
        self.worlds[slot].reset(seed)
        self._answer(slot, {"steps": 0, "is_success": False, "truncated": False}, [])

    def step_chunk(self, slot: int, actions: np.ndarray, video: bool = False) -> None:
        self._run(slot, list(actions), len(actions), video)

    def expert_chunk(self, slot: int, n: int, video: bool = False) -> None:
        self._run(slot, [None] * n, n, video)

    def wait(self) -> list[FakeAnswer]:
        assert self.ready, "nothing was asked for"
        self.order.shuffle(self.ready)
        count = self.order.randint(1, min(len(self.ready), self.workers))
        given, self.ready = self.ready[:count], self.ready[count:]
        return given

    def _run(self, slot: int, actions: list[np.ndarray | None], n: int, video: bool) -> None:
        world, frames, success, executed = self.worlds[slot], [], False, 0
        if self.seeds[slot] in self.broken:
            self.ready.append(FakeAnswer(slot, None, {}, [], "the simulator diverged"))
            return
        for action in actions:
            success = world.step(world.expert() if action is None else action)
            executed += 1
            if video:
                frames.append(world.pixels())
            if success or world.steps >= world.max_steps:
                break
        self._answer(slot, {"steps": executed, "is_success": success, "truncated": world.steps >= world.max_steps}, frames)

    def _answer(self, slot: int, info: dict[str, Any], frames: list[dict[str, np.ndarray]]) -> None:
        world = self.worlds[slot]
        seen = Observation(world.pixels(), world.at.astype(np.float32), world.task_description, world.steps / RATE)
        self.ready.append(FakeAnswer(slot, seen, info, frames, None))


class FakePolicy(Policy):
    """Walks to the pixels of the colour that the instruction names; noise is keyed by (seed, step of the session)."""

    def __init__(self, blind: bool = False, contract: Contract = CONTRACT, fails_on: str = "") -> None:
        self.contract, self.blind, self.fails_on = contract, blind, fails_on
        self.sessions: dict[str, list[int]] = {}
        self.batches: list[list[str]] = []

    def reset(self, session: str, seed: int) -> None:
        self.sessions[session] = [seed, 0]

    def close(self, session: str) -> None:
        self.sessions.pop(session, None)

    def plan(self, requests: list[Request]) -> list[Plan]:
        self.batches.append([r.session for r in requests])
        for request in requests:
            if self.fails_on and request.session.endswith(self.fails_on):
                raise FloatingPointError("the flow diverged")
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Plan:
        seed, step = self.sessions[request.session]
        self.sessions[request.session][1] += 1
        noise = np.random.default_rng((seed, step)).normal(size=(6, 2)) * 0.3
        seen = request.observation
        colour = next((c for c in ("red", "green") if c in seen.instruction), "red")
        goal = self._find(seen.images["top"], colour)
        lost = self.blind or goal is None or seed % 5 == 0
        direction = np.array([0.0, 0.0]) if lost else np.clip((goal - seen.state) / 6, -1.5, 1.5)
        actions = np.concatenate([direction + noise, np.sign(noise[:, :1])], axis=1)
        expected = {name: np.roll(image, 1, axis=1) for name, image in seen.images.items()}
        return Plan(ActionChunk(actions, RATE, seen.timestamp), foresight=lambda: expected)

    @staticmethod
    def _find(image: np.ndarray, colour: str) -> np.ndarray | None:
        rows, columns = np.nonzero((image == RGB[colour]).all(axis=2))
        return np.array([columns.mean(), rows.mean()]) if len(rows) else None


def write_checkpoint(folder: Path) -> Path:
    """A run folder whose checkpoint has what an evaluation reads; returns the checkpoint."""
    checkpoint = folder / "checkpoints" / "step-000400"
    checkpoint.mkdir(parents=True)
    (checkpoint / "contract.json").write_text(CONTRACT.model_dump_json())
    (checkpoint / "manifest.json").write_text('{"files": {}}')
    save_statistics(
        {"observation.state": statistics_of(np.array([[10.0, 12.0], [22.0, 20.0]], np.float32))}, checkpoint / "statistics.json"
    )
    lines = [
        {"step": s, "loss": 1 / (1 + s / 50), "loss_flow": 0.7 / (1 + s / 50), "loss_foresight": 0.3 / (1 + s / 90)}
        for s in range(0, 400, 10)
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return checkpoint
