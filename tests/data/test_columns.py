"""Vectors of large datasets lie in a memory-mapped cache."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from triune.data import ChunkSampler, open_dataset
from triune.data.readers import columns
from triune.errors import UserError

MakeDataset = Callable[..., Path]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and datasets that all count as large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(columns, "MAPPED_FRAMES", 1)
    return tmp_path / "cache" / "triune" / "vectors"


def test_mapped_columns_are_the_same(make_dataset: MakeDataset, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_dataset(4)
    first, again = open_dataset(folder), open_dataset(folder)
    versions = [path for path in cache.glob("*/*") if path.is_dir()]
    assert len(versions) == 1
    monkeypatch.setattr(columns, "MAPPED_FRAMES", 10**9)
    read = open_dataset(folder)
    for key, values in read.vectors.items():
        for mapped in (first, again):
            np.testing.assert_array_equal(mapped.vectors[key], values)
            assert not mapped.vectors[key].flags.writeable and mapped.vectors[key].flags.c_contiguous
    np.testing.assert_array_equal(first.task_index, read.task_index)
    for key, value in ChunkSampler(read, 4, 8, seed=0).batch(3).items():
        np.testing.assert_array_equal(ChunkSampler(again, 4, 8, seed=0).batch(3)[key], value)


def test_a_changed_dataset_is_read_anew(make_dataset: MakeDataset, cache: Path) -> None:
    assert len(open_dataset(make_dataset(2))) == 11
    (before,) = [path for path in cache.glob("*/*") if path.is_dir()]
    assert len(open_dataset(make_dataset(1))) > 11  # three episodes now
    (after,) = [path for path in cache.glob("*/*") if path.is_dir()]
    assert before != after and not before.exists()


def test_processes_that_open_it_at_once(make_dataset: MakeDataset, cache: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "from triune.data.readers import columns\n"
        "columns.MAPPED_FRAMES = 1\n"
        "from triune.data import open_dataset\n"
        "print(open_dataset(sys.argv[1]).vectors['action'].sum(dtype=np.float64))"
    )
    folder = make_dataset(3)
    processes = [subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    sums = {process.communicate(timeout=60)[0] for process in processes}
    assert len(sums) == 1 and all(process.returncode == 0 for process in processes)
    assert len([path for path in cache.glob("*/*") if path.is_dir()]) == 1


def test_a_cache_that_cannot_be_written(make_dataset: MakeDataset, cache: Path) -> None:
    cache.parent.parent.mkdir()
    cache.parent.write_text("in the way")
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder with room"):
        open_dataset(make_dataset(1))
