"""What is seen of a world and how often it is controlled, as one value: from a command, a suite or a contract to the simulator."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal, get_args

from ..data import Camera, Contract
from ..errors import UserError

CAMERAS = ("agentview", "wrist")
"""The cameras that every world has, and what is seen where nothing else is asked for."""
SIDE = 96
"""Height and width of an image in pixels where nothing else is asked for."""
SMALLEST = 16
"""Fewest pixels of a side that users may ask for: with less nothing can be told apart."""

Profile = Literal["fast", "default"]
"""How images are drawn; see ``envs.render``."""
Size = int | tuple[int, int]
"""Pixels: the side of a square, or height and width."""
Sizes = Size | Mapping[str, Size]
"""One size for all cameras, or one for each by name."""


def check_profile(profile: str) -> None:
    """Refuse an unknown render profile.

    Raises:
        UserError: naming the profiles that exist.
    """
    if profile not in get_args(Profile):
        raise UserError(f"render must be one of {', '.join(get_args(Profile))}, got '{profile}'")


@dataclass(frozen=True)
class Shot:
    """One camera and the size of its images in pixels."""

    camera: str
    height: int = SIDE
    width: int = SIDE


@dataclass(frozen=True)
class View:
    """Cameras with their sizes, control rate, render profile.

    Attributes:
        shots: in the order in which the world's contract names them.
        rate: control rate in Hz; ``None``: the world's own.
        render: ``fast`` or ``default``.

    Raises:
        UserError: there is no camera or one twice, a size or the rate is not positive, or there is no such profile.
    """

    shots: tuple[Shot, ...] = tuple(Shot(camera) for camera in CAMERAS)
    rate: float | None = None
    render: str = "fast"

    def __post_init__(self) -> None:
        check_profile(self.render)
        if not self.shots or len(set(self.cameras)) < len(self.shots):
            raise UserError(f"a world is seen by one camera or more, each named once, got {', '.join(self.cameras) or 'none'}")
        for shot in self.shots:
            if min(shot.height, shot.width) < 1:
                raise UserError(f"images of camera {shot.camera} need a positive height and width, got {shot.height} x {shot.width}")
        if self.rate is not None and not (isfinite(self.rate) and self.rate > 0):
            raise UserError(f"the control rate must be a positive number of Hz, got {self.rate}")

    @property
    def cameras(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(shot.camera for shot in self.shots)


DEFAULT = View()


def choose(
    *,
    render: str | None = None,
    size: Sizes | None = None,
    cameras: Iterable[str] | None = None,
    rate: float | None = None,
    like: Contract | None = None,
) -> View:
    """A view by its parts; what is not given is as in ``like`` where that knows it, and else as in ``DEFAULT``.

    Raises:
        UserError: as ``View``, or ``size`` names a camera that is not among ``cameras``.
    """
    known = {camera.name: camera for camera in like.cameras} if like is not None else {}
    names = tuple(cameras) if cameras is not None else tuple(known) or CAMERAS
    sizes = dict(size) if isinstance(size, Mapping) else {} if size is None else dict.fromkeys(names, size)
    strange = [name for name in sizes if name not in names]
    if strange:
        raise UserError(f"size names camera {', '.join(strange)}, but the cameras are {', '.join(names)}")
    shots = tuple(Shot(name, *_pixels(sizes.get(name), known.get(name))) for name in names)
    if like is not None:
        rate, render = like.rate if rate is None else rate, like.render if render is None else render
    return View(shots, rate, DEFAULT.render if render is None else render)


def read_size(value: object) -> Size:
    """A size as users write it: ``96``, or height and width as ``120x160`` or ``[120, 160]``.

    Raises:
        UserError: it is none of these, or a side has fewer than ``SMALLEST`` pixels.
    """
    sides = value.split("x") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    pixels = [int(str(side)) for side in sides if str(side).isdecimal()]
    if not 1 <= len(pixels) == len(sides) <= 2 or min(pixels) < SMALLEST:
        raise UserError(f"{value} is no size of {SMALLEST} pixels or more; write 96, or height and width as 120x160")
    return pixels[0] if len(pixels) == 1 else (pixels[0], pixels[1])


def describe(contract: Contract) -> dict[str, Any]:
    """The view that the contract of a world describes, ready for JSON: render profile, rate in Hz, camera -> [height, width]."""
    sizes = {camera.name: [camera.height, camera.width] for camera in contract.cameras}
    return {"render": contract.render, "rate": contract.rate, "cameras": sizes}


def _pixels(size: Size | None, known: Camera | None) -> tuple[int, int]:
    if size is not None:
        return (size, size) if isinstance(size, int) else size
    return (known.height or SIDE, known.width or SIDE) if known is not None else (SIDE, SIDE)
