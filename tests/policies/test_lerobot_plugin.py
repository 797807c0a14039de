"""lerobot 0.6.1 trains and evaluates our specs through ``lerobot_policy_triune``, and each opens what the other wrote."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from triune import UserError
from triune.config import merge
from triune.data import ChunkSampler, Episode, Observation, open_dataset
from triune.data.writer import DatasetWriter
from triune.policies import Request, find_checkpoint, load_policy, read_checkpoint, verify
from triune.policies.train.recipe import run

from ..client.fake import Fake
from ..envs.point_world import PointWorld, expert
from ..lerobot_peers import record_frames

CAMERAS = ("top", "hand")
CHANGES = ["cameras=[top, hand]", "heads.future.cameras=[top, hand]"]
Make = Callable[..., Any]


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return record_frames(tmp_path_factory.mktemp("theirs") / "d", use_videos=False)


@pytest.fixture(scope="session")
def spec(tiny_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The probe spec with its own cameras, states and actions."""
    file = tmp_path_factory.mktemp("spec") / "probe.yaml"
    file.write_text(yaml.safe_dump(merge(tiny_tree, {"streams": {"obs": {"length": 24}}})))
    return file


def plugin() -> Any:
    """The distribution in policies/plugin, which ``make venv`` installs."""
    return importlib.import_module("lerobot_policy_triune")


def plugin_policy() -> Any:
    return importlib.import_module("lerobot_policy_triune.modeling_triune").TriunePolicy


def lerobot(command: str, **said: Any) -> None:
    """``lerobot-train`` or ``lerobot-eval`` in this process; a dot in a name is written ``__``."""
    options = [f"--{name.replace('__', '.')}={value}" for name, value in said.items()]
    script = importlib.import_module(f"lerobot.scripts.lerobot_{command}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"lerobot-{command}", *options])
        patch.setattr(script, "init_logging", lambda **_: None)  # it would change the loggers of every test that follows
        script.main()


def learning(data: Path, out: Path, **more: Any) -> dict[str, Any]:
    """Options of a short training run."""
    run = {"output_dir": out, "batch_size": 4, "steps": 2, "save_freq": 2, "num_workers": 0, "log_freq": 1}
    return run | {"dataset__repo_id": "local/d", "dataset__root": data, "policy__push_to_hub": "false", "policy__device": "cpu"} | more


def anew(spec: Path) -> dict[str, Any]:
    """Options of a new policy for ``theirs``."""
    changes = json.dumps(CHANGES)
    return {"policy__type": "triune", "policy__spec": spec, "policy__overrides": changes, "policy__n_action_steps": 3}


@pytest.fixture(scope="session")
def trained(spec: Path, theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a policy that lerobot-train trained for two steps."""
    out = tmp_path_factory.mktemp("lerobot") / "run"
    lerobot("train", **learning(theirs, out, **anew(spec)))
    return out


@pytest.fixture
def fresh(spec: Path, theirs: Path) -> Make:
    """``fresh(changes..., **fields)``: a new policy, and lerobot's dataset with the frames that it asks for."""

    def make(*changes: str, **fields: Any) -> tuple[Any, Any]:
        from lerobot.datasets import LeRobotDataset
        from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
        from lerobot.datasets.factory import resolve_delta_timestamps
        from lerobot.policies.factory import make_policy

        config = plugin().TriuneConfig(spec=str(spec), overrides=[*CHANGES, *changes], device="cpu", n_action_steps=3, **fields)
        times = resolve_delta_timestamps(config, LeRobotDatasetMetadata("local/d", root=theirs))
        dataset = LeRobotDataset("local/d", root=theirs, delta_timestamps=times, video_backend="pyav")
        torch.manual_seed(0)
        return make_policy(config, ds_meta=dataset.meta), dataset

    return make


def batch_of(dataset: Any, frames: list[int]) -> dict[str, Any]:
    return torch.utils.data.default_collate([dataset[frame] for frame in frames])


def seen(rows: int, seed: int = 0) -> tuple[dict[str, Any], list[Observation]]:
    """The same observations as a batch of lerobot's evaluator, and in our words."""
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (rows, 32, 32, 3), np.uint8) for camera in CAMERAS}
    state = rng.normal(size=(rows, 4)).astype(np.float32)
    batch = {f"observation.images.{c}": torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for c, x in images.items()}
    ours = [Observation({c: images[c][row] for c in CAMERAS}, state[row], "fold it") for row in range(rows)]
    return batch | {"observation.state": torch.from_numpy(state), "task": ["fold it"] * rows}, ours


