"""The flight recorder: what it keeps, when it writes, and that asking again gives the same answers."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from triune.data import ActionChunk, Camera, Contract, Observation, Vector, open_dataset
from triune.data.incidents import Recorded, read_incident, runs, write_incident
from triune.data.inspect import inspect
from triune.errors import UserError
from triune.policies import Request
from triune.policies.serve import Serve, Server, Service, Source
from triune.policies.serve.exchange import Exchange, Refusal
from triune.policies.serve.recorder import Recorder, held, recorded
from triune.policies.serve.replay import replay

from .conftest import seen, served

pytestmark = pytest.mark.usefixtures("fakes")
SIZE = 32
SOURCE = Source("fakes:Fake", {"size": SIZE}, 1)


def asking(session: str, seed: int = 0, instruction: str = "lift", **more: Any) -> Request:
    return Request(session, Observation(**seen(seed, instruction, size=SIZE)), **more)


def incidents(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if not f.name.startswith("."))


def drive(folder: Path, words: list[str], **record: Any) -> None:
    """A session ``a`` of seed 7 and one ``b`` of seed 8 ask in turn, with these instructions; then the server stops."""

    async def work(server: Server) -> None:
        await server.service.reset("c0/a", 7)
        await server.service.reset("c1/b", 8)
        for step, word in enumerate(words):
            while not server.service.ready:
                await asyncio.sleep(0.01)
            try:
                await server.service.plan(asking("c0/a", step, word))
                prefix = ActionChunk(np.full((3, 32), 0.1 * step, np.float32), 50.0)
                await server.service.plan(asking("c1/b", 100 + step, prefix=prefix, delay=2))
            except Refusal:
                pass
            while server.operations.recorder is not None and not server.operations.recorder._queue.empty():
                await asyncio.sleep(0.01)

    served(work, size=SIZE)(record={"dir": str(folder), "after": 0.0, **record})


def replayed(folder: Path, tolerance: float = 0.0, source: Source = SOURCE) -> list:
    return asyncio.run(replay(source, read_incident(folder)[1], tolerance))


def test_a_defect_is_recorded_and_asked_again_gives_the_same_bits(tmp_path: Path) -> None:
    drive(tmp_path, ["lift", "lift", "raise", "lift"], gap=60)
    (folder,) = incidents(tmp_path)
    assert folder.name.endswith("-internal")
    head, rows = read_incident(folder)
    assert head["policy"] == {"name": "fake"} and head["contract"]["rate"] == 50.0 and "the policy failed" in head["sentence"]
    assert [(e["event"], e["session"]) for e in head["events"]][:3] == [("started", None), ("reset", "c0/a"), ("reset", "c1/b")]
    refused = [row for row in rows if row.actions is None]
    assert [(row.code, row.step, row.observation.instruction) for row in refused] == [("internal", 2, "raise")]
    for row in rows:
        if row.session == "c0/a":
            expected = seen(row.step, size=SIZE)
            np.testing.assert_array_equal(row.observation.images["wrist"], expected["images"]["wrist"])
            np.testing.assert_array_equal(row.observation.state, expected["state"])
        else:
            assert row.delay == 2 and row.prefix is not None
            np.testing.assert_array_equal(row.prefix, np.full((3, 32), 0.1 * row.step, np.float32))
    found = replayed(folder)
    assert len(found) == len(rows) >= 5 and all(row.passed for row in found)
    assert [row.error for row in found if row.recorded == "answered"] == [0.0] * (len(rows) - 1)
    assert [row.now for row in found if row.recorded != "answered"] == ["internal"]


def test_what_is_kept_is_not_where_the_next_message_is_read() -> None:
    request = asking("a", prefix=ActionChunk(np.zeros((3, 32), np.float32), 50.0))
    row = recorded(Exchange(request, 5, 0, refusal=Refusal("late", "too late")), 1.0)
    assert request.prefix is not None and row.prefix is not None
    pairs = [(row.prefix, request.prefix.actions), (row.observation.state, request.observation.state)]
    pairs += [(row.observation.images[camera], image) for camera, image in request.observation.images.items()]
    assert all(np.array_equal(kept, came) and not np.shares_memory(kept, came) for kept, came in pairs) and len(pairs) == 4


def test_another_policy_differs(tmp_path: Path) -> None:
    drive(tmp_path, ["lift", "raise"])
    (folder,) = incidents(tmp_path)
    found = replayed(folder, tolerance=0.5, source=Source("fakes:Shifted", {"size": SIZE}, 1))
    answered = [row for row in found if row.error is not None]
    assert answered and all(row.error == pytest.approx(1.0, abs=1e-5) and not row.passed for row in answered)
    assert all(row.passed for row in replayed(folder, tolerance=1.001, source=Source("fakes:Shifted", {"size": SIZE}, 1)))


def test_the_request_that_killed_the_policy_is_in_the_record_and_kills_it_again(tmp_path: Path) -> None:
    drive(tmp_path, ["lift", "lift", "die"], gap=60)
    (folder,) = incidents(tmp_path)
    assert folder.name.endswith("-died")
    found = replayed(folder)
    assert [(row.recorded, row.now) for row in found if row.recorded != "answered"] == [("worker", "worker")]
    assert all(row.passed for row in found)


def test_a_record_that_begins_in_the_middle_is_asked_from_there(tmp_path: Path) -> None:
    drive(tmp_path, ["lift"] * 6 + ["raise"], memory_mib=6 * 2 * SIZE * SIZE * 3 / 2**20)  # some five requests fit
    _, rows = read_incident(incidents(tmp_path)[0])
    assert 3 <= len(rows) <= 6 and min(row.step for row in rows) >= 3
    assert all(row.passed and (row.error in (0.0, None)) for row in replayed(incidents(tmp_path)[0]))


def test_late_answers_do_not_shift_the_steps_of_those_that_follow(tmp_path: Path) -> None:
    async def work(server: Server) -> None:
        service = server.service
        await service.reset("a", 7)
        await service.plan(asking("a"))
        with pytest.raises(Refusal, match="no answer within"):
            await service.plan(asking("a", 1, "sleep 0.3"), deadline=0.05)
        await service.plan(asking("a", 2))
        server.operations.record()

    served(work, size=SIZE)(record={"dir": str(tmp_path), "after": 0.0})
    _, rows = read_incident(incidents(tmp_path)[0])
    assert [(row.step, row.code) for row in rows] == [(0, None), (1, "late"), (2, None)]
    assert [row.error for row in replayed(incidents(tmp_path)[0])] == [0.0, None, 0.0]


def test_always_records_everything_in_parts_and_removes_the_oldest(tmp_path: Path) -> None:
    picture = 2 * SIZE * SIZE * 3 / 2**20
    drive(tmp_path / "all", ["lift"] * 8, mode="always", memory_mib=11 * picture)
    parts = incidents(tmp_path / "all")
    rows = [row for part in parts for row in read_incident(part)[1]]
    assert len(parts) >= 3 and sorted((row.session, row.step) for row in rows) == [(s, i) for s in ("c0/a", "c1/b") for i in range(8)]
    size = sum(file.stat().st_size for file in parts[-1].iterdir()) / 2**20
    drive(tmp_path / "few", ["lift"] * 8, mode="always", memory_mib=11 * picture, disk_mib=1.5 * size)
    kept = incidents(tmp_path / "few")
    assert len(kept) == 1 and max(row.step for row in read_incident(kept[0])[1]) == 7


def test_events_of_the_guard_and_the_gap_between_incidents(tmp_path: Path) -> None:
    drive(tmp_path / "gap", ["raise"] * 3, gap=60)
    drive(tmp_path / "none", ["raise"] * 3, gap=0)
    assert len(incidents(tmp_path / "gap")) == 1 and len(incidents(tmp_path / "none")) >= 2


def test_vla_data_opens_an_incident(tmp_path: Path) -> None:
    drive(tmp_path, ["lift", "raise", "lift"], after=0.5)
    (folder,) = incidents(tmp_path)
    dataset, (_, rows) = open_dataset(folder), read_incident(folder)
    answered = [row for row in rows if row.actions is not None]
    assert [(e.meta["session"], e.meta["seed"], e.length) for e in dataset.episodes] == [("c0/a", 7, 2), ("c1/b", 8, 2)]
    ordered = [row for run in runs(answered) for row in run]
    for camera in ("agentview", "wrist"):
        np.testing.assert_array_equal(dataset.frames(camera, range(4)), np.stack([row.observation.images[camera] for row in ordered]))
    np.testing.assert_array_equal(dataset.vectors["action"], np.stack([row.actions[0] for row in ordered if row.actions is not None]))
    found = inspect(dataset)
    assert (found["frames"], found["fps"], found["action"]) == (4, None, "action")


def test_nothing_answered_and_no_incident_are_said_in_a_sentence(tmp_path: Path) -> None:
    drive(tmp_path / "rec", ["raise"])
    with pytest.raises(UserError, match=r"was answered; `vla replay"):
        open_dataset(incidents(tmp_path / "rec")[0])
    with pytest.raises(UserError, match="is no incident"):
        read_incident(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make its folder"):
        Recorder(Serve(record={"dir": str(tmp_path / "file" / "x")}).record, Service(SOURCE), "fake")


@pytest.mark.parametrize("damage", ["cut", "garbage", "column"])
def test_damage_is_said_in_a_sentence(tmp_path: Path, damage: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "i"
    write_incident(folder, {"contract": CONTRACT.model_dump(mode="json")}, [row(0)])
    file = folder / "answered.parquet"
    if damage == "column":
        pq.write_table(pa.table({"time": [1.0]}), file)
    else:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"PAR1" + os.urandom(len(data)) + b"PAR1")
    with pytest.raises(UserError, match="copy the folder again"):
        read_incident(folder)


CONTRACT = Contract(cameras=(Camera(name="c"),), state=Vector(names=("s",)), action=Vector(names=("a",)))


def row(step: int, **more: Any) -> Recorded:
    image = np.random.default_rng(step).integers(0, 256, (8, 8, 3), np.uint8)
    observation = Observation({"c": image}, np.array([step], np.float32), "x", float(step))
    return Recorded(100.0 + step, "s", 1, step, observation, **({"actions": np.full((2, 1), step, np.float32)} | more))


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    odd = np.array([[np.nan], [np.inf], [1e-38]], np.float32)
    rows = [row(0, actions=odd), row(1, prefix=np.zeros((0, 1), np.float32)), row(2, actions=None, code="late", message="…", samples=2)]
    write_incident(tmp_path / "i", {"contract": CONTRACT.model_dump(mode="json"), "reason": "x"}, rows)
    head, back = read_incident(tmp_path / "i")
    assert head["reason"] == "x" and [b.code for b in back] == [None, None, "late"] and back[2].samples == 2
    assert back[0].actions.tobytes() == odd.tobytes() and back[1].prefix is None and back[2].actions is None
    for before, after in zip(rows, back, strict=True):
        np.testing.assert_array_equal(before.observation.images["c"], after.observation.images["c"])


def test_a_view_keeps_the_frame_that_it_came_in() -> None:
    frame = bytes(1000)
    views = [np.frombuffer(frame, np.uint8, 100, offset).reshape(10, 10) for offset in (0, 100)]
    assert held(views) == 1000 and held([np.zeros(5, np.float32)]) == 20 and held([np.zeros((4, 4), np.uint8)[:2]]) == 16


def test_the_server_answers_while_an_incident_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triune.policies.serve import recorder

    writing, go = threading.Event(), threading.Event()
    real = write_incident

    def slow(*arguments: Any) -> int:
        writing.set()
        go.wait(20)
        return real(*arguments)

    monkeypatch.setattr(recorder, "write_incident", slow)

    async def work(server: Server) -> None:
        own = server.operations.recorder
        assert own is not None
        await server.service.reset("a", 7)
        for step in range(5):  # the first is being written, two wait, two are dropped
            server.operations.record()
            await asyncio.sleep(0.05)
            assert (await asyncio.wait_for(server.service.plan(asking("a", step)), 5)).actions.shape == (50, 32)
        assert writing.is_set() and own.counts["dropped"] == 2
        go.set()

    served(work, size=SIZE)(record={"dir": str(tmp_path), "after": 0.0})
    assert len(incidents(tmp_path)) == 3


def test_a_kill_while_writing_leaves_no_half_incident(tmp_path: Path) -> None:
    program = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom triune.data import Observation\n"
        "from triune.data.incidents import Recorded, write_incident\n"
        "image = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)\n"
        "rows = [Recorded(float(i), 's', 1, i, Observation({'c': image}, np.zeros(2), 'x'), actions=np.zeros((2, 2), np.float32))"
        " for i in range(300)]\nprint('ready', flush=True)\n"
        "while True:\n    write_incident(Path(sys.argv[1]) / 'i', {}, rows)\n    print('written', flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, env=environment)
    assert child.stdout is not None
    child.stdout.readline()
    time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    rest = child.stdout.read()
    child.wait()
    child.stdout.close()
    assert (tmp_path / "i").exists() or b"written" not in rest
    if (tmp_path / "i").exists():
        assert len(read_incident(tmp_path / "i")[1]) == 300


def test_a_policy_that_cannot_begin_in_the_middle_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has a gap before its request 3"):
        asyncio.run(replay(Source("fakes:Forward", {"size": SIZE}, 1), [row(3)]))
