"""A GR00T folder, converted for a robot, acts as NVIDIA's own code does: N1.5, N1.6 and N1.7 (``golden/groot*.json``)."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from triune import UserError
from triune.cli import model as cli
from triune.config import CONFIGS, load, parse
from triune.data import Observation
from triune.data.transforms import Angles
from triune.policies import Request, TriunePolicy, load_policy, read_checkpoint, verify
from triune.policies.convert import convert, fitted
from triune.policies.inputs import Resize
from triune.policies.released.base import read_origin
from triune.policies.released.groot import _spec
from triune.policies.released.groot_lines import LINES, MULTIPLE
from triune.policies.released.groot_processor import Processor, read_resize
from triune.policies.released.groot_transforms import Transforms
from triune.vla import Spec, load_spec
from triune.vla.model import sketch
from triune.vla.weights.groot import groot_weights
from triune.vla.weights.released import Shapes

from .golden import make_groot, make_groot15, make_groot16
from .golden.make_groot import CAMERAS, NUMBERS, SIDE, blocks, case, dit, draw, statistics, tokenizer


@dataclass(frozen=True)
class Made:
    """What NVIDIA's code answered: the file, its robots, and of the VLM the name, our tiny architecture, the tokenizer's marks and chat."""

    golden: dict[str, Any]
    kinds: dict[str, dict[str, Any]]
    vlm: str
    tiny: str
    special: dict[str, int]
    chat: str | None = None
    case: Callable[..., Any] = case

    def files(self, tag: str) -> dict[str, Any]:
        """What a folder holds for a robot beside weights, by name."""
        told = {"config": self.golden["config"]}
        if "files" not in self.golden["kinds"][tag]:
            return told | {"experiment_cfg/metadata": make_groot15.metadata(tag)}
        return told | {"statistics": {tag: statistics(self.kinds[tag])}} | self.golden["kinds"][tag]["files"]


MADE = {
    "Gr00tN1d7": Made(
        json.loads(make_groot.FILE.read_text()), make_groot.KINDS, make_groot.VLM, "qwen3_vl_tiny", make_groot.SPECIAL, make_groot.CHAT
    ),
    "Gr00tN1d6": Made(
        json.loads(make_groot16.FILE.read_text()), make_groot16.KINDS, make_groot16.VLM, "siglip2_qwen3_tiny", make_groot16.SPECIAL
    ),
    "gr00t_n1_5": Made(
        json.loads(make_groot15.FILE.read_text()),
        make_groot15.KINDS,
        make_groot15.VLM,
        "siglip_qwen3_tiny",
        make_groot15.SPECIAL,
        case=make_groot15.case,
    ),
}
"""``model_type`` -> what was made by its code."""
Robot = tuple[str, str]
SEVEN, SIX, FIVE = "Gr00tN1d7", "Gr00tN1d6", "gr00t_n1_5"
ROBOTS: list[Robot] = [(line, tag) for line, made in MADE.items() for tag in made.kinds]
QUANTILES = ("libero_sim", "libero_panda")
"""Robots whose actions are all absolute and by quantiles."""


def asked(robot: Robot, folder: Path) -> dict[str, Any]:
    """What is asked for beside a robot's folder: of N1.5 its transforms, of which the pictures' size is given apart."""
    line, tag = robot
    if line != FIVE:
        return {"embodiment": tag}
    config = folder.parent / f"{tag}.yaml"
    config.write_text(json.dumps(MADE[line].kinds[tag]["config"]))  # YAML, too
    return {"embodiment": tag, "config": str(config), "changes": [f"side={make_groot15.SIDE}"]}


@pytest.fixture(scope="module", autouse=True)
def _architecture() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for line, made in MADE.items():
            patch.setitem(LINES, line, replace(LINES[line], vlms={made.vlm: made.tiny}))
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tokenizer of a line's VLM, with its chat template."""
    from transformers import PreTrainedTokenizerFast

    def make(line: str) -> Path:
        folder, made = tmp_path_factory.mktemp("tokenizer"), MADE[line]
        marks = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
        found = PreTrainedTokenizerFast(tokenizer_object=tokenizer(made.special), chat_template=made.chat, **marks)
        found.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Robot], Path]:
    """The folder of a policy as its ``save_pretrained`` wrote it, for each robot; weights in one file, or in two."""
    found: dict[Robot, Path] = {}

    def make(robot: Robot) -> Path:
        if robot not in found:
            (line, tag), golden = robot, MADE[robot[0]].golden
            found[robot] = folder = tmp_path_factory.mktemp(tag) / "policy"
            (folder / "experiment_cfg").mkdir(parents=True)
            for name, tree in MADE[line].files(tag).items():
                (folder / f"{name}.json").write_text(json.dumps(tree))
            tensors = {name: torch.from_numpy(x) for name, x in draw(golden["tensors"]).items()}
            if tag in QUANTILES:
                save_file(tensors, folder / "model.safetensors")
                (folder / "README.md").write_text("---\nlicense: other\n---\n")
            else:
                parts = {f"model-0000{1 + i}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
                for name, part in parts.items():
                    save_file(part, folder / name)
                index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return found[robot]

    return make


@pytest.fixture(scope="module")
def converted(folders: Any, words: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Robot], Path]:
    done: dict[Robot, Path] = {}

    def get(robot: Robot) -> Path:
        if robot not in done:
            done[robot] = tmp_path_factory.mktemp("converted") / robot[1]
            source = folders(robot)
            cli.convert(source, done[robot], tokenizer=words(robot[0]), json=False, **asked(robot, source))
        return done[robot]

    return get