def test_what_lerobot_trained_is_a_checkpoint_of_ours(trained: Path, theirs: Path) -> None:
    folder = find_checkpoint(trained)
    assert folder == (trained / "checkpoints" / "000002" / "pretrained_model").resolve()
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"} <= {
        p.name for p in folder.iterdir()
    }
    checkpoint, policy = read_checkpoint(trained), load_policy(trained)
    assert len(rows := verify(checkpoint, policy)) == 5 and all(row.passed for row in rows)
    assert load_file(folder / "model.safetensors").keys() == policy.model.trained().keys()
    assert set(checkpoint.info.weights) == {"und", "future"}
    contract = checkpoint.contract
    assert (contract.camera_names, contract.rate, contract.chunk, contract.executed) == (CAMERAS, 10.0, 6, 3)
    assert (contract.state.names, contract.action.names) == (("pan", "lift", "elbow", "jaw"), ("pan", "lift"))
    action = open_dataset(theirs).vectors["action"]
    np.testing.assert_allclose(checkpoint.statistics["action"]["q99"], np.quantile(action, 0.99, axis=0), rtol=1e-6)


def test_training_sees_what_acting_sees(fresh: Make, theirs: Path) -> None:
    """Two pictures of each camera, four steps apart, and the frame that is foreseen; the ends of episodes included."""
    policy, dataset = fresh("history={frames: 2, every: 3}", "streams.obs.length=48")
    assert policy.config.observation_delta_indices == [-3, 0, 4]
    frames, ours = [0, 2, 5, 8, 9, 26], open_dataset(theirs)
    batch = batch_of(dataset, frames)
    inputs, targets = policy._inputs(batch), policy._targets(batch)
    starts, ends = np.array([0, 0, 0, 0, 9, 18]), np.array([8, 8, 8, 8, 17, 26])
    for view, camera in enumerate(CAMERAS):
        pictures = torch.from_numpy(ours.load_images(camera)).permute(0, 3, 1, 2)
        assert torch.equal(inputs.images[:, 2 * view], pictures[np.maximum(np.array(frames) - 3, starts)])
        assert torch.equal(inputs.images[:, 2 * view + 1], pictures[frames])
        assert torch.equal(targets.future[:, view], pictures[np.minimum(np.array(frames) + 4, ends)])
    drawn = ChunkSampler(ours, 6, 1, 0).gather(np.array(frames))
    np.testing.assert_array_equal(targets.mask.numpy(), drawn["mask"])
    there = drawn["mask"]
    np.testing.assert_array_equal(targets.actions.numpy()[there], policy.acting.action.normalise(drawn["action"])[there])
    np.testing.assert_array_equal(inputs.state.numpy(), policy.acting.state.normalise(drawn["state"]))
    words = policy.acting.prompts([ours.task_of_frame[frame] for frame in frames], 4)
    assert torch.equal(inputs.ids, words[0]) and torch.equal(inputs.present, words[1])


def test_only_what_is_trained_learns(fresh: Make) -> None:
    policy, dataset = fresh()
    assert {id(p) for p in policy.get_optim_params()} == {id(p) for n, p in policy.named_parameters() if ".und." not in n}
    optimizer = policy.config.get_optimizer_preset().build(policy.get_optim_params())
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    policy.train()
    loss, terms = policy.forward(batch_of(dataset, [0, 4, 8, 12]))
    assert terms.keys() == {"action_loss", "future_loss"} and not policy.model.mot.experts["und"].training
    loss.backward()
    optimizer.step()
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in changed if ".und." in name} == set()
    assert {"model.actions.action.out.weight", "model.foresight.future.queries"} <= changed
    assert all(p.grad is None for name, p in policy.named_parameters() if ".und." in name)


