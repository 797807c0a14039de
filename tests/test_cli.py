"""The command line: quick to start, every verb works, and a user's mistake is one sentence and exit code 2."""

import ast
import importlib
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import triune
from triune.cli.main import main
from triune.data.statistics import load_statistics

CLI = Path(triune.__file__).parent / "cli"
VERBS = (
    ("quickstart",),
    ("train",),
    ("eval",),
    ("serve",),
    ("client",),
    ("trial",),
    ("replay",),
    ("verify",),
    ("bench",),
    ("doctor",),
    ("data",),
    ("data", "record"),
    ("data", "inspect"),
    ("data", "stats"),
    ("data", "bench"),
    ("data", "convert"),
    ("data", "repair"),
    ("model",),
    ("model", "show"),
    ("model", "check"),
    ("model", "score"),
    ("model", "convert"),
    ("model", "merge"),
)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def vla(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs ``vla`` with arguments in this process, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vla", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_help_starts_in_half_a_second() -> None:
    """The ratchet: processor time of the whole process, which is its time on an idle machine; the best of several."""
    command = [sys.executable, "-c", "from triune.cli.main import main; main()", "--help"]
    best = float("inf")
    for _ in range(10):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if best < 0.4:
            break
    assert best < 0.5


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_has_help(vla: Run, verb: tuple[str, ...]) -> None:
    code, out, _ = vla(*verb, "--help")
    assert code == 0
    assert "Usage:" in out


def test_what_the_commands_import_exists() -> None:
    """The library is imported inside the commands, so a missing name would only show when a user runs them."""
    for path in CLI.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                module = importlib.import_module(f"triune.{node.module}" if node.module else "triune")
                names = [alias.name for alias in node.names]
                missing = [n for n in names if not hasattr(module, n) and importlib.util.find_spec(f"{module.__name__}.{n}") is None]
                assert not missing, f"{path}:{node.lineno}"


def test_version(vla: Run) -> None:
    assert vla("--version") == (0, f"triune {triune.__version__}\n", "")


def test_an_unknown_verb_names_the_nearest(vla: Run) -> None:
    code, _, err = vla("trian")
    assert code == 2
    assert "train" in err


def test_interrupting_exits_with_130(vla: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("triune.policies.train.recipe.run", interrupted)
    code, _, err = vla("train", "quickstart")
    assert code == 130
    assert "Traceback" not in err


def test_our_own_defects_keep_their_traceback(vla: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("triune.policies.train.recipe.run", broken)
    with pytest.raises(ZeroDivisionError):
        vla("train", "quickstart")


def test_an_error_of_a_whole_process_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from triune.cli.main import main; main()", "eval", "nowhere", "--policy", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: there is no suite config 'nowhere'")
    assert done.stderr.count("\n") == 1


# A user's mistakes: arguments, and what the one sentence must say. Functions of the folder return the arguments.


def wrong_suite_key(folder: Path) -> list[str]:
    (folder / "s.yaml").write_text("title: t\ntasks: {cubes/lift-red: {scord: false}}\n")
    return ["eval", "s.yaml", "--policy", "expert"]


def unknown_task(folder: Path) -> list[str]:
    (folder / "s.yaml").write_text("title: t\ntasks: {cubes/lift-rde: {}}\n")
    return ["eval", "s.yaml", "--policy", "expert"]


def wrong_spec_key(folder: Path) -> list[str]:
    (folder / "m.yaml").write_text(yaml.safe_dump({"base": str(CLI.parent / "configs/model/triune_tiny.yaml"), "steams": {}}))
    return ["model", "show", "m.yaml"]


def no_checkpoint_in(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    return ["verify", "run"]


def broken_manifest(folder: Path) -> list[str]:
    checkpoint(folder / "checkpoint")
    (folder / "checkpoint" / "manifest.json").write_text('{"files": ')
    return ["verify", "checkpoint"]


def changed_weights(folder: Path) -> list[str]:
    checkpoint(folder / "checkpoint")
    (folder / "checkpoint" / "model.safetensors").write_bytes(b"cut off")
    return ["eval", "quickstart", "--policy", "checkpoint"]


def checkpoint(folder: Path) -> None:
    """A folder whose files match its manifest, as far as their hashes go."""
    from triune.policies.checkpoint import PARTS, seal

    folder.mkdir()
    for name in PARTS:
        (folder / name).write_text("{}")
    seal(folder)


def dataset(folder: Path, cameras: tuple[str, ...] = ("agentview", "wrist"), state: int = 10, action: int = 7) -> list[str]:
    """A dataset of one tiny episode, and the command that trains the quickstart's recipe on it."""
    from triune.data import Camera, Contract, Episode, Vector
    from triune.data.writer import DatasetWriter

    def vector(letter: str, size: int) -> Vector:
        return Vector(names=tuple(f"{letter}{i}" for i in range(size)))

    contract = Contract(cameras=tuple(Camera(name=name) for name in cameras), state=vector("s", state), action=vector("a", action), rate=20)
    images = {name: np.zeros((3, 96, 96, 3), np.uint8) for name in cameras}
    columns = {"action.expert": np.zeros((3, action), np.float32)}
    episode = Episode(images, np.zeros((3, state), np.float32), np.zeros((3, action), np.float32), "lift the red cube", extra=columns)
    with DatasetWriter(folder / "dataset", contract, 20) as writer:
        writer.add(episode)
    return ["train", "quickstart", "data=dataset"]


def dataset_with_one_camera(folder: Path) -> list[str]:
    return dataset(folder, cameras=("agentview",))


def dataset_with_other_actions(folder: Path) -> list[str]:
    return dataset(folder, action=8)


def dataset_with_other_state(folder: Path) -> list[str]:
    return dataset(folder, state=12)


def small_dataset_to(version: str) -> Callable[[Path], list[str]]:
    def arguments(folder: Path) -> list[str]:
        dataset(folder)
        return ["data", "convert", "dataset", "out", "--to", version]

    return arguments


def no_run_to_resume(folder: Path) -> list[str]:
    return ["train", "quickstart", "--resume", "--out", str(folder / "run")]


MISTAKES: dict[str, tuple[list[str] | Callable[[Path], list[str]], str]] = {
    "unknown recipe": (["train", "quickstrat"], "there is no train config 'quickstrat'; did you mean 'quickstart'?"),
    "wrong recipe key": (["train", "quickstart", "train.stesp=3"], "unknown key 'train.stesp'; did you mean 'steps'?"),
    "malformed override": (["train", "quickstart", "train.steps"], "must have the form key.subkey=value"),
    "unknown kind": (["train", "quickstart", "kind=polici"], "its kind 'polici' is unknown; did you mean 'policy'?"),
    "missing dataset": (["train", "quickstart", "data=nowhere"], "nowhere"),
    "dataset without a camera": (dataset_with_one_camera, "has no camera wrist (it has agentview)"),
    "dataset of other actions": (dataset_with_other_actions, "'action.expert' has 8 dimensions, triune_tiny takes 7 for its action"),
    "dataset of other state": (dataset_with_other_state, "'observation.state' has 12 dimensions, triune_tiny takes 10 for its state"),
    "nothing to resume": (no_run_to_resume, "there is no run to resume"),
    "nobody serves": (["client", "ws://127.0.0.1:9", "--world", "cubes/lift-red"], "no connection to ws://127.0.0.1:9"),
    "no address": (["client", "localhost:8000", "--world", "cubes/lift-red"], "write ws://host:port"),
    "openpi without a rate": (["client", "ws://127.0.0.1:9", "--dialect", "openpi", "--world", "x"], "name --rate and --executed"),
    "a trial of nothing": (["trial", "nowhere", "elsewhere", "--world", "cubes/lift-red"], "nowhere"),
    "serving nothing": (["serve", "--policy", "nowhere", "--port", "0"], "nowhere"),
    "serving to all": (["serve", "--policy", "nowhere", "--host", "0.0.0.0"], "needs a token"),
    "unknown suite": (["eval", "quikstart", "--policy", "expert"], "there is no suite config 'quikstart'; did you mean 'quickstart'?"),
    "wrong suite key": (wrong_suite_key, "unknown key 'tasks.cubes/lift-red.scord'; did you mean 'scored'?"),
    "wrong suite override": (["eval", "quickstart", "slot=3", "--policy", "expert"], "unknown key 'slot'; did you mean 'slots'?"),
    "unknown task": (unknown_task, "cubes/lift-red"),
    "beside without a label": (["eval", "quickstart", "--policy", "expert", "--beside", "runs/x"], "--beside runs/x is not LABEL=DIR"),
    "training seed": (["eval", "quickstart", "--policy", "expert", "--seed", "7"], "lies among the training seeds"),
    "missing checkpoint": (["eval", "quickstart", "--policy", "runs/none"], "there is no checkpoint runs/none"),
    "no checkpoint in the folder": (no_checkpoint_in, "is no policy checkpoint"),
    "corrupt manifest": (broken_manifest, "manifest.json cannot be read"),
    "corrupt weights": (changed_weights, "model.safetensors is damaged or was changed"),
    "unknown world": (["data", "record", "cubes/lift-rde", "--episodes", "1", "--out", "d"], "cubes/lift-red"),
    "unknown camera": (
        ["data", "record", "cubes/lift-red", "--episodes", "1", "--out", "d", "--cameras", "top"],
        "world cubes/lift-red has no camera 'top'; it has agentview, wrist, sideview",
    ),
    "rate of a world that has one": (
        ["data", "record", "metaworld/push-v3", "--episodes", "1", "--out", "d", "--rate", "10"],
        "world metaworld/push-v3 runs at 80 Hz and at no other rate, so not at 10",
    ),
    "size that is none": (["data", "record", "cubes/lift-red", "--episodes", "1", "--out", "d", "--size", "96x"], "96x is no size"),
    "size too small": (["data", "record", "cubes/lift-red", "--episodes", "1", "--out", "d", "--size", "8"], "8 is no size of 16 pixels"),
    "scenes at a rate": (
        ["data", "record", "scenes:cubes", "--episodes", "1", "--out", "d", "--rate", "10"],
        "scenes:cubes are square pictures of agentview and wrist",
    ),
    "unknown scenes": (["data", "record", "scenes:cubse", "--episodes", "1", "--out", "d"], "there are no scenes of kind 'cubse'"),
    "no dataset to inspect": (["data", "inspect", "nowhere"], "nowhere"),
    "no dataset to sum up": (["data", "stats", "nowhere"], "nowhere"),
    "relative actions of no chunk": (["data", "stats", "nowhere", "--relative", "0,1"], "--relative and --chunk belong together"),
    "malformed dimensions": (["data", "stats", "x", "--relative", "0,a", "--chunk", "4"], "--relative '0,a' must list a state dimension"),
    "no dataset to time": (["data", "bench", "nowhere"], "nowhere"),
    "unknown mapping": (
        ["data", "convert", "nowhere", "out", "--robot", "libreo"],
        "there is no robot config 'libreo'; did you mean 'libero'?",
    ),
    "no dataset to convert": (["data", "convert", "nowhere", "out"], "there is no dataset folder nowhere"),
    "no dataset to repair": (["data", "repair", "nowhere"], "there is no dataset folder nowhere"),
    "unknown format": (small_dataset_to("v1.6"), "a dataset cannot be converted to 'v1.6'; choose v3.0 or v2.1"),
    "no incident": (["replay", "nowhere"], "nowhere is no incident"),
    "unknown spec": (["model", "show", "triune_tyni"], "did you mean 'triune_tiny'?"),
    "unknown spec to check": (["model", "check", "triune_tyni"], "did you mean 'triune_tiny'?"),
    "wrong spec key": (wrong_spec_key, "unknown key 'steams'; did you mean 'streams'?"),
    "no scenes to score on": (["model", "score", "nowhere", "--scenes", "empty"], "there are no scenes in empty"),
    "unknown benchmark": (["bench", "lodaer"], "there is no benchmark 'lodaer'; did you mean 'loader'?"),
    "change of no recipe": (["doctor", "train.steps=3"], "train.steps=3 changes a recipe, and none is given; name one by --recipe"),
    "wrong quickstart key": (["quickstart", "worker=3"], "unknown key 'worker'; did you mean 'workers'?"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(vla: Run, tmp_path: Path, mistake: str) -> None:
    arguments, sentence = MISTAKES[mistake]
    code, out, err = vla(*(arguments(tmp_path) if callable(arguments) else arguments))
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.strip()]
    assert lines[-1].startswith("error: "), err
    assert sentence in lines[-1]
    assert "Traceback" not in err


def test_the_data_verbs(vla: Run, tmp_path: Path) -> None:
    dataset(tmp_path)
    code, out, _ = vla("data", "inspect", "dataset", "--write", "mine.yaml", "--images", "pictures")
    assert (code, "Findings:" in out, "mapping: mine.yaml" in out) == (0, True, True)
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["agentview.png", "wrist.png"]
    code, out, _ = vla("data", "inspect", "dataset", "--robot", "mine.yaml", "--json")
    assert (code, json.loads(out)["features"]["action"]) == (0, 7)
    code, out, _ = vla("data", "convert", "dataset", "old", "--to", "v2.1", "--robot", "mine.yaml")
    assert (code, "camera wrist: every pixel equal" in out) == (0, True)
    assert vla("data", "repair", "dataset") == (0, "dataset: nothing is broken, 1 episodes\n", "")
    (tmp_path / "dataset/meta/stats.json").write_text("{")
    (tmp_path / "dataset/meta/tasks.parquet").unlink()
    code, out, _ = vla("data", "repair", "dataset", "--json")
    assert (code, json.loads(out)["backup"], json.loads(out)["kept"]) == (0, "dataset.broken", 1)
    assert vla("data", "inspect", "dataset", "--json")[0] == 0


def test_show_prints_a_spec(vla: Run) -> None:
    code, out, _ = vla("model", "show", "triune_tiny")
    assert code == 0
    assert all(name in out for name in ("obs", "future", "state", "action"))


def test_statistics_of_a_dataset(vla: Run, tmp_path: Path) -> None:
    """Written for a trainer, printed for people, and compared with those of a checkpoint."""
    folder = dataset(tmp_path)[2].partition("=")[2]
    code, out, _ = vla("data", "stats", folder, "--out", "statistics.json", "--json")
    found = json.loads(out)["statistics"]
    assert code == 0
    assert found["action"]["count"] == found["observation.state"]["count"] > 0
    assert load_statistics("statistics.json")["action"].q99 == tuple(found["action"]["q99"])
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint / "statistics.json").write_bytes(Path("statistics.json").read_bytes())
    relative = ",".join(["0"] + ["-"] * (len(found["action"]["mean"]) - 1))
    code, out, _ = vla("data", "stats", folder, "--relative", relative, "--chunk", "4", "--against", checkpoint)
    assert code == 0
    assert "relative, chunks of 4" in out
    assert "Use the statistics of the checkpoint: every dimension" in out


def test_check_prints_json(vla: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"spec": "a", "passed": True}, {"spec": "b", "passed": False}]
    monkeypatch.setattr("triune.vla.proofs.check", lambda specs: {"rows": rows})
    code, out, _ = vla("model", "check", "a", "b", "--json")
    assert code == 1
    assert json.loads(out) == {"rows": rows}
