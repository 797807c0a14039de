"""The conventions that a checkpoint, a dataset, a world and a robot must share, as data that can be compared."""

from typing import Literal

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
        found: list[str] = []
        missing = [camera.name for camera in self.cameras if camera.name not in other.camera_names]
        needed = [camera.name for camera in self.cameras if not camera.optional]
        if missing and (set(missing) & set(needed) or len(missing) == len(self.cameras)):
            found.append(f"camera {', '.join(missing)} is expected but there is only {', '.join(other.camera_names) or 'none'}")
        theirs = {camera.name: camera for camera in other.cameras}
        for camera in self.cameras:
            if camera.name in theirs:
                found += _differences(f"camera {camera.name}", camera, theirs[camera.name], ("height", "width", "colour", "flip", "crop"))
        for part in ("state", "action"):
            mine, yours = getattr(self, part), getattr(other, part)
            if mine.size != yours.size:
                sizes = f"{mine.size} dimensions ({', '.join(mine.names)}) here and {yours.size} ({', '.join(yours.names)}) there"
                found.append(f"{part} has {sizes}")
            else:
                mine, yours = (_known(part, vector) for vector in (mine, yours))
                found += _differences(part, mine, yours, ("names", "units", "frame", "rotation", "gripper", "mode"))
        return found + _differences("contract", self, other, ("rate", "render"))

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


def _differences(where: str, a: Strict, b: Strict, fields: tuple[str, ...]) -> list[str]:
    pairs = [(name, getattr(a, name), getattr(b, name)) for name in fields]
    return [f"{where}: {name} is {x} here and {y} there" for name, x, y in pairs if x is not None and y is not None and x != y]
