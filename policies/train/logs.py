"""What a run tells: ``log.jsonl`` and TensorBoard for curves, a progress bar for the person waiting."""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ...data.files import write_file
from ...errors import UserError


class Meter:
    """Running means over the steps since the last log line. Part of a checkpoint: a resumed run logs the same numbers."""

    def __init__(self, sums: dict[str, float] | None = None, count: int = 0) -> None:
        self.sums = dict(sums or {})
        self.count = count

    def add(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1

    def take(self) -> dict[str, float]:
        """The means; counting begins anew."""
        means = {name: total / self.count for name, total in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


def read_log(path: Path) -> list[dict[str, float]]:
    """The rows of a ``log.jsonl``; a last line cut off by a kill is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class RunLog:
    """Writes ``log.jsonl``, ``validation.jsonl``, ``tensorboard/`` and the progress bar (or, without a terminal, a line now and then)
    of one run; in a process that is not the ``main`` one, nothing.

    Rows after ``start`` are of a run that was killed after its last checkpoint; they are dropped, because they come again.
    """

    def __init__(self, out: Path, steps: int, start: int, main: bool = True) -> None:
        self.main = main
        if not main:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("training logs to TensorBoard, which is not installed; run: pip install 'triune-vla[train]'") from None
        self._files: list[IO[str]] = []
        for path in (out / "log.jsonl", out / "validation.jsonl"):
            kept = [row for row in read_log(path) if row["step"] <= start]
            write_file(path, "".join(json.dumps(row) + "\n" for row in kept))
            self._files.append(path.open("a"))
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
        self._console = Console(stderr=True)
        left = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        columns = (TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), *left)
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._task = self._bar.add_task("train", total=steps, completed=start, note="")
        self._steps, self._start, self._began, self._told = steps, start, time.monotonic(), time.monotonic()

    def __enter__(self) -> Self:
        if self.main:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.main:
            self._bar.stop()
            for file in self._files:
                file.close()
            self._board.close()

    def advance(self, step: int) -> None:
        if self.main:
            self._bar.update(self._task, completed=step)

    def write(self, step: int, row: dict[str, float]) -> None:
        """Log one row after ``step`` steps. ``data_ms`` and ``compute_ms`` are what a step waits for data, and what it computes."""
        if not self.main:
            return
        self._keep(0, step, row)
        waiting = row["data_ms"] / max(1e-9, row["data_ms"] + row["compute_ms"])
        note = f"loss {row['loss']:.4f}  {row['data_ms'] + row['compute_ms']:.0f} ms/step ({waiting:.0%} data)"
        self._bar.update(self._task, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._told > 15 or step == self._steps):
            left = (now - self._began) / max(1, step - self._start) * (self._steps - step)
            self._console.print(f"step {step}/{self._steps}  {note}  {left:.0f} s left", highlight=False)
            self._told = now

    def validate(self, step: int, row: dict[str, Any]) -> None:
        """Keep what ``Task.validate`` found; lists, such as errors per step of a chunk, stand in the file alone."""
        if row and self.main:
            self._keep(1, step, row)
            self.say(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)))

    def say(self, sentence: str) -> None:
        """A sentence for the person waiting."""
        if self.main:
            self._console.print(sentence, highlight=False)

    def _keep(self, file: int, step: int, row: dict[str, Any]) -> None:
        self._files[file].write(json.dumps({"step": step, **row}) + "\n")
        self._files[file].flush()
        for name, value in row.items():
            if isinstance(value, float):
                self._board.add_scalar(name, value, step)
