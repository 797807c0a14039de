"""A folder that lerobot wrote, converted, acts as lerobot does: its processors, its network, its processors."""

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from triune import UserError
from triune.cli import model as cli
from triune.cli.main import main
from triune.config import load_tree, merge, parse
from triune.data import Observation
from triune.policies import Request, TriunePolicy, load_policy, read_checkpoint, verify
from triune.policies.checkpoint import seal
from triune.policies.convert import convert, fitted
from triune.policies.released.base import Sizes, by_layout
from triune.policies.triune import Undrawn, anchored
from triune.vla import Spec, load_spec
from triune.vla.model import Model, sketch
from triune.vla.weights.references import ASSETS
from triune.vla.weights.released import HEAD_DIM, LAYOUTS, VISION_HEADS

from ..lerobot_peers import CHUNK, DIM, SIDE, SMOL_SIDE, WIDTH, pi_classes, pi_config, pi_fill, smol_config, smol_fill, smol_folder
from .tokens import byte_tokenizer

KINDS = ("pi0", "pi05", "smolvla")
STATE_SIZE, ACTION_SIZE = 4, 3  # of the robot; the networks have 6
STATE = {
    "mean": [0.1, -0.2, 0.3, 2.0],
    "std": [0.5, 1.5, 0.25, 0.0],
    "min": [-1.0, -3.0, 0.0, 2.0],
    "max": [1.5, 3.0, 0.9, 2.0],
    "q01": [-0.9, -2.5, 0.05, 2.0],
    "q99": [1.4, 2.9, 0.8, 2.0],
}
MODES = {
    "pi0": {"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "QUANTILES"},
    "pi05": {"VISUAL": "IDENTITY", "STATE": "QUANTILES", "ACTION": "QUANTILES"},
    "smolvla": {"VISUAL": "IDENTITY", "STATE": "MIN_MAX", "ACTION": "MEAN_STD"},
}


@dataclass
class Released:
    """A policy of lerobot, its processors, the folder it was saved to, and where its tokenizer is."""

    kind: str
    policy: Any
    before: Any
    after: Any
    folder: Path
    tokenizer: Path
    answers: list[np.ndarray] = field(default_factory=list)  # to CASES

    def chunk(self, observations: list[Observation], noise: np.ndarray) -> np.ndarray:
        """What lerobot answers to observations of the same sizes: (B, C, A) in physical units."""
        batch: dict[str, Any] = {"task": [o.instruction for o in observations]}
        batch["observation.state"] = torch.from_numpy(np.stack([o.state for o in observations]))
        for camera in observations[0].images:
            pixels = torch.from_numpy(np.stack([o.images[camera] for o in observations]))
            batch[f"observation.images.{camera}"] = pixels.permute(0, 3, 1, 2).float() / 255
        actions = self.policy.predict_action_chunk(self.before(batch), noise=torch.from_numpy(noise))
        return self.after(actions).numpy()


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes each kind of released policy once."""
    made: dict[str, Released] = {}
    with pytest.MonkeyPatch.context() as patch:
        for table, key, value in (
            (HEAD_DIM, ("paligemma", WIDTH), DIM),
            (VISION_HEADS, ("paligemma", 24), 2),
            (HEAD_DIM, ("smolvlm", 32), 8),
            (VISION_HEADS, ("smolvlm", 32), 4),
        ):
            patch.setitem(table, key, value)

        def make(kind: str) -> Released:
            if kind not in made:
                with pytest.MonkeyPatch.context() as building:
                    made[kind] = release(kind, tmp_path_factory.mktemp(kind), building)
            return made[kind]

        yield make


def release(kind: str, folder: Path, patch: pytest.MonkeyPatch) -> Released:
    import lerobot.processor.tokenizer_processor as tokenizing
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.factory import make_pre_post_processors
    from transformers import AutoTokenizer

    views = {f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)) for name in ("top", "wrist")}
    features = {
        "input_features": views | {"observation.state": PolicyFeature(FeatureType.STATE, (STATE_SIZE,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION_SIZE,))},
        "normalization_mapping": MODES[kind],
        "empty_cameras": 1,
    }
    stats = {
        "observation.state": {name: np.float32(row) for name, row in STATE.items()},
        "action": {name: 2 * np.float32(row[:ACTION_SIZE]) for name, row in STATE.items()},
    }
    tokenizer = byte_tokenizer(folder / "tokenizer")
    if kind == "smolvla":
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

        smol_folder(folder / "vlm")
        byte_tokenizer(folder / "vlm")
        size = {"resize_imgs_with_padding": (SMOL_SIDE, SMOL_SIDE), "load_vlm_weights": False}
        policy = SmolVLAPolicy(smol_config(folder / "vlm", **features, **size))
        smol_fill(policy.model)
    else:  # its processors name PaliGemma's tokenizer, which is not on this machine
        own = AutoTokenizer.from_pretrained(tokenizer)
        patch.setattr(tokenizing, "AutoTokenizer", type("Local", (), {"from_pretrained": staticmethod(lambda name: own)}))
        package, module = pi_classes(kind, patch)
        policy = getattr(module, {"pi0": "PI0Policy", "pi05": "PI05Policy"}[kind])(pi_config(package, **features))
        pi_fill(policy.model)
    policy.eval()
    before, after = make_pre_post_processors(policy.config, dataset_stats=stats)
    for part in (policy, before, after):
        part.save_pretrained(folder / "policy")
    (folder / "policy" / "README.md").write_text("---\nlicense: apache-2.0\ntags: [robotics]\n---\n\n# A policy\n")
    return Released(kind, policy, before, after, folder / "policy", tokenizer)


@pytest.fixture(scope="module")
def converted(released: Callable[[str], Released], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Converts each kind of released policy once, by the command."""
    done: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp("converted") / kind
            source = released(kind)
            cli.convert(source.folder, done[kind], tokenizer=None if kind == "smolvla" else source.tokenizer, json=kind == "pi0")
        return done[kind]

    return get


def observation(seed: int, text: str, sizes: dict[str, tuple[int, int]]) -> Observation:
    """Noise of the given sizes (height, width), and a state with one dimension at an end of its range and one beyond it."""
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (*size, 3), np.uint8) for name, size in sizes.items()}
    state = np.array([STATE["q01"][0], 9.0 if seed else -9.0, rng.uniform(0, 1), 2.0], np.float32)
    return Observation(images, state, text)


