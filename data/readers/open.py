"""The door to every format: what lies at a path decides how it is read."""

import os
import re
from pathlib import Path

from ...errors import UserError
from ..incidents import is_incident, open_incident
from .dataset import Dataset
from .hdf5 import SUFFIXES, open_hdf5
from .lerobot import open_lerobot

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def open_dataset(path: str | Path) -> Dataset:
    """Open a dataset: a LeRobotDataset folder (v2.0, v2.1, v3.0), an HDF5 file of robomimic's form, or a folder of them;
    what a flight recorder wrote.

    Args:
        path: the folder or file; or a hub id (``user/name``, ``user/name@revision``) where there is no such folder.

    Raises:
        UserError: there is nothing, it is of no known format, it is empty, or has broken files.
    """
    root = find_dataset(path)
    if is_incident(root):
        return open_incident(root)
    if root.suffix in SUFFIXES or (root.is_dir() and not (root / "meta").is_dir() and _holds_hdf5(root)):
        return open_hdf5(root)
    return open_lerobot(root)


def find_dataset(path: str | Path) -> Path:
    """``path`` where it exists, else the hub's dataset in the cache of ``huggingface_hub``, downloaded when it is not there yet.

    Raises:
        UserError: a dataset of that id can neither be found in the cache nor downloaded.
    """
    root = Path(path)
    name = str(path)
    if root.exists() or not HUB_ID.fullmatch(name) or Path(name.split("/")[0]).is_dir():
        return root
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", revision=revision or None))
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "") else "the hub cannot be reached"
        raise UserError(f"there is no folder {name}, nor such a dataset of the hub in the cache, and {offline}; check the path") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"there is no folder {name}, and the hub does not give a dataset {repository} ({reason}); check the name") from None


def _holds_hdf5(folder: Path) -> bool:
    return any(file.suffix in SUFFIXES for file in folder.iterdir())
