"""A client's names for what the contract calls cameras, state and instruction."""

import asyncio
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from pydantic import PositiveInt
from triune_client.wire import EncodedImage, Limits, WireError, decode_image

from ...config import Strict
from ...data import Contract, Observation
from ...errors import UserError
from .exchange import Refusal
from .security import public

CAMERAS = ("{}", "observation/{}", "observation/{}_image", "observation/images/{}", "observation/image/{}", "images/{}", "video/{}")
"""Where openpi, LeRobot, vla-evaluation-harness and GR00T put a camera's picture, in the order in which they are tried."""
STATES = ("observation/state", "state", "states")
GROUPS = ("state/{}", "observation/{}", "{}")
"""Where the numbers of one name are, for clients that send a state in parts."""
PROMPTS = ("prompt", "task", "instruction", "task_description", "lang")
ROOTS = ("language/", "annotation/")
"""Where GR00T has its instruction, under names that differ by data set."""


class Keys(Strict):
    """Which keys of a client's observation are what. What is not said is looked for where peers have it.

    A key is a path: ``observation/state``, ``observation.state`` and ``{"observation": {"state": ...}}`` are the same.

    Attributes:
        cameras: camera of the policy -> key of its picture.
        state: keys whose numbers, one after the other, are the state.
        prompt: key of the instruction.
        instruction: for clients that send none; without it they are refused.
        actions: name -> how many numbers, for clients that want the action in parts (GR00T).
    """

    cameras: dict[str, str] = {}
    state: tuple[str, ...] = ()
    prompt: str | None = None
    instruction: str | None = None
    actions: dict[str, PositiveInt] = {}

    def check(self, contract: Contract) -> None:
        """Refuse keys that do not belong to the policy.

        Raises:
            UserError: a camera that it does not have, or actions of another size.
        """
        if unknown := [name for name in self.cameras if name not in contract.camera_names]:
            known = ", ".join(contract.camera_names) or "none"
            raise UserError(f"keys.cameras names {', '.join(unknown)}, and the cameras of the policy are {known}; use its names")
        if self.actions and sum(self.actions.values()) != contract.action.size:
            sizes = f"{sum(self.actions.values())} numbers together, and an action of the policy has {contract.action.size}"
            raise UserError(f"keys.actions has {sizes} ({', '.join(contract.action.names)}); make them agree")

    def state_parts(self, contract: Contract) -> tuple[str, ...]:
        """Names of the parts of the state, as clients are told."""
        return tuple(bare(key) for key in self.state) or tuple(groups(contract.state.names))

    def action_parts(self, contract: Contract) -> dict[str, int]:
        """Names and sizes of the parts of an action."""
        return self.actions or groups(contract.action.names)

    async def read(self, tree: Mapping[Any, Any], contract: Contract, limits: Limits) -> Observation:
        """The observation in a client's map. Of pictures and numbers with leading axes (batch, time) the last is taken.

        Raises:
            Refusal: something is missing or of another shape; the sentence names the keys that came.
        """
        leaves = flatten(tree)
        images: dict[str, np.ndarray] = {}
        for camera in contract.cameras:
            said = self.cameras.get(camera.name)
            value = _first(leaves, [said] if said else [where.format(camera.name) for where in CAMERAS])
            if value is not None:
                images[camera.name] = await _decoded(value, camera.name, limits)
            elif said or not camera.optional:
                raise _missing(f"a picture of camera '{camera.name}'", leaves, f"keys.cameras.{camera.name}=KEY")
        time = leaves.get("timestamp", 0.0)
        seconds = float(time) if isinstance(time, int | float | np.number) and np.isfinite(time) else 0.0
        try:
            return Observation(images, self._state(leaves, contract), self._words(leaves), seconds)
        except UserError as error:
            raise Refusal("bad_request", public(str(error))) from None

    def _state(self, leaves: Mapping[str, Any], contract: Contract) -> np.ndarray:
        size, names = contract.state.size, groups(contract.state.names)
        ways = [list(self.state)] if self.state else [*([key] for key in STATES), *([w.format(n) for n in names] for w in GROUPS)]
        for keys in ways:
            found = [_first(leaves, [key]) for key in keys]
            if all(value is not None for value in found):
                parts = [_numbers(value, key) for value, key in zip(found, keys, strict=True)]
                state = np.concatenate(parts) if parts else np.zeros(0, np.float32)
                if len(state) != size:
                    came = ", ".join(f"{key}: {len(part)}" for key, part in zip(keys, parts, strict=True))
                    wanted = f"the policy takes {size} ({', '.join(contract.state.names)})"
                    raise Refusal("bad_request", f"the state has {len(state)} numbers ({came}), {wanted}; say keys.state=[KEY, ...]")
                return state
        raise _missing("the state", leaves, "keys.state=[KEY, ...]")

    def _words(self, leaves: Mapping[str, Any]) -> str:
        keys = [self.prompt] if self.prompt else [*PROMPTS, *(key for key in leaves if key.startswith(ROOTS))]
        value = _first(leaves, keys)
        while (isinstance(value, list) and value) or (isinstance(value, np.ndarray) and value.ndim and len(value)):
            value = value[0]
        if isinstance(value, np.ndarray) and not value.ndim:
            value = value.item()
        if isinstance(value, str):
            return str(value)
        if self.instruction is None:
            raise _missing("an instruction", leaves, "keys.prompt=KEY, or keys.instruction='what to do' for all clients")
        return self.instruction