def test_actions_are_those_of_our_policy(trained: Path) -> None:
    folder, ours = find_checkpoint(trained), load_policy(trained)
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies.factory import make_pre_post_processors

    theirs = plugin_policy().from_pretrained(folder)
    before, after = make_pre_post_processors(PreTrainedConfig.from_pretrained(folder), str(folder))
    batch, observations = seen(5)
    theirs.reset()
    torch.manual_seed(3)
    with torch.inference_mode():
        steps = [after(theirs.select_action(before(dict(batch)))).numpy() for _ in range(4)]
    torch.manual_seed(3)
    for row in range(5):
        ours.reset(str(row), int(torch.randint(2**31, ())))
    plans = [[ours.act(Request(str(row), o)).chunk.actions for row, o in enumerate(observations)] for _ in range(2)]
    for step, (number, place) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0)]):
        np.testing.assert_array_equal(steps[step], np.stack([chunk[place] for chunk in plans[number]]))
    with pytest.raises(UserError, match="takes no noise"):
        theirs.predict_action_chunk(batch, noise=torch.zeros(1))


def test_training_goes_on_after_an_evaluation(fresh: Make) -> None:
    policy, dataset = fresh()
    with torch.inference_mode():
        policy.eval().select_action(seen(2)[0])
    policy.train()
    policy.forward(batch_of(dataset, [0, 1]))[0].backward()
    assert all(p.grad is not None for p in policy.get_optim_params())


def test_a_run_is_resumed(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "run", symlinks=True)
    settings = tmp_path / "run" / "checkpoints" / "last" / "pretrained_model" / "train_config.json"
    lerobot("train", config_path=settings, resume="true", steps=3, output_dir=tmp_path / "run")
    first, second = (load_file(find_checkpoint(folder) / "model.safetensors") for folder in (trained, tmp_path / "run"))
    assert first.keys() == second.keys() and not torch.equal(first["actions.action.out.weight"], second["actions.action.out.weight"])
    assert all(row.passed for row in verify(read_checkpoint(tmp_path / "run"), load_policy(tmp_path / "run")))


def test_lerobot_goes_on_with_what_vla_trained(spec: Path, theirs: Path, tmp_path: Path) -> None:
    own = {"cameras": list(CAMERAS), "state_dim": 4, "heads": {"future": {"cameras": list(CAMERAS)}, "action": {"action_dim": 2}}}
    train = {"steps": 1, "batch_size": 4, "precision": "fp32", "device": "cpu"}
    recipe = {"kind": "policy", "spec": str(spec), "overrides": own, "data": str(theirs), "executed": 2, "normalise_action": "min_max"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"train": train}))
    ours = run(str(tmp_path / "recipe.yaml"), [], tmp_path / "ours", resume=False)
    more = record_frames(tmp_path / "more", use_videos=False, episodes=1)
    lerobot("train", **learning(more, tmp_path / "kept", policy__path=ours))
    lerobot("train", **learning(more, tmp_path / "new", policy__path=ours, policy__new_statistics="true"))
    first, kept, new = (read_checkpoint(folder) for folder in (ours, tmp_path / "kept", tmp_path / "new"))
    assert kept.statistics == first.statistics and kept.contract == first.contract
    low = open_dataset(more).vectors["action"].min(0)
    np.testing.assert_array_equal(np.float32(new.statistics["action"]["min"]), low)
    assert new.contract.action.normalisation == "min_max"
    assert all(
        row.passed for folder in ("kept", "new") for row in verify(read_checkpoint(tmp_path / folder), load_policy(tmp_path / folder))
    )


@pytest.fixture
def point_env(monkeypatch: pytest.MonkeyPatch) -> None:
    """The point world in the place of the simulators."""
    module = importlib.import_module("lerobot_policy_triune.environment_triune")
    monkeypatch.setattr(module, "make_world", lambda name, render, size: PointWorld(name))


