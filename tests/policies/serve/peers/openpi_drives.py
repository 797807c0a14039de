"""openpi's own client against a server, run by the interpreter of the peers: python openpi_drives.py URL; prints what it saw as JSON."""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def seen(step: int) -> dict:
    """As LIBERO's client of openpi sends it."""
    rng = np.random.default_rng(step)
    return {
        "observation/agentview": rng.integers(0, 255, (32, 32, 3), np.uint8),
        "observation/wrist_image": rng.integers(0, 255, (32, 32, 3), np.uint8),
        "observation/state": rng.standard_normal(8),
        "prompt": "lift",
    }


def main() -> None:
    policy = WebsocketClientPolicy(sys.argv[1])
    answers = [policy.infer(seen(step)) for step in range(2)]
    try:
        policy.infer({"prompt": "lift"})
        error = ""
    except RuntimeError as caught:
        error = str(caught)
    broker = ActionChunkBroker(policy, action_horizon=25)
    steps = [broker.infer(seen(2 if step < 25 else 3))["actions"] for step in range(26)]
    found = {
        "metadata": policy.get_server_metadata(),
        "actions": [answer["actions"].tolist() for answer in answers],
        "timing": [sorted(answer["server_timing"]) + sorted(answer["policy_timing"]) for answer in answers],
        "error": error,
        "steps": [steps[0].tolist(), steps[24].tolist(), steps[25].tolist()],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
