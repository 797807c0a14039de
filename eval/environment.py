"""What this machine and its environment can do, and what of them does not fit the package: the first part of ``vla doctor``."""

import platform
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from packaging.requirements import Requirement

from ..data.inspect import Finding
from ..data.readers.images import Pyav, video_decoder
from ..policies.train.optim import resolve_device, resolve_precision
from .provenance import hardware

PACKAGE = "triune-vla"
FOR = {
    "sim": "worlds",
    "lerobot": "writing LeRobotDatasets, policies of lerobot",
    "hdf5": "HDF5 datasets",
    "train": "adapters, several processes, TensorBoard",
    "eval": "reports and videos",
}
"""Extra -> what it is for."""


def facts() -> dict[str, str]:
    """Processor, GPU, versions, and what they come to: precision, decoder of videos, extras that are whole."""
    import torch

    machine, device = hardware(), resolve_device("auto")
    whole = [extra for extra in FOR if not _missing(extra)]
    return {
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {'built for CUDA ' + torch.version.cuda if torch.version.cuda else 'built without CUDA'}",
        "cpu": f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB",
        "gpu": str(machine["gpu"] or "none that torch finds"),
        "precision": f"{str(resolve_precision('auto', device)).removeprefix('torch.')} (precision: auto, on {device.type})",
        "video": f"{video_decoder().__name__.lower()}",
        "extras": ", ".join(whole) or "none",
    }


def findings() -> list[Finding]:
    """Packages that are missing or of a version that was not meant, and a decoder that cannot start."""
    found = []
    for needed in _missing(None):
        found.append(Finding("dependency", f"{PACKAGE} needs {needed}", f"pip install '{PACKAGE}'"))
    for extra, use in FOR.items():
        lacking = _missing(extra)
        if lacking:
            mend = f"pip install '{PACKAGE}[{extra}]', if you need it"
            found.append(Finding("extra", f"the extra {extra} ({use}) needs {'; '.join(lacking)}", mend))
    if find_spec("torchcodec") and video_decoder() is Pyav:
        sentence = "torchcodec is installed and does not start (it needs FFmpeg's libraries), so videos are decoded by PyAV"
        found.append(Finding("decoder", sentence, "apt-get install ffmpeg, if videos should load faster"))
    return found


def _missing(extra: str | None) -> list[str]:
    """Requirements of an extra, or of the package itself, that are not met: as they are, and what is there instead."""
    lacking = []
    for text in _requirements():
        needed = Requirement(text)
        mine = needed.marker is None or needed.marker.evaluate({"extra": extra or ""})
        if not mine or (extra is not None and (needed.marker is None or needed.marker.evaluate({"extra": ""}))):
            continue
        try:
            there = version(needed.name)
        except PackageNotFoundError:
            lacking.append(f"{needed.name}{needed.specifier}, which is not installed")
            continue
        if not needed.specifier.contains(there, prereleases=True):
            lacking.append(f"{needed.name}{needed.specifier}, and {there} is installed")
    return lacking


def _requirements() -> list[str]:
    """What the package's metadata name; nothing where it runs without being installed."""
    try:
        return requires(PACKAGE) or []
    except PackageNotFoundError:
        return []