def test_lerobot_evaluates_in_a_world_what_it_trained_on_our_data(spec: Path, point_env: None, tmp_path: Path) -> None:
    """Our writer's dataset, 16 px pictures fitted into 32, one step of training, four episodes in two environments at once."""
    world = PointWorld("point/a")
    with DatasetWriter(tmp_path / "data", world.contract, 20) as writer:
        writer.add(world_episode(world))
    new = {"policy__type": "triune", "policy__spec": spec, "policy__image_size": "[32, 32]", "policy__n_action_steps": 6}
    lerobot("train", **learning(tmp_path / "data", tmp_path / "run", steps=1, **new))
    folder = find_checkpoint(tmp_path / "run")
    lerobot(
        "eval",
        policy__path=folder,
        env__type="triune",
        env__task="point/a",
        eval__n_episodes=4,
        eval__batch_size=2,
        eval__use_async_envs="false",
        output_dir=tmp_path / "eval",
        seed=1_000_000,
    )
    told = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert [task["task_group"] for task in told["per_task"]] == ["triune"]
    assert len(told["per_task"][0]["metrics"]["successes"]) == 4
    policy = load_policy(folder)
    assert (policy.contract.state.names, policy.contract.executed) == (("x", "y"), 6)
    same_rollout(folder, world)


def same_rollout(folder: Path, world: PointWorld) -> None:
    """From the same noise, lerobot's rollout and ours take the same actions to the last bit."""
    from lerobot.policies.factory import make_pre_post_processors
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.scripts.lerobot_eval import rollout

    theirs, ours = plugin_policy().from_pretrained(folder), load_policy(folder)
    vector, nothing = plugin().TriuneEnv(task="point/a").create_envs(1)["triune"][0], PolicyProcessorPipeline(steps=[])
    torch.manual_seed(4)
    played = rollout(vector, theirs, nothing, nothing, *make_pre_post_processors(theirs.config, str(folder)), seeds=[1])
    torch.manual_seed(4)
    ours.reset("s", int(torch.randint(2**31, ())))
    observation, info = world.reset(seed=1)
    taken: list[np.ndarray] = []
    while not info["is_success"] and len(taken) < world.max_steps:
        for action in ours.act(Request("s", world.observation(observation))).chunk.actions[:6]:
            if not info["is_success"] and len(taken) < world.max_steps:
                observation, _, _, _, info = world.step(action)
                taken.append(action)
    np.testing.assert_array_equal(played["action"][0].numpy(), np.stack(taken))


def world_episode(world: PointWorld) -> Episode:
    observation, _ = world.reset(seed=1)
    states, images = [], []
    actions = np.random.default_rng(0).uniform(-1, 1, (8, 3)).astype(np.float32)
    for action in actions:
        states.append(observation["agent_pos"])
        images.append(observation["pixels"])
        observation, *_ = world.step(action)
    pictures = {name: np.stack([image[name] for image in images]) for name in ("agentview", "wrist")}
    return Episode(pictures, np.stack(states), actions, world.task_description, {"world": world.name, "seed": 1, "success": False})


def test_success_ends_an_episode(point_env: None) -> None:
    config = plugin().TriuneEnv(task="point/a", fps=3)
    assert config.fps == 20 and config.features["pixels/wrist"].shape == (16, 16, 3)
    vector = config.create_envs(2)["triune"][0]
    vector.reset(seed=[1, 2])
    assert vector.call("_max_episode_steps") == (40, 40) and vector.call("task") == ("point/a", "point/a")
    assert vector.call("task_description") == ("go to the goal of point/a",) * 2
    for _ in range(40):
        goals = [expert(env.unwrapped.privileged()) for env in vector.envs]
        _, _, ended, cut, info = vector.step(np.float32(goals))
        if ended[0]:
            break
    assert ended[0] and not cut[0] and info["final_info"]["is_success"][0]
    with pytest.raises(UserError, match="--env.task names the world"):
        plugin().TriuneEnv()


