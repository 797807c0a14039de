"""A policy on another computer behind our contract: any action server of Triune, by its address."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..config import parse
from ..data import ActionChunk, Contract, Observation
from ..errors import UserError
from .base import Plan, Policy, Request

if TYPE_CHECKING:
    from triune_client import Client

MENDABLE = ("bad_request", "contract", "unauthorized")
"""Refusals that asking again does not change. Others (a worker that died, a server too busy) end what was asked and nothing more."""


def is_remote(policy: str) -> bool:
    """Whether ``policy`` is the address of a server and not a folder."""
    return policy.startswith(("ws://", "wss://"))


def open_remote(url: str, token: str | None = None, ca: str | None = None, foresight: bool = False, **options: Any) -> "RemotePolicy":
    """The policy that the server at ``url`` serves.

    Args:
        url: ``ws://host:port`` or ``wss://host:port``.
        token: what the server asks for; the environment variable ``TRIUNE_TOKEN`` unless given.
        ca: file of certificates to trust; ``TRIUNE_CA`` unless given.
        foresight: see ``RemotePolicy``.
        options: further ones of ``triune_client.Client``.

    Raises:
        UserError: triune_client is not installed, nobody answers, or the server refuses.
    """
    try:
        from triune_client import Client
    except ImportError as error:
        raise UserError(f"{url} needs the client of action servers, which is not here ({error}): pip install triune-client") from None
    token, ca = token or os.environ.get("TRIUNE_TOKEN"), ca or os.environ.get("TRIUNE_CA")
    with _told(url):
        try:
            return RemotePolicy(Client(url, token=token, ca=ca, **options), foresight)
        except ValueError as error:
            raise UserError(f"{error}") from None


class RemotePolicy(Policy):
    """The server's policy: requests of one call are sent together, and the server batches them as it can.

    Args:
        client: a connection; ``close`` ends it.
        foresight: ask for the frames that the policy expects with every plan. In a process of ours they are drawn when they are looked at;
            a server draws and sends them or not.
    """

    def __init__(self, client: "Client", foresight: bool = False) -> None:
        self.client, self.foresight = client, foresight
        self.contract = parse(Contract, client.welcome.contract, f"the contract of {client.url}")

    @property
    def limits(self) -> dict[str, Any] | None:
        return self.client.welcome.limits

    @property
    def realtime(self) -> dict[str, int | bool]:
        return {"prefix": self.client.welcome.prefix, "guided": self.client.welcome.guided}

    def reset(self, session: str, seed: int) -> None:
        """See ``Policy``; a lost connection is made again here.

        Raises:
            UserError: the server cannot be reached, or refuses.
        """
        with _told(self.client.url):
            self.client.reset(session, seed)

    def plan(self, requests: list[Request]) -> list[Plan]:
        """See ``Policy``.

        Raises:
            UserError: the connection is lost, no answer comes, or the server refuses what asking again does not change.
            ServerError: the server could not answer this time.
        """
        with _told(self.client.url):
            asked = [
                self.client.ask(
                    _words(request.observation),
                    request.session,
                    prefix=None if request.prefix is None else request.prefix.actions,
                    delay=request.delay,
                    foresight=self.foresight,
                    samples=request.samples,
                )
                for request in requests
            ]
            answers = [one.wait() for one in asked]
        plans = []
        for answer in answers:
            seen = answer.foresight
            drawn = None if seen is None else (lambda frames=seen: dict(frames))
            timing = {**answer.timing, "round_trip": 1e3 * answer.round_trip}
            chunk, several = ActionChunk(answer.actions, answer.rate, answer.time), () if answer.samples is None else answer.samples
            samples = tuple(ActionChunk(actions, answer.rate, answer.time) for actions in several)
            plans.append(Plan(chunk, drawn, answer.value, timing, samples))
        return plans

    def close(self, session: str) -> None:
        if self.client.connected:
            with _told(self.client.url):
                self.client.end(session)

    def disconnect(self) -> None:
        """End the connection."""
        self.client.close()


def _words(observation: Observation) -> dict[str, Any]:
    """An observation as the protocol has it; what is not known is not sent."""
    words = {
        "images": dict(observation.images),
        "state": observation.state,
        "instruction": observation.instruction,
        "timestamp": float(observation.timestamp),
        "embodiment": observation.embodiment,
        "subtask": observation.subtask,
    }
    return {name: value for name, value in words.items() if value is not None}


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Errors of the connection as a user's."""
    from triune_client import ServerError

    try:
        yield
    except ServerError as error:
        if error.code not in MENDABLE:
            raise
        raise UserError(f"{url} refuses: {error.message}") from None
    except (ConnectionError, TimeoutError) as error:
        raise UserError(str(error)) from None
