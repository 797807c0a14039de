"""What a dataset holds, what is doubtful about it, and how to mend it: ``inspect``."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from . import checks
from .contract import Contract
from .readers import Dataset, open_dataset

PAIRS = 24
"""Neighbouring frames of each camera that are decoded to find pictures that stand still while the robot moves."""
SHORT = 0.25
"""An episode shorter than this share of the median is short."""
MANY_CLIPPED = 0.05
MANY_IDLE = 0.1


@dataclass(frozen=True)
class Finding:
    """One sentence about what is wrong or doubtful, and one about what to do."""

    check: str
    sentence: str
    mend: str


def inspect(dataset: str | Path | Dataset) -> dict[str, Any]:
    """What a dataset holds, ready for JSON: sizes, cameras, features, tasks, ranges per dimension, measurements, and ``findings``.

    Reads all vectors and decodes some frames of each camera.

    Raises:
        UserError: it cannot be opened.
    """
    opened = dataset if isinstance(dataset, Dataset) else open_dataset(dataset)
    lengths = [episode.length for episode in opened.episodes]
    fps = opened.fps if math.isfinite(opened.fps) else None
    findings = _gaps(opened)
    measured, found = _measure(opened)
    cameras, seen = _cameras(opened)
    counts = {task: sum(episode.task == task for episode in opened.episodes) for task in opened.tasks}
    return {
        "path": str(opened.path),
        "episodes": len(opened.episodes),
        "frames": len(opened),
        "fps": fps,
        "seconds": len(opened) / fps if fps else None,
        "episode_length": {"min": min(lengths), "mean": float(np.mean(lengths)), "max": max(lengths)},
        "cameras": cameras,
        "tasks": counts,
        "worlds": sorted({str(episode.meta["world"]) for episode in opened.episodes if "world" in episode.meta}),
        "features": {key: int(values.shape[1]) for key, values in opened.vectors.items()},
        "ranges": {key: _ranges(opened, key) for key in opened.vectors},
        "unknown": unknown_fields(opened.contract),
        **measured,
        "findings": [asdict(finding) for finding in (*findings, *found, *seen)],
    }


def roles(dataset: Dataset) -> tuple[list[str], str | None]:
    """Features that make up the state, in order, and the one that is the action (``None``: cannot be told)."""
    keys = list(dataset.vectors)
    action = next((key for key in ("action", "actions") if key in keys), None)
    for key in ("observation.state", "state", "observation.proprio"):
        if key in keys:
            return [key], action
    libero = [f"observation.{key}" for key in ("ee_pos", "ee_ori", "gripper_states")]
    if set(libero) <= set(keys):
        return libero, action
    ends = ("eef_pos", "eef_quat", "gripper_qpos")
    robosuite = [key for robot in range(4) for end in ends if (key := f"observation.robot{robot}_{end}") in keys]
    others = [key for key in keys if key.startswith("observation.") and not key.startswith("observation.object")]
    return robosuite or others, action


def joined(dataset: Dataset, features: list[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Features side by side, float32 (N, D), every value finite (others are replaced by their column's median), and dimension names."""
    if not features:
        return np.zeros((len(dataset), 0), np.float32), ()
    values = np.concatenate([dataset.vectors[key] for key in features], axis=1)
    bad = ~np.isfinite(values)
    if bad.any():
        values = values.copy()
        for i in np.flatnonzero(bad.any(0)):
            good = values[~bad[:, i], i]
            values[bad[:, i], i] = np.median(good) if len(good) else 0.0
    return values, tuple(name for key in features for name in dimension_names(dataset, key))


def dimension_names(dataset: Dataset, key: str) -> tuple[str, ...]:
    """The contract's names of a feature's dimensions, or ``<feature>_<i>``."""
    contract, width = dataset.contract, dataset.vectors[key].shape[1]
    known = {"observation.state": contract.state.names, "action": contract.action.names, "action.expert": contract.action.names}.get(
        key, ()
    )
    short = key.removeprefix("observation.")
    return known if len(known) == width else tuple(f"{short}_{i}" for i in range(width))


def unknown_fields(contract: Contract) -> list[str]:
    """Names of the contract's fields that nobody says."""
    fields: list[tuple[str, object]] = [("rate", contract.rate), ("render", contract.render)]
    fields += [(f"camera {camera.name} flip", camera.flip) for camera in contract.cameras]
    for part, vector in (("state", contract.state), ("action", contract.action)):
        fields += [(f"{part} {name}", value) for name, value in (("units", vector.units), ("frame", vector.frame), ("mode", vector.mode))]
    return [name for name, value in fields if value is None]


def _ranges(dataset: Dataset, key: str) -> list[dict[str, Any]]:
    rows = []
    for i, name in enumerate(dimension_names(dataset, key)):
        values = dataset.vectors[key][:, i]
        good = values[np.isfinite(values)]
        low, high, mean = (float(f(good)) for f in (np.min, np.max, np.mean)) if len(good) else (None, None, None)
        rows.append({"name": name, "min": low, "max": high, "mean": mean, "constant": low == high, "not_finite": len(values) - len(good)})
    return rows


