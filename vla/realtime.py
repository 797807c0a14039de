"""Chunks that go on from what is left of the one before, which is executed while they are made: real-time chunking.

Trained: some first actions are settled, they stand in the chunk without noise, and the network learned to go on from them (arXiv
2512.05964). Guided: any flow is led, at every step, towards a chunk that begins as the one before goes on (arXiv 2506.07339).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor

from ..config import Strict
from ..errors import UserError
from .model import Model
from .spec import FlowHead

Velocity = Callable[[Mapping[str, Tensor], int], dict[str, Tensor]]
"""Flows (B, T, X) and the number of a run -> their velocities."""


class Realtime(Strict):
    """How a chunk goes on from what is left of the one before.

    Attributes:
        method: ``trained`` settles actions, as many as the spec's ``prefix`` allows; ``guided`` leads the flow; ``auto`` is trained where
            no more actions are settled than that, and guided where more are.
        schedule: what each action that is left counts in guidance. All that are executed before the answer count 1; from the
            ``horizon`` on none counts; between, the weight falls by a line (``linear``), or by c (e^c - 1) / (e - 1) of that line c
            (``exp``, the paper's), or is 1 (``ones``) or 0 (``zeros``).
        horizon: how many of the actions that are left may count; all of them where it is not given.
        most: largest factor of the correction (beta of the paper).
        jacobian: whether the correction goes back through the network, as in the paper, or takes its Jacobian for the identity: one pass
            forward and no pass backward, as lerobot 0.6.1 does.
    """

    method: Literal["auto", "trained", "guided"] = "auto"
    schedule: Literal["exp", "linear", "ones", "zeros"] = "exp"
    horizon: PositiveInt | None = None
    most: PositiveFloat = 5.0
    jacobian: bool = True

    def weights(self, delay: int, left: int, length: int) -> list[float]:
        """What each action of a chunk of ``length`` counts, where ``left`` are left of the one before and ``delay`` of these are executed
        before the answer."""
        end = min(left, length, self.horizon or length)
        start = min(delay, end)
        line = [(end - i) / (end - start + 1) for i in range(start, end)]
        between = {
            "linear": line,
            "exp": [c * math.expm1(c) / math.expm1(1) for c in line],
            "ones": [1.0] * len(line),
            "zeros": [0.0] * len(line),
        }[self.schedule]
        return [1.0] * start + between + [0.0] * (length - end)


@dataclass(frozen=True)
class Prefix:
    """What is left of the chunk before, in network units, as long as a chunk; the first of it is of the time of the observation.

    Attributes:
        actions: anything where they do not count.
        weights: what each counts.
        guide: how they lead the flow; without it those that count are settled.
    """

    actions: Float[Tensor, "B T A"]
    weights: Float[Tensor, "B T"]
    guide: Realtime | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> "Prefix":
        """This prefix with both tensors changed."""
        return replace(self, actions=change(self.actions), weights=change(self.weights))


def trained(model: Model) -> int:
    """How many first actions may be settled in the chunks of a model."""
    head = model.spec.heads[model.action_stream]
    return head.prefix if isinstance(head, FlowHead) else 0


def check_settled(model: Model, actions: int) -> None:
    """Refuse more settled actions than a model was trained with.

    Raises:
        UserError: they are more.
    """
    if actions > (most := trained(model)):
        raise UserError(
            f"{model.spec.name} was trained with up to {most} settled actions, {actions} are given; "
            f"train with heads.{model.action_stream}.prefix={actions}, give fewer, or let them guide the flow"
        )


def settled(model: Model, actions: Float[Tensor, "B P A"], delays: Sequence[int] | None = None) -> Prefix:
    """The first actions of each row, as many as its delay (by default all), as they are executed before the answer.

    Raises:
        UserError: the model was not trained with as many.
    """
    batch, given, _ = actions.shape
    counts = [given] * batch if delays is None else [min(d, given) for d in delays]
    check_settled(model, max(counts))
    length = model.spec.streams[model.action_stream].length
    return Prefix(_long(actions, length), _rows([[1.0] * n + [0.0] * (length - n) for n in counts], actions))


def led(model: Model, actions: Float[Tensor, "B P A"], how: Realtime, delays: Sequence[int], left: Sequence[int] | None = None) -> Prefix:
    """The actions that are left in each row (by default all), by which the flow is led."""
    batch, given, _ = actions.shape
    length = model.spec.streams[model.action_stream].length
    counts = [given] * batch if left is None else left
    weights = [how.weights(d, n, length) for d, n in zip(delays, counts, strict=True)]
    return Prefix(_long(actions, length), _rows(weights, actions), how)


def strength(time: float, most: float) -> float:
    """The factor of the correction at a flow time: (1 - t) / (t r^2) with r^2 = (1 - t)^2 / (t^2 + (1 - t)^2), at ``most``."""
    left = 1 - time
    return most if time <= 0 or left <= 0 else min(most, (time**2 + left**2) / (time * left))


def guided(velocity: Velocity, flow: str, prefix: Prefix, times: Sequence[float]) -> Velocity:
    """``velocity`` of a ``flow`` led towards a chunk that begins as the ``prefix`` does: v + s J^T (weights (prefix - end)), where ``end``
    is the chunk that a straight path from here leads to and J its derivative by what is noisy now.

    Args:
        times: the flow time of each run.
    """
    how = prefix.guide
    assert how is not None, "a prefix that is settled guides nothing"
    weights = prefix.weights[..., None]

    def lead(x: Mapping[str, Tensor], run: int) -> dict[str, Tensor]:
        left = 1 - times[run]
        if how.jacobian:
            with torch.enable_grad():
                noisy = x[flow].detach().requires_grad_()
                v = velocity({**x, flow: noisy}, run)
                end = noisy + left * v[flow].to(noisy.dtype)
                correction = torch.autograd.grad(end, noisy, ((prefix.actions - end) * weights).detach())[0]
            v = {n: t.detach() for n, t in v.items()}
        else:
            v = velocity(x, run)
            correction = (prefix.actions - x[flow] - left * v[flow].to(x[flow].dtype)) * weights
        return v | {flow: v[flow].to(correction.dtype) + strength(times[run], how.most) * correction}

    return lead


def _long(actions: Tensor, length: int) -> Tensor:
    """Actions (B, P, A) cut, or filled with zeros, to ``length``."""
    return torch.nn.functional.pad(actions[:, :length], (0, 0, 0, max(0, length - actions.shape[1])))


def _rows(weights: list[list[float]], actions: Tensor) -> Tensor:
    return torch.tensor(weights, dtype=torch.float32).to(actions.device, non_blocking=True)
