"""Controls: one thing is taken away or falsified, and the success rate says whether the policy needed it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from ..config import Strict
from ..data import Observation

Change = Callable[[Observation], Observation]


class Control(Strict):
    """One control of a suite; exactly one of the four changes is set.

    Attributes:
        instruction: ``swap`` gives each task the instruction of the next of ``tasks``; success stays that of the task itself.
        images: ``blank`` makes every camera black.
        state: ``blank`` freezes proprioception at its mean over the training data.
        cut: (reader, read) removes that edge of the policy's attention graph.
        tasks: names of tasks of the suite; all scored ones where it is not given.
        episodes: per task; never more than the tasks themselves get.
        below: the rate must stay under this for the control to pass.
    """

    instruction: Literal["swap"] | None = None
    images: Literal["blank"] | None = None
    state: Literal["blank"] | None = None
    cut: tuple[str, str] | None = None
    tasks: tuple[str, ...] | None = None
    episodes: int | None = Field(default=None, ge=1)
    below: float | None = Field(default=None, gt=0, le=1)

    @model_validator(mode="after")
    def _one_change(self) -> "Control":
        given = [name for name in ("instruction", "images", "state", "cut") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of instruction, images, state, cut must be set, got {', '.join(given) or 'none'}")
        if self.instruction == "swap" and self.tasks is not None and len(self.tasks) < 2:
            raise ValueError("swapping instructions needs two tasks or more")
        return self

    def change(self, task: str, tasks: Sequence[str], instructions: dict[str, str], mean_state: np.ndarray | None) -> Change | None:
        """What this control makes of the observations of ``task``; None where the observations stay (a cut).

        Args:
            tasks: the control's tasks, in order.
            instructions: task -> instruction.
            mean_state: (S,) mean proprioception of the training data; needed by ``state: blank`` alone.
        """
        if self.instruction == "swap":
            return give_instruction(instructions[tasks[(list(tasks).index(task) + 1) % len(tasks)]])
        if self.images == "blank":
            return blank_images
        if self.state == "blank":
            if mean_state is None:
                raise ValueError("blanking the state needs its mean")
            return give_state(mean_state)
        return None


def give_instruction(words: str) -> Change:
    """Other words for the same scene."""
    return lambda observation: replace(observation, instruction=words)


def blank_images(observation: Observation) -> Observation:
    """Black pictures from every camera."""
    return replace(observation, images={name: np.zeros_like(image) for name, image in observation.images.items()})


def give_state(state: np.ndarray) -> Change:
    """The same proprioception at every step."""
    return lambda observation: replace(observation, state=state)