@pytest.mark.slow
def test_lerobots_commands_run_by_themselves(spec: Path, tmp_path: Path) -> None:
    """The two commands of the plugin's README, each a process of its own that finds the plugin by its name, in a simulated world."""
    from triune.envs import make_world

    world = make_world("cubes/lift-red", size=32)
    observation, _ = world.reset(seed=0)
    still = np.zeros((9, world.contract.action.size), np.float32)
    images = {name: np.stack([image] * 9) for name, image in observation["pixels"].items()}
    with DatasetWriter(tmp_path / "data", world.contract, 20) as writer:
        writer.add(
            Episode(images, np.stack([observation["agent_pos"]] * 9), still, world.task_description, {"world": world.name, "seed": 0})
        )
    new = {"policy__type": "triune", "policy__spec": spec, "policy__n_action_steps": 6}
    evaluation = {"policy__path": tmp_path / "run" / "checkpoints" / "last" / "pretrained_model", "env__type": "triune"}
    evaluation |= {"env__task": "cubes/lift-red", "env__size": 32, "eval__n_episodes": 1, "eval__batch_size": 1, "seed": 1_000_000}
    for command, said in (
        ("train", learning(tmp_path / "data", tmp_path / "run", **new)),
        ("eval", evaluation | {"output_dir": tmp_path / "eval"}),
    ):
        options = [f"--{name.replace('__', '.')}={value}" for name, value in said.items()]
        run = subprocess.run([sys.executable, "-m", f"lerobot.scripts.lerobot_{command}", *options], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
    told = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert told["overall"]["n_episodes"] == 1 and Path(told["overall"]["video_paths"][0]).stat().st_size > 0


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"spec": None}, "needs a spec: --policy.spec"),
        ({"spec": "nowhere"}, "there is no model config 'nowhere'"),
        ({"overrides": []}, "has no camera agentview, wrist (it has top, hand)"),
        ({"overrides": ["cameras=[top, hand]", "colour=red"]}, "unknown key 'colour'"),
        ({"n_action_steps": 7}, "a chunk has 6 steps, not 7 that could be executed"),
        ({"action_normalisation": "quantiles"}, "'quantiles' is unknown"),
        ({"input_features": {"observation.state": ("STATE", (4,))}}, "have no camera"),
    ],
)
def test_mistakes_are_one_sentence(fields: dict[str, Any], said: str, spec: Path, theirs: Path) -> None:
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.policies.factory import make_policy

    if "input_features" in fields:
        fields = {"input_features": {k: PolicyFeature(FeatureType[kind], shape) for k, (kind, shape) in fields["input_features"].items()}}
    config = plugin().TriuneConfig(**{"spec": str(spec), "overrides": CHANGES, "device": "cpu"} | fields)
    with pytest.raises(UserError) as error:
        make_policy(config, ds_meta=LeRobotDatasetMetadata("local/d", root=theirs))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_saved_policy_keeps_its_network(trained: Path, theirs: Path, tmp_path: Path) -> None:
    from lerobot.configs import PreTrainedConfig
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    folder = find_checkpoint(trained)
    for option, said in (
        ('--overrides=["space.heads=8"]', "leave out --policy.overrides"),
        ("--chunk_size=4", "plans chunks of 6 steps, not 4"),
    ):
        with pytest.raises(UserError, match=said):
            plugin_policy().from_pretrained(folder, config=PreTrainedConfig.from_pretrained(folder, cli_overrides=[option]))
    longer = PreTrainedConfig.from_pretrained(folder, cli_overrides=["--n_action_steps=5"])
    assert plugin_policy().from_pretrained(folder, config=longer).acting.contract.executed == 5
    info = json.loads((theirs / "meta" / "info.json").read_text())
    info["features"]["action"]["names"] = ["knee", "toe"]
    shutil.copytree(theirs, tmp_path / "other")
    (tmp_path / "other" / "meta" / "info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="names is .*pan.* here and .*knee.* there"):
        plugin_policy().from_pretrained(folder, dataset_meta=LeRobotDatasetMetadata("local/d", root=tmp_path / "other"))
    with pytest.raises(UserError, match="learns its sizes from a dataset"):
        plugin_policy()(plugin().TriuneConfig(spec="triune_tiny", device="cpu"))


def test_a_hub_id_is_a_folder_of_the_cache(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own code finds a snapshot in its cache without a network; what was saved once is saved again the same."""
    import huggingface_hub.constants as hub

    cached = tmp_path / "hub" / "models--someone--folding"
    shutil.copytree(find_checkpoint(trained), cached / "snapshots" / "f0" / "")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("f0")
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    policy = plugin_policy().from_pretrained("someone/folding")
    assert policy.config.action_delta_indices == list(range(6)) and policy.config.input_features.keys() == {
        "observation.images.top",
        "observation.images.hand",
        "observation.state",
    }
    policy.save_pretrained(tmp_path / "again", state_dict=policy.state_dict())
    first, again = read_checkpoint(trained), read_checkpoint(tmp_path / "again")
    assert first.manifest == again.manifest


def test_golden_pictures_reach_the_hub(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lerobot uploads no pictures, without which a checkpoint is not whole."""
    from lerobot.policies.pretrained import PreTrainedPolicy

    sent: list[str] = []

    class Hub:
        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
            sent.extend(f"{repo_id}/{p.relative_to(folder_path)}" for p in Path(folder_path).rglob("*") if p.is_file())

    monkeypatch.setattr(importlib.import_module("lerobot_policy_triune.modeling_triune"), "HfApi", Hub)
    monkeypatch.setattr(PreTrainedPolicy, "push_model_to_hub", lambda *_: sent.append("lerobot's own"))
    policy = plugin_policy().from_pretrained(find_checkpoint(trained))
    policy.config.repo_id = "someone/folding"
    policy.push_model_to_hub(None)
    assert sent[0] == "lerobot's own" and {"someone/folding/golden/04-hand.png", "someone/folding/manifest.json"} <= set(sent)


def test_lerobot_evaluates_a_policy_behind_a_server(point_env: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its address, and by the folder that it saves; the token is in the environment and nowhere else."""
    asked: list[dict] = []
    monkeypatch.setenv("TRIUNE_TOKEN", "s3cret")

    def act(message: dict) -> np.ndarray:
        asked.append(message)
        return np.repeat([[0.5, -0.5, 1.0]], 4, 0).astype(np.float32)

    contract = {**PointWorld("point/a").contract.model_dump(mode="json"), "chunk": 4, "executed": 2}
    settings = {
        "env__type": "triune",
        "env__task": "point/a",
        "eval__n_episodes": 2,
        "eval__batch_size": 2,
        "seed": 1_000_000,
        "eval__use_async_envs": "false",
    }
    with Fake(token="s3cret", contract=contract, act=act) as server:
        lerobot(
            "eval",
            policy__type="triune_remote",
            policy__url=server.url,
            output_dir=tmp_path / "eval",
            **settings,
        )
        first = [message for message in asked if message["type"] == "infer"]
        config = importlib.import_module("lerobot_policy_triune").TriuneRemoteConfig(url=server.url, device="cpu")
        policy = importlib.import_module("lerobot_policy_triune.modeling_triune_remote").TriuneRemotePolicy(config)
        policy.save_pretrained(tmp_path / "saved")
        asked.clear()
        lerobot("eval", policy__path=tmp_path / "saved", output_dir=tmp_path / "again", **settings)
        again = [message for message in asked if message["type"] == "infer"]
        config.n_action_steps = 9
        with pytest.raises(UserError, match="has 4 steps, not 9"):
            type(policy)(config)
    assert len(first) == len(again) == 2 * 40 / 2
    assert [message["session"] for message in first[:2]] == ["0", "1"]
    seen = first[2]["observation"]
    assert set(seen["images"]) == {"agentview", "wrist"} and seen["instruction"] == "go to the goal of point/a" and seen["timestamp"] == 0.1
    np.testing.assert_allclose(seen["state"], [0.2, -0.2], atol=1e-6)  # two steps of what was answered
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    assert all("s3cret" not in path.read_text(errors="replace") for path in tmp_path.rglob("*.json"))
