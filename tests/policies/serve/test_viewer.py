"""What the viewer streams, read back by rerun's own reader."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("rerun")

import rerun as rr

from triune.data import Observation
from triune.errors import UserError
from triune.policies import Request
from triune.policies.serve import Serve, Server, Service, Source
from triune.policies.serve.exchange import Refusal
from triune.policies.serve.viewer import Viewer

from .conftest import seen, served
from .fakes import expected

pytestmark = pytest.mark.usefixtures("fakes")


def column(recording: Any, path: str, component: str) -> tuple[list[float], list[Any]]:
    """Times in seconds and values of one component, where it was logged."""
    rows = recording.view(index="time", contents=path).select().read_all().to_pydict()
    values = rows[f"{path}:{component}"]
    kept = [i for i, value in enumerate(values) if value is not None]
    return [rows["time"][i].total_seconds() for i in kept], [values[i] for i in kept]


def test_cameras_foresight_actions_limits_and_timing_are_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "x.rrd"
    steps = 4
    observations = [seen(step, size=32) | {"timestamp": 0.5 * step} for step in range(steps)]

    async def work(server: Server) -> None:
        await server.service.reset("c0/a b", 5)
        for observation in observations:
            reply = await server.service.plan(Request("c0/a b", Observation(**observation)))
            assert not reply.foresight
        await server.service.reset("c1/b", 6)
        for observation, delay in zip(observations, (0, 2), strict=False):
            await server.service.plan(Request("c1/b", Observation(**observation), delay=delay))
        with pytest.raises(Refusal):
            await server.service.plan(Request("c0/a b", Observation(**(seen(9, "raise", size=32) | {"timestamp": 2.0}))))

    served(work, size=32)(rerun={"save": str(file), "foresight_every": 2}, metrics={"foresight_every": 0})
    recording = rr.dataframe.load_recording(file)
    assert recording.application_id() == "triune fake"
    root = r"/c0/a\ b"
    times, pictures = column(recording, f"{root}/camera/wrist", "Image:buffer")
    assert times[:steps] == [0.0, 0.5, 1.0, 1.5] and len(pictures) == steps + 1
    np.testing.assert_array_equal(np.array(pictures[1][0], np.uint8), observations[1]["images"]["wrist"].reshape(-1))
    times, pictures = column(recording, f"{root}/foresight/wrist", "Image:buffer")
    assert times == [0.0, 1.0]
    np.testing.assert_array_equal(np.array(pictures[1][0], np.uint8), 255 - observations[2]["images"]["wrist"].reshape(-1))
    chunks = [expected(5, step, o["state"], o["images"])[:25, 3] for step, o in enumerate(observations)]
    times, curve = column(recording, f"{root}/action/a3", "Scalars:scalars")
    np.testing.assert_allclose([value[0] for value in curve], np.concatenate(chunks), rtol=1e-6)
    np.testing.assert_allclose(times, np.arange(25 * steps) / 50, atol=1e-6)
    chunks = [expected(6, step, o["state"], o["images"])[:, 3] for step, o in enumerate(observations[:2])]
    times, curve = column(recording, "/c1/b/action/a3", "Scalars:scalars")  # the second plan took over 2 steps after it was asked for
    np.testing.assert_allclose([value[0] for value in curve], np.concatenate([chunks[0][:27], chunks[1][2:27]]), rtol=1e-6)
    np.testing.assert_allclose(times, np.arange(52) / 50, atol=1e-6)
    assert {tuple(v) for v in column(recording, f"{root}/action/a3/band", "Scalars:scalars")[1]} == {(-2.0, 2.0)}
    assert len(column(recording, f"{root}/timing/model", "Scalars:scalars")[1]) == steps
    said = [v[0] for v in column(recording, f"{root}/log", "TextLog:text")[1]]
    assert any(word.startswith("internal: the policy failed") for word in said) and "reset" in said


def test_a_viewer_that_cannot_be_shown_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    service = Service(Source("fakes:Fake"))
    with pytest.raises(UserError, match="no screen here"):
        Viewer(Serve(rerun={"spawn": True}).rerun, service, "fake")
    with pytest.raises(UserError, match="cannot write"):
        Viewer(Serve(rerun={"save": str(tmp_path / "no" / "x.rrd")}).rerun, service, "fake")
    with pytest.raises(ValueError, match="one of spawn, connect and save"):
        Serve(rerun={"spawn": True, "save": "x.rrd"})
