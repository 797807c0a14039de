"""An openpi folder, converted, acts as openpi's own code does: its transforms, its network, its transforms (``golden/openpi.json``)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from triune import UserError
from triune.cli import model as cli
from triune.config import CONFIGS, load, merge, parse
from triune.data import Observation
from triune.data.transforms import Relative, RelativePose
from triune.policies import Request, TriunePolicy, load_policy, read_checkpoint, verify
from triune.policies.convert import convert, fitted
from triune.policies.released.base import Sizes, by_layout
from triune.policies.released.openpi import SLOTS, Training
from triune.vla import Spec, load_spec
from triune.vla.model import sketch
from triune.vla.weights.released import HEAD_DIM, LAYOUTS, VISION_HEADS

from .golden.make_openpi import CASES, CHUNK, DIM, FILE, KINDS, WIDTH, case, draw, statistics
from .tokens import byte_tokenizer

GOLDEN = json.loads(FILE.read_text())
RELATIVE = [6, -1, 6, -1]
VIEWS = "base_0_rgb: base, left_wrist_0_rgb: left"
TOLD: dict[str, list[str]] = {
    "pi0": [
        "state=14",
        "action=14",
        f"relative={RELATIVE}",
        f"cameras={{{VIEWS}, right_wrist_0_rgb: right}}",
    ],
    "pi05": ["state_in_prompt=true", "words=120", "chunk=5", "relative=[]"],
    "pi05_plain": ["state_in_prompt=false", "words=40", "chunk=5", "action=7", "rate=20", "mode=relative"],
}
"""What only the training config knows."""


@pytest.fixture(scope="module", autouse=True)
def _heads() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HEAD_DIM, ("paligemma", WIDTH), DIM)
        patch.setitem(VISION_HEADS, ("paligemma", 24), 2)
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of each kind, as openpi writes it: pi0 by its converter of JAX weights, the others by its training."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = folder = tmp_path_factory.mktemp(kind) / "policy"
            assets = folder / "assets" / "lab" / "robot"
            assets.mkdir(parents=True)
            (assets / "norm_stats.json").write_text(json.dumps({"norm_stats": statistics(kind)}))
            save_file({n: torch.from_numpy(x) for n, x in draw(GOLDEN["kinds"][kind]["tensors"]).items()}, folder / "model.safetensors")
            if kind == "pi0":
                told = {"action_dim": 16, "action_horizon": CHUNK, "paligemma_variant": "gemma_2b", "precision": "float32"}
                (folder / "config.json").write_text(json.dumps(told))
                (folder / "README.md").write_text("---\nlicense: gemma\n---\n")
        return made[kind]

    return make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def converted(folders: Any, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def get(kind: str) -> Path:
        if kind not in done:
            done[kind] = tmp_path_factory.mktemp("converted") / kind
            changes = TOLD[kind] + ([] if kind == "pi0" else [f"cameras={{{VIEWS}}}"])
            cli.convert(folders(kind), done[kind], changes, tokenizer=tokenizer, json=kind == "pi0")
        return done[kind]

    return get


def difference(policy: TriunePolicy, kind: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest difference of an action from openpi's, as a part of its largest; all observations are answered in one call."""
    noise = {}
    requests = []
    for number in range(len(CASES)):
        text, state, images, noise[str(number)] = case(kind, number)
        shown = {name: image for name, image in images.items() if name in policy.contract.camera_names}
        requests.append(Request(str(number), Observation(shown, state, text)))
        policy.reset(str(number), seed=number)
    monkeypatch.setattr(policy, "_noise", lambda request, sample: {"action": noise[request.session]})
    ours = np.stack([plan.chunk.actions for plan in policy.plan(requests)])
    theirs = np.array(GOLDEN["kinds"][kind]["answers"])
    assert theirs.shape == ours.shape == (len(CASES), CHUNK, KINDS[kind]["actions"])
    return float(np.abs(theirs - ours).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_a_converted_policy_acts_as_openpi_does(kind: str, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of all shapes, absent and never present cameras, cut off texts, states beyond their range, relative actions."""
    assert difference(load_policy(converted(kind)), kind, monkeypatch) < 1e-5


def change(policy: TriunePolicy, part: str, **changes: Any) -> None:
    found = getattr(policy.settings, part).model_copy(update=changes)
    policy.settings = policy.settings.model_copy(update={part: found})


PARTS = {
    "template": ("pi0", lambda p: setattr(p, "contract", p.contract.model_copy(update={"prompt": "{instruction}"}))),
    "edits": ("pi0", lambda p: change(p, "words", edits=())),
    "filter": ("pi0", lambda p: change(p, "resize", filter="bilinear")),
    "padding": ("pi0", lambda p: change(p, "resize", at="bottom_right")),
    "relative": ("pi0", lambda p: setattr(p, "settings", p.settings.model_copy(update={"relative": None}))),
    "state": ("pi0", lambda p: setattr(p, "state", p.state.model_copy(update={"bias": 0.1}))),
    "bins": ("pi05", lambda p: change(p, "words", state_bins=255)),
    "action": ("pi05_plain", lambda p: setattr(p, "action", p.action.model_copy(update={"bias": 0.0}))),
}


@pytest.mark.parametrize("what", PARTS)
def test_each_part_of_the_processing_matters(what: str, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, spoil = PARTS[what]
    policy = load_policy(converted(kind))
    spoil(policy)
    assert difference(policy, kind, monkeypatch) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_says_what_is_known(kind: str, converted: Any) -> None:
    found = read_checkpoint(converted(kind))
    assert all(row.passed for row in verify(found, load_policy(converted(kind))))
    contract = found.contract
    assert contract.chunk == contract.executed == CHUNK
    assert (contract.rate, contract.action.mode) == {"pi0": (None, "absolute"), "pi05": (None, None), "pi05_plain": (20, "relative")}[kind]
    assert contract.action.normalisation == ("mean_std" if kind == "pi0" else "quantile")
    assert contract.camera_names == (("base", "left", "right") if kind == "pi0" else ("base", "left"))
    licence = {"licence": "gemma"} if kind == "pi0" else {}
    assert found.info.source == {"format": "openpi", "type": kind[:4].removesuffix("_"), **licence}


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_published_sizes_are_those_of_our_specs(kind: str, tmp_path: Path) -> None:
    """openpi's own network at full size, without memory: every name and shape has its place, and the spec is the one in configs."""
    tensors = {
        name.replace("*", str(i)): torch.empty(shape, device="meta")
        for name, (count, shape) in GOLDEN["full"][kind].items()
        for i in range(count)
    }
    spec = load_spec(kind)
    sizes = Sizes((224, 224), load(Training, CONFIGS / "openpi" / f"{kind}.yaml").words, 50, 10, 32, spec.cameras)
    made = by_layout(LAYOUTS[kind], tensors, tmp_path / "model.safetensors", sizes, "")
    (tmp_path / "config.json").write_text(json.dumps(made["vlm"]))
    tree = made["spec"].model_dump(mode="json")
    tree["experts"]["und"] |= {"weights": f"random:path:{tmp_path}"}
    fitted(cast(Any, SimpleNamespace(**made)), sketch(parse(Spec, tree, kind)), "mot.experts.und.model.")
    same = {"experts": {"und": spec.experts["und"].model_dump(mode="json")}, "schedule": spec.model_dump(mode="json")["schedule"]}
    assert parse(Spec, merge(tree, same), kind) == spec
    assert sum(t.numel() for t in tensors.values()) > 3e9


def test_weights_may_lie_in_several_files(folders: Any, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Path(shutil.copytree(folders("pi0"), tmp_path / "policy"))
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    parts = {f"model-0000{1 + i}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
    for name, part in parts.items():
        save_file(part, source / name)
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, part in parts.items() for key in part}}))
    convert(source, tmp_path / "out", tokenizer, changes=TOLD["pi0"])
    assert difference(load_policy(tmp_path / "out"), "pi0", monkeypatch) < 1e-5
    index.write_text(json.dumps({"weight_map": {"nowhere": next(iter(parts))}}))
    with pytest.raises(UserError, match="holds 'nowhere', which it does not"):
        convert(source, tmp_path / "again", tokenizer, changes=TOLD["pi0"])


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONFIGS / "openpi").glob("*.yaml")))
def test_known_configs_hold_together(name: str) -> None:
    found = load(Training, CONFIGS / "openpi" / f"{name}.yaml")
    assert found.kind == name.split("_")[0] and set(found.cameras) <= set(SLOTS)
    sizes = [size if isinstance(size, int) else len(size or ()) for size in (found.state, found.action)]
    assert sum(map(abs, found.relative or ())) <= min(sizes)


