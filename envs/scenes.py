"""Annotated pictures of tables and robots: what the embedded VLM and the autoencoder are trained on.

A *scene* is one moment of a world seen by its cameras, with what is in it: name, colour, shape, size, place in every
image. In the tabletop kinds nothing is simulated: objects are teleported and the arm is posed (above, around or holding an
object, or somewhere), so a scene costs little more than its images, and of each thing it is known how many pixels show it.
Scene ``i`` is a function of ``seed + i`` alone.

Kinds (``vla data record scenes:<kind>``): ``cubes`` (the look of the ``cubes/*`` worlds, two cubes, sometimes
something else too), ``tabletop`` (2-4 objects of any colour and shape, any look), ``rollouts`` and ``metaworld`` (frames of
scripted experts at work, ``envs.scene_rollouts``), and for scoring only the three that training never shows:
``heldout-colour`` (a purple cube), ``heldout-shape`` (a capsule), ``heldout-scene`` (table, camera and cubes of the
``heldout/*`` worlds).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.readers.scenes import CAMERAS, SceneWriter
from ..errors import UserError
from .scene_rollouts import RolloutScenes
from .tabletop import COLOURS, TABLE_HEIGHT, Area, Look, Scene, Shape, Tabletop, Thing

HELD_OUT_COLOUR: tuple[str, Shape] = ("purple", "cube")
HELD_OUT_SHAPE: Shape = "capsule"

TABLES = (
    "ceramic", "gray-felt", "gray-plaster", "light-gray-plaster", "metal", "steel-brushed", "steel-scratched", "white-plaster",
    "cream-plaster", "clay", "pink-plaster", "yellow-plaster", "white-bricks", "gray-woodgrain", "blue-wood", "green-wood", "dirt",
)  # fmt: skip
"""Table textures of training scenes; those of ``heldout/*`` are not among them."""
FLOORS = ("light-gray-floor-tile", "white-bricks", "gray-felt", "cream-plaster", "steel-brushed", "dirt")
WALLS = ("light-gray-plaster", "white-plaster", "cream-plaster", "gray-felt", "green-wood", "pink-plaster")

TRAIN_SHAPES: tuple[Shape, ...] = ("cube", "plate", "cylinder")
"""Told apart by their proportions, which a tower with patches of eight pixels sees: of a ball and a cube it does not."""
COPIES = 4
"""Things of each shape in the pool that scenes draw from: also the most objects in a scene."""

PHASES = {"free": 0.18, "above": 0.2, "around": 0.2, "hold": 0.15, "hold over": 0.1, "stack": 0.09, "home": 0.08}
"""What the arm is doing, and how often."""

REACH = Area(x=(-0.14, 0.14), y=(-0.20, 0.20), yaw=float(np.pi / 4), gap=0.065)
Record = dict[str, Any]


class TabletopScenes:
    """Draws scenes on one ``Tabletop`` that holds enough things and textures for all of them.

    Args:
        kind: one of the tabletop kinds.
        size: height and width of the images in pixels.
    """

    def __init__(self, kind: str, size: int = 96) -> None:
        shapes: tuple[Shape, ...] = (*TRAIN_SHAPES, HELD_OUT_SHAPE) if kind == "heldout-shape" else TRAIN_SHAPES
        things = tuple(Thing(f"{shape}{i}", shape, "red") for shape in shapes for i in range(COPIES))
        self.kind = kind
        self.base = held_out_look() if kind == "heldout-scene" else Look()
        textures = self.base.textures if kind == "heldout-scene" else (*TABLES, *FLOORS, *WALLS)
        self.table = Tabletop(Scene(things, look=self.base, textures=textures, area=replace(REACH, x=(-0.3, 0.3), y=(-0.35, 0.35))))
        self.painter = self.table.painter(size)

    def close(self) -> None:
        self.painter.close()
        self.table.close()

    def scene(self, seed: int) -> Record:
        """Images and annotation of scene ``seed``."""
        generator = np.random.default_rng((seed, 11))
        chosen = self._choose(generator)
        poses = self._arrange(generator, chosen)
        look = self._look(generator)
        self.table.look(look)
        for name, thing in chosen.items():
            self.table.dress(name, thing.colour, thing.size)
            tint = np.clip(np.array(COLOURS[thing.colour]) * generator.uniform(0.85, 1.1) + generator.normal(0, 0.03, 3), 0, 1)
            item = self.table.objects[name]
            for geom in (*item.visual_geoms, *item.contact_geoms):
                self.table.sim.model.geom_rgba[self.table.sim.model.geom_name2id(geom), :3] = tint
        held = self._pose(generator, chosen, poses)
        self.table.place(poses)
        self.table.forward()
        return self._record(seed, chosen, held)

    # What is there

    def _choose(self, generator: np.random.Generator) -> dict[str, Thing]:
        """Things by name; no two alike in both colour and shape."""
        pairs: list[tuple[str, Shape]]
        if self.kind == "cubes":
            if generator.random() < 0.6:
                pairs = [("red", "cube"), ("green", "cube")]
            else:
                names = [c for c in COLOURS if (c, "cube") != HELD_OUT_COLOUR]
                pairs = [(str(c), "cube") for c in generator.choice(names, 2, replace=False)]
            if generator.random() < 0.15:
                pairs.append(self._pair(generator, pairs))
            sizes = [0.021 if generator.random() < 0.7 else float(generator.uniform(0.018, 0.025)) for _ in pairs]
        elif self.kind == "heldout-scene":
            pairs, sizes = [("purple", "cube"), ("green", "cube")], [0.021, 0.021]
        else:
            pairs = [HELD_OUT_COLOUR] if self.kind == "heldout-colour" else []
            if self.kind == "heldout-shape":
                pairs = [(str(generator.choice(list(COLOURS))), HELD_OUT_SHAPE)]
            while len(pairs) < generator.integers(2, COPIES + 1):
                pairs.append(self._pair(generator, pairs))
            sizes = [float(generator.uniform(0.017, 0.027)) for _ in pairs]
        generator.shuffle(pairs)
        used = {shape: 0 for _, shape in pairs}
        chosen: dict[str, Thing] = {}
        for (colour, shape), size in zip(pairs, sizes, strict=True):
            name = f"{shape}{used[shape]}"
            chosen[name] = Thing(name, shape, colour, size)
            used[shape] += 1
        return chosen

    def _pair(self, generator: np.random.Generator, taken: list[tuple[str, Shape]]) -> tuple[str, Shape]:
        """A colour and a shape not taken and not held out; one in three shares its colour or shape with one taken."""
        while True:
            colour, shape = str(generator.choice(list(COLOURS))), TRAIN_SHAPES[generator.choice(3, p=(0.5, 0.25, 0.25))]
            if taken and generator.random() < 0.4:
                other = taken[generator.integers(len(taken))]
                colour, shape = (other[0], shape) if generator.random() < 0.5 else (colour, other[1])
            if (colour, shape) not in taken and (colour, shape) != HELD_OUT_COLOUR and shape != HELD_OUT_SHAPE:
                return colour, shape

    def _arrange(self, generator: np.random.Generator, chosen: dict[str, Thing]) -> dict[str, list[float]]:
        area = Area() if self.kind in ("cubes", "heldout-scene") and generator.random() < 0.5 and len(chosen) == 2 else REACH
        return {name: list(pose) for name, pose in zip(chosen, area.sample(generator, len(chosen)), strict=True)}

    def _look(self, generator: np.random.Generator) -> Look:
        base = self.base
        if self.kind in ("cubes", "heldout-scene"):
            small = 0.0 if generator.random() < 0.5 else 0.01
            return replace(
                base,
                camera=_shift(generator, base.camera, small),
                target=_shift(generator, base.target, small),
                light=base.light * float(generator.uniform(0.8, 1.15)) if small else base.light,
            )
        turn, rise, far = generator.uniform(-0.35, 0.35), generator.normal(0, 0.08), generator.uniform(0.9, 1.15)
        offset = np.array(base.camera) - base.target
        flat, angle = np.hypot(offset[0], offset[1]), np.arctan2(offset[2], np.hypot(offset[0], offset[1])) + rise
        reach = far * np.hypot(flat, offset[2])
        offset = np.array([np.cos(angle) * np.cos(turn), np.cos(angle) * np.sin(turn), np.sin(angle)]) * reach
        target = np.array(base.target) + generator.normal(0, 0.02, 3)
        return Look(
            table=str(generator.choice(TABLES)),
            floor=str(generator.choice(FLOORS)),
            wall=str(generator.choice(WALLS)),
            camera=tuple(float(v) for v in target + offset),  # type: ignore[arg-type]
            target=tuple(float(v) for v in target),  # type: ignore[arg-type]
            fovy=float(generator.uniform(0.92, 1.08)) * base.fovy,
            light=float(generator.uniform(0.5, 1.0)),
        )

    # Where the arm is

    def _pose(self, generator: np.random.Generator, chosen: dict[str, Thing], poses: dict[str, list[float]]) -> dict[str, str]:
        """Pose the arm as it is met in manipulation; a held or stacked thing moves in ``poses``. Returns what is held or on what."""
        names = list(chosen)
        target = str(generator.choice(names))
        others = [name for name in names if name != target]
        x, y, yaw = poses[target]
        rest = chosen[target].rest
        phase = str(generator.choice(list(PHASES), p=list(PHASES.values())))
        grip, states = float(chosen[target].width + generator.normal(0, 0.0015)), {}
        height, wide = rest, 0.08
        turn = yaw + generator.normal(0, 0.08)
        if phase in ("hold over", "stack") and not others:
            phase = "hold"
        if phase == "home" or phase == "free":
            x, y, height = generator.uniform(-0.2, 0.2), generator.uniform(-0.25, 0.25), generator.uniform(0.03, 0.30)
            if phase == "home":
                x, y, height = -0.1 + generator.normal(0, 0.03), generator.normal(0, 0.03), generator.normal(0.2, 0.03)
            turn, wide = generator.uniform(-0.8, 0.8), float(generator.choice([0.08, 0.08, 0.0, generator.uniform(0, 0.08)]))
        elif phase == "above":
            x, y, height = x + generator.normal(0, 0.025), y + generator.normal(0, 0.025), 2 * rest + generator.uniform(0, 0.12)
            turn = yaw * generator.uniform(0, 1) + generator.normal(0, 0.08)
        elif phase == "around":
            x, y, height = x + generator.normal(0, 0.006), y + generator.normal(0, 0.006), rest + abs(generator.normal(0, 0.02))
            wide = float(generator.choice([0.08, generator.uniform(grip, 0.08), grip]))
        else:
            other = str(generator.choice(others)) if others else target
            if phase == "hold":
                shift = generator.uniform(0, 0.18) * generator.integers(0, 2)
                x, y = (x, y) if shift == 0 else generator.uniform((-0.14, -0.2), (0.14, 0.2))
                height = rest + generator.uniform(0, 0.2)
            else:
                spread = 0.03 if phase == "hold over" else 0.004
                x, y = poses[other][0] + generator.normal(0, spread), poses[other][1] + generator.normal(0, spread)
                height = rest + 2 * chosen[other].rest + (generator.uniform(0.01, 0.15) if phase == "hold over" else 0.0)
            slip = generator.normal(0, 0.004, 2)
            poses[target] = [x + slip[0], y + slip[1], turn + generator.normal(0, 0.03), height - rest]
            states[target] = "held"
            wide = grip
            if phase == "stack":
                states[target] = f"on {other}"
                released = generator.random()
                if released < 0.6:
                    wide, height = 0.08, height + generator.choice([0.0, generator.uniform(0, 0.15)])
                if released < 0.2:
                    x, y = x + generator.normal(0, 0.1), y + generator.normal(0, 0.1)
            height += generator.normal(0, 0.004)
        self.table.reach((x, y, TABLE_HEIGHT + max(height, 0.012)), float(turn), float(np.clip(wide, 0, 0.08)), steps=25)
        return states

    def _record(self, seed: int, chosen: dict[str, Thing], held: dict[str, str]) -> Record:
        objects = []
        eef, visible = self.table.eef, self.table.visible(self.painter)
        for name, thing in chosen.items():
            position = self.table.position(name)
            state, _, below = held.get(name, "table").partition(" ")
            entry: dict[str, Any] = {"name": name, "colour": thing.colour, "shape": thing.shape, "size": round(thing.size, 4)}
            entry["position"] = _rounded(position)
            entry |= {"state": state, "on": below or None}
            entry["image"] = {camera: self._point(position, camera) for camera in CAMERAS}
            entry["visible"] = visible[name]
            objects.append(entry)
        gripper = {"position": _rounded(eef), "image": {camera: self._point(eef, camera) for camera in CAMERAS}}
        annotation = {"world": f"scenes:{self.kind}", "seed": seed, "objects": objects, "gripper": gripper}
        return {"images": self.table.images(self.painter), "annotation": annotation}

    def _point(self, position: np.ndarray, camera: str) -> list[float] | None:
        """Normalised image coordinates, or ``None`` outside the image."""
        point, depth = self.table.pixels(position[None], camera)
        inside = bool(depth[0] > 0.01 and (point[0] >= 0).all() and (point[0] < 1).all())
        return _rounded(point[0]) if inside else None


def held_out_look() -> Look:
    """The look of the ``heldout/*`` worlds."""
    from .robosuite import HELD_OUT_LOOK

    return HELD_OUT_LOOK


KINDS: dict[str, Callable[[str, int], TabletopScenes | RolloutScenes]] = {
    **dict.fromkeys(("cubes", "tabletop"), TabletopScenes),
    **dict.fromkeys(("rollouts", "metaworld"), RolloutScenes),
    **dict.fromkeys(("heldout-colour", "heldout-shape", "heldout-scene"), TabletopScenes),
}


def scenes(kind: str, count: int, seed: int = 0, size: int = 96) -> Iterator[Record]:
    """``count`` scenes of one kind in this process: dicts of ``images`` (camera -> uint8 (size, size, 3)) and ``annotation``.

    Raises:
        UserError: there is no such kind.
    """
    if kind not in KINDS:
        raise UserError(f"there are no scenes of kind '{kind}'; known: {', '.join(KINDS)}")
    maker = KINDS[kind](kind, size)
    try:
        for index in range(seed, seed + count):
            yield maker.scene(index)
    finally:
        maker.close()


def record_scenes(
    world: str,
    n: int,
    out: str | Path,
    *,
    seed: int = 0,
    workers: int = 2,
    size: int = 96,
    shard: int = 500,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write ``n`` scenes of ``scenes:<kind>`` as Parquet shards under ``out``; a shard already there is kept, so an
    interrupted recording continues.

    Args:
        world: ``scenes:<kind>`` or the kind alone.
        seed: seed of the first scene; training uses 0 and up.
        workers: processes.
        shard: scenes per file.
        progress: called with (scenes written, n).

    Raises:
        UserError: there is no such kind.
    """
    from concurrent.futures import ProcessPoolExecutor, as_completed
    from multiprocessing import get_context

    kind = world.removeprefix("scenes:")
    if kind not in KINDS:
        raise UserError(f"there are no scenes of kind '{kind}'; known: {', '.join(KINDS)}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, start, min(shard, seed + n - start), size, str(folder)) for start in range(seed, seed + n, shard)]
    todo = [job for job in jobs if not _shard_path(folder, kind, job[1], job[2]).exists()]
    written = n - sum(job[2] for job in todo)
    if workers <= 1 or len(todo) <= 1:
        for job in todo:
            written += _record_shard(job)
            if progress:
                progress(written, n)
        return folder
    with ProcessPoolExecutor(min(workers, len(todo)), get_context("spawn")) as pool:  # it says when a worker cannot start
        for done in as_completed([pool.submit(_record_shard, job) for job in todo]):
            written += done.result()
            if progress:
                progress(written, n)
    return folder


def _record_shard(job: tuple[str, int, int, int, str]) -> int:
    kind, start, count, size, folder = job
    with SceneWriter(_shard_path(Path(folder), kind, start, count)) as writer:
        for record in scenes(kind, count, start, size):
            writer.add(record["images"], json.dumps(record["annotation"]))
    return count


def _shard_path(folder: Path, kind: str, start: int, count: int) -> Path:
    return folder / f"{kind}-{start:07d}-{start + count:07d}.parquet"


def _shift(generator: np.random.Generator, point: tuple[float, float, float], sigma: float) -> tuple[float, float, float]:
    x, y, z = np.array(point) + generator.normal(0, 1, 3) * sigma
    return float(x), float(y), float(z)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 5) for v in values]
