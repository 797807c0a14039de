"""A robot's program with openpi's own client, run by the interpreter of the peers: python openpi_robot.py URL HORIZON.

Its cameras and arm are at the other end of two pipes: lines of standard input are observations, lines of standard output actions.
"""

import base64
import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def main() -> None:
    policy = ActionChunkBroker(WebsocketClientPolicy(sys.argv[1]), action_horizon=int(sys.argv[2]))
    for line in sys.stdin:
        seen = json.loads(line)
        if not seen:
            policy.reset()
            continue
        shapes, images = seen["shapes"], {name: base64.b64decode(data) for name, data in seen["images"].items()}
        observation = {f"observation/{name}": np.frombuffer(data, np.uint8).reshape(shapes[name]) for name, data in images.items()}
        observation |= {"observation/state": np.array(seen["state"], np.float32), "prompt": seen["instruction"]}
        print(json.dumps(policy.infer(observation)["actions"].tolist()), flush=True)


if __name__ == "__main__":
    main()
