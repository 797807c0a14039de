"""Small episodes, and datasets of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from triune.data import Camera, Contract, Episode, Vector
from triune.data.encode import png
from triune.data.writer import DatasetWriter
from triune.data.writer_v21 import encode_video

SIZE = 16
CONTRACT = Contract(
    cameras=(Camera(name="agentview", height=SIZE, width=SIZE), Camera(name="wrist", height=SIZE, width=SIZE)),
    state=Vector(names=("x", "y", "z"), units=("m", "m", "m"), frame="base"),
    action=Vector(names=("dx", "dy", "gripper"), mode="relative", gripper="+1 closes"),
    rate=20.0,
    render="fast",
)
MakeEpisode = Callable[..., Episode]
MakeDataset = Callable[..., Path]


def _episode(index: int, length: int | None = None) -> Episode:
    generator = np.random.default_rng(index)
    count = length or 5 + index % 4
    return Episode(
        images={name: generator.integers(0, 256, (count, SIZE, SIZE, 3), np.uint8) for name in CONTRACT.camera_names},
        state=generator.normal(size=(count, 3)).astype(np.float32),
        action=generator.normal(size=(count, 3)).astype(np.float32),
        task=("lift the red cube", "stack the red cube")[index % 2],
        meta={"world": "cubes/lift-red", "seed": index, "success": True, "cameras": {"wrist": {"intrinsics": np.eye(3)}}},
        extra={"action.expert": generator.normal(size=(count, 3)).astype(np.float32)},
    )


@pytest.fixture
def contract() -> Contract:
    return CONTRACT


@pytest.fixture
def make_episode() -> MakeEpisode:
    """``make_episode(index, length=None)``: random, the same for the same arguments."""
    return _episode


@pytest.fixture
def make_dataset(tmp_path: Path) -> MakeDataset:
    """``make_dataset(count)``: the folder of a dataset of episodes 0, 1, ..."""

    def make(count: int, name: str = "dataset") -> Path:
        with DatasetWriter(tmp_path / name, CONTRACT, 20) as writer:
            for index in range(count):
                writer.add(_episode(index))
        return tmp_path / name

    return make


@pytest.fixture
def make_v2(tmp_path: Path) -> Callable[..., Path]:
    """``make_v2(count, version="v2.1", video=False, **info)``: a folder as lerobot 0.2 and 0.3 wrote it, by hand."""

    def make(count: int, version: str = "v2.1", video: bool = False, **info: object) -> Path:
        folder = tmp_path / f"{version}{'-video' if video else ''}"
        write_v2(folder, [_episode(i, 8) for i in range(count)], version, video, info)
        return folder

    return make


def write_v2(folder: Path, episodes: list[Episode], version: str, video: bool, changes: dict[str, object]) -> None:
    """Lists instead of fixed-size lists, tasks in an order of their own, names of cameras and features that are not ours."""
    (folder / "meta").mkdir(parents=True)
    tasks = {7: "stack the red cube", 3: "lift the red cube"}
    lines: dict[str, list[dict]] = {"episodes": [], "episodes_stats": [], "tasks": []}
    lines["tasks"] = [{"task_index": index, "task": task} for index, task in tasks.items()]
    first = 0
    for index, episode in enumerate(episodes):
        count = len(episode)
        columns: dict[str, list] = {
            "observation.state": episode.state.tolist(),
            "action": episode.action.tolist(),
            "timestamp": (np.arange(count) / 20).tolist(),
            "frame_index": list(range(count)),
            "episode_index": [index] * count,
            "index": list(range(first, first + count)),
            "task_index": [next(i for i, task in tasks.items() if task == episode.task)] * count,
        }
        if not video:
            columns["observation.images.top"] = [{"bytes": png(image), "path": None} for image in episode.images["agentview"]]
        file = folder / f"data/chunk-{index // 2:03d}/episode_{index:06d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), file)
        if video:
            clip = folder / f"videos/chunk-{index // 2:03d}/observation.images.top/episode_{index:06d}.mp4"
            clip.parent.mkdir(parents=True, exist_ok=True)
            encode_video(clip, episode.images["agentview"], 20)
        lines["episodes"].append({"episode_index": index, "tasks": [episode.task], "length": count})
        lines["episodes_stats"].append({"episode_index": index, "stats": {}})
        first += count
    for name, rows in lines.items():
        if name != "episodes_stats" or version == "v2.1":
            (folder / "meta" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if version == "v2.0":
        (folder / "meta" / "stats.json").write_text("{}")
    scalars = {key: {"dtype": "int64", "shape": [1]} for key in ("frame_index", "episode_index", "index", "task_index")}
    info = {
        "codebase_version": version,
        "robot_type": "arm",
        "total_episodes": len(episodes),
        "total_frames": first,
        "total_tasks": 2,
        "total_videos": len(episodes) if video else 0,
        "total_chunks": (len(episodes) + 1) // 2,
        "chunks_size": 2,
        "fps": 20,
        "splits": {"train": f"0:{len(episodes)}"},
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4" if video else None,
        "features": {
            "observation.images.top": {"dtype": "video" if video else "image", "shape": [SIZE, SIZE, 3], "names": ["height", "width", "c"]},
            "observation.state": {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "z"]}},
            "action": {"dtype": "float32", "shape": [3], "names": None},
            "timestamp": {"dtype": "float32", "shape": [1]},
            **scalars,
        },
    }
    (folder / "meta" / "info.json").write_text(json.dumps(info | changes))


@pytest.fixture
def make_hdf5(tmp_path: Path) -> Callable[..., Path]:
    """``make_hdf5(episodes, name="demo.hdf5", **attributes)``: a file in robomimic's form with LIBERO's observations."""

    def make(episodes: list[Episode], name: str = "demo.hdf5", **attributes: object) -> Path:
        import h5py

        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with h5py.File(path, "w") as file:
            data = file.create_group("data")
            for key, value in attributes.items():
                data.attrs[key] = value if isinstance(value, str) else json.dumps(value)
            for index, episode in enumerate(episodes):
                group = data.create_group(f"demo_{index}")
                group["actions"] = np.concatenate([episode.action, -episode.action, episode.action[:, :1]], 1).astype(np.float64)
                group["states"] = np.zeros((len(episode), 40))
                group["obs/agentview_rgb"] = episode.images["agentview"][:, ::-1]
                group.create_dataset(
                    "obs/eye_in_hand_rgb", data=episode.images["wrist"][:, ::-1], chunks=(2, SIZE, SIZE, 3), compression="gzip"
                )
                group["obs/ee_pos"], group["obs/ee_ori"] = episode.state.astype(np.float64), -episode.state.astype(np.float64)
                group["obs/gripper_states"] = np.abs(episode.state[:, :2]).astype(np.float64)
                group["obs/depth"] = np.zeros((len(episode), SIZE, SIZE, 1), np.float32)
            file["mask/train"] = np.array([b"demo_0"])
        return path

    return make
