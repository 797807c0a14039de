"""Recording LeRobotDataset v3.0 folders through lerobot, so that nothing is lost when the recorder is killed.

lerobot's own recorder keeps one parquet file open until ``finalize()``; killed before, all of it is unreadable. Here
each episode is finished in a staging folder and published by renaming whole files: frames first, ``meta/info.json``
last. Readers, ours and lerobot's, take from ``info.json`` how many episodes there are, so at every moment they see
exactly the published ones. The last parquet file of the folder is replaced by a longer one until it holds
4 MB, so that a dataset does not become thousands of small files.

Beside lerobot's files lie ``meta/triune.json`` (the contract) and ``meta/triune_episodes.jsonl`` (facts per episode).
"""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UserError
from .contract import Contract
from .encode import History, Job, encode_images, encode_videos
from .features import episode_features, refuse_headless
from .files import append_json, lock, plain, publish, room, vacant, write_file, write_json_lines
from .readers.metadata import CONTRACT_FILE, EPISODES_FILE, read_contract, read_episode_rows, read_facts, read_info
from .tail import Tail
from .types import Episode

Statistics = dict[str, dict[str, np.ndarray]]
"""Feature -> min, max, mean, std, count, quantiles."""
STAGING = ".staging"
SMALLEST_VIDEO = 64
"""The AV1 encoder ends the whole process with a floating point exception at 16 pixels."""


