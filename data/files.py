"""Writing files so that a reader, or a program killed at any moment, sees the old state or the new one and nothing between."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from ..errors import UserError


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Let the file ``temporary`` become ``path``; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def write_file(path: Path, content: str | bytes) -> None:
    """Replace the file at ``path`` by ``content``, text as UTF-8; the folder is made where it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    publish(temporary, path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that becomes ``path`` when the block ends without an error.

    Everything in it is on the disk before the name appears. A folder that is already at ``path`` is replaced.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for folder, _, names in os.walk(temporary, topdown=False):
            for name in names:
                sync(Path(folder) / name)
            sync(Path(folder))
        remove(path)
        os.rename(temporary, path)
        sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Delete a folder, if it exists; its name goes first, so that no half-deleted folder is ever found under it."""
    if path.exists():
        trash = path.with_name(f".old-{path.name}")
        if trash.exists():
            shutil.rmtree(trash)
        os.rename(path, trash)
        shutil.rmtree(trash)


@contextmanager
def room(folder: Path, then: str = "run the same command again, which goes on from there") -> Iterator[None]:
    """Around all that writes into ``folder``: a full disk is said in one sentence, whichever thread of whichever library meets it.

    Args:
        then: what to do when there is room again.

    Raises:
        UserError: the disk is full, or the user's quota.
    """
    found: list[BaseException | None] = []
    usual = threading.excepthook

    def hear(told: threading.ExceptHookArgs) -> None:
        found.append(told.exc_value) if _is_full(told.exc_value) else usual(told)

    threading.excepthook = hear
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        found.append(error)
    finally:
        threading.excepthook = usual
    if found:
        raise UserError(f"no room left on the disk of {folder}; everything saved before is whole: make room, then {then}") from found[0]


def _is_full(error: BaseException | None) -> bool:
    """By its words, since safetensors has no number for what the system said."""
    return any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT))


def vacant(path: Path) -> bool:
    """Whether there is nothing at ``path`` but what a writer killed at its very beginning leaves: folders and temporary files."""
    return not path.exists() or (path.is_dir() and all(found.is_dir() or found.name.startswith(".tmp-") for found in path.rglob("*")))


def lock(folder: Path) -> int:
    """Hold the folder for one writer until the descriptor is closed or the process dies.

    Raises:
        UserError: another one holds it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"{folder} is being written by another recorder; wait until it ends, or choose another folder") from None
    return descriptor


def append_json(file: Path, row: dict[str, Any]) -> None:
    """Add one line of JSON, numpy's arrays and numbers as JSON's, and wait until it is on the disk."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(plain(row)) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def write_json_lines(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file of JSON lines."""
    write_file(file, "".join(json.dumps(plain(row)) + "\n" for row in rows))


def plain(value: Any) -> Any:
    """``value`` with numpy's arrays and numbers as JSON's."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def replace_link(link: Path, target: str) -> None:
    """Point the symbolic link ``link`` at ``target`` (relative to its folder)."""
    temporary = link.with_name(f".tmp-{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)
