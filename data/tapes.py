"""Videos of a broken recording: how many frames they hold, and where episodes lie whose metadata is gone."""

import shutil
from pathlib import Path
from typing import Any

from .readers.dataset import DAMAGE
from .readers.images import Clip
from .readers.layouts import locate


class Tapes:
    """The videos of one camera in the order of recording, and where the episode that comes next would begin."""

    def __init__(self, root: Path, info: dict[str, Any], key: str, rows: dict[int, dict[str, Any]]) -> None:
        self.key, self.fps, self.rows = key, float(info["fps"]), rows
        pattern = locate(root, info, "video_path", video_key=key, chunk_index=0, file_index=0)
        self.numbers: dict[Path, tuple[int, int]] = {}
        for file in sorted(pattern.parents[1].glob("*/*.mp4")):
            chunk, number = file.parent.name.rpartition("-")[2], file.stem.rpartition("-")[2]
            if chunk.isdigit() and number.isdigit():
                self.numbers[file] = (int(chunk), int(number))
        self.files = sorted(self.numbers, key=lambda file: self.numbers[file])
        self.counts = {file: frames_in(file) for file in self.files}
        self._file, self._frame, self._next = 0, 0, 0
        self._used: set[Path] = set()

    def place(self, number: int, length: int) -> Clip | None:
        """Where episode ``number`` lies: as its row says, or behind the episode before it; ``None`` where frames are missing."""
        for before in range(self._next, number):  # episodes whose frames are gone, but whose rows say where they were
            if before in self.rows:
                self._jump(self.rows[before], int(self.rows[before]["length"]))
                self._next = before + 1
        row = self.rows.get(number)
        if row is not None:
            start = self._jump(row, length)
        elif number == self._next and self._file < len(self.files):
            if self._frame + length > self.counts[self.files[self._file]] and self._file + 1 < len(self.files):
                self._file, self._frame = self._file + 1, 0
            start = self._frame / self.fps
            self._frame += length
        else:
            start = None  # an episode of unknown length came before
        self._next = number + 1
        if start is None or self._frame > self.counts[self.files[self._file]]:
            return None
        self._used.add(self.files[self._file])
        return Clip(self.files[self._file], start)

    def _jump(self, row: dict[str, Any], length: int) -> float | None:
        """Go behind the episode of a row; where it starts in seconds."""
        numbers = tuple(row.get(f"videos/{self.key}/{name}_index") for name in ("chunk", "file"))
        file = next((file for file in self.files if self.numbers[file] == numbers), None)
        start = row.get(f"videos/{self.key}/from_timestamp")
        if file is None or not isinstance(start, float):
            return None
        self._file, self._frame = self.files.index(file), round(start * self.fps) + length
        return start

    def copy(self, root: Path, folder: Path) -> None:
        for file in sorted(self._used):
            copy = folder / file.relative_to(root)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)


def frames_in(file: Path) -> int:
    """Frames that a video holds, counted without decoding; 0 where it cannot be opened."""
    import av

    try:
        with av.open(str(file)) as container:
            return sum(packet.size > 0 for packet in container.demux(video=0))
    except (av.FFmpegError, *DAMAGE):
        return 0