class DatasetWriter:
    """Appends episodes to a dataset; a new folder is begun, an existing one continued.

    Args:
        path: the dataset folder.
        contract: conventions of the episodes to come.
        fps: control rate in Hz, a whole number (lerobot stores no other).
        video: keep images as AV1 video instead of PNG. Smaller for large images; not bit for bit.
        robot: name of the robot type that is written into ``info.json``.

    Raises:
        UserError: the folder is something else, or a dataset of other features, rate or contract.
    """

    def __init__(self, path: str | Path, contract: Contract, fps: float, *, video: bool = False, robot: str | None = None) -> None:
        check_lerobot()
        self.path = Path(path)
        self.contract = contract
        self.fps = int(fps)
        self.video = video
        self.robot = robot
        self._stage = self.path / STAGING
        self._data = Tail(self.path / "data")
        self._episodes = Tail(self.path / "meta" / "episodes")
        self._history: History | None = None
        self._count = 0
        if self.fps != fps:
            raise UserError(f"a LeRobotDataset has a whole number of frames per second, not {fps}; record at another control rate")
        begun = (self.path / CONTRACT_FILE).is_file() or (self.path / "meta" / "info.json").is_file()
        if not begun and not vacant(self.path):
            raise UserError(f"{self.path} exists and is not a dataset; choose another folder, or remove it")
        refuse_headless(self.path)
        with room(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = lock(self.path)
            try:
                if (self.path / "meta" / "info.json").is_file():
                    self._resume()
                else:  # also where a recorder died in its first episode
                    for name in ("data", "videos", "meta"):
                        shutil.rmtree(self.path / name, ignore_errors=True)
                write_file(self.path / CONTRACT_FILE, json.dumps({"version": 1, "contract": contract.model_dump(mode="json")}, indent=1))
            except BaseException:
                self.close()
                raise

    def __len__(self) -> int:
        """Episodes that are published: readable whatever happens now."""
        return self._count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the staging folder and let others write. All episodes were on the disk when ``add`` returned."""
        shutil.rmtree(self._stage, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def add(self, episode: Episode) -> int:
        """Publish one episode; when this returns it is on the disk and readable.

        Returns:
            its index.

        Raises:
            UserError: its cameras or sizes are not those of the contract, or of the episodes before; or the disk is full, which, as
                any error in the middle of writing, closes this writer: the next one cuts off what was begun.
        """
        if self._lock is None:
            raise ValueError(f"the writer of {self.path} is closed")
        smallest = min((min(images.shape[1:3]) for images in episode.images.values()), default=SMALLEST_VIDEO)
        wrong = []
        if self.video and smallest < SMALLEST_VIDEO:
            wrong.append(f"AV1 video needs at least {SMALLEST_VIDEO} pixels each way and its images have {smallest}")
        before = self._history.info.features if self._history else None
        features = episode_features(episode, self.path, self.contract, self.video, before, wrong)
        try:
            with room(self.path):
                return self._append(episode, features)
        except BaseException:
            self.close()
            raise

    def _append(self, episode: Episode, features: dict[str, Any]) -> int:
        shutil.rmtree(self._stage, ignore_errors=True)
        history = self._history or History()
        for tail in (self._data, self._episodes):
            tail.make_room(history.chunk_size)
        job = Job(self.path, self._stage, self._count, self.fps, self.robot, features, history, self._data, self._episodes)
        meta, frames = (encode_videos if self.video else encode_images)(episode, job)

        self._data.add(frames)
        for video in sorted((self._stage / "videos").rglob("*.mp4")):
            publish(video, self.path / video.relative_to(self._stage))
        row = pq.read_table(self._stage / self._episodes.path.relative_to(self.path))
        self._episodes.add(row)
        if (self._stage / "meta" / "tasks.parquet").is_file():
            publish(self._stage / "meta" / "tasks.parquet", self.path / "meta" / "tasks.parquet")
        statistics = _joined(history.stats, [row])
        (self._stage / "meta" / "stats.json").write_text(_as_json(statistics))
        publish(self._stage / "meta" / "stats.json", self.path / "meta" / "stats.json")
        append_json(self.path / EPISODES_FILE, {"episode_index": self._count, **episode.meta})
        publish(self._stage / "meta" / "info.json", self.path / "meta" / "info.json")  # from here on it exists

        self._history = History(meta.info, meta.tasks, statistics, _without_statistics(row))
        self._count += 1
        return self._count - 1

    def _resume(self) -> None:
        """Take up a dataset where its last published episode ends."""
        from lerobot.datasets.io_utils import load_info, load_stats, load_tasks

        info = read_info(self.path)
        stored = read_contract(self.path)
        if int(info["fps"]) != self.fps:
            raise UserError(f"{self.path} was recorded at {info['fps']} frames per second, not {self.fps}; record into another folder")
        if stored is not None:
            self.contract.require(stored, "the recording", str(self.path))
            stored.require(self.contract, str(self.path), "the recording")
        self._count = int(info["total_episodes"])
        last = [row for row in read_episode_rows(self.path) if row["episode_index"] == self._count - 1][-1]
        statistics = load_stats(self.path)
        if statistics is None or int(statistics["action"]["count"][0]) != int(
            info["total_frames"]
        ):  # of an episode that is not counted, too
            rows = (pq.read_table(file) for file in sorted((self.path / "meta" / "episodes").glob("*/*.parquet")))
            statistics = _joined(None, (part for table in rows for part in _split(table, self._count)))
            write_file(self.path / "meta" / "stats.json", _as_json(statistics))
        for tail, name in ((self._data, "data"), (self._episodes, "meta/episodes")):
            tail.chunk, tail.file = last[f"{name}/chunk_index"], last[f"{name}/file_index"]
            tail.load(self._count)
        self._history = History(load_info(self.path), load_tasks(self.path), statistics, last)
        facts = read_facts(self.path)
        write_json_lines(self.path / EPISODES_FILE, ({"episode_index": i, **facts[i]} for i in sorted(facts) if i < self._count))


def check_lerobot() -> None:
    """
    Raises:
        UserError: lerobot is not installed.
    """
    if importlib.util.find_spec("lerobot") is None:
        raise UserError("recording needs lerobot, which is not installed; run `pip install 'triune-vla[lerobot]'` (Python 3.12)")


def _joined(before: Statistics | None, rows: Iterable[pa.Table]) -> Statistics | None:
    """lerobot's statistics of the episodes ``before`` and of those in ``rows`` (one each), one after the other.

    Always from what is on the disk: lerobot's own numbers in memory are partly of single precision, so that a recording that was killed
    and continued had others in ``stats.json``.
    """
    from lerobot.datasets.compute_stats import aggregate_stats

    for row in rows:
        here: Statistics = {}
        for name, value in row.select([name for name in row.column_names if name.startswith("stats/")]).to_pylist()[0].items():
            here.setdefault(name.split("/")[1], {})[name.split("/")[2]] = np.array(value)
        before = here if before is None else aggregate_stats([before, here])
    return before


def _as_json(statistics: Statistics | None) -> str:
    """In order: lerobot's own changes from process to process."""
    return json.dumps(plain(statistics), indent=4, sort_keys=True)


def _split(table: pa.Table, episodes: int) -> Iterator[pa.Table]:
    """The rows of the first so many episodes, each as a table."""
    for number, index in enumerate(table.column("episode_index").to_pylist()):
        if index < episodes:
            yield table.slice(number, 1)


def _without_statistics(row: pa.Table) -> dict[str, Any]:
    plain: dict[str, Any] = row.select([name for name in row.column_names if not name.startswith("stats/")]).to_pylist()[0]
    return plain
