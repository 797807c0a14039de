"""Episodes before (``Job``) and after (``Row``) they are played, and the file that keeps the rows."""

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..data import Observation
from ..data.files import write_file
from ..envs.view import DEFAULT, View
from ..errors import UserError

Key = tuple[str | None, str, int]


@dataclass(frozen=True)
class Job:
    """One episode to play.

    Attributes:
        task: row name in the suite.
        world: registry name of the world; its success signal scores the episode.
        seed: of the world and of the policy's noise.
        rate, action_names: control rate (Hz) and action dimensions of the world as it is seen by ``view``.
        index: place among the episodes of the same task and control.
        control: name of the control that this episode belongs to, if any.
        change: what the policy sees instead of the observation, in a control.
        view: cameras, sizes, rate and render profile of the world.
    """

    task: str
    world: str
    seed: int
    rate: float
    action_names: tuple[str, ...]
    index: int = 0
    control: str | None = None
    change: Callable[[Observation], Observation] | None = None
    view: View = DEFAULT

    @property
    def key(self) -> Key:
        return self.control, self.task, self.seed

    @property
    def slug(self) -> str:
        """Name of the episode as a file and as a policy's session, such as ``cubes-lift-red-1000000``."""
        return slug(self.key)


@dataclass(frozen=True)
class Row:
    """One line of ``episodes.jsonl``.

    Attributes:
        success_any: the world signalled success at some step.
        success_end: it still did when the episode ended, ``settle`` steps after the first success.
        steps: control steps executed.
        first_success_step: steps executed when success came first.
        smoothness: ``statistics.smoothness`` of the executed actions.
        deadline_misses: plans that took longer than the part of a chunk that is executed meanwhile on a robot.
        policy_ms: mean wall time of the batches in which this episode's plans were computed.
        error: what went wrong, if the episode could not be played or filmed to its end.
        video: path of the mp4, relative to the folder of the evaluation.
    """

    control: str | None
    task: str
    seed: int
    success_any: bool
    success_end: bool
    steps: int
    first_success_step: int | None
    smoothness: float | None
    deadline_misses: int
    policy_ms: float | None
    error: str | None
    video: str | None

    @property
    def key(self) -> Key:
        return self.control, self.task, self.seed


def slug(key: Key) -> str:
    """``key`` as a file name: letters, digits and single dashes."""
    control, task, seed = key
    return re.sub(r"[^a-zA-Z0-9]+", "-", f"{control or ''} {task} {seed}").strip("-").lower()


class Ledger:
    """``episodes.jsonl``: appended and fsynced row by row, so that a killed evaluation keeps what it played."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: dict[Key, Row] = {row.key: row for row in read_rows(path)} if path.exists() else {}
        if path.exists():
            self.sort()  # also drops a last line that was cut off by a kill

    def append(self, row: Row) -> None:
        self.rows[row.key] = row
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def sort(self, order: Iterable[Key] = ()) -> None:
        """Rewrite the file in ``order``; rows without a place come after, by name and seed."""
        place = {key: i for i, key in enumerate(order)}
        rows = sorted(self.rows.values(), key=lambda r: (place.get(r.key, len(place)), r.control or "", r.task, r.seed))
        write_file(self.path, "".join(json.dumps(asdict(row)) + "\n" for row in rows))


def read_rows(path: Path) -> list[Row]:
    """The rows of an ``episodes.jsonl``; a last line without its end (a killed run) is left out.

    Raises:
        UserError: the file is missing, or another line is not a row.
    """
    if not path.exists():
        raise UserError(f"there is no {path}; an evaluation writes it, see `vla eval --help`")
    text = path.read_text()
    lines = text.split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(Row(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise UserError(f"{path} line {number} is not an episode row ({error}); evaluate into a fresh folder") from None
    return rows
