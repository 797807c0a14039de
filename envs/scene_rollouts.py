"""Scenes met while a scripted expert works: frames of its noisy episodes, annotated like those of ``envs.scenes``.

``rollouts`` are episodes of the ``cubes/*`` and ``robosuite/*`` worlds, ``metaworld`` of all 50 Meta-World tasks. Every
episode gives ``FRAMES`` scenes, so scene ``i`` is frame ``i % FRAMES`` of episode ``i // FRAMES``, and both are functions
of the index alone.
"""

from typing import Any

import numpy as np

from ..data.readers.scenes import CAMERAS
from .base import World
from .registry import make_expert, make_world

FRAMES = 10
"""Scenes per episode."""

ROLLOUTS = ("cubes/lift-red", "cubes/lift-green", "cubes/stack", "cubes/lift-red", "cubes/lift-green", "robosuite/lift", "robosuite/stack")

Record = dict[str, Any]


class RolloutScenes:
    """Draws scenes from episodes. Worlds are built once each.

    Args:
        kind: ``rollouts`` or ``metaworld``.
        size: height and width of the images in pixels.
    """

    def __init__(self, kind: str, size: int = 96) -> None:
        from .metaworld import TASKS

        self.kind = kind
        self.names = ROLLOUTS if kind == "rollouts" else tuple(TASKS)
        self.size = size
        self._worlds: dict[str, World] = {}
        self._episode: int | None = None
        self._records: list[Record] = []

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()

    def scene(self, seed: int) -> Record:
        """Images and annotation of scene ``seed``."""
        if self._episode != seed // FRAMES:
            self._episode = seed // FRAMES
            self._records = self._play(self._episode, self._episode * FRAMES)
        record = self._records[seed % FRAMES]
        return {"images": record["images"], "annotation": {**record["annotation"], "seed": seed}}

    def _play(self, episode: int, first: int) -> list[Record]:
        """``FRAMES`` scenes of one episode (again from a new start where it succeeds sooner): the expert acts, and a random walk
        pushes it aside. Worlds are reset with seeds ``first`` to ``first + FRAMES - 1``."""
        generator = np.random.default_rng((episode, 13))
        name = self.names[episode % len(self.names)]
        if name not in self._worlds:
            if self.kind == "metaworld":  # 50 simulators would not fit into memory
                self.close()
                self._worlds.clear()
            self._worlds[name] = make_world(name, size=self.size)
        world, expert = self._worlds[name], make_expert(name)
        obs, info = world.reset(seed=first)
        records = [self._record(world, obs)]
        every = 24 if self.kind == "metaworld" else 7
        scale = float(generator.choice([0.0, 0.3, 0.6]))
        noise = np.zeros(world.contract.action.size)

        def pushed(known: dict[str, Any]) -> np.ndarray:
            noise[:-1] = 0.8 * noise[:-1] + 0.6 * scale * generator.normal(0, 1, len(noise) - 1)  # the gripper stays the expert's
            return np.clip(expert(known) + noise, -1, 1).astype(np.float32)

        while len(records) < FRAMES:
            obs, info, _ = world.expert_chunk(pushed, int(generator.integers(1, every)))
            records.append(self._record(world, obs))
            if info["is_success"] or info["truncated"]:
                obs, info = world.reset(seed=first + len(records))
        return records

    def _record(self, world: World, obs: dict[str, Any]) -> Record:
        known = world.privileged()
        annotation: dict[str, Any] = {"world": f"scenes:{self.kind}", "objects": [], "instructions": []}
        gripper = known["gripper"]["position"]
        annotation["gripper"] = {"position": _rounded(gripper), "image": self._places(known, gripper)}
        if self.kind == "metaworld":
            seen = np.array(known["observation"])
            target, goal = ({"image": self._places(known, point)} for point in (seen[4:7], seen[36:39]))
            annotation["instructions"].append({"text": world.task_description, "target": target, "destination": goal})
        else:
            annotation["objects"] = self._objects(known)
        return {"images": {camera: obs["pixels"][camera] for camera in CAMERAS}, "annotation": annotation}

    def _objects(self, known: dict[str, Any]) -> list[dict[str, Any]]:
        things = known["objects"]
        found = []
        for name, thing in things.items():
            position = np.array(thing["position"])
            beside = np.linalg.norm(position - known["gripper"]["position"]) < 0.02
            resting = position[2] < known["table"] + thing["size"] + 0.01
            held = beside and known["gripper"]["width"] < 2 * thing["size"] + 0.006
            below = [other for other in things if other != name and not held and not resting and _above(position, things[other])]
            state = "held" if held else "on" if below else "table" if resting else "air"
            entry = {"name": name, "colour": thing["colour"], "shape": thing["shape"], "size": round(thing["size"], 4)}
            entry |= {"position": _rounded(position), "state": state, "on": below[0] if below else None}
            entry["image"] = self._places(known, position)
            found.append(entry)
        return found

    def _places(self, known: dict[str, Any], position: Any) -> dict[str, list[float] | None]:
        """Where a point falls in each image; ``None`` outside."""
        places: dict[str, list[float] | None] = {}
        for camera in CAMERAS:
            seen = (np.array(known["cameras"][camera]["extrinsics"]) @ [*position, 1.0])[:3]
            pixel = np.array(known["cameras"][camera]["intrinsics"]) @ seen
            xy = pixel[:2] / max(pixel[2], 1e-9) / self.size
            places[camera] = _rounded(xy) if seen[2] > 0.01 and (xy >= 0).all() and (xy < 1).all() else None
        return places


def _above(position: np.ndarray, thing: dict[str, Any]) -> bool:
    away = position - np.array(thing["position"])
    return bool(np.linalg.norm(away[:2]) < thing["size"] and away[2] > thing["size"])


def _rounded(values: Any) -> list[float]:
    return [round(float(v), 5) for v in values]
