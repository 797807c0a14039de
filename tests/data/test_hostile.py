"""Cut and changed files of every format: a sentence, or data; never another error and never a hang."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from triune.data import Episode, open_dataset
from triune.data.inspect import inspect
from triune.data.readers import hdf5
from triune.errors import UserError

MakeEpisode = Callable[..., Episode]
Make = Callable[..., Path]
ENV = {"env_name": "Lift", "env_kwargs": {"control_freq": 20}}


def read_all(folder: Path) -> bool:
    """Whether a dataset can be read to its last frame; what cannot is a ``UserError`` of one line."""
    try:
        dataset = open_dataset(folder)
        assert len(dataset.task_of_frame) == len(dataset)
        assert all(len(values) == len(dataset) for values in dataset.vectors.values())
        for camera in dataset.cameras:
            dataset.load_images(camera, threads=1)
    except UserError as error:
        return bool(str(error)) and False
    return True


def harms(content: bytes, generator: np.random.Generator) -> bytes:
    """One of: cut, some bytes changed, a part overwritten by another, a part doubled."""
    kind = generator.integers(4)
    place, other = sorted(generator.integers(0, max(1, len(content)), 2).tolist())
    if kind == 0:
        return content[:place]
    if kind == 1:
        harmed = bytearray(content)
        for at in generator.integers(0, max(1, len(content)), 1 + len(content) // 200):
            harmed[at : at + 1] = bytes([int(generator.integers(256))])
        return bytes(harmed)
    size = int(generator.integers(1, 64))
    return content[:place] + content[other : other + size] + content[place + (size if kind == 2 else 0) :]


def torture(folder: Path, seeds: range) -> int:
    """Harm one file of a dataset in each round; how many rounds could still be read."""
    files = sorted(path for path in ([folder] if folder.is_file() else folder.rglob("*")) if path.is_file())
    readable = 0
    for seed in seeds:
        generator = np.random.default_rng(seed)
        file = files[seed % len(files)]
        content = file.read_bytes()
        file.write_bytes(harms(content, generator))
        readable += read_all(folder)
        file.write_bytes(content)
    return readable


@pytest.mark.parametrize("kind", ["v3.0", "v2.1", "v2.1 video", "v2.0"])
def test_lerobot(kind: str, make_dataset: Make, make_v2: Make) -> None:
    folder = make_dataset(2) if kind == "v3.0" else make_v2(2, kind.split()[0], kind.endswith("video"))
    readable = torture(folder, range(120))
    assert 0 < readable < 110
    assert read_all(folder)


def test_hdf5(make_hdf5: Make, make_episode: MakeEpisode) -> None:
    pytest.importorskip("h5py", reason="the extra [hdf5] is not installed")
    path = make_hdf5([make_episode(i) for i in range(2)], env_args=ENV)
    readable = torture(path, range(25))
    assert 0 < readable < 25
    assert read_all(path)


@pytest.mark.slow
def test_more_hdf5(make_hdf5: Make, make_episode: MakeEpisode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among these are files in whose attributes libhdf5 2.0 reads for ever."""
    pytest.importorskip("h5py", reason="the extra [hdf5] is not installed")
    monkeypatch.setattr(hdf5, "PROBE_SECONDS", 10.0)
    path = make_hdf5([make_episode(i) for i in range(2)], env_args={"env_kwargs": {"control_freq": 20}})
    assert torture(path, range(2250, 2290)) < 40


HANGS = {"while True: pass": "does not end", "import os; os.abort()": r"dies in reading it \(signal 6\)"}


@pytest.mark.parametrize("code", HANGS)
def test_a_library_that_hangs_or_dies(code: str, make_hdf5: Make, make_episode: MakeEpisode, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("h5py", reason="the extra [hdf5] is not installed")
    path = make_hdf5([make_episode(0)], env_args=ENV)
    monkeypatch.setattr(hdf5, "PROBE", code)
    monkeypatch.setattr(hdf5, "PROBE_SECONDS", 1.0)
    with pytest.raises(UserError, match=HANGS[code]):
        open_dataset(path)


WRONG = {
    "no data": lambda file: file.pop("data"),
    "no demonstrations": lambda file: [file["data"].pop(name) for name in list(file["data"])],
    "no actions": lambda file: file["data/demo_0"].pop("actions"),
    "text as actions": lambda file: (file["data/demo_0"].pop("actions"), file["data/demo_0"].create_dataset("actions", data=b"none")),
    "other lengths": lambda file: (file["data/demo_0/obs"].pop("ee_pos"), file["data/demo_0/obs"].create_dataset("ee_pos", data=[1.0])),
    "a group for a picture": lambda file: (
        file["data/demo_0/obs"].pop("agentview_rgb"),
        file["data/demo_0/obs"].create_group("agentview_rgb"),
    ),
    "other widths": lambda file: (file["data/demo_1"].pop("actions"), file["data/demo_1"].create_dataset("actions", data=np.zeros((6, 2)))),
    "no JSON": lambda file: file["data"].attrs.__setitem__("env_args", "{"),
    "a list": lambda file: file["data"].attrs.__setitem__("env_args", "[]"),
    "a demonstration that is none": lambda file: file["data"].create_dataset("demo_7", data=np.zeros(3)),
}


@pytest.mark.parametrize("name", WRONG)
def test_hdf5_of_another_form(name: str, make_hdf5: Make, make_episode: MakeEpisode) -> None:
    h5py = pytest.importorskip("h5py", reason="the extra [hdf5] is not installed")
    path = make_hdf5([make_episode(i) for i in range(2)], env_args=ENV)
    with h5py.File(path, "a") as file:
        WRONG[name](file)
    with pytest.raises(UserError, match=r"demo\.hdf5"):
        open_dataset(path)


def test_not_a_dataset(tmp_path: Path) -> None:
    (tmp_path / "x.hdf5").write_bytes(b"not HDF5")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("x")
    for path in (tmp_path / "x.hdf5", tmp_path / "none.hdf5", tmp_path / "folder", tmp_path / "folder/notes.txt"):
        with pytest.raises(UserError, match="HDF5|dataset"):
            open_dataset(path)


def test_inspecting_what_does_not_decode(make_v2: Make) -> None:
    """A broken picture is a finding, not the end of the inspection."""
    folder = make_v2(2, video=True)
    video = next(folder.rglob("*000001.mp4"))
    video.write_bytes(video.read_bytes()[:300])
    report = inspect(folder)
    assert report["cameras"][0]["decodes"] is False
    assert "decode" in {finding["check"] for finding in report["findings"]}
    shutil.rmtree(folder)
