"""Vectors of large datasets, kept as memory-mapped arrays in the user's cache folder: processes share their pages, and opening the
dataset a second time reads nothing.

``$XDG_CACHE_HOME/triune/vectors/<dataset>/<version>/<column>.npy`` (``~/.cache`` where the variable is not set). A version is named by
the names, sizes and times of the data files; when it changes, the one before is removed. It may be deleted at any time.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote, unquote

import numpy as np

from ...errors import UserError
from ..files import atomic_folder, remove

MAPPED_FRAMES = 2**18
"""Datasets of fewer frames are simply read: some 20 MB of vectors."""

Columns = dict[str, np.ndarray]


def mapped(root: Path, files: Sequence[Path], facts: Sequence[object], frames: int, read: Callable[[], Columns]) -> Columns:
    """What ``read`` returns, from the cache where ``frames`` are many; such arrays are read-only.

    Args:
        root: the dataset.
        files: what ``read`` reads.
        facts: what else its result depends on, ready for JSON.

    Raises:
        UserError: the cache cannot be written.
    """
    if frames < MAPPED_FRAMES:
        return read()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "triune" / "vectors"
    states = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    folder = cache / _hash(str(root.resolve())) / _hash([states, *facts])
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed: of several processes one writes
            if not folder.is_dir():
                columns = read()
                for old in [entry for entry in folder.parent.iterdir() if entry.is_dir()]:
                    remove(old)
                with atomic_folder(folder) as temporary:
                    for name, values in columns.items():
                        np.save(temporary / f"{quote(name, safe='')}.npy", values)
                del columns
    except OSError as error:
        raise UserError(f"the vectors of {root} cannot be kept in {cache} ({error}); set XDG_CACHE_HOME to a folder with room") from None
    return {unquote(file.stem): np.load(file, mmap_mode="r", allow_pickle=False).view(np.ndarray) for file in folder.glob("*.npy")}


def _hash(thing: object) -> str:
    return hashlib.sha256(json.dumps(thing).encode()).hexdigest()[:24]
