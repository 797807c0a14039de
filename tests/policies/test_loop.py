"""The training loop: exact resumption, safe checkpoints, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triune.errors import UserError
from triune.policies.train.logs import read_log
from triune.policies.train.loop import Part, StepReport, TrainConfig, prefetch, step_seed, train
from triune.policies.train.optim import learned_buffers, learning_rate, make_optimizer, resolve_precision, trainable
from triune.policies.train.state import step_folders

CONFIG = TrainConfig(
    steps=12, batch_size=8, lr=1e-2, warmup=3, save_every=6, log_every=4, keep=3, precision="fp32", device="cpu", lr_scale={"slow": 0.1}
)


class Toy:
    """A frozen layer, dropout, a buffer that training changes, noise in the losses: all that resumption could get wrong."""

    def __init__(self, poison: int | None = None) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict(
            {
                "frozen": nn.Linear(4, 16),
                "slow": nn.Linear(16, 16),
                "norm": nn.BatchNorm1d(16),
                "drop": nn.Dropout(0.2),
                "out": nn.Linear(16, 2),
            }
        )
        self.module["frozen"].requires_grad_(False)
        self.poison = poison
        self.seen: list[int] = []

    def batch(self, part: Part) -> dict[str, Tensor]:
        index = part.index
        self.seen.append(index)
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step_seed(7, index)))
        return {"x": x if index != self.poison else x * float("nan"), "y": x[:, :2]}

    def losses(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        net = self.module
        hidden = net["drop"](net["norm"](net["slow"](net["frozen"](batch["x"]).tanh())))
        fit = (net["out"](hidden) - batch["y"]).square().mean()
        noise = (net["out"](hidden + torch.randn_like(hidden)) - batch["y"]).square().mean()
        return {"loss": fit + 0.1 * noise, "fit": fit}

    def validate(self) -> dict[str, float]:
        return {}

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        save_file(weights, folder / "model.safetensors")


def losses_of(out: Path) -> list[tuple[float, ...]]:
    return [(row["step"], row["lr"], row["loss"], row["fit"], row["grad_norm"]) for row in read_log(out / "log.jsonl")]


def same_tensors(a: Path, b: Path) -> bool:
    first, second = load_file(a), load_file(b)
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def same_checkpoint(a: Path, b: Path) -> bool:
    return all(same_tensors(a / name, b / name) for name in ("model.safetensors", "training/state.safetensors"))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "straight"
    train(Toy(), CONFIG, out)
    return out


def test_a_run_leaves_what_it_promises(straight: Path) -> None:
    folders = step_folders(straight)
    assert [folder.name for folder in folders] == ["step-000006", "step-000012"]
    assert (straight / "checkpoints/last").resolve() == folders[-1].resolve()
    assert [row["step"] for row in read_log(straight / "log.jsonl")] == [4, 8, 12]
    assert {"loss", "fit", "lr", "grad_norm", "data_ms", "compute_ms"} <= read_log(straight / "log.jsonl")[0].keys()
    assert list((straight / "tensorboard").iterdir())
    assert {path.suffix for path in straight.rglob("*") if path.is_file() and "tensorboard" not in path.parts} == {
        ".json",
        ".jsonl",
        ".safetensors",
    }
    weights = load_file(folders[-1] / "model.safetensors")
    assert "norm.running_mean" in weights
    assert not any(name.startswith("frozen") for name in weights)


def test_the_same_run_twice_is_the_same(straight: Path, tmp_path: Path) -> None:
    assert same_checkpoint(train(Toy(), CONFIG, tmp_path / "again"), straight / "checkpoints/last")


@pytest.mark.parametrize(("killed_after", "times"), [(3, 1), (7, 2)])
def test_resuming_is_exact(straight: Path, tmp_path: Path, killed_after: int, times: int) -> None:
    """Stopped by SIGTERM between log lines, then resumed in a new module: the curve and every tensor are those of the straight run. A
    second SIGTERM, as when a cluster and torchrun both pass it on, changes nothing."""
    out = tmp_path / "run"

    def terminate(report: StepReport) -> None:
        if report.step == killed_after:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stop:
        train(Toy(), CONFIG, out, hooks=[terminate])
    assert stop.value.code == 128 + signal.SIGTERM
    assert step_folders(out)[-1].name == f"step-{killed_after + 1:06d}"
    task = Toy()
    checkpoint = train(task, CONFIG, out, resume=True)
    assert task.seen[0] == killed_after + 1
    assert losses_of(out) == losses_of(straight)
    assert same_checkpoint(checkpoint, straight / "checkpoints/last")


def test_resuming_is_exact_with_accumulation_and_without_ema(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"accumulate": 2, "ema": 0.0, "steps": 6, "save_every": 3})
    whole = train(Toy(), config, tmp_path / "whole")
    part = tmp_path / "part"
    with pytest.raises(RuntimeError, match="power cut"):
        train(Toy(), config, part, hooks=[power_cut])
    assert same_checkpoint(train(Toy(), config, part, resume=True), whole)


def power_cut(report: StepReport) -> None:
    if report.step == 4:
        raise RuntimeError("power cut")


def test_sigkill_at_any_moment_then_resume(straight: Path, tmp_path: Path) -> None:
    """A separate process killed with SIGKILL, without any chance to clean up."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys, time; from pathlib import Path; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_loop import CONFIG, Toy\nfrom triune.policies.train.loop import train\n"
        f"train(Toy(), CONFIG.model_copy(update=dict(save_every=2)), Path({str(tmp_path / 'run')!r}), hooks=[lambda _: time.sleep(0.05)])\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.DEVNULL)
    while len(step_folders(tmp_path / "run")) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert step_folders(tmp_path / "run")[-1].name != "step-000012"
    resumed = train(Toy(), CONFIG.model_copy(update={"save_every": 2}), tmp_path / "run", resume=True)
    assert losses_of(tmp_path / "run") == losses_of(straight)
    assert same_checkpoint(resumed, straight / "checkpoints/last")


