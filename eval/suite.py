"""Suites: which tasks, how many episodes, which controls. YAML in ``configs/suite/``."""

import difflib
from pathlib import Path

from pydantic import Field, field_validator, model_validator

from ..config import Strict, find, load
from ..envs.view import Size, read_size
from ..errors import UserError
from .controls import Control

TRAINING, DEVELOPMENT, EVALUATION = 0, 500_000, 1_000_000  # first seed of each range


class Task(Strict):
    """One task of a suite.

    Attributes:
        world: registry name; the task's own name where it is not given.
        scored: counts towards ``overall``.
        episodes: instead of the suite's.
    """

    world: str | None = None
    scored: bool = True
    episodes: int | None = Field(default=None, ge=1)


class Videos(Strict):
    """How many episodes of each task are filmed: the first ones, and failures beyond them."""

    first: int = Field(default=2, ge=0)
    failures: int = Field(default=4, ge=0)


class Suite(Strict):
    """An experiment over tasks, as ``vla eval`` runs it.

    Attributes:
        title: heading of the report.
        tasks, controls: by name, in the order in which they are reported.
        episodes: per task.
        gate: the overall rate that counts as passed.
        render, size, cameras, rate: how the worlds are seen and controlled; see ``envs.make_world``. What is not given is as in the
            policy's contract, and where that does not know it (or a scripted expert acts) as by default.
        slots: episodes played at once; half of them form one batch of the policy.
        settle: steps played on after the first success, to tell a success that lasts.
    """

    title: str
    tasks: dict[str, Task] = Field(min_length=1)
    controls: dict[str, Control] = {}
    episodes: int = Field(default=30, ge=1)
    gate: float | None = Field(default=None, gt=0, le=1)
    render: str | None = None
    size: Size | dict[str, Size] | None = None
    cameras: tuple[str, ...] | None = None
    rate: float | None = Field(default=None, gt=0)
    slots: int = Field(default=8, ge=1)
    settle: int = Field(default=10, ge=0)
    videos: Videos = Videos()

    @field_validator("size", mode="before")
    @classmethod
    def _sizes(cls, value: object) -> object:
        try:
            if isinstance(value, dict):
                return {camera: read_size(size) for camera, size in value.items()}
            return None if value is None else read_size(value)
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _known_tasks(self) -> "Suite":
        for name, control in self.controls.items():
            for task in control.tasks or ():
                if task not in self.tasks:
                    near = difflib.get_close_matches(task, self.tasks, n=1)
                    raise ValueError(f"control '{name}' names an unknown task '{task}'" + (f"; did you mean '{near[0]}'?" if near else ""))
            if control.instruction == "swap" and len(self.tasks_of(control)) < 2:
                raise ValueError(f"control '{name}' swaps instructions, which needs two scored tasks or more")
        return self

    def world(self, task: str) -> str:
        """Registry name of a task's world."""
        return self.tasks[task].world or task

    def tasks_of(self, control: Control) -> list[str]:
        """The tasks that a control runs."""
        return list(control.tasks or (name for name, task in self.tasks.items() if task.scored))

    def count(self, task: str, control: Control | None = None, episodes: int | None = None) -> int:
        """Episodes of a task, or of a control of it; ``episodes`` is what the command line asked for."""
        own = episodes or self.tasks[task].episodes or self.episodes
        return own if control is None else min(own, control.episodes or own)


def load_suite(name: str, overrides: list[str] | None = None) -> Suite:
    """The suite of a name in ``configs/suite/`` or of a path.

    Raises:
        UserError: there is no such suite, or it does not read as one; the nearest valid name is given.
    """
    return load(Suite, find(name, "suite"), overrides)


def check_seeds(seed: int, episodes: int) -> None:
    """Evaluation on starts that training may have seen proves nothing.

    Raises:
        UserError: a seed lies in the training range, or the range runs from development into evaluation.
    """
    if seed < DEVELOPMENT:
        raise UserError(
            f"--seed {seed} lies among the training seeds (0 to {DEVELOPMENT - 1:,}); "
            f"use {EVALUATION:,} or more to evaluate, {DEVELOPMENT:,} or more while developing"
        )
    if seed < EVALUATION < seed + episodes:
        raise UserError(f"--seed {seed} with {episodes} episodes runs from the development seeds into the evaluation seeds; begin lower")


def suite_name(name: str) -> str:
    """``quickstart`` for ``quickstart``, ``my/suite.yaml`` for a path: as results and reports name it."""
    return Path(name).stem
