"""Writing files so that a reader, or a program killed at any moment, sees the old state or the new one and nothing between."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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


def replace_link(link: Path, target: str) -> None:
    """Point the symbolic link ``link`` at ``target`` (relative to its folder)."""
    temporary = link.with_name(f".tmp-{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    sync(link.parent)