def chunk(robot: Robot) -> int:
    kind = MADE[robot[0]].kinds[robot[1]]
    return int(kind.get("config", kind)["chunk"])


def difference(policy: TriunePolicy, robot: Robot, monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest difference of an action from theirs, as a part of its largest; all observations are answered in one call, though
    their texts are of unequal length."""
    made = MADE[robot[0]]
    kind = made.kinds[robot[1]]
    noise, requests, theirs = {}, [], []
    for name, actions in made.golden["kinds"][robot[1]]["answers"].items():
        text, state, images, noise[name] = made.case(kind, int(name))
        requests.append(Request(name, Observation(images, np.concatenate(list(state.values())), text)))
        policy.reset(name, seed=0)
        theirs.append(actions)
    monkeypatch.setattr(policy, "_noise", lambda request, sample: {"action": noise[request.session]})
    ours = np.stack([plan.chunk.actions for plan in policy.plan(requests)])
    assert ours.shape == np.shape(theirs) == (len(theirs), chunk(robot), sum(kind["action"].values()))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("robot", ROBOTS)
def test_a_converted_policy_acts_as_nvidias(robot: Robot, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are scaled, cut and scaled, words by a chat, states beyond their range, relative actions with a row for each step."""
    assert difference(load_policy(converted(robot)), robot, monkeypatch) < 1e-5


def test_few_actions_lie_at_the_end_of_their_range() -> None:
    """Otherwise clipping would hide what differs."""
    for line, tag in ROBOTS:
        if tag in QUANTILES:
            kind = MADE[line].kinds[tag]
            low, high = (np.array([x for key in kind["action"] for x in statistics(kind)["action"][key][end]]) for end in ("q01", "q99"))
            answers = MADE[line].golden["kinds"][tag]["answers"].values()
            assert np.mean([(np.array(a) > low + 1e-4) & (np.array(a) < high - 1e-4) for a in answers]) > 0.5


def change(policy: TriunePolicy, part: str, **changes: Any) -> None:
    found = getattr(policy.settings, part).model_copy(update=changes)
    policy.settings = policy.settings.model_copy(update={part: found})
    policy.prompts.words = policy.settings.words


def respec(policy: TriunePolicy, **changes: Any) -> None:
    act = policy.model.mot.experts["act"]
    act.config = act.config.model_copy(update=changes)


def prompt(policy: TriunePolicy, text: str) -> None:
    policy.contract = policy.contract.model_copy(update={"prompt": text})


def shuffle(policy: TriunePolicy) -> None:
    weight = policy.model.mot.experts["vlm"].model.model.multi_modal_projector.linear_1.weight
    weight.copy_(weight.unflatten(1, (-1, 4)).mT.flatten(1))


def cross(policy: TriunePolicy, **changes: Any) -> None:
    respec(policy, cross=policy.model.mot.experts["act"].config.cross.model_copy(update=changes))


def rejoin(policy: TriunePolicy) -> None:
    policy.model.actions["action"].features = policy.model.spec.streams["action"].joins.model_copy(update={"base": 5000.0})


LIBERO, NEW, POSES = (SEVEN, "libero_sim"), (SEVEN, "new_embodiment"), (SEVEN, "oxe_droid_relative_eef_relative_joint")
LIBERO16, GR16 = (SIX, "libero_panda"), (SIX, "gr1")
NEW15, AGIBOT15, GR15 = (FIVE, "new_embodiment"), (FIVE, "agibot_genie1"), (FIVE, "gr1")
PARTS: dict[str, tuple[Robot, Callable[[TriunePolicy], Any]]] = {
    "capitals": (LIBERO, lambda p: change(p, "words", lower=False)),
    "punctuation": (LIBERO, lambda p: change(p, "words", edits=())),
    "chat": (LIBERO, lambda p: prompt(p, f"{p.contract.prompt} ")),
    "crop": (LIBERO, lambda p: change(p, "resize", crop=0.99)),
    "filter": (LIBERO, lambda p: change(p, "resize", filter="pillow")),
    "clip": (LIBERO, lambda p: setattr(p, "state", p.state.model_copy(update={"clip": False}))),
    "relative": (NEW, lambda p: setattr(p, "settings", p.settings.model_copy(update={"relative": None}))),
    "poses": (POSES, lambda p: setattr(p, "settings", p.settings.model_copy(update={"poses": ()}))),
    "steps": (NEW, lambda p: setattr(p, "action", p.action.model_copy(update={"shift": p.action.shift[0]}))),
    "last layer": (LIBERO, lambda p: setattr(p.model.mot.experts["vlm"], "normed", True)),
    "turns": (LIBERO, lambda p: cross(p, turns=("all",))),
    "places": (LIBERO, lambda p: p.model.places["action"].data.zero_()),
    "time": (LIBERO, rejoin),
    "Eagle's chat": (LIBERO16, lambda p: prompt(p, p.contract.prompt.replace("<image 2>", ""))),
    "last scaling": (LIBERO16, lambda p: change(p, "resize", first=None)),
    "final norm": (LIBERO16, lambda p: setattr(p.model.mot.experts["vlm"], "normed", False)),
    "layer norm": (LIBERO16, lambda p: setattr(p.model.mot.experts["act"], "adapter", torch.nn.Identity())),
    "turns without refining": (LIBERO16, lambda p: cross(p, turns=("all",))),
    "patches": (LIBERO16, shuffle),
    "N1.6's sines": (GR16, lambda p: setattr(p, "settings", p.settings.model_copy(update={"angles": Angles(groups=((0, 2),))}))),
    "each clips for itself": (GR16, lambda p: setattr(p, "state", p.state.model_copy(update={"clip": True}))),
    "Eagle 2.5's chat": (NEW15, lambda p: prompt(p, p.contract.prompt.removesuffix("<|im_start|>assistant\n"))),
    "where a cut begins": (NEW15, lambda p: change(p, "resize", crop=0.93)),
    "antialiasing": (NEW15, lambda p: change(p, "resize", filter="bilinear")),
    "stretching": (AGIBOT15, lambda p: change(p, "resize", shape="fit", crop=None)),
    "registers": (AGIBOT15, lambda p: p.model.registers["registers"].zero_()),
    "refining": (NEW15, lambda p: p.model.mot.experts["vl"].layers[0].down.weight.zero_()),
    "sines": (GR15, lambda p: setattr(p, "settings", p.settings.model_copy(update={"angles": Angles(groups=((0, 3),))}))),
    "clipped states": (AGIBOT15, lambda p: setattr(p, "state", p.state.model_copy(update={"clip": False}))),
    "Qwen3's final norm": (AGIBOT15, lambda p: setattr(p.model.mot.experts["vlm"], "normed", False)),
}


@pytest.mark.parametrize("what", PARTS)
def test_each_part_matters(what: str, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    robot, spoil = PARTS[what]
    policy = load_policy(converted(robot))
    with torch.no_grad():
        spoil(policy)
        assert difference(policy, robot, monkeypatch) > 1e-4


@pytest.mark.parametrize("robot", ROBOTS)
def test_the_checkpoint_says_what_is_known(robot: Robot, converted: Any) -> None:
    (line, tag), found = robot, read_checkpoint(converted(robot))
    assert all(row.passed for row in verify(found, load_policy(converted(robot))))
    contract = found.contract
    cameras = CAMERAS if line != FIVE else tuple(MADE[line].kinds[tag]["config"]["cameras"])
    assert contract.camera_names == cameras and contract.chunk == contract.executed == chunk(robot)
    assert contract.rate == (make_groot15.RATE if line == FIVE else None)
    licence = {"licence": "other"} if tag in QUANTILES else {}
    source = dict(found.info.source)
    assert (source.pop("config", None) is not None) == (line == FIVE)
    assert source == {"format": "Isaac-GR00T", "type": LINES[line].name, "embodiment": tag, **licence}
    if tag in QUANTILES:
        assert contract.state.names == ("x", "rotation_0", "rotation_1", "rotation_2", "gripper")
        assert (contract.action.mode, contract.action.normalisation) == (None, "quantile")
    elif line == FIVE:
        kinds = (contract.state.normalisation, contract.action.normalisation)
        told = {"new_embodiment": (None, None), "agibot_genie1": ("quantile", None), "gr1": (None, "min_max")}
        assert kinds == told[tag] and contract.action.mode is None
    elif tag == "new_embodiment":
        assert (contract.action.mode, contract.action.names) == ("absolute", ("arm_0", "arm_1", "arm_2", "grip"))
        with pytest.raises(UserError, match="the policy takes squares"):
            load_policy(converted(robot)).inputs([Observation({n: np.zeros((9, 8, 3), np.uint8) for n in CAMERAS}, np.zeros(5), "go")])


def test_pictures_become_as_large_as_eagles() -> None:
    """By their ``smart_resize``, for squares of any side."""
    sides = MADE[SIX].golden["sides"]
    assert sides["256"] == [252, 252]
    for side, size in sides.items():
        made = read_resize(Path(), Processor(modality_configs={}, shortest_image_edge=int(side)), MULTIPLE)
        assert [made.height, made.width] == size
        assert made.first == (None if size[0] == int(side) else (int(side), int(side)))


def test_cutting_and_a_last_scaling_are_for_squares() -> None:
    with pytest.raises(ValueError, match="crop and first are for pictures that are squares; set shape"):
        Resize(height=56, width=56, first=(64, 64))
    with pytest.raises(ValueError, match="first is for pictures that are squares; set shape"):
        Resize(height=56, width=56, shape="stretched", first=(64, 64))


@pytest.mark.parametrize("size", [(224, 224), (236, 236), (480, 640), (101, 70), (50, 30), (51, 1)])
def test_stretched_pictures_are_torchvisions(size: tuple[int, int]) -> None:
    """Bit for bit: cut in the middle, whose half pixels round to even, scaled in numbers from 0 to 1, cut off."""
    from torchvision.transforms import v2

    images = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cut = v2.CenterCrop((int(size[0] * 0.95), max(1, int(size[1] * 0.95))))
    theirs = (v2.Resize((224, 224), antialias=True)(cut(images.float() / 255)) * 255).byte()
    ours = Resize(height=224, width=224, shape="stretched", filter="smooth", crop=0.95)(images)
    assert torch.equal(ours, theirs.float())


RELEASED: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    # as many tensors as NVIDIA/GR00T-N1.7-3B has (FlashRT, flash_rt/frontends/torch/_groot_n17_thor_spec.py)
    SEVEN: ("groot_n17", 1031, 2, {"diffusion_model_cfg": dit(32, 48, 32, 1024), "vl_self_attention_cfg": blocks(32, 64, 4)}),
    # 50 steps of 128 numbers as nvidia/GR00T-N1.6-3B gives (FlashRT, docs/benchmark_comparison.md)
    SIX: ("groot_n16", 1106, 2, {"max_state_dim": 128, "max_action_dim": 128, "action_horizon": 50}),
    # as config.json of nvidia/GR00T-N1.5-3B says, at revision 869830fc (quoted in public code)
    FIVE: (
        "groot_n15",
        899,
        31,
        {
            "diffusion_model_cfg": dit(32, 48, 16, 1024),
            "vl_self_attention_cfg": blocks(32, 64, 4),
            "max_state_dim": 64,
            "max_action_dim": 32,
            "action_horizon": 16,
        },
    ),
}
"""``model_type`` -> our spec, how many tensors there are, a robot, what ``config.json`` says."""


@pytest.mark.parametrize("line", RELEASED)
def test_published_sizes_are_those_of_our_spec(line: str, tmp_path: Path) -> None:
    """NVIDIA's own network at the released size, without memory: every name and shape has its place, and the spec is the one in configs."""
    name, tensors, robot, config = RELEASED[line]
    full = MADE[line].golden["full"]
    shapes: dict[str, list[int]] = {name: shape for name, (_, shape) in full.items() if "*" not in name}
    for pattern, (count, shape) in full.items():
        numbers = (pattern.replace("*", str(i)) for i in range(100))
        shapes |= dict.fromkeys([n for n in numbers if n not in shapes][:count], shape) if "*" in pattern else {}
    assert len(shapes) == tensors
    network, spec = parse(LINES[line].network, config, "config"), load_spec(name)
    told = Shapes({n: tuple(s) for n, s in shapes.items()}, tmp_path)
    found = _spec(LINES[line], network, told, spec.streams["obs"].length, spec.cameras)
    assert {n: e for n, e in found.experts.items() if n != "vlm"} == {n: e for n, e in spec.experts.items() if n != "vlm"}
    assert found.model_copy(update={"experts": spec.experts}) == spec
    weights = groot_weights({n: torch.empty(s, device="meta") for n, s in shapes.items()}, robot, network.action_horizon)
    release = SimpleNamespace(weights=weights, spec=spec, file=tmp_path, way_out="")
    fitted(cast(Any, release), sketch(cast(Spec, spec)), "mot.experts.vlm.model.")


# what cannot be converted --------------------------------------------------------------------------------------------


def edit(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tree = json.loads((folder / f"{name}.json").read_text())
        change(tree)
        (folder / f"{name}.json").write_text(json.dumps(tree))

    return apply


def robot(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return edit("processor_config", lambda tree: change(tree["processor_kwargs"]["modality_configs"]["new_embodiment"]))


def processor(**changes: Any) -> Callable[[Path], None]:
    return edit("processor_config", lambda tree: tree["processor_kwargs"].update(changes))


def config(**changes: Any) -> Callable[[Path], None]:
    return edit("config", lambda tree: tree.update(changes))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "N1": (config(model_type="gr00t_n1"), "holds a 'gr00t_n1'; of GR00T only N1.5, N1.6, N1.7 can be converted"),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "processor_config.json cannot be read"),
    "no statistics": (edit("statistics", lambda t: t.clear()), "choose one by --embodiment TAG: none has statistics"),
    "no relative statistics": (
        edit("statistics", lambda t: t["new_embodiment"].pop("relative_action")),
        "statistics.json has no min and max of relative_action 'arm'",
    ),
    "history": (config(state_history_length=2), "sets state_history_length to 2; only 1"),
    "torchvision": (processor(use_albumentations=False), "sets use_albumentations to False"),
    "deviations": (robot(lambda r: r["action"].update(mean_std_embedding_keys=["grip"])), "normalises the actions' grip by mean"),
    "poses": (
        robot(lambda r: r["action"]["action_configs"][0].update(type="EEF")),
        "from the hand's own frame as DEFAULT; only XYZ_ROT6D",
    ),
    "past frames": (robot(lambda r: r["video"].update(delta_indices=[-5, 0])), r"looks at video of steps \[-5, 0\]"),
    "another VLM": (config(model_name="nvidia/Other"), "stands on 'nvidia/Other'; known VLMs are"),
    "refining": (config(vl_self_attention_cfg=None), "vl_self_attention_cfg"),
    "steps": (config(num_inference_timesteps=7), "7 steps do not divide the 1000 flow times"),
    "cells": (processor(shortest_image_edge=48), "pictures of 48x48 are no whole number of cells of 32"),
    "sizes": (config(hidden_size=12), "has shape .* instead of"),
    "a part": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "model-00002-of-00002.safetensors cannot be read"),
}


