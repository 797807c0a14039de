"""The last parquet file of a dataset, which grows episode by episode without ever being incomplete."""

from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import publish

FILE_BYTES = 4 * 2**20
"""A file that has grown to this size is not written to again; a smaller one is replaced with each episode."""


@dataclass
class Tail:
    """The last parquet file of a series (``data`` or ``meta/episodes``): one row group per episode."""

    folder: Path
    chunk: int = 0
    file: int = 0
    groups: list[pa.Table] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / f"chunk-{self.chunk:03d}" / f"file-{self.file:03d}.parquet"

    def make_room(self, chunk_size: int) -> None:
        """Go on to the next file when this one is full."""
        if sum(group.nbytes for group in self.groups) >= FILE_BYTES:
            self.chunk, self.file = (self.chunk, self.file + 1) if self.file + 1 < chunk_size else (self.chunk + 1, 0)
            self.groups = []

    def add(self, group: pa.Table) -> None:
        """Publish the file with one more row group."""
        self.groups = [*self.groups, group.cast(self.groups[0].schema) if self.groups else group]
        self.write()

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        with pq.ParquetWriter(temporary, self.groups[0].schema, compression="snappy", use_dictionary=False) as writer:
            for group in self.groups:
                writer.write_table(group)
        publish(temporary, self.path)

    def load(self, episodes: int) -> None:
        """Read the file back without what a killed recorder left: rows of uncounted episodes, and later files."""
        for path in self.folder.glob("*/*.parquet"):
            if path.parent.name > self.path.parent.name or (path.parent == self.path.parent and path.name > self.path.name):
                path.unlink()
        table = pq.read_table(self.path)
        column = table.column("episode_index")
        self.groups = [table.filter(pc.equal(column, index)) for index in sorted(set(column.to_pylist())) if index < episodes]
        if sum(map(len, self.groups)) < len(table):
            self.write()