def bare(key: str) -> str:
    """A client's key without the modality that GR00T and StarVLA put before it."""
    return re.sub(r"^(video|state|action)[./]", "", key)


def groups(names: Iterable[str]) -> dict[str, int]:
    """Names that count belong together: x, rotation_0, rotation_1 are {"x": 1, "rotation": 2}."""
    found: dict[str, int] = {}
    last = ""
    for name in names:
        counted = re.fullmatch(r"(.+)_(\d+)", name)
        stem, number = (counted[1], int(counted[2])) if counted else (name, 0)
        if counted and stem == last and found[stem] == number:
            found[stem] += 1
            continue
        last = name if not counted or number or stem in found else stem
        found[last] = 1
    return found


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Leaves of maps in maps by their path.

    Raises:
        Refusal: a key is no text, or two keys are one path.
    """
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str):
            raise Refusal("bad_request", "the keys of an observation must be text")
        inner = {f"/{k}": v for k, v in flatten(value).items()} if isinstance(value, Mapping) else {"": value}
        for rest, leaf in inner.items():
            path = _path(key) + rest
            if path in leaves:
                raise Refusal("bad_request", f"two keys of the observation are the same path '{path[:60]}'; send one of them")
            leaves[path] = leaf
    return leaves


def picture(value: Any, camera: str) -> np.ndarray:
    """uint8 (H, W, 3) of pixels as (..., H, W, 3) or (..., 3, H, W): bytes, or floats from 0 to 1.

    Raises:
        Refusal: it is something else.
    """
    if not isinstance(value, np.ndarray) or value.ndim < 3 or 0 in value.shape:
        came = f"an array {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise Refusal("bad_request", f"the picture of camera '{camera}' must be an array (height, width, 3), and {came} came")
    image = value.reshape(-1, *value.shape[-3:])[-1]
    if image.shape[0] == 3 and image.shape[2] != 3:
        image = image.transpose(1, 2, 0)
    if image.dtype.kind == "f":
        if not (image.min() >= 0 and image.max() <= 1):
            raise Refusal("bad_request", f"the picture of camera '{camera}' is {image.dtype} and not from 0 to 1; send bytes (uint8)")
        image = np.rint(255 * image.astype(np.float32)).astype(np.uint8)
    return image


async def _decoded(value: Any, camera: str, limits: Limits) -> np.ndarray:
    if isinstance(value, EncodedImage):
        try:
            value = await asyncio.to_thread(decode_image, value, limits)
        except WireError as error:
            raise Refusal("bad_request", f"camera '{camera}': {error}") from None
    return picture(value, camera)


def _numbers(value: Any, key: str) -> np.ndarray:
    """float32 (D,) of numbers as a scalar, or the last row of an array (..., D)."""
    try:
        array = np.asarray(value if _plain(value) else None)
    except ValueError:
        raise Refusal("bad_request", f"'{key}' is a list of arrays that are not equally long") from None
    if array.dtype.kind not in "biuf":
        raise Refusal("bad_request", f"'{key}' must be an array of numbers")
    if not array.size:
        return np.zeros(0, np.float32)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, and an observation must be finite
        return array.reshape(-1, array.shape[-1] if array.ndim else 1)[-1].astype(np.float32)


def _plain(value: Any) -> bool:
    """Whether NumPy may look at it: a text in a list would make every entry as long."""
    if isinstance(value, list):
        return all(not isinstance(each, list) and _plain(each) for each in value)
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    return isinstance(value, int | float | np.number | np.bool_)


def _path(key: str) -> str:
    return key.replace(".", "/")


def _first(leaves: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((leaves[_path(key)] for key in keys if leaves.get(_path(key)) is not None), None)


def _missing(what: str, leaves: Mapping[str, Any], mend: str) -> Refusal:
    came = ", ".join(key[:60] for key in list(leaves)[:20]) or "nothing"
    return Refusal("bad_request", f"the observation lacks {what}; it has {came}. Send it, or say its key to the server: {mend}")
