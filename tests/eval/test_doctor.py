"""What does not fit is told in sentences, what fits is not; what the doctor passes trains."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from triune.cli.main import main
from triune.config import merge
from triune.data import Camera, Contract, Episode, Vector
from triune.data.writer import DatasetWriter
from triune.envs import make_world
from triune.errors import UserError
from triune.eval.doctor import examine
from triune.policies.train.recipe import run

SIDE = 32
STATE = Vector(names=tuple("abcde"), units=("m",) * 5, frame="base", rotation="axis_angle", gripper="width", mode="absolute")
ACTION = Vector(names=tuple("xyz"), units=("m", "m", "1"), frame="base", rotation="axis_angle", gripper="+1 closes", mode="relative")
CONTRACT = Contract(
    cameras=(Camera(name="agentview", height=SIDE, width=SIDE), Camera(name="wrist", height=SIDE, width=SIDE)),
    state=STATE,
    action=ACTION,
    rate=20.0,
    render="fast",
)


def record(folder: Path, contract: Contract = CONTRACT, scale: float = 1.0, task: str = "lift the red cube", spoil: bool = False) -> Path:
    """Four episodes of noise under a contract."""
    with DatasetWriter(folder, contract, int(contract.rate or 20)) as writer:
        for i in range(4):
            rng = np.random.default_rng(i)
            images = {c.name: rng.integers(0, 256, (9, c.height or SIDE, c.width or SIDE, 3), np.uint8) for c in contract.cameras}
            state, action = (rng.normal(size=(9, vector.size)).astype(np.float32) for vector in (contract.state, contract.action))
            if spoil and i == 2:
                action[4, 0] = np.nan
            writer.add(Episode(images, scale * state, action, task, {"world": "noise", "seed": i, "success": True}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record(tmp_path_factory.mktemp("doctor") / "data")


@pytest.fixture(scope="module")
def tree(data: Path, tiny_tree: dict) -> dict:
    """A recipe that fits, its spec beside the data."""
    spec = data.parent / "probe.yaml"
    tiny = {"streams": {"obs": {"length": 24}}, "heads": {"future": {"horizon": 3}}}
    spec.write_text(yaml.safe_dump(merge(tiny_tree, tiny)))
    train = {"steps": 2, "batch_size": 4, "precision": "fp32", "device": "cpu", "save_every": 2}
    return {"kind": "policy", "spec": str(spec), "data": str(data), "executed": 3, "train": train}


@pytest.fixture(scope="module")
def checkpoint(tree: dict, data: Path) -> Path:
    return run(written(tree, data.parent), [], data.parent / "run", resume=False)


def written(tree: dict, folder: Path, name: str = "recipe") -> str:
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return str(path)


def tuned(tree: dict, checkpoint: Path, **more: Any) -> dict:
    return {k: v for k, v in tree.items() if k not in ("spec", "executed")} | {"init": str(checkpoint)} | more


def said(found: dict, level: str) -> str:
    """All sentences of a level, each with its mend."""
    assert all(row["sentence"] and row["mend"] for row in found["findings"])
    assert found["passed"] == (not any(row["level"] == "conflict" for row in found["findings"]))
    return "\n".join(f"{row['between']}: {row['sentence']} -> {row['mend']}" for row in found["findings"] if row["level"] == level)


def with_action(**changes: Any) -> Contract:
    return CONTRACT.model_copy(update={"action": ACTION.model_copy(update=changes)})


def with_cameras(*cameras: Camera) -> Contract:
    return CONTRACT.model_copy(update={"cameras": cameras})


def test_nothing_given_is_the_environment_alone() -> None:
    found = examine()
    assert (found["passed"], found["contracts"], found["statistics"]) == (True, {}, {})
    assert {row["between"] for row in found["findings"]} <= {"environment"}
    assert found["environment"].keys() == {"python", "torch", "cpu", "gpu", "precision", "video", "extras"}
    assert found["environment"]["precision"].split()[0] in ("float32", "bfloat16")


def test_a_package_that_is_missing_or_another_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["numpy>=2", "numpy<1", "nothing-of-that-name>=3", "torch==0.1; extra == 'sim'", "numpy>=2; extra == 'train'"]
    monkeypatch.setattr("triune.eval.environment.requires", lambda name: needs)
    found = examine()
    text = said(found, "conflict")
    assert "triune-vla needs numpy<1, and 2" in text and "needs nothing-of-that-name>=3, which is not installed" in text
    assert "the extra sim (worlds) needs torch==0.1, and 2" in said(found, "note") and "numpy>=2" not in text
    assert found["environment"]["extras"] == "lerobot, hdf5, train, eval"


def test_what_fits_has_no_conflicts_and_trains(tree: dict, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    recipe = written(tree, tmp_path)
    found = examine(recipe=recipe, data=str(data), policy=str(checkpoint))
    assert said(found, "conflict") == "" and said(found, "unknown") == ""
    assert found["contracts"].keys() == {"policy", "recipe", "data"} and found["contracts"]["recipe"] == found["contracts"]["policy"]
    assert found["statistics"]["policy"]["action"]["use"] == "checkpoint"
    assert run(recipe, [], tmp_path / "run", resume=False).is_dir()

    lora = {"experts": {"act": {"lora": {"rank": 2}}}, "statistics": "checkpoint"}
    recipe = written(tuned(tree, checkpoint, **lora), tmp_path, "tuned")
    found = examine(recipe=recipe, policy=str(checkpoint))
    assert found["passed"] and found["contracts"].keys() == {"init", "recipe", "data"}
    assert "reference" not in said(found, "note") and "statistics" not in said(found, "note")
    assert run(recipe, [], tmp_path / "tuned", resume=False).is_dir()


@pytest.mark.parametrize(
    ("contract", "sentence", "mend"),
    [
        (with_action(gripper="-1 closes"), "action: gripper is +1 closes in the policy and -1 closes in the data", "`gripper:`"),
        (with_action(mode="absolute"), "action: mode is relative in the policy and absolute in the data", "`relative:`"),
        (with_action(rotation="rot6d"), "action: rotation is axis_angle in the policy and rot6d in the data", "into that form"),
        (with_action(units=("mm", "mm", "1")), "action: units is ('m', 'm', '1') in the policy and ('mm', 'mm', '1')", "does not convert"),
        (with_action(names=("y", "x", "z")), "action: names is ('x', 'y', 'z') in the policy and ('y', 'x', 'z') in the data", "order"),
        (
            with_action(names=("x", "y"), units=("m", "m")),
            "3 dimensions (x, y, z) in the policy and 2 (x, y) in the data",
            "slots",
        ),
        (CONTRACT.model_copy(update={"rate": 10.0}), "contract: rate is 20.0 in the policy and 10.0 in the data", "record at that rate"),
        (CONTRACT.model_copy(update={"render": "default"}), "contract: render is fast in the policy and default", "`render:`"),
        (
            with_cameras(CONTRACT.cameras[0], Camera(name="wrist", height=48, width=32)),
            "wrist: height is 32 in the policy",
            "`init`",
        ),
        (with_cameras(*(c.model_copy(update={"flip": "vertical"}) for c in CONTRACT.cameras)), "flip is none in the policy and", "`flip:`"),
        (
            with_cameras(Camera(name="hand", height=SIDE, width=SIDE), Camera(name="top", height=SIDE, width=SIDE)),
            "camera agentview, wrist is expected but there is only hand, top",
            "perhaps agentview: {source: top}, wrist: {source: hand}",
        ),
    ],
)
def test_a_policy_and_data_of_another_convention(contract: Contract, sentence: str, mend: str, checkpoint: Path, tmp_path: Path) -> None:
    found = examine(policy=str(checkpoint), data=str(record(tmp_path / "other", contract)))
    lines = [line for line in said(found, "conflict").splitlines() if sentence in line]
    assert lines and all(line.startswith("policy and data: ") and mend in line for line in lines)


def test_what_only_one_says_is_unknown_and_asked(checkpoint: Path, tmp_path: Path) -> None:
    plain = with_action(gripper=None, mode=None).model_copy(update={"render": None})
    found = examine(policy=str(checkpoint), data=str(record(tmp_path / "plain", plain)))
    assert found["passed"]
    text = said(found, "unknown")
    assert "action: gripper is +1 closes in the policy and unknown in the data; action: mode is relative in the policy and unknown" in text
    assert "find it out and say it in the mapping" in text and "looks" not in text
    alone = examine(data=str(tmp_path / "plain"))
    assert alone["passed"] and "nobody says render, action mode -> find them out" in said(alone, "unknown")


def test_going_on_from_a_policy_of_other_conventions_is_noted(tree: dict, checkpoint: Path, tmp_path: Path) -> None:
    other = record(tmp_path / "other", with_action(gripper="-1 closes"), scale=57.2958, task="stack the cubes")
    found = examine(recipe=written(tuned(tree, checkpoint, statistics="checkpoint", prompt="do it"), tmp_path), data=str(other))
    assert found["passed"], said(found, "conflict")
    text = said(found, "note")
    assert "init and data: action: gripper is +1 closes in the init and -1 closes in the data" in text
    assert "observation.state has drifted" in text and "degrees where the checkpoint has radians?" in text
    assert "the prompt 'do it' leaves the instruction out" in text and "prompt was {instruction} in" in text
    assert found["statistics"]["init"]["observation.state"]["dimensions"][0]["outside"] > 0.5
    changed = examine(recipe=written(tuned(tree, checkpoint), tmp_path))
    assert "`statistics: checkpoint` would keep it so" in said(changed, "note")


def drop_frames(tree: dict, folder: Path) -> dict:
    return tree | {"data": str(record(folder / "nan", spoil=True))}


def renamed(tree: dict, folder: Path, **more: Any) -> dict:
    cameras = (Camera(name="hand", height=SIDE, width=SIDE), Camera(name="top", height=SIDE, width=SIDE))
    return tree | {"data": str(record(folder / "renamed", with_cameras(*cameras)))} | more


def sized(tree: dict, folder: Path, *sides: int, heads: Any = None) -> dict:
    cameras = tuple(Camera(name=c.name, height=side, width=side) for c, side in zip(CONTRACT.cameras, sides, strict=True))
    return tree | {"data": str(record(folder / "sized", with_cameras(*cameras)))} | ({"overrides": heads} if heads else {})


NO_FORESIGHT = {"streams": {"future": None}, "heads": {"future": None}, "edges": {"future": None, "action": {"future": None}}}
NO_FORESIGHT["experts"] = {"gen": None}
MISFITS: dict[str, tuple[Callable[[dict, Path], dict], str]] = {
    "not finite": (drop_frames, "action has NaN or infinity in 1 frames, of episodes 2"),
    "cameras": (renamed, "has no camera agentview, wrist (it has hand, top), which probe sees -> record it, or say by `cameras:`"),
    "stand-ins": (renamed, "such as cameras=[top,hand]"),
    "foreseen": (
        lambda t, f: renamed(t, f, cameras=["top", "hand"]),
        "no camera agentview (it has hand, top), which heads.future foresees",
    ),
    "foreseen size": (lambda t, f: sized(t, f, 48, 48), "camera agentview is 48x48, heads.future foresees 32x32 -> record at that size"),
    "sizes": (lambda t, f: sized(t, f, 32, 48), "has images of several sizes, agentview 32x32, wrist 48x48, which probe does not scale"),
    "tokens": (
        lambda t, f: sized(t, f, 48, 48, heads=NO_FORESIGHT),
        "are 48x48, which give 9 tokens each, and probe has room for 4",
    ),
    "state": (
        lambda t, f: t | {"overrides": {"state_dim": 4}},
        "'observation.state' has 5 dimensions, probe takes 4 for its state",
    ),
    "column": (lambda t, f: t | {"action_key": "action.expert"}, "has no column 'action.expert' -> set action_key to one of action"),
    "prompt": (lambda t, f: t | {"overrides": {"streams": {"obs": {"length": 8}}}}, "the spec's prompt stream holds 8"),
    "expert": (lambda t, f: t | {"experts": {"acct": {}}}, "experts.acct: probe has no such expert; it has act, gen, und"),
    "unlearned": (lambda t, f: t | {"experts": {"act": {"frozen": True}}}, "experts.act would stay random"),
    "relative": (lambda t, f: t | {"relative": ["x"]}, "relative: there is no state called 'x'"),
    "weights": (lambda t, f: t | {"overrides": {"experts": {"und": {"weights": "path:nowhere"}}}}, "there is no folder"),
    "hub": (lambda t, f: t | {"overrides": {"experts": {"und": {"weights": "hf:a/b@main"}}}}, "'hf:a/b@main' is not in the hub's cache"),
    "data": (lambda t, f: t | {"data": str(f / "nowhere")}, "there is no dataset folder"),
    "init": (lambda t, f: tuned(t, f / "nowhere"), "there is no checkpoint"),
    "shares": (lambda t, f: merge(t, {"train": {"accumulate": 3}}), "train.batch_size is 4, which 1 processes cannot share evenly"),
    "hold out": (lambda t, f: t | {"hold_out": 0.99}, "no episode is left for training"),
    "mapping": (lambda t, f: t | {"robot": "libero"}, "the mapping 'libero' does not fit"),
    "key": (lambda t, f: t | {"executde": 3}, "unknown key 'executde'; did you mean 'executed'?"),
    "kind": (lambda t, f: {"kind": "polici"}, "its kind 'polici' is unknown; did you mean 'policy'?"),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_recipe_that_training_refuses(misfit: str, tree: dict, tmp_path: Path) -> None:
    """With the words of the refusal."""
    change, sentence = MISFITS[misfit]
    recipe = written(change(tree, tmp_path), tmp_path)
    found = examine(recipe=recipe)
    assert not found["passed"] and sentence in said(found, "conflict")
    with pytest.raises(UserError) as error:
        run(recipe, [], tmp_path / "run", resume=False)
    if misfit not in ("not finite", "hub"):  # which statistics and the hub refuse in words of their own
        assert sentence.split(" -> ")[0] in str(error.value)


def test_a_recipe_of_another_kind_is_no_policy(tmp_path: Path) -> None:
    assert "is a recipe of kind vlm, which has no robot's data" in said(examine(recipe="embedded_vlm"), "conflict")


def test_a_checkpoint_that_would_not_load(tree: dict, checkpoint: Path, tmp_path: Path) -> None:
    """Its base gone, its weights others, its files damaged."""
    base = Path(shutil.copytree(checkpoint, tmp_path / "base"))
    folder = run(written(tuned(tree, base, experts={"act": {"lora": {"rank": 2}}}), tmp_path), [], tmp_path / "run", resume=False)
    assert examine(policy=str(folder))["passed"]
    base.rename(tmp_path / "elsewhere")
    text = said(examine(policy=str(folder)), "conflict")
    assert "policy: " in text and "was fine-tuned from the checkpoint" in text and "which is not there" in text
    (folder / "policy.json").write_text((folder / "policy.json").read_text() + " ")
    assert "policy.json is damaged or was changed" in said(examine(policy=str(folder)), "conflict")
    assert "there is no checkpoint" in said(examine(policy=str(tmp_path / "none")), "conflict")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a world's recorder writes: the world's contract and instruction."""
    world = make_world("cubes/lift-red", size=SIDE)
    return record(tmp_path_factory.mktemp("world") / "data", world.contract, task=world.task_description)