def _gaps(dataset: Dataset) -> list[Finding]:
    """What is missing, too short, or not a number."""
    found = []
    for key, values in dataset.vectors.items():
        rows = np.flatnonzero(~np.isfinite(values).all(1))
        if len(rows):
            starts = [e.start for e in dataset.episodes]
            episodes = sorted({int(np.searchsorted(starts, row, side="right")) - 1 for row in rows})
            sentence = f"{key} has NaN or infinity in {len(rows)} frames, of episodes {_some(episodes)}"
            found.append(Finding("not_finite", sentence, "leave these episodes out, or record them again: training refuses such values"))
    features, action = roles(dataset)
    if "observation.state" not in dataset.vectors or action != "action":
        held = ", ".join(dataset.vectors)
        sentence = f"state and action are not under their names here (it has {held})"
        found.append(Finding("names", sentence, "write a mapping with --write, mend it, and give it as --robot"))
    if not math.isfinite(dataset.fps):
        found.append(Finding("rate", "nothing says the control rate", "write `rate:` (Hz) into the mapping"))
    median = float(np.median([e.length for e in dataset.episodes]))
    short = [e.index for e in dataset.episodes if e.length < max(2, SHORT * median)]
    if short:
        sentence = f"{len(short)} episodes are shorter than a quarter of the median of {median:.0f} frames: {_some(short)}"
        found.append(Finding("short", sentence, "look at them: aborted recordings teach to stop; leave them out of training"))
    if len(dataset.tasks) == 1 and len(dataset.tasks[0].split()) < 2:
        sentence = f"the only instruction is '{dataset.tasks[0]}', which is no sentence"
        found.append(Finding("instruction", sentence, "write the instruction as a person would say it; a VLM reads it"))
    if dataset.timestamps is None:
        return found
    ticks = checks.clock(dataset.timestamps, dataset.fps, dataset.episodes)
    if ticks is not None and ticks.gaps:
        sentence = f"{ticks.gaps} steps leave out one or more frames (time stamps jump by up to {ticks.worst + 1 / dataset.fps:.3f} s)"
        found.append(Finding("clock", sentence, "the robot moved on unrecorded there; resample the recording, or leave these episodes out"))
    elif ticks is not None and ticks.jittered:
        sentence = f"{ticks.jittered} time stamps are off by more than a tenth of a frame (up to {1000 * ticks.worst:.1f} ms)"
        found.append(Finding("clock", sentence, "frames are taken by their number here, not by their time; resample if the jitter is real"))
    return found


def _measure(dataset: Dataset) -> tuple[dict[str, Any], list[Finding]]:
    """Idle frames, clipping, grippers, absolute or relative, wraps."""
    features, key = roles(dataset)
    state, state_names = joined(dataset, features)
    found: list[Finding] = []
    idle = checks.idle(state if state.shape[1] else joined(dataset, [key] if key else [])[0], dataset.episodes)
    if idle is not None and idle.share > MANY_IDLE:
        sentence = (
            f"{idle.share:.0%} of the frames are idle ({idle.starts:.0%} at the starts of episodes, {idle.ends:.0%} at their ends; "
            f"the longest start stands still for {idle.longest_start} frames)"
        )
        found.append(Finding("idle", sentence, "cut still starts and ends off: a policy learns to stand still from them"))
    wrapped = checks.wraps(state, dataset.episodes)
    for i, count in wrapped.items():
        sentence = f"state {state_names[i]} jumps by a whole turn {count} times"
        found.append(Finding("wraps", sentence, "use a rotation without jumps (rot6d, or a quaternion with one sign)"))
    measured: dict[str, Any] = {"idle": asdict(idle) if idle else None, "state": features, "action": key}
    if key is None:
        return measured | {"clipped": {}, "gripper": [], "mode": None, "follows": []}, found
    action, names = joined(dataset, [key])
    shares = checks.clipped(action)
    hit = [f"{names[i]} {shares[i]:.0%}" for i in np.flatnonzero(shares > MANY_CLIPPED)]
    if hit:
        sentence = f"many actions lie exactly at the smallest or largest value of their dimension: {', '.join(hit)}"
        mend = "the controller or the recorder clips; raise its limit, or accept that faster moves are not learned"
        found.append(Finding("clipped", sentence, mend))
    hands = checks.grippers(action, state, (names, state_names), dataset.episodes)
    gripper = [asdict(hand) | {"name": names[hand.action], "guess": _hand(hand, names, state_names)} for hand in hands]
    if dataset.contract.action.gripper is None:
        mend = "say it as `gripper:` in the mapping's action after looking at an episode; a wrong sign fails every grasp"
        found += [Finding("gripper", entry["guess"], mend) for entry in gripper]
    links = checks.follows(action, state, dataset.episodes) if state.shape[1] else []
    arm = [(i, link) for i, link in enumerate(links) if link is not None and i not in {hand.action for hand in hands}]
    mode = next((m for m in ("absolute", "relative") if arm and sum(link.mode == m for _, link in arm) * 2 >= len(arm)), None)
    if dataset.contract.action.mode is None:
        found.append(_mode_finding(mode, arm, names, state_names))
    elif mode is not None and mode != dataset.contract.action.mode:
        sentence = f"the contract says that actions are {dataset.contract.action.mode}, and they look {mode}"
        found.append(Finding("mode", sentence, "look at one episode and correct `mode:` in the mapping"))
    late = [link for _, link in arm if link.mode == "relative" and link.late]
    if len(late) * 2 > len(arm) > 0:
        sentence = (
            "actions go with the movement that ended at their row better than with the one that begins there: rows look one step late"
        )
        found.append(
            Finding("late", sentence, "LIBERO's recorder stores what was seen after the action; look how yours pairs them before training")
        )
    follows = [{"name": names[i], "state": state_names[link.state], **asdict(link), "error": _finite(link.error)} for i, link in arm]
    clipping = {names[i]: float(shares[i]) for i in range(len(names))}
    return measured | {"clipped": clipping, "gripper": gripper, "mode": mode, "follows": follows}, found