BOTH = {"top": (48, 64), "wrist": (31, 20)}
CASES = (  # each: observations that lerobot can take in one batch
    [observation(0, "pick up the cube", BOTH), observation(1, " put_the cup\non the plate\n", BOTH)],
    [observation(2, "close the drawer", {"top": (SIDE, SIDE)})],  # the wrist camera is absent
    [observation(3, "push " + "the very " * 40 + "long thing", {"wrist": (SMOL_SIDE, SMOL_SIDE), "top": (33, 57)})],  # cut off
)


def difference(source: Released, policy: TriunePolicy, change: Callable[[Observation], Observation] = lambda o: o) -> float:
    """The largest difference of an action, as a part of the largest action; ours answers all observations in one call."""
    flat = [o for case in CASES for o in case]
    for number, _ in enumerate(flat):
        policy.reset(str(number), seed=10 + number)
    requests = [Request(str(number), change(o)) for number, o in enumerate(flat)]
    noise = np.stack([policy._noise(request)["action"] for request in requests])
    ours = np.stack([plan.chunk.actions for plan in policy.plan(requests)])
    if not source.answers:
        ends = np.cumsum([len(case) for case in CASES])
        source.answers += [source.chunk(case, noise[end - len(case) : end]) for case, end in zip(CASES, ends, strict=True)]
    theirs = np.concatenate(source.answers)
    assert theirs.shape == ours.shape == (len(flat), CHUNK, ACTION_SIZE)
    return float(np.abs(theirs - ours).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_policy_acts_as_lerobot_does(kind: str, released: Any, converted: Any) -> None:
    source, policy = released(kind), load_policy(converted(kind))
    assert difference(source, policy) < 1e-6
    assert np.abs(np.concatenate(source.answers)).max() < 50  # so it is below 5e-5 in units of the actions


def test_prompts_of_one_call_are_padded_to_lengths_of_their_own(converted: Any) -> None:
    policy = load_policy(converted("pi05"))
    observations = [o for case in CASES for o in case]
    lengths = [policy._length(o) for o in observations]
    assert len(set(lengths)) > 1 and max(lengths) <= policy.answers.full
    asked = [Request(str(number), o) for number, o in enumerate(observations)]
    for request in asked:
        policy.reset(request.session, seed=0)
    together = [plan.chunk.actions for plan in policy.plan(asked)]
    for request, chunk in zip(asked, together, strict=True):
        policy.reset(request.session, seed=0)
        np.testing.assert_array_equal(policy.act(request).chunk.actions, chunk)


def test_weights_may_be_held_in_bf16(converted: Any) -> None:
    found = read_checkpoint(converted("pi0"))
    exact, narrow = load_policy(found.folder), load_policy(found.folder, precision="bf16")
    assert (exact.dtype, narrow.dtype) == ("float32", "bfloat16")
    rows = verify(found, narrow, narrow.dtype)
    assert all(row.passed for row in rows) and max(row.error for row in rows) > 0
    assert not all(row.passed for row in verify(found, narrow, "float32"))
    with pytest.raises(UserError, match="'und' is a 'smolvlm' model, not known to be right in bf16"):
        load_policy(converted("smolvla"), precision="bf16")
    with pytest.raises(UserError, match="precision is one of auto, fp32, bf16, not 'half'"):
        load_policy(found.folder, precision="half")  # type: ignore[arg-type]


def settings(policy: TriunePolicy, part: str, **changes: Any) -> None:
    found = getattr(policy.settings, part).model_copy(update=changes)
    policy.settings = policy.settings.model_copy(update={part: found})


def with_black(o: Observation) -> Observation:
    return Observation({"wrist": np.zeros((8, 8, 3), np.uint8)} | o.images, o.state, o.instruction)


PARTS = ("template", "edits", "padding", "state", "absence")


@pytest.mark.parametrize(("kind", "what"), [*((kind, part) for kind in KINDS for part in PARTS), ("pi05", "bins")])
def test_each_part_of_the_processing_matters(kind: str, what: str, released: Any, converted: Any) -> None:
    policy = load_policy(converted(kind))
    match what:
        case "template":
            template = (policy.contract.prompt or "").removesuffix("\n").removesuffix(" ")
            policy.contract = policy.contract.model_copy(update={"prompt": template})
        case "edits":
            settings(policy, "words", edits=())
        case "padding":
            other = {"centre": "bottom_right", "bottom_right": "centre"}[policy.settings.resize.at]
            settings(policy, "resize", at=other)
        case "state":
            policy.state = policy.state.model_copy(update={"bias": 0.1})
        case "bins":
            settings(policy, "words", state_bins=255)
    assert difference(released(kind), policy, with_black if what == "absence" else lambda o: o) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_checkpoint_stands_alone(kind: str, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved elsewhere and read from another folder it passes its golden observations, one of them with a single camera."""
    shutil.copytree(converted(kind), tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    found = read_checkpoint("moved")
    rows = verify(found, load_policy("moved"))
    assert len(rows) == 5 and all(row.passed for row in rows)
    assert len(found.golden.cases[4].images) == 1
    assert found.info.source == {"format": "lerobot", "type": kind, "licence": "apache-2.0"}
    assert found.info.weights["und"].ref == "path:vlm"
    (tmp_path / "moved" / "vlm" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="damaged or was changed"):
        load_policy("moved")
    seal(tmp_path / "moved")
    with pytest.raises(UserError, match="not those that were trained with"):
        load_policy("moved")


def test_weights_that_are_replaced_are_not_drawn(converted: Any) -> None:
    spec = parse(Spec, load_tree(converted("pi0") / "spec.yaml"), "spec")
    with Undrawn():
        before = torch.get_rng_state()
        Model(anchored(spec, converted("pi0")))  # transformers draws its weights under a seed of its own
        torch.nn.init.normal_(torch.empty(3))
        assert torch.equal(torch.get_rng_state(), before)


def test_a_contract_may_do_without_optional_cameras(converted: Any) -> None:
    mine = read_checkpoint(converted("pi0")).contract
    top = mine.model_copy(update={"cameras": mine.cameras[:1]})
    other = mine.model_copy(update={"cameras": (mine.cameras[0].model_copy(update={"name": "front"}),)})
    assert mine.conflicts(top) == []
    assert "camera top, wrist, empty_camera_0 is expected" in mine.conflicts(other)[0]
    with pytest.raises(UserError, match="needs camera 'top'"):
        load_policy(converted("pi0")).inputs([observation(0, "go", {"front": (9, 9)})])


def test_frozen_weights_keep_their_type(released: Any, tmp_path: Path) -> None:
    source = copied(released("smolvla"), tmp_path)
    tensors = load_file(source / "model.safetensors")
    half = {name: t.bfloat16() if ".vlm." in name else t for name, t in tensors.items()}
    save_file(half, source / "model.safetensors")
    convert(source, tmp_path / "out")
    assert {t.dtype for t in load_file(tmp_path / "out" / "vlm" / "model.safetensors").values()} == {torch.bfloat16}
    assert {p.dtype for p in load_policy(tmp_path / "out").model.parameters()} == {torch.float32}


def test_a_policy_without_statistics_takes_values_as_they_are(released: Any, tmp_path: Path) -> None:
    """As lerobot does: released base policies have none."""
    source = copied(released("pi0"), tmp_path)
    for name in ("policy_preprocessor", "policy_postprocessor"):
        edit(source / f"{name}.json", lambda tree: [step.pop("state_file", None) for step in tree["steps"]])
    convert(source, tmp_path / "out", released("pi0").tokenizer)
    policy = load_policy(tmp_path / "out")
    assert policy.state.normalise(np.array([[1.5] * STATE_SIZE])).tolist() == [[1.5] * STATE_SIZE]
    assert policy.action.unnormalise(np.array([[-2.5] * ACTION_SIZE])).tolist() == [[-2.5] * ACTION_SIZE]


def test_names_and_steps_are_those_of_the_folder(released: Any, tmp_path: Path) -> None:
    """Cameras have the names that observations had before lerobot renamed them; the flow takes as many steps as there."""
    source, features = copied(released("pi0"), tmp_path), ["x", "y", "gripper"]
    config(num_inference_steps=3, action_feature_names=features)(source)
    step(0, config={"rename_map": {"observation.images.front": "observation.images.top"}})(source)
    contract = convert(source, tmp_path / "out", released("pi0").tokenizer)
    assert contract.camera_names == ("front", "wrist", "empty_camera_0")
    assert contract.action.names == tuple(features) and contract.state.names == ("state_0", "state_1", "state_2", "state_3")
    phases = load_policy(tmp_path / "out").model.graph.phases
    assert [p.steps for p in phases.values() if p.kind == "denoise"] == [3]


# what cannot be converted --------------------------------------------------------------------------------------------


def copied(source: Released, folder: Path) -> Path:
    return Path(shutil.copytree(source.folder, folder / "policy"))


def edit(file: Path, change: Callable[[Any], Any]) -> None:
    tree = json.loads(file.read_text())
    change(tree)
    file.write_text(json.dumps(tree))


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return apply


def config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda tree: tree.update(changes))


def step(number: int, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "policy_preprocessor.json", lambda tree: tree["steps"][number].update(changes))


EXPERT_NORM = "model.paligemma_with_expert.gemma_expert.model.norm.weight"
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "another type": (config(type="act"), "'type': Input should be 'pi0', 'pi05' or 'smolvla'"),
    "relative actions": (config(use_relative_actions=True), "sets use_relative_actions to True"),
    "old": (lambda f: (f / "policy_preprocessor.json").unlink(), "migrate_policy_normalization"),
    "unknown step": (step(0, registry_name="blur"), "has a step 'blur' that cannot be converted"),
    "cut off": (lambda f: (f / "model.safetensors").write_bytes(b"\x10" * 40), "model.safetensors cannot be read"),
    "too few": (tensors(lambda t: t.pop(EXPERT_NORM)), "mot.experts.act.final_norm.weight is missing"),
    "too many": (tensors(lambda t: t.update({"model.extra.weight": torch.zeros(1)})), "has a tensor 'extra' that a pi0 has not"),
    "no tower": (tensors(lambda t: [t.pop(n) for n in list(t) if "patch_embedding" in n]), "has no tensor"),
    "another shape": (tensors(lambda t: t.update({EXPERT_NORM: torch.zeros(7)})), r"has shape \(7,\) instead of \(24,\)"),
    "images": (config(image_resolution=[56, 56]), "takes squares of 28"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_converted_is_one_sentence(case: str, released: Any, tmp_path: Path) -> None:
    spoil, message = BAD[case]
    source = copied(released("pi0"), tmp_path)
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", released("pi0").tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


def test_statistics_of_another_size_are_refused(released: Any, tmp_path: Path) -> None:
    source = copied(released("pi0"), tmp_path)
    file = next(source.glob("policy_preprocessor*normalizer*.safetensors"))
    save_file({name: row[:2].clone() for name, row in load_file(file).items()}, file)
    with pytest.raises(UserError, match="no mean of 4 numbers for observation.state, which MEAN_STD needs"):
        convert(source, tmp_path / "out", released("pi0").tokenizer)


def test_a_tokenizer_that_saving_changes_is_refused(released: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd:
        name_or_path = "odd"

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [3, 4]}

        def save_pretrained(self, folder: Path) -> None:
            shutil.copytree(released("pi0").tokenizer, folder, dirs_exist_ok=True)

    monkeypatch.setattr("triune.policies.released.lerobot.load_tokenizer", lambda *_: Odd())
    with pytest.raises(UserError, match="gives other tokens once it is saved"):
        convert(released("pi0").folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_width_of_unknown_heads_is_refused(released: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(HEAD_DIM, ("paligemma", WIDTH))
    with pytest.raises(UserError, match="nothing says how many heads a paligemma of width 32 has; known widths are 2048 or 1024"):
        convert(released("pi0").folder, tmp_path / "out", released("pi0").tokenizer)


def test_the_command_says_what_is_wrong(
    released: Any, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No tokenizer here and no network; a folder that is there already."""
    source, there = released("pi0").folder, converted("pi0")
    for out, message in ((tmp_path / "out", "hf download google/paligemma-3b-pt-224) or give a folder"), (there, "is there already")):
        monkeypatch.setattr("sys.argv", ["vla", "model", "convert", str(source), str(out)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no tokenizer"):
        convert(source, tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_published_sizes_are_those_of_our_specs(kind: str, tmp_path: Path) -> None:
    """lerobot's own network at full size, on the meta device: every name and shape has its place, and the spec is the one in configs."""
    module = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    package = importlib.import_module(f"lerobot.policies.{kind}")
    if kind == "smolvla":
        smol_folder(tmp_path)
        shutil.copy(ASSETS / "architectures" / "smolvlm2_500m" / "config.json", tmp_path)
    with torch.device("meta"):
        if kind == "smolvla":
            network = module.VLAFlowMatching(package.SmolVLAConfig(vlm_model_name=str(tmp_path), device="cpu"))
        else:
            name = {"pi0": "PI0", "pi05": "PI05"}[kind]
            network = getattr(module, f"{name}Pytorch")(getattr(package, f"{name}Config")(device="cpu"))
    tensors = network.state_dict()
    size, words = ((512, 512), 48) if kind == "smolvla" else ((224, 224), {"pi0": 48, "pi05": 200}[kind])
    spec = load_spec(kind)
    sizes = Sizes(size, words, spec.streams["action"].length, 10, spec.state_dim, spec.cameras)
    made = by_layout(LAYOUTS[kind], tensors, tmp_path / "model.safetensors", sizes, "")
    (tmp_path / "config.json").write_text(json.dumps(made["vlm"]))
    tree = made["spec"].model_dump(mode="json")
    tree["experts"]["und"] |= {"weights": f"random:path:{tmp_path}"}
    release = SimpleNamespace(**made)
    fitted(cast(Any, release), sketch(parse(Spec, tree, kind)), "mot.experts.und.model.")
    same = {"experts": {"und": spec.experts["und"].model_dump(mode="json")}, "schedule": spec.model_dump(mode="json")["schedule"]}
    assert parse(Spec, merge(tree, same), kind) == spec