def test_data_and_a_world(recorded: Path, checkpoint: Path) -> None:
    fits = examine(data=str(recorded), world="cubes/lift-red")
    assert fits["passed"] and not [row for row in fits["findings"] if "world" in row["between"]]
    assert fits["contracts"]["world"] == fits["contracts"]["data"]
    other = examine(data=str(recorded), world="cubes/lift-green")
    assert other["passed"] and "which the data never says" in said(other, "note")
    far = examine(data=str(recorded), world="metaworld/push-v3")
    text = said(far, "conflict")
    assert (
        "runs at 80 Hz and at no other rate" in text and "state has 10 dimensions" in text and "rate is 20.0 in the data and 80.0" in text
    )
    text = said(examine(policy=str(checkpoint), world="cubes/lift-red"), "conflict")
    assert "policy and world: state has 5 dimensions (a, b, c, d, e) in the policy and 10 (eef_x" in text
    assert "did you mean 'cubes/lift-red'" in said(examine(world="cubes/lift-rde"), "conflict")


def test_a_mapping_is_compared_without_its_data(checkpoint: Path) -> None:
    found = examine(robot="libero", policy=str(checkpoint))
    assert "state has 5 dimensions" in said(found, "conflict") and found["contracts"]["data"]["rate"] == 20
    assert "there is no robot config 'libreo'; did you mean 'libero'?" in said(examine(robot="libreo"), "conflict")


