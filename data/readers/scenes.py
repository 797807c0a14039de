"""Annotated scenes on disk: Parquet shards of PNG images and a JSON annotation, as ``envs.scenes`` records them.

Columns: ``agentview`` and ``wrist`` (Hugging Face ``Image``: PNG bytes), ``annotation`` (JSON text: world, seed, objects,
gripper). ``datasets.load_dataset("parquet", data_files=...)`` opens the shards too.
"""

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from ...errors import UserError

CAMERAS = ("agentview", "wrist")


@dataclass(frozen=True, eq=False)
class Scenes:
    """Scenes in memory.

    Attributes:
        images: uint8 (n, cameras, H, W, 3), cameras in the order of ``CAMERAS``.
        annotations: one mapping per scene.
    """

    images: np.ndarray
    annotations: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.annotations)


def open_scenes(folder: str | Path, limit: int | None = None) -> Scenes:
    """All shards under ``folder`` (any depth) in the order of their names; at most ``limit`` scenes of each world.

    Raises:
        UserError: there is no shard, or a file is not one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    paths = sorted(Path(folder).rglob("*.parquet"))
    if not paths:
        raise UserError(
            f"there are no scenes in {folder}; record some with `vla data record scenes:tabletop --episodes 1000 --out {folder}`"
        )
    images: list[np.ndarray] = []
    annotations: list[dict[str, Any]] = []
    counts: dict[str, int] = {}
    for path in paths:
        try:
            table = pq.read_table(path, columns=[*CAMERAS, "annotation"])
        except (pa.ArrowInvalid, KeyError, OSError) as error:
            raise UserError(f"{path} is not a shard of scenes ({error}); delete it and record again") from None
        columns = [table.column(camera).to_pylist() for camera in CAMERAS]
        for *cells, text in zip(*columns, table.column("annotation").to_pylist(), strict=True):
            annotation = json.loads(text)
            counts[annotation["world"]] = counts.get(annotation["world"], 0) + 1
            if limit is None or counts[annotation["world"]] <= limit:
                images.append(np.stack([np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in cells]))
                annotations.append(annotation)
    return Scenes(np.stack(images), annotations)


class SceneWriter:
    """Writes one shard; it appears under its name only when complete.

    Use as a context manager: an exception inside leaves no file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, list[Any]] = {name: [] for name in (*CAMERAS, "annotation")}

    def add(self, images: dict[str, np.ndarray], annotation: str) -> None:
        """One scene: camera -> uint8 (H, W, 3), and its annotation as JSON."""
        from PIL import Image

        for camera in CAMERAS:
            buffer = io.BytesIO()
            Image.fromarray(images[camera]).save(buffer, "PNG", compress_level=1)
            self._rows[camera].append({"bytes": buffer.getvalue(), "path": None})
        self._rows["annotation"].append(annotation)

    def __enter__(self) -> "SceneWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if kind is not None:
            return
        image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        features = {camera: {"_type": "Image"} for camera in CAMERAS} | {"annotation": {"dtype": "string", "_type": "Value"}}
        schema = pa.schema(
            [*((camera, image) for camera in CAMERAS), ("annotation", pa.string())],
            metadata={"huggingface": json.dumps({"info": {"features": features}})},
        )
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        pq.write_table(pa.table(self._rows, schema=schema), temporary, row_group_size=100)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(self.path)
