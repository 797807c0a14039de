"""Several processes train as one does: the same losses on the same global batches, the same checkpoint, resumed by any number."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from triune.policies import load_policy, read_checkpoint, verify
from triune.policies.train.logs import read_log
from triune.policies.train.state import step_folders

TORCHRUN = ("-m", "torch.distributed.run")
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines={nodes}", "--mixed_precision=no")
MPI = {"RANK": "{rank}", "SIZE": "2", "LOCAL_RANK": "{rank}", "LOCAL_SIZE": "2"}
LAUNCHERS: dict[str, list[tuple[str, ...]]] = {
    "torchrun": [(*TORCHRUN, "--nproc-per-node=2", "--standalone")],
    "accelerate": [(*ACCELERATE, "--main_process_port=0")],
    "mpirun": [(), ()],
    "torchrun on two nodes": 2 * [(*TORCHRUN, "--nnodes=2", "--node-rank={rank}", "--master-addr=127.0.0.1", "--master-port={port}")],
    "accelerate on two nodes": 2 * [(*ACCELERATE, "--machine_rank={rank}", "--main_process_ip=127.0.0.1", "--main_process_port={port}")],
}
"""Name -> the commands that stand before ``-m triune train``: one starts both processes, or each of two starts one (another node)."""


def launch(by: str, recipe: Path, out: Path, *more: str) -> list[dict]:
    """Run ``vla train`` in one process, or in two by a launcher; returns the rows of its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = LAUNCHERS.get(by, [()])
    runs = []
    for rank, command in enumerate(commands):
        said = {"rank": rank, "port": port, "nodes": len(commands)}
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if by == "mpirun":  # what Open MPI's says to the processes that it starts
            env |= {f"OMPI_COMM_WORLD_{key}": value.format(**said) for key, value in MPI.items()} | {"MASTER_PORT": str(port)}
        whole = [sys.executable, *(word.format(**said) for word in command), "-m", "triune", "train", str(recipe), "--out", str(out), *more]
        runs.append(subprocess.Popen(whole, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for run in runs:
        with run:
            printed, _ = run.communicate(timeout=300)
        assert run.returncode == 0, printed[-4000:]
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def recipe(recipe_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five steps of four samples; also the VLM learns, by adapters, and a part is held out."""
    train = {**recipe_tree["train"], "steps": 5, "log_every": 1, "save_every": 3, "lr": 1e-3, "weight_decay": 0.1, "clip": 0.5}
    tree = {**recipe_tree, "train": train, "experts": {"und": {"lora": {"rank": 2}}}, "hold_out": 0.3, "validation_batches": 1}
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    out = tmp_path_factory.mktemp("alone") / "run"
    return launch("alone", recipe, out), out


CASES = [
    pytest.param("torchrun", "ddp"),
    pytest.param("torchrun", "fsdp"),
    pytest.param("accelerate", "ddp"),
    pytest.param("mpirun", "ddp", marks=pytest.mark.slow),
    pytest.param("accelerate", "fsdp", marks=pytest.mark.slow),
    pytest.param("torchrun on two nodes", "ddp", marks=pytest.mark.slow),
    pytest.param("accelerate on two nodes", "fsdp", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("by", "parallel"), CASES)
def test_two_processes_train_as_one(by: str, parallel: str, recipe: Path, alone: tuple[list[dict], Path], tmp_path: Path) -> None:
    rows = launch(by, recipe, tmp_path / "run", f"train.parallel={parallel}")
    for one, both in zip(alone[0], rows, strict=True):
        assert abs(one["loss"] - both["loss"]) < 1e-5 and abs(one["grad_norm"] - both["grad_norm"]) < 1e-3 * one["grad_norm"]
    mine, theirs = (load_file(out / "checkpoints/last/model.safetensors") for out in (tmp_path / "run", alone[1]))
    assert mine.keys() == theirs.keys() and all((mine[n] - theirs[n]).abs().max() < 1e-3 for n in mine)
    looks = [json.loads((out / "validation.jsonl").read_text()) for out in (tmp_path / "run", alone[1])]
    assert looks[0]["held_out_loss"] == pytest.approx(looks[1]["held_out_loss"], abs=1e-4)
    policy = load_policy(tmp_path / "run")
    assert all(row.passed for row in verify(read_checkpoint(tmp_path / "run"), policy))


@pytest.mark.slow
@pytest.mark.parametrize("everybody", [False, True], ids=["torchrun is told", "all are told"])
def test_sigterm_saves_and_one_process_goes_on(everybody: bool, recipe: Path, tmp_path: Path) -> None:
    """Two processes with streamed images are stopped in the middle: by torchrun, or as a cluster does it, which tells them too. Both
    end, with one whole checkpoint; a single process resumes it, and all steps are those of a run that was never stopped."""
    more = ["train.steps=40", "train.save_every=1000", "cache.images_gb=2e-4", "cache.limit_gb=1e-9"]
    straight, out = launch("alone", recipe, tmp_path / "straight", *more), tmp_path / "run"
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "triune", "train", str(recipe), "--out", str(out)]
    with subprocess.Popen(
        [sys.executable, *command, *more], env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
    ) as torchrun:
        while len(read_log(out / "log.jsonl")) < 5:
            assert torchrun.poll() is None
            time.sleep(0.01)
        workers = [int(pid) for pid in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()]
        for pid in [*(workers if everybody else []), torchrun.pid]:
            os.kill(pid, signal.SIGTERM)
        assert torchrun.wait(60) != 0
    assert len(workers) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in workers)
    (saved,) = step_folders(out)
    read_checkpoint(saved)
    assert 5 <= int(saved.name[5:]) == len(read_log(out / "log.jsonl")) < 40
    rows = launch("alone", recipe, out, *more, "--resume")
    assert [row["step"] for row in rows] == list(range(1, 41))
    for one, both in zip(straight, rows, strict=True):
        assert abs(one["loss"] - both["loss"]) < 1e-5