def test_a_policy_of_lerobot_is_asked_without_its_weights(data: Path, tmp_path: Path) -> None:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.factory import make_pre_post_processors

    images = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, SIDE, SIDE)) for name in ("agentview", "wrist")}
    config = ACTConfig(
        input_features={**images, "observation.state": PolicyFeature(FeatureType.STATE, (5,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (4,))},
        device="cpu",
    )
    config.save_pretrained(tmp_path / "act")
    for processor in make_pre_post_processors(config):
        processor.save_pretrained(tmp_path / "act")
    found = examine(policy=str(tmp_path / "act"), data=str(data))
    assert "action has 4 dimensions (action_0, action_1, action_2, action_3) in the policy and 3 (x, y, z)" in said(found, "conflict")
    assert "camera agentview: flip is unknown in the policy and none in the data" in said(found, "unknown")


def test_the_command(data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def vla(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vla", "doctor", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return (int(end.value.code or 0), *capsys.readouterr())

    code, out, _ = vla("--data", str(data), "--policy", str(checkpoint))
    assert code == 0 and "Conventions" in out and "Nothing conflicts." in out and "in ranges of policy" in out
    code, out, _ = vla("--json", "--data", str(tmp_path / "nowhere"))
    assert code == 1 and json.loads(out)["passed"] is False
