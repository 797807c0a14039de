"""A GR00T N1.7 folder, converted for a robot, acts as NVIDIA's own code does: its processor and its network (``golden/groot.json``)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from triune import UserError
from triune.cli import model as cli
from triune.config import parse
from triune.data import Observation
from triune.policies import Request, TriunePolicy, load_policy, read_checkpoint, verify
from triune.policies.convert import convert, fitted
from triune.policies.released.groot import ARCHITECTURES, Network, _spec
from triune.vla import Spec, load_spec
from triune.vla.model import sketch
from triune.vla.weights.groot import groot_weights
from triune.vla.weights.released import Shapes

from .golden.make_groot import CAMERAS, CHAT, FILE, KINDS, NUMBERS, SIDE, VLM, blocks, case, dit, draw, statistics, tokenizer

GOLDEN = json.loads(FILE.read_text())


@pytest.fixture(scope="module", autouse=True)
def _architecture() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, VLM, "qwen3_vl_tiny")
        yield


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The VLM's tokenizer and chat template."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer(), eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHAT)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a policy as its ``save_pretrained`` wrote it, for each robot; weights in one file, or in two."""
    made: dict[str, Path] = {}

    def make(tag: str) -> Path:
        if tag not in made:
            made[tag] = folder = tmp_path_factory.mktemp(tag) / "policy"
            folder.mkdir()
            for name, tree in ({"config": GOLDEN["config"], "statistics": {tag: statistics(tag)}} | GOLDEN["kinds"][tag]["files"]).items():
                (folder / f"{name}.json").write_text(json.dumps(tree))
            tensors = {name: torch.from_numpy(x) for name, x in draw(GOLDEN["tensors"]).items()}
            if tag == "libero_sim":
                save_file(tensors, folder / "model.safetensors")
                (folder / "README.md").write_text("---\nlicense: other\n---\n")
            else:
                parts = {f"model-0000{1 + i}-of-00002.safetensors": dict(list(tensors.items())[i::2]) for i in range(2)}
                for name, part in parts.items():
                    save_file(part, folder / name)
                index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
                (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return made[tag]

    return make


@pytest.fixture(scope="module")
def converted(folders: Any, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    done: dict[str, Path] = {}

    def get(tag: str) -> Path:
        if tag not in done:
            done[tag] = tmp_path_factory.mktemp("converted") / tag
            cli.convert(folders(tag), done[tag], embodiment=tag, tokenizer=words, json=False)
        return done[tag]

    return get


def difference(policy: TriunePolicy, tag: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """The largest difference of an action from theirs, as a part of its largest; all observations are answered in one call, though
    their texts are of unequal length."""
    noise, requests, theirs = {}, [], []
    for name, actions in GOLDEN["kinds"][tag]["answers"].items():
        text, state, images, noise[name] = case(tag, int(name))
        requests.append(Request(name, Observation(images, np.concatenate(list(state.values())), text)))
        policy.reset(name, seed=0)
        theirs.append(actions)
    monkeypatch.setattr(policy, "_noise", lambda request: {"action": noise[request.session]})
    ours = np.stack([plan.chunk.actions for plan in policy.plan(requests)])
    assert ours.shape == np.shape(theirs) == (len(theirs), KINDS[tag]["chunk"], sum(KINDS[tag]["action"].values()))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("tag", KINDS)
def test_a_converted_policy_acts_as_nvidias(tag: str, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are scaled, cut and scaled, words by a chat, states beyond their range, relative actions with a row for each step."""
    assert difference(load_policy(converted(tag)), tag, monkeypatch) < 1e-5


def test_few_actions_lie_at_the_end_of_their_range() -> None:
    """Otherwise clipping would hide what differs."""
    for tag, kind in GOLDEN["kinds"].items():
        low, high = (np.array([x for key in KINDS[tag]["action"] for x in statistics(tag)["action"][key][end]]) for end in ("q01", "q99"))
        if tag == "libero_sim":
            inside = [(np.array(a) > low + 1e-4) & (np.array(a) < high - 1e-4) for a in kind["answers"].values()]
            assert np.mean(inside) > 0.5


def change(policy: TriunePolicy, part: str, **changes: Any) -> None:
    found = getattr(policy.settings, part).model_copy(update=changes)
    policy.settings = policy.settings.model_copy(update={part: found})
    policy.prompts.words = policy.settings.words


def respec(policy: TriunePolicy, **changes: Any) -> None:
    act = policy.model.mot.experts["act"]
    act.config = act.config.model_copy(update=changes)


PARTS: dict[str, tuple[str, Callable[[TriunePolicy], Any]]] = {
    "capitals": ("libero_sim", lambda p: change(p, "words", lower=False)),
    "punctuation": ("libero_sim", lambda p: change(p, "words", edits=())),
    "chat": ("libero_sim", lambda p: setattr(p, "contract", p.contract.model_copy(update={"prompt": f"{p.contract.prompt} "}))),
    "crop": ("libero_sim", lambda p: change(p, "resize", crop=0.99)),
    "filter": ("libero_sim", lambda p: change(p, "resize", filter="pillow")),
    "clip": ("libero_sim", lambda p: setattr(p, "state", p.state.model_copy(update={"clip": False}))),
    "relative": ("new_embodiment", lambda p: setattr(p, "settings", p.settings.model_copy(update={"relative": None}))),
    "poses": ("oxe_droid_relative_eef_relative_joint", lambda p: setattr(p, "settings", p.settings.model_copy(update={"poses": ()}))),
    "steps": ("new_embodiment", lambda p: setattr(p, "action", p.action.model_copy(update={"shift": p.action.shift[0]}))),
    "last layer": ("libero_sim", lambda p: setattr(p.model.mot.experts["vlm"], "normed", True)),
    "turns": ("libero_sim", lambda p: respec(p, cross=p.model.mot.experts["act"].config.cross.model_copy(update={"turns": ("all",)}))),
    "places": ("libero_sim", lambda p: p.model.places["action"].data.zero_()),
    "time": ("libero_sim", lambda p: setattr(p.model.actions["action"], "features", p.model.spec.experts["act"].time_features)),
}


@pytest.mark.parametrize("what", PARTS)
def test_each_part_matters(what: str, converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tag, spoil = PARTS[what]
    policy = load_policy(converted(tag))
    with torch.no_grad():
        if what == "time":
            policy.model.actions["action"].features = policy.model.spec.streams["action"].joins.model_copy(update={"base": 5000.0})
        else:
            spoil(policy)
        assert difference(policy, tag, monkeypatch) > 1e-4


@pytest.mark.parametrize("tag", KINDS)
def test_the_checkpoint_says_what_is_known(tag: str, converted: Any) -> None:
    found = read_checkpoint(converted(tag))
    assert all(row.passed for row in verify(found, load_policy(converted(tag))))
    contract = found.contract
    assert contract.camera_names == CAMERAS and (contract.chunk, contract.rate) == (KINDS[tag]["chunk"], None)
    licence = {"licence": "other"} if tag == "libero_sim" else {}
    assert found.info.source == {"format": "Isaac-GR00T", "type": "N1.7", "embodiment": tag, **licence}
    if tag == "libero_sim":
        assert contract.state.names == ("x", "rotation_0", "rotation_1", "rotation_2", "gripper")
        assert (contract.action.mode, contract.action.normalisation) == (None, "quantile")
    elif tag == "new_embodiment":
        assert (contract.action.mode, contract.action.names) == ("absolute", ("arm_0", "arm_1", "arm_2", "grip"))
        with pytest.raises(UserError, match="the policy takes squares"):
            load_policy(converted(tag)).inputs([Observation({n: np.zeros((9, 8, 3), np.uint8) for n in CAMERAS}, np.zeros(5), "go")])


def test_published_sizes_are_those_of_our_spec(tmp_path: Path) -> None:
    """NVIDIA's own network at the released size, without memory: every name and shape has its place, and the spec is the one in configs."""
    shapes: dict[str, list[int]] = {name: shape for name, (_, shape) in GOLDEN["full"].items() if "*" not in name}
    for name, (count, shape) in GOLDEN["full"].items():
        numbers = (name.replace("*", str(i)) for i in range(100))
        shapes |= dict.fromkeys([n for n in numbers if n not in shapes][:count], shape) if "*" in name else {}
    assert len(shapes) == 1031  # as many as NVIDIA/GR00T-N1.7-3B has (FlashRT, flash_rt/frontends/torch/_groot_n17_thor_spec.py)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    network = parse(Network, {"diffusion_model_cfg": dit(32, 48, 32, 1024), "vl_self_attention_cfg": blocks(32, 64, 4)}, "config")
    spec = load_spec("groot_n17")
    found = _spec(network, Shapes({n: tuple(s) for n, s in shapes.items()}, tmp_path), spec.streams["obs"].length, spec.cameras)
    same = {"experts": spec.experts}
    assert found.experts["act"] == spec.experts["act"] and found.experts["vl"] == spec.experts["vl"]
    assert found.model_copy(update=same) == spec
    release = SimpleNamespace(weights=groot_weights(tensors, 2, 40), spec=spec, file=tmp_path, way_out="")
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


def both(*changes: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda folder: [change(folder) for change in changes] and None


def config(**changes: Any) -> Callable[[Path], None]:
    return edit("config", lambda tree: tree.update(changes))


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "N1.6": (config(model_type="Gr00tN1d6"), "of GR00T only N1.7 can be converted, not N1.5 and N1.6, since their VLM"),
    "no processor": (lambda f: (f / "processor_config.json").unlink(), "processor_config.json cannot be read"),
    "no statistics": (edit("statistics", lambda t: t.clear()), "choose one by --embodiment TAG: none has statistics"),
    "no relative statistics": (
        edit("statistics", lambda t: t["new_embodiment"].pop("relative_action")),
        "statistics.json has no min and max of relative_action 'arm'",
    ),
    "history": (config(state_history_length=2), "sets state_history_length to 2; only 1"),
    "torchvision": (processor(use_albumentations=False), "sets use_albumentations to False"),
    "sines": (
        both(processor(apply_sincos_state_encoding=True), robot(lambda r: r["state"].update(sin_cos_embedding_keys=["arm"]))),
        "gives the state's arm as sine and cosine",
    ),
    "deviations": (robot(lambda r: r["action"].update(mean_std_embedding_keys=["grip"])), "normalises the action's grip by mean"),
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
def test_what_cannot_be_converted_is_one_sentence(why: str, folders: Any, words: Path, tmp_path: Path) -> None:
    spoil, message = BAD[why]
    source = Path(shutil.copytree(folders("new_embodiment"), tmp_path / "policy"))
    spoil(source)
    with pytest.raises(UserError, match=message):
        convert(source, tmp_path / "out", words, embodiment="new_embodiment")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy"]


def test_options_are_for_their_own_folders(folders: Any, words: Path, tmp_path: Path) -> None:
    source = folders("new_embodiment")
    with pytest.raises(UserError, match="choose one by --embodiment TAG: new_embodiment"):
        convert(source, tmp_path / "out", words)
    with pytest.raises(UserError, match="is of GR00T and not of openpi"):
        convert(source, tmp_path / "out", words, changes=["chunk=3"], embodiment="new_embodiment")
    assert NUMBERS and SIDE
