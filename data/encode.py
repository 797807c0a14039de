"""One episode as lerobot would write it: rows of the data file, and metadata in a staging folder.

lerobot makes the schema, the statistics and all metadata. It believes to begin a dataset in the staging folder, and is
told of the episodes before through the public attributes of its metadata object.
"""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .features import vectors_of
from .tail import Tail
from .types import Episode

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDatasetMetadata

PNG_LEVEL = 1
"""zlib level: 0.6 ms and 9.5 kB for a rendered 96 px frame; lerobot's 6 takes 1.5 ms for 9.0 kB."""
REPOSITORY = "local/triune"
"""lerobot asks for a hub id; a folder on disk never uses it."""


@dataclass
class History:
    """What lerobot's metadata object must know of the episodes before."""

    info: Any = None
    tasks: Any = None
    stats: Any = None
    last: dict[str, Any] = field(default_factory=dict)

    @property
    def chunk_size(self) -> int:
        return int(self.info.chunks_size) if self.info is not None else 1000

    def restore(self, meta: "LeRobotDatasetMetadata", data: Tail, episodes: Tail) -> None:
        """lerobot goes on in the file after the last one; it is told one less, so that it means our tail."""
        if self.info is None:
            return
        before = {"data/chunk_index": data.chunk, "data/file_index": data.file - 1}
        before |= {"meta/episodes/chunk_index": episodes.chunk, "meta/episodes/file_index": episodes.file - 1}
        meta.info, meta.tasks, meta.stats, meta.episodes = self.info, self.tasks, self.stats, [self.last | before]


@dataclass(frozen=True)
class Job:
    """Where an episode goes.

    Attributes:
        root: the dataset folder.
        stage: the staging folder, which does not exist yet.
        index: of the episode.
        features: lerobot's feature table, without its default columns.
        history: the episodes before.
        data, episodes: the files that will take the rows.
    """

    root: Path
    stage: Path
    index: int
    fps: int
    robot: str | None
    features: dict[str, Any]
    history: History
    data: Tail
    episodes: Tail


def encode_images(episode: Episode, job: Job) -> tuple["LeRobotDatasetMetadata", pa.Table]:
    """Rows with PNG images in lerobot's schema.

    ``LeRobotDataset.add_frame`` writes each image to a file, reads it back for its statistics, and a third time to
    put it into the table: 0.6 s for 45 frames of two cameras, against 0.1 s here.
    """
    from lerobot.datasets import LeRobotDatasetMetadata
    from lerobot.datasets.compute_stats import compute_episode_stats
    from lerobot.datasets.feature_utils import get_hf_features_from_features

    meta = LeRobotDatasetMetadata.create(
        REPOSITORY, job.fps, job.features, robot_type=job.robot, root=job.stage, use_videos=False, metadata_buffer_size=1
    )
    job.history.restore(meta, job.data, job.episodes)
    meta.save_episode_tasks([episode.task])
    count, first = len(episode), meta.total_frames
    steps = np.arange(count)
    vectors: dict[str, np.ndarray] = {
        "timestamp": steps / job.fps,
        "frame_index": steps,
        "episode_index": np.full(count, job.index),
        "index": first + steps,
        "task_index": np.full(count, meta.get_task_index(episode.task)),
        **{key: value[:, 0] if value.shape[1] == 1 else value for key, value in vectors_of(episode).items()},
    }
    columns: dict[str, pa.Array] = {}
    schema = get_hf_features_from_features(meta.features).arrow_schema
    statistics = compute_episode_stats(vectors, meta.features)
    names = [f"frame-{step:06d}.png" for step in steps]
    with ThreadPoolExecutor(4) as pool:
        for camera, images in episode.images.items():
            key = f"observation.images.{camera}"
            statistics[key] = image_statistics(images)
            encoded = pa.array(pool.map(png, images), pa.binary())
            columns[key] = pa.StructArray.from_arrays([encoded, pa.array(names)], ["bytes", "path"])
    for key, value in vectors.items():
        kind = schema.field(key).type
        flat = pa.array(np.ascontiguousarray(value).reshape(-1), kind if value.ndim == 1 else kind.value_type)
        columns[key] = flat if value.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, type=kind)
    frames = pa.table([columns[name] for name in schema.names], schema=schema)
    place = {"data/chunk_index": job.data.chunk, "data/file_index": job.data.file}
    meta.save_episode(job.index, count, [episode.task], statistics, place)
    meta.finalize()
    return meta, frames


def encode_videos(episode: Episode, job: Job) -> tuple["LeRobotDatasetMetadata", pa.Table]:
    """Rows without images, which lerobot encodes into one mp4 file per camera."""
    from lerobot.datasets import LeRobotDataset
    from lerobot.utils.utils import SuppressProgressBars

    os.environ.setdefault("SVT_LOG", "1")  # the AV1 encoder prints 40 lines per file otherwise
    dataset = LeRobotDataset.create(
        REPOSITORY,
        job.fps,
        job.features,
        root=job.stage,
        robot_type=job.robot,
        video_backend="pyav",
        streaming_encoding=True,
        encoder_queue_maxsize=len(episode),  # lerobot drops the frames that find its queue (of 30) full, and goes on
        metadata_buffer_size=1,
    )
    job.history.restore(dataset.meta, job.data, job.episodes)
    dataset.clear_episode_buffer()
    columns = {f"observation.images.{camera}": images for camera, images in episode.images.items()} | vectors_of(episode)
    with SuppressProgressBars():
        for step in range(len(episode)):
            dataset.add_frame({key: values[step] for key, values in columns.items()} | {"task": episode.task})
        dataset.save_episode()
        dataset.finalize()
    return dataset.meta, pq.read_table(job.stage / job.data.path.relative_to(job.root))


def image_statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    """lerobot's statistics of frames uint8 (T, H, W, 3), in [0, 1], from every fourth pixel of some eight of them."""
    from lerobot.datasets.compute_stats import get_feature_stats

    pixels = images[:: max(1, len(images) // 8), ::4, ::4].transpose(0, 3, 1, 2)
    found = get_feature_stats(pixels, axis=(0, 2, 3), keepdims=True)
    return {name: value if name == "count" else np.squeeze(value / 255.0, axis=0) for name, value in found.items()}


def png(image: np.ndarray) -> bytes:
    """An image (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