KILL_POINTS = """
import itertools, os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch, torch.utils.tensorboard
from test_loop import CONFIG, Toy
from triune.policies.train.loop import train

def die_at(point):
    count = itertools.count(1)
    def wrap(operation):
        def call(*args, **kwargs):
            if next(count) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)
        return call
    for name in ("fsync", "replace", "rename", "unlink", "rmdir", "mkdir", "symlink"):
        setattr(os, name, wrap(getattr(os, name)))

def child(out, point):
    process = os.fork()
    if process == 0:
        die_at(point)
        train(Toy(), CONFIG.model_copy(update={"keep": 1}), out, resume=(out / "log.jsonl").exists())
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

torch.optim.AdamW(Toy().module.parameters(), fused=True)  # its first use imports for a second; not in every child
for point in itertools.count(1):
    out = Path(sys.argv[2]) / str(point)
    if child(out, point) == 0:
        break  # there are not so many file operations
    assert child(out, 0) == 0
"""


@pytest.mark.slow
def test_killed_at_any_file_operation_the_run_is_the_same(straight: Path, tmp_path: Path) -> None:
    """SIGKILL just before the first, second, ... file operation of a run, then one resumption: always the straight run's end."""
    subprocess.run([sys.executable, "-c", KILL_POINTS, str(Path(__file__).parent), str(tmp_path)], check=True)
    runs = list(tmp_path.iterdir())
    assert len(runs) > 40
    for run in runs:
        assert losses_of(run) == losses_of(straight)
        assert same_checkpoint(run / "checkpoints/last", straight / "checkpoints/last")
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last", "step-000012"]


def test_what_a_kill_left_behind_is_settled(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"save_every": 3})
    train(Toy(), config, tmp_path)
    folder = tmp_path / "checkpoints"
    (folder / ".tmp-step-000099").mkdir()
    (folder / ".old-step-000003").mkdir()
    (folder / "last").unlink()
    train(Toy(), config, tmp_path, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step-000006", "step-000009", "step-000012"]
    assert (folder / "last").resolve().name == "step-000012"


def test_frozen_parameters_stay_and_old_checkpoints_go(tmp_path: Path) -> None:
    task = Toy()
    before = {name: value.clone() for name, value in task.module["frozen"].state_dict().items()}
    train(task, CONFIG.model_copy(update={"save_every": 2, "keep": 2}), tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in task.module["frozen"].state_dict().items())
    assert all(parameter.grad is None for parameter in task.module["frozen"].parameters())
    assert [folder.name for folder in step_folders(tmp_path)] == ["step-000010", "step-000012"]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")]


def test_a_failed_save_leaves_no_trace(tmp_path: Path) -> None:
    task = Toy()
    task.save = power_cut_save  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="power cut"):
        train(task, CONFIG, tmp_path)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def power_cut_save(folder: Path, weights: dict[str, Tensor]) -> None:
    (folder / "half").write_text("half")
    raise RuntimeError("power cut")