def test_relative_actions_come_back() -> None:
    rng = np.random.default_rng(0)
    action, state = rng.normal(size=(2, 5, 3)), rng.normal(size=(2, 4))
    relative = Relative(state_of=(3, None, 0))
    moved = relative.apply(action, state)
    assert np.allclose(moved[..., 0], action[..., 0] - state[:, None, 3]) and np.array_equal(moved[..., 1], action[..., 1])
    assert np.allclose(relative.undo(moved, state), action)
    assert torch.allclose(relative.undo(torch.from_numpy(moved), torch.from_numpy(state)), torch.from_numpy(action))


def test_relative_poses_come_back() -> None:
    """And a hand that turns with its frame stays where it was in it."""
    rng = np.random.default_rng(0)
    state, action = rng.normal(size=(2, 12)), rng.normal(size=(2, 5, 10))
    pose = RelativePose(action=1, state=2)
    whole = pose.undo(action, state)
    again = pose.undo(pose.apply(whole, state), state)
    assert np.allclose(again, whole) and np.array_equal(whole[..., [0]], action[..., [0]])
    still = np.tile(np.eye(3)[:2].ravel(), (2, 5, 1))
    here = np.concatenate([np.zeros((2, 5, 1)), np.zeros((2, 5, 3)), still], axis=-1)
    assert np.allclose(pose.undo(here, state)[..., 1:4], state[:, None, 2:5])
    quarter = np.concatenate([np.zeros(2), [1.0, 2, 3], [0, -1, 0, 1, 0, 0]])  # its x axis is where y was
    forward = np.concatenate([np.zeros(1), [1.0, 0, 0], np.eye(3)[:2].ravel()])
    assert np.allclose(pose.undo(forward[None], quarter)[0, 1:], [1, 3, 3, 0, -1, 0, 1, 0, 0])