@pytest.mark.parametrize("why", BAD)
def test_what_cannot_be_converted_is_one_sentence(why: str, folders: Any, words: Any, tmp_path: Path) -> None:
    spoil, message = BAD[why]
    source = Path(shutil.copytree(folders(NEW), tmp_path / "policy"))
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", words(SEVEN), embodiment="new_embodiment")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


def test_the_tokenizer_must_be_eagles(folders: Any, words: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no <IMG_CONTEXT>; give Eagle's own folder"):
        convert(folders(LIBERO16), tmp_path / "out", words(SEVEN), embodiment="libero_panda")


def known(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return edit("experiment_cfg/metadata", lambda tree: change(tree["new_embodiment"]))


BAD15: dict[str, tuple[Callable[[Path], Any], list[str], str]] = {
    "no metadata": (lambda f: (f / "experiment_cfg" / "metadata.json").unlink(), [], "metadata.json cannot be read"),
    "another robot": (edit("experiment_cfg/metadata", lambda t: t.clear()), [], "choose one by --embodiment TAG: none has statistics"),
    "no statistics": (known(lambda t: t["statistics"]["state"]["arm"].pop("q99")), [], "statistics.state.arm.q99"),
    "uneven": (known(lambda t: t["statistics"]["state"]["arm"]["q99"].pop()), [], "min, max, mean, std, q01 and q99 are not of one length"),
    "a key": (lambda f: None, ["state.knee=min_max"], r"has no state 'knee', it has hand, arm, turn; correct the data config"),
    "a camera": (lambda f: None, ["cameras=[side]"], "has no video 'side', it has front, wrist"),
    "a way": (lambda f: None, ["state.arm=binary"], "state.arm"),
    "an action as sine": (lambda f: None, ["action.arm=sin_cos"], "action.arm"),
    "side": (lambda f: None, ["side=112"], "pictures would become 112x112, its vision tower takes 56x56; set side=56"),
    "projected": (config(backbone_cfg={"project_to_dim": 1536}), [], "sets project_to_dim to 1536; only None can be converted"),
    "no head": (config(action_head_cfg=None), [], "config.json has no backbone_cfg and action_head_cfg"),
    "too many numbers": (
        edit("config", lambda t: t["action_head_cfg"].update(max_state_dim=7)),
        [],
        "new_embodiment has 8 numbers of state, the network 7",
    ),
}


@pytest.mark.parametrize("why", BAD15)
def test_what_of_n15_cannot_be_converted_is_one_sentence(why: str, folders: Any, words: Any, tmp_path: Path) -> None:
    spoil, changes, message = BAD15[why]
    told = asked(NEW15, folders(NEW15))
    source = Path(shutil.copytree(folders(NEW15), tmp_path / "policy"))
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", words(FIVE), **told | {"changes": told["changes"] + changes})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


def test_transforms_of_n15_must_be_named(folders: Any, words: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"name it by --config NAME \(agibot_genie1, .*so100.*\), or write such a YAML file"):
        convert(folders(NEW15), tmp_path / "out", words(FIVE), embodiment="new_embodiment")


@pytest.mark.parametrize("path", sorted((CONFIGS / "groot").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_configs_hold_together(path: Path) -> None:
    does = load(Transforms, path)
    assert does.chunk == 16 and len(does.cameras) == len(set(does.cameras))


def test_a_licence_is_what_the_card_says(tmp_path: Path) -> None:
    """The third is how the card of GR00T-N1.5-3B begins its section."""
    cards = {
        "---\nlicense: apache-2.0\n---\n": "apache-2.0",
        "---\nlicense: other\nlicense_name: nsclv1\n---\n": "nsclv1",
        "---\ntags:\n- robotics\n---\n## License/Terms of Use\n[Nvidia License](https://a.b/OneWay.pdf?t=ey)<br>\n": "https://a.b/OneWay.pdf",
        "---\ntags:\n- robotics\n---\n## Uses\n[here](https://a.b/c)\n": None,
    }
    for card, licence in cards.items():
        (tmp_path / "README.md").write_text(card)
        assert read_origin(tmp_path, type="x").get("licence") == licence


def test_options_are_for_their_own_folders(folders: Any, words: Any, tmp_path: Path) -> None:
    source = folders(NEW)
    with pytest.raises(UserError, match="choose one by --embodiment TAG: new_embodiment"):
        convert(source, tmp_path / "out", words(SEVEN))
    with pytest.raises(UserError, match="tells what its robots do, so --config and KEY=VALUE have nothing to add"):
        convert(source, tmp_path / "out", words(SEVEN), changes=["chunk=3"], embodiment="new_embodiment")
    assert NUMBERS and SIDE
