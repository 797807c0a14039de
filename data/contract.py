"""The conventions that a checkpoint, a dataset, a world and a robot must share, as data that can be compared."""

from typing import Literal, NamedTuple

from ..config import Strict
from ..errors import UserError


class Camera(Strict):
    """One camera. ``None`` means unknown: said and asked for, never guessed. ``optional``: a policy does without its images."""

    name: str
    height: int | None = None
    width: int | None = None
    colour: Literal["rgb", "bgr"] | None = "rgb"
    flip: Literal["none", "horizontal", "vertical", "rotate180"] | None = "none"
    crop: float | None = None
    optional: bool = False


class Vector(Strict):
    """State or action: one entry of ``names`` per dimension. Names that only count, ``state_0`` and on, are unknown ones."""

    names: tuple[str, ...]
    units: tuple[str, ...] | None = None
    frame: str | None = None
    rotation: str | None = None
    gripper: str | None = None
    mode: Literal["absolute", "relative"] | None = None
    normalisation: Literal["mean_std", "quantile", "min_max", "none"] | None = None

    @property
    def size(self) -> int:
        return len(self.names)


class Difference(NamedTuple):
    """What two contracts do not share, as a sentence.

    Attributes:
        field: ``cameras``, ``dimensions``, or the name of a field of ``Camera``, ``Vector`` or ``Contract``.
        silent: the words for the side that does not say it, where only one does; then nothing is known to conflict.
    """

    field: str
    sentence: str
    silent: str = ""


class Contract(Strict):
    """What ``contract.json`` in a checkpoint says."""

    cameras: tuple[Camera, ...]
    state: Vector
    action: Vector
    rate: float | None = None
    chunk: int | None = None
    executed: int | None = None
    prompt: str | None = None
    render: str | None = None

    @property
    def camera_names(self) -> tuple[str, ...]:
        return tuple(camera.name for camera in self.cameras)

    def conflicts(self, other: "Contract") -> list[str]:
        """Sentences about what does not fit, empty when all known fields agree. Unknown fields never conflict."""
        return [difference.sentence for difference in self.compare(other) if not difference.silent]

    def compare(self, other: "Contract", here: str = "here", there: str = "there") -> list[Difference]:
        """What does not fit, and what only one of both says; ``here`` and ``there`` are words for this one and the other."""
        found: list[Difference] = []
        missing = [camera.name for camera in self.cameras if camera.name not in other.camera_names]
        needed = [camera.name for camera in self.cameras if not camera.optional]
        if missing and (set(missing) & set(needed) or len(missing) == len(self.cameras)):
            only = ", ".join(other.camera_names) or "none"
            found.append(Difference("cameras", f"camera {', '.join(missing)} is expected but there is only {only}"))
        theirs, words = {camera.name: camera for camera in other.cameras}, (here, there)
        for camera in self.cameras:
            if camera.name in theirs:
                fields = ("height", "width", "colour", "flip", "crop")
                found += _differences(f"camera {camera.name}", camera, theirs[camera.name], fields, words)
        for part in ("state", "action"):
            mine, yours = getattr(self, part), getattr(other, part)
            if mine.size != yours.size:
                sizes = f"{mine.size} dimensions ({', '.join(mine.names)}) {here} and {yours.size} ({', '.join(yours.names)}) {there}"
                found.append(Difference("dimensions", f"{part} has {sizes}"))
            else:
                mine, yours = (_known(part, vector) for vector in (mine, yours))
                found += _differences(part, mine, yours, ("names", "units", "frame", "rotation", "gripper", "mode"), words)
        return found + _differences("contract", self, other, ("rate", "render"), words)

    def require(self, other: "Contract", mine: str, yours: str) -> None:
        """Refuse a conflict.

        Raises:
            UserError: naming ``mine`` and ``yours``, each conflict, and the way out.
        """
        found = self.conflicts(other)
        if found:
            mend = f"Give {mine} what it was made for, or make {mine} anew from data of {yours}"
            raise UserError(f"{mine} does not fit {yours}: {'; '.join(found)}. {mend}")


def _known(part: str, vector: Vector) -> Vector:
    """``vector`` without names that only count."""
    counted = vector.names == tuple(f"{part}_{i}" for i in range(vector.size))
    return vector.model_copy(update={"names": None}) if counted else vector


def _differences(where: str, a: Strict, b: Strict, fields: tuple[str, ...], words: tuple[str, str]) -> list[Difference]:
    found = []
    for name in fields:
        x, y = getattr(a, name), getattr(b, name)
        if x != y:
            sides = (f"{'unknown' if value is None else value} {word}" for value, word in zip((x, y), words, strict=True))
            silent = words[0] if x is None else words[1] if y is None else ""
            found.append(Difference(name, f"{where}: {name} is {' and '.join(sides)}", silent))
    return found
