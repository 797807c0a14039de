"""The policy's own process, so that the server answers while it thinks, and outlives it.

python -m triune.policies.serve.worker '{"policy": "triune.policies:open_policy", "arguments": {"path": "runs/mine"}, ...}'
"""

import contextlib
import importlib
import json
import logging
import signal
import socket
import sys
import time
from typing import Any

import numpy as np

from ...data import ActionChunk, Observation
from ...errors import UserError
from ..base import Plan, Policy, Request
from .channel import Arena, Coder, receive
from .logs import set_up_as_told

logger = logging.getLogger(__name__)


def main() -> None:
    """Load the policy, warm it, then answer turn after turn until the other side has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal goes to all; the server ends this one when it has drained
    settings = json.loads(sys.argv[1])
    set_up_as_told()
    sock = socket.socket(fileno=settings["socket"])
    coder = Coder(Arena(settings["answers"], settings["size"]), Arena(settings["requests"], settings["size"]), in_place=True)
    if settings["spare"] and not wait(sock, coder):
        return
    try:
        policy = make(settings["policy"], settings["arguments"])
        policy.warm(settings["batch"])
    except UserError as error:
        sock.sendall(coder.encode({"refused": str(error)}))
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server stopped without waiting for the answer
        sock.sendall(coder.encode({"ready": introduction(policy), "modules": list(sys.modules)}))
        while (body := receive(sock)) is not None:
            sock.sendall(coder.encode(turn(policy, coder.decode(body))))


def wait(sock: socket.socket, coder: Coder) -> bool:
    """Import what the policy before this one had imported, then wait until it is needed; False where the server stopped before."""
    wanted = receive(sock)
    if wanted is None:
        return False
    for name in coder.decode(wanted)["modules"]:
        if name not in sys.modules:
            with contextlib.suppress(ImportError):  # made by another module, which has it when it needs it
                importlib.import_module(name)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(coder.encode({"prepared": True}))
    return receive(sock) is not None


def make(name: str, arguments: dict[str, Any]) -> Policy:
    """The policy that the function ``name`` (``module:function``) makes of ``arguments``."""
    module, _, function = name.partition(":")
    made = getattr(importlib.import_module(module), function)(**arguments)
    assert isinstance(made, Policy), f"{name} made {type(made).__name__}, not a Policy"
    return made


def introduction(policy: Policy) -> dict[str, Any]:
    """What the server must know of its policy."""
    said = {"limits": policy.limits, "realtime": policy.realtime, "bands": policy.bands, "skips": type(policy).skip is not Policy.skip}
    return {"contract": policy.contract.model_dump(mode="json")} | said


def turn(policy: Policy, commands: dict[str, Any]) -> dict[str, Any]:
    """Carry out the commands of a turn: sessions that end, sessions that begin, plans."""
    for session in commands["close"]:
        policy.close(session)
    for session, seed, step in commands["reset"]:
        policy.reset(session, seed)
        if step:
            policy.skip(session, step)
    return {"answers": answers(policy, commands["plan"])}


def answers(policy: Policy, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A plan or a refusal for each request. Where a batch fails each is asked alone, so that only the faulty ones are refused."""
    if not asked:
        return []
    try:
        requests = [request(tree) for tree in asked]
        return [answer(plan, bool(tree["foresight"])) for plan, tree in zip(policy.plan(requests), asked, strict=True)]
    except Exception as error:
        if len(asked) > 1:
            return [single for tree in asked for single in answers(policy, [tree])]
        if isinstance(error, UserError):
            return [{"code": "bad_request", "message": str(error)}]
        logger.exception("the policy failed on session %r", asked[0]["session"])
        return [{"code": "internal", "message": "the policy failed on this request; the server's log says where"}]


def request(tree: dict[str, Any]) -> Request:
    """A request as the policy takes it, of what the server sent."""
    observation = Observation.trusted(**tree["observation"])
    prefix = None if tree["prefix"] is None else ActionChunk(**tree["prefix"])
    return Request(tree["session"], observation, prefix, tree["delay"], tree["samples"])


def answer(plan: Plan, foresight: bool) -> dict[str, Any]:
    """A plan as it is sent to the server; what is foreseen is drawn only where it was asked for."""
    began = time.perf_counter()
    drawn: dict[str, np.ndarray] = plan.foresight() if foresight and plan.foresight is not None else {}
    timing = plan.timing | ({"foresight": 1e3 * (time.perf_counter() - began)} if drawn else {})
    chunk = {"actions": plan.chunk.actions, "rate": plan.chunk.rate, "time": plan.chunk.time}
    samples = np.stack([sample.actions for sample in plan.samples]) if plan.samples else None
    return {"chunk": chunk, "samples": samples, "timing": timing, "value": plan.value, "foresight": drawn}


if __name__ == "__main__":
    main()
