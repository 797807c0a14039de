"""A session's chunks inside the limits of its robot, before they leave the server."""

from collections import Counter
from typing import Any

import numpy as np
from triune_client import ActionLimits, Guard

from ...data import Contract, Observation
from ...errors import UserError
from .exchange import Refusal


def read_limits(stated: dict[str, Any] | None, contract: Contract) -> ActionLimits:
    """Limits for the actions of ``contract``; where none are stated, numbers that are not finite are still refused.

    Raises:
        UserError: they are of other actions than the policy's.
    """
    names = contract.action.names
    limits = ActionLimits.from_dict(stated or {"dimensions": [{"name": name} for name in names]})
    theirs = tuple(dimension.name for dimension in limits.dimensions)
    if len(theirs) != len(names):
        raise UserError(
            f"the limits ({limits.source}) are of {len(theirs)} actions ({', '.join(theirs)}), the policy has {len(names)} "
            f"({', '.join(names)}); name the mapping of the robot that the policy was trained on"
        )
    return limits


class Warden:
    """Keeps the chunks of one session inside limits. The robot's own guard, where there is one, has the last word.

    Where timestamps do not say how much of a chunk was executed before the next question, it is the part that is meant to be.
    """

    def __init__(self, limits: ActionLimits, contract: Contract) -> None:
        self.guard, self.executed = Guard(limits, contract.rate or 1.0), contract.executed
        self.answered: tuple[np.ndarray, float] | None = None

    def keep(self, seen: Observation, actions: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
        """A chunk (C, A) inside the limits, and what had to be changed for it: ``<kind> <dimension>`` -> at how many steps.

        Velocities count from what the robot was last sent. Which steps of the chunk before those were, the timestamps say.

        Raises:
            Refusal: a number is not finite, and nothing is known that would hold the robot.
        """
        if self.answered is not None:
            before, then = self.answered
            passed = self.executed or len(before)
            if seen.timestamp > then:
                passed = round(min((seen.timestamp - then) * self.guard.rate, len(before)))
            self.guard.sent(before[:passed], seen.state)
        safe, events = self.guard.check_chunk(actions, seen.state)
        if safe is None:
            raise Refusal("internal", f"{events[-1].sentence}: the policy's numbers are not finite, and nothing is known that would hold")
        self.answered = safe.astype(np.float32), seen.timestamp
        return self.answered[0], dict(Counter(f"{event.kind} {event.name}" for event in events)) if events else {}