def test_nan_stops_the_run_and_names_step_and_term(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 8: 'loss' is nan, 'fit' is nan"):
        train(Toy(poison=7), CONFIG, tmp_path)
    assert step_folders(tmp_path)[-1].name == "step-000006"


def test_what_may_not_be_resumed(straight: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds a run.*--resume"):
        train(Toy(), CONFIG, straight)
    with pytest.raises(UserError, match="no run to resume"):
        train(Toy(), CONFIG, tmp_path / "nothing", resume=True)
    with pytest.raises(UserError, match=r"train\.lr was 0\.01 and is 0\.02"):
        train(Toy(), CONFIG.model_copy(update={"lr": 0.02}), straight, resume=True)
    with pytest.raises(UserError, match=r"train\.steps was 12 and is 20"):
        train(Toy(), CONFIG.model_copy(update={"steps": 20}), straight, resume=True)
    other = Toy()
    other.module["extra"] = nn.Linear(2, 2)
    with pytest.raises(UserError, match="another model"):
        train(other, CONFIG, straight, resume=True)
    assert train(Toy(), CONFIG.model_copy(update={"log_every": 1}), straight, resume=True).name == "step-000012"


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "json"])
def test_damaged_training_state_is_one_sentence(tmp_path: Path, damage: str) -> None:
    out = tmp_path / "run"
    state = train(Toy(), CONFIG, out) / "training/state.safetensors"
    data = bytearray(state.read_bytes())
    match damage:
        case "flip":
            data[-3] ^= 1
            state.write_bytes(data)
        case "truncate":
            state.write_bytes(data[:100])
        case "remove":
            state.unlink()
        case "json":
            state.with_name("state.json").write_text('{"step": ')
    with pytest.raises(UserError, match="delete that folder to resume from the checkpoint before it"):
        train(Toy(), CONFIG, out, resume=True)


def test_learning_rate() -> None:
    config = TrainConfig(steps=110, warmup=10, lr=1.0, final=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.1)
    assert learning_rate(config, 9) == learning_rate(config, 10) == 1.0
    assert learning_rate(config, 60) == pytest.approx(0.55)
    assert learning_rate(config, 110) == pytest.approx(0.1)
    assert learning_rate(config.model_copy(update={"schedule": "constant"}), 99) == 1.0


def test_parameter_groups() -> None:
    module = Toy().module
    groups = {
        (group["scale"], group["weight_decay"]): len(group["params"]) for group in make_optimizer(trainable(module), CONFIG).param_groups
    }
    assert groups == {(0.1, 0.01): 1, (0.1, 0.0): 1, (1.0, 0.0): 3, (1.0, 0.01): 1}
    with pytest.raises(UserError, match=r"lr_scale: no trained parameter begins with 'fast'.*norm, out, slow"):
        make_optimizer(trainable(module), CONFIG.model_copy(update={"lr_scale": {"fast": 2.0}}))
    with pytest.raises(UserError, match="nothing to train"):
        trainable(module.requires_grad_(False))


def test_buffers_of_frozen_parts_are_not_learned() -> None:
    module = Toy().module
    assert all(name.startswith("norm") for name in learned_buffers(module))
    module["norm"].requires_grad_(False)
    assert learned_buffers(module) == {}


def test_ema_is_near_the_weights_after_a_short_run(straight: Path) -> None:
    """A plain average with decay 0.999 would still be 98.8 % initial weights after 12 steps."""
    start = dict(Toy().module.named_parameters())["out.weight"].detach()
    tensors = load_file(straight / "checkpoints/last/training/state.safetensors")
    travelled = (tensors["ema.out.weight"] - start).norm() / (tensors["model.out.weight"] - start).norm()
    assert 0.4 < travelled < 1.1


def test_bf16_trains(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"precision": "bf16", "steps": 40, "log_every": 10, "save_every": 40})
    train(Toy(), config, tmp_path)
    rows = read_log(tmp_path / "log.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert resolve_precision("fp32", torch.device("cpu")) is torch.float32


def test_prefetch_hands_over_errors_and_ends_its_thread() -> None:
    def batch(index: int) -> int:
        if index == 3:
            raise UserError("episode 3 is missing")
        return index

    with prefetch(batch, 0, 10) as batches:
        assert [next(batches) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(UserError, match="episode 3"):
            next(batches)
    with prefetch(lambda index: index, 0, 1000) as batches:
        assert next(batches) == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_state_json_is_plain(straight: Path) -> None:
    facts = json.loads((straight / "checkpoints/last/training/state.json").read_text())
    assert facts["step"] == 12
    assert facts["train"]["lr"] == 0.01


def test_prefetch_computes_in_one_thread_and_leaves_the_trainer_its_own() -> None:
    before = torch.get_num_threads()
    with prefetch(lambda index: torch.get_num_threads(), 0, 2) as batches:
        assert list(batches) == [1, 1]
    assert torch.get_num_threads() == before
