"""Writing files so that a reader, or a run killed at any moment, sees the old state or the new one and nothing between."""

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


def fsync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace the file at ``path`` by ``text``."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(text)
    fsync(temporary)
    os.replace(temporary, path)
    fsync(path.parent)


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
                fsync(Path(folder) / name)
            fsync(Path(folder))
        remove(path)
        os.rename(temporary, path)
        fsync(path.parent)
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
    fsync(link.parent)