# what cannot be converted --------------------------------------------------------------------------------------------


def jax(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "params").mkdir()


def other(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if "time_mlp" not in name}, folder / "model.safetensors")


def second(folder: Path) -> None:
    shutil.copytree(folder / "assets" / "lab", folder / "assets" / "home")


def short(folder: Path) -> None:
    file = folder / "assets" / "lab" / "robot" / "norm_stats.json"
    file.write_text(json.dumps({"norm_stats": {"state": statistics("pi0")["state"]}}))


def extra(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors") | {"lora.weight": torch.zeros(1)}, folder / "model.safetensors")


BAD: dict[str, tuple[str, Callable[[Path], Any], list[str], str]] = {
    "jax": ("pi0", jax, [], "holds openpi's JAX weights; convert them with openpi's own"),
    "another network": ("pi0", other, [], "neither a pi0 nor a pi0.5"),
    "no statistics": ("pi0", lambda f: shutil.rmtree(f / "assets"), [], "has no assets/<asset id>/norm_stats.json"),
    "two robots": ("pi0", second, [], "statistics of 2 robots; choose one by asset=NAME: home/robot, lab/robot"),
    "no such robot": ("pi0", second, ["asset=x"], "no statistics 'x'; choose"),
    "no actions": ("pi0", short, [], "has no statistics of 'actions'"),
    "too few": ("pi0", lambda f: None, ["state=17"], "has no mean_std statistics of 17 numbers for state"),
    "chunk": ("pi05", lambda f: None, [], "add chunk=N and state_in_prompt=true|false"),
    "two chunks": ("pi0", lambda f: None, ["chunk=9"], "says action_horizon 5, the training config 9"),
    "relative": ("pi0", lambda f: None, ["relative=[20]"], "relative names 20 actions, more than"),
    "unknown key": ("pi0", lambda f: None, ["chunks=9"], "unknown key 'chunks'; did you mean 'chunk'"),
    "another kind": ("pi0", lambda f: None, ["kind=pi05"], "is of a pi05, .* holds a pi0"),
    "tensors": ("pi0", extra, [], "has a tensor 'lora' that a pi0 has not"),
}


@pytest.mark.parametrize("why", BAD)
def test_what_cannot_be_converted_is_one_sentence(why: str, folders: Any, tokenizer: Path, tmp_path: Path) -> None:
    kind, spoil, changes, message = BAD[why]
    source = Path(shutil.copytree(folders(kind), tmp_path / "policy"))
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", tokenizer, changes=changes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]
