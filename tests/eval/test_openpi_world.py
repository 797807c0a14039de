"""openpi's own client, unmodified, drives the two-cube world: it runs in the peers' interpreter, the simulator in this one."""

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import triune
from triune.data import Contract
from triune.eval.bodies import WorldBody
from triune.policies.serve import Serve, Source
from triune.policies.serve.local import serving

HERE = Path(__file__).parent
PEERS = Path(triune.__file__).parent / ".venv-peers" / "bin" / "python"


@contextmanager
def robot(url: str, horizon: int) -> "Iterator[subprocess.Popen[str]]":
    assert PEERS.exists(), "openpi's own client is not here: make venv builds .venv-peers"
    command = [str(PEERS), str(HERE / "openpi_robot.py"), url, str(horizon)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.terminate()


def drive(body: WorldBody, process: "subprocess.Popen[str]", seed: int, steps: int) -> list[np.ndarray]:
    """One episode of at most ``steps``; the actions."""
    assert process.stdin is not None and process.stdout is not None
    body.begin(seed)
    print("{}", file=process.stdin, flush=True)
    sent: list[np.ndarray] = []
    while not body.over and len(sent) < steps:
        seen = body.look()
        images = {name: base64.b64encode(image.tobytes()).decode() for name, image in seen.images.items()}
        said = {"images": images, "shapes": {name: image.shape for name, image in seen.images.items()}}
        print(json.dumps(said | {"state": seen.state.tolist(), "instruction": seen.instruction}), file=process.stdin, flush=True)
        sent.append(np.array(json.loads(process.stdout.readline())))
        body.act(sent[-1])
    return sent


def test_openpis_client_drives_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
    source = Source("served:world", {"name": "cubes/lift-red"})
    with serving(source, "waves", Serve(port=0, limits=False)) as server, robot(server.url, 10) as process:
        body = WorldBody("cubes/lift-red", server.service.contract)
        try:
            sent = np.stack(drive(body, process, 7, 25))
        finally:
            body.close()
    rate = body.rate
    wave = 0.2 * np.sin((np.arange(25) % 10)[:, None] / rate + np.arange(sent.shape[1]))  # openpi tells no time: each chunk begins at 0
    np.testing.assert_allclose(sent, wave, atol=1e-6)


if __name__ == "__main__":  # python tests/eval/test_openpi_world.py URL EPISODES: a served policy in the world, by openpi's client
    from triune_client import Client

    with Client(sys.argv[1]) as client, robot(sys.argv[1], client.welcome.executed) as process:
        body = WorldBody("cubes/lift-red", Contract.model_validate(client.welcome.contract))
        done = []
        for seed in range(1_000_000, 1_000_000 + int(sys.argv[2])):
            drive(body, process, seed, body.world.max_steps)
            done.append(body.success)
            print(f"seed {seed}: {'success' if body.success else 'failure'}", flush=True)
        print(f"{sum(done)} of {len(done)}")
