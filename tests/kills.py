"""Processes that are killed: in a moment, in the middle of a write, or by a full disk.

``Stage`` keeps one process that has imported everything and computed nothing, and forks it for every run, so that a run begins at once.
``faults.c`` stands between the run and the disk: it counts what changes files beneath one folder, and dies when told.
"""

import ctypes
import importlib
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit code (negative for a signal), what it did to files, how long it took, and what it said."""

    code: int
    operations: int
    seconds: float
    said: str


class Stage:
    """Runs commands in forks of one process.

    Args:
        folder: for its own files.
        warm: modules that are imported once, before all runs.
    """

    def __init__(self, folder: Path, *warm: str) -> None:
        library = folder / "faults.so"
        source = HERE / "faults.c"
        subprocess.run(["cc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
        self.folder = folder
        paths = os.pathsep.join([str(HERE), str(HERE / "envs"), os.environ.get("PYTHONPATH", "")])
        settings = {
            "LD_PRELOAD": str(library),
            "OMP_NUM_THREADS": "1",
            "JE_ARROW_MALLOC_CONF": "background_thread:false",
            "PYTHONPATH": paths,
        }
        command = [sys.executable, __file__, str(library), *warm]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **settings})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.__exit__(kind, error, trace)  # closes its input, which is its end

    def run(
        self, call: str, *arguments: str | Path, beneath: Path, at: int = 0, room: int = -1, seconds: float | None = None, number: int = 9
    ) -> Ended:
        """Call ``module:function`` with ``sys.argv`` in a process of its own, and wait for its end.

        Args:
            beneath: the folder whose files count.
            at: the operation on files to be killed at, in a write after half of it; 0 for none.
            room: bytes that fit on the disk; -1 for enough.
            seconds: after which the signal ``number`` is sent.
        """
        said = self.folder / "said.txt"
        job = {
            "call": call,
            "arguments": [str(argument) for argument in arguments],
            "plan": [str(beneath.resolve()), at, room],
            "seconds": seconds,
            "number": number,
            "said": str(said),
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()), said.read_text())


class Trial(Protocol):
    """A command that is run as often as it takes."""

    def go(self, **plan: float) -> Ended:
        """Begin, or go on; ``plan`` is for ``Stage.run``."""

    def check(self) -> None:
        """What is there now must be whole."""


def killed(begin: Callable[[Path], Trial], whole: Ended, folder: Path, kills: int, first: int = 0) -> Iterator[Trial]:
    """Ended trials, each killed about twice on its way, until there were so many kills: before or in operations on files, and at moments,
    both as likely anywhere in what ``whole`` did; by turns of a generator seeded with ``first`` and the numbers after it.
    """
    done = 0
    for seed in range(first, first + 10 * kills):
        rng = np.random.default_rng(seed)
        trial = begin(folder / str(seed))
        for attempt in range(2 if done + 1 < kills else 1):
            by_operation, part = bool(rng.integers(2)), rng.random() / (1 + attempt)
            ended = trial.go(**({"at": 1 + int(part * whole.operations)} if by_operation else {"seconds": part * whole.seconds}))
            assert ended.code in (0, -signal.SIGKILL), ended.said
            done += ended.code != 0
            trial.check()
        ended = trial.go()
        assert ended.code == 0, (seed, ended.said)
        yield trial
        shutil.rmtree(folder / str(seed))
        if done >= kills:
            return
    raise AssertionError(f"only {done} of the kills hit")


def filled(begin: Callable[[Path], Trial], like: Path, folder: Path, shares: list[float]) -> Iterator[Trial]:
    """Ended trials whose disk was full once these shares of the bytes beneath ``like`` were written; then there was room again."""
    size = sum(path.stat().st_size for path in like.rglob("*") if path.is_file() and not path.is_symlink())
    for number, share in enumerate(shares):
        trial = begin(folder / str(number))
        ended = trial.go(room=int(share * size))
        assert ended.code == 2, ended.said
        assert "Traceback" not in ended.said and "error: no room left on the disk" in " ".join(ended.said.split()), ended.said
        trial.check()
        ended = trial.go()
        assert ended.code == 0, ended.said
        yield trial


def main() -> None:
    """The process that is forked: a job per line, an answer per line."""
    library = ctypes.CDLL(sys.argv[1])
    for name in sys.argv[2:]:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        shared = mmap.mmap(-1, 8)
        began = time.perf_counter()
        process = os.fork()
        if process == 0:
            _child(job, library, shared)
        if job["seconds"] is not None:
            time.sleep(job["seconds"])
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                os.kill(process, job["number"])
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(json.dumps([code, int.from_bytes(shared, "little"), time.perf_counter() - began]), flush=True)
    os._exit(0)  # taking a thousand modules down takes seconds


def _child(job: dict[str, Any], library: ctypes.CDLL, shared: mmap.mmap) -> None:
    said = os.open(job["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    empty = os.open(os.devnull, os.O_RDONLY)
    for own, other in ((0, empty), (1, said), (2, said)):
        os.dup2(other, own)
    sys.argv = ["vla", *job["arguments"]]
    folder, at, room = job["plan"]
    memory = ctypes.addressof(ctypes.c_char.from_buffer(shared))
    library.faults_plan(folder.encode(), ctypes.c_long(at), ctypes.c_long(room), ctypes.c_void_p(memory))
    code = 1
    try:
        module, name = job["call"].split(":")
        getattr(importlib.import_module(module), name)()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - a process of its own ends here
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train() -> None:
    """``vla train`` that notes the frames of each step in the file which its first argument names."""
    from triune.cli.main import main as vla
    from triune.data.loader import Loaded, Loader

    order = open(sys.argv.pop(1), "a", buffering=1)  # noqa: SIM115 - until the process ends
    load = Loader.batch

    def batch(self: Loader, step: int) -> Loaded:
        loaded = load(self, step)
        order.write(json.dumps([step, loaded.values["index"].tolist()]) + "\n")
        return loaded

    Loader.batch = batch  # type: ignore[method-assign]
    sys.argv[1:1] = ["train"]
    vla()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    main()
