"""What is served is what was trained: a real checkpoint through the server acts as in this process, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
from triune_client import ActionLimits, Client

from triune.data import ActionChunk, Observation
from triune.policies import Request, TriunePolicy, load_policy
from triune.policies.checkpoint import read_checkpoint, verify
from triune.policies.remote import RemotePolicy
from triune.policies.serve import Serve, Source
from triune.policies.serve.local import serving


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> TriunePolicy:
    return load_policy(str(checkpoint))


def requests(policy: TriunePolicy, step: int) -> list[Request]:
    """Three sessions with prompts of two lengths; the last two go on from what is left of a chunk."""
    out = []
    for i, words in enumerate(("lift the cube", "lift the red cube", "lift the red cube")):
        rng = np.random.default_rng([step, i])
        images = {c.name: rng.integers(0, 256, (c.height, c.width, 3), np.uint8) for c in policy.contract.cameras}
        left = ActionChunk(rng.standard_normal((4, policy.contract.action.size)), 20.0) if i and step else None
        seen = Observation(images, rng.standard_normal(policy.contract.state.size), words, step / 20)
        out.append(Request(f"s{i}", seen, left, delay=2 * (left is not None), samples=1 + (i == 2)))
    return out


def test_actions_are_those_of_this_process(checkpoint: Path, policy: TriunePolicy) -> None:
    source = Source("triune.policies:load_policy", {"path": str(checkpoint)}, batch=3)
    with serving(source, "tiny", Serve(port=0, limits=False)) as server, Client(server.url) as client:
        remote = RemotePolicy(client)
        assert remote.contract == policy.contract and remote.realtime == policy.realtime and remote.limits is None
        for each in (policy, remote):
            for i in range(3):
                each.reset(f"s{i}", seed=i)
        for step in range(3):
            for here, there in zip(policy.plan(requests(policy, step)), remote.plan(requests(policy, step)), strict=True):
                np.testing.assert_array_equal(there.chunk.actions, here.chunk.actions)
                assert (there.chunk.rate, there.chunk.time, len(there.samples)) == (here.chunk.rate, here.chunk.time, len(here.samples))
                for ours, theirs in zip(here.samples, there.samples, strict=True):
                    np.testing.assert_array_equal(theirs.actions, ours.actions)
        for each in (policy, remote):
            for i in range(3):
                each.close(f"s{i}")
        assert not server.service.sessions
        rows = verify(read_checkpoint(str(checkpoint)), remote)
        assert len(rows) >= 4 and all(row.passed for row in rows)


def test_limits_of_the_training_data_are_kept_unless_told_otherwise(checkpoint: Path, policy: TriunePolicy) -> None:
    source = Source("triune.policies:load_policy", {"path": str(checkpoint)}, batch=1)
    with serving(source, "tiny") as server, Client(server.url) as client:
        assert client.welcome.limits == ActionLimits.from_dict(policy.limits).to_dict()
        limits = client.welcome.limits["dimensions"]
        low, high = (np.array([row[end] for row in limits]) for end in ("min", "max"))
        client.reset()
        plan = client.infer({**vars(requests(policy, 0)[0].observation)})
        assert (plan.actions >= low.astype(np.float32)).all() and (plan.actions <= high.astype(np.float32)).all()