def _hand(hand: checks.Gripper, names: tuple[str, ...], state_names: tuple[str, ...]) -> str:
    """A sentence about a gripper; always a guess."""
    kind = f"switches between {hand.values[0]:g} and {hand.values[1]:g}" if hand.values else "moves continuously"
    if hand.state is None:
        return f"action {names[hand.action]} {kind}; no state answers, so which end closes is unknown"
    ends = (f"{hand.values[0]:g}", f"{hand.values[1]:g}") if hand.values else ("its low end", "its high end")
    closing, change = (ends[1], "falls") if hand.closes == "high" else (ends[0], "rises")
    answer = f"the size of state {state_names[hand.state]} {change} when it is high (correlation {hand.correlation:.2f})"
    return f"action {names[hand.action]} {kind}; {answer}: if that is the gripper's opening, {closing} closes (a guess)"


def _mode_finding(mode: str | None, arm: list[tuple[int, checks.Follow]], names: tuple[str, ...], state_names: tuple[str, ...]) -> Finding:
    mend = "say it as `mode:` in the mapping's action; a policy that takes one for the other fails always"
    if mode is None:
        return Finding("mode", "whether actions are absolute or relative cannot be told from their relation to the state", mend)
    i, link = next((i, link) for i, link in arm if link.mode == mode)
    if mode == "absolute":
        proof = f"{names[i]} is within {link.error:.1%} of the range of where state {state_names[link.state]} goes"
    else:
        proof = f"{names[i]} has correlation {max(link.correlation, link.before):.2f} with the steps of state {state_names[link.state]}"
    return Finding("mode", f"actions look {mode}: {proof} (a guess)", mend)


def _cameras(dataset: Dataset) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Each camera as the contract has it, with what decoding shows."""
    features, _ = roles(dataset)
    state = joined(dataset, features)[0]
    moving = checks.inside_episodes(dataset.episodes)
    if state.shape[1]:
        moving = moving & (np.abs(np.diff(state, axis=0)) > 10 * checks.STILL * checks.spread(state)).any(1)
    frames = np.flatnonzero(moving)
    frames = frames[np.linspace(0, len(frames) - 1, min(PAIRS, len(frames))).astype(int)] if len(frames) else frames
    rows, found = [], []
    for camera in dataset.contract.cameras:
        row = camera.model_dump(mode="json") | {"decodes": True, "decoded": None, "duplicates": None, "pairs": len(frames)}
        rows.append(row)
        try:
            row["decoded"] = list(dataset.frames(camera.name, [0, len(dataset) - 1]).shape[1:3])
            if len(frames):
                pairs = dataset.frames(camera.name, np.concatenate([frames, frames + 1]))
                same = (pairs[: len(frames)] == pairs[len(frames) :]).all(axis=(1, 2, 3))
                row["duplicates"] = int(same.sum())
        except UserError as error:
            row["decodes"] = False
            found.append(Finding("decode", str(error), "copy the dataset again, or run `vla data repair`"))
            continue
        if row["decoded"] != [camera.height or row["decoded"][0], camera.width or row["decoded"][1]]:
            height, width = row["decoded"]
            sentence = f"camera {camera.name} is said to be {camera.height}x{camera.width} and decodes to {height}x{width}"
            found.append(Finding("size", sentence, "trust what decodes: correct the sizes in meta/info.json or in the mapping"))
        if row["duplicates"]:
            sentence = (
                f"camera {camera.name} shows the same picture twice in {row['duplicates']} of {len(frames)} places where the state moves"
            )
            found.append(Finding("duplicates", sentence, "the camera is slower than the control rate, or froze; check its frame rate"))
        if camera.flip is None:
            sentence = f"nothing says whether frames of camera {camera.name} are upright (robosuite's own are upside down)"
            found.append(Finding("flip", sentence, "look at one (--images FOLDER) and say `flip:` in the mapping"))
    return rows, found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
