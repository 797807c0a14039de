"""The embedded VLM: how it is trained, and the folder that is shipped."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from triune.config import CONFIGS, load, parse
from triune.data.questions import DESTINATION_SLOTS, TARGET_SLOTS, Turn, locate, turns
from triune.data.readers.scenes import CAMERAS, SceneWriter
from triune.policies.train import vlm
from triune.policies.train.team import Part
from triune.policies.train.vlm_model import LOCATIONS, build_processor, build_tokenizer
from triune.vla.weights.references import resolve_weights

TINY = {
    "kind": "vlm",
    "model": {
        "image_size": 32,
        "vision": {"width": 32, "layers": 1, "heads": 2, "ffn": 48},
        "text": {"width": 32, "layers": 3, "heads": 2, "ffn": 48},
    },
    "turns": 3,
    "exits": [2],
    "train": {"steps": 2, "batch_size": 3, "precision": "fp32"},
}


def thing(colour: str, x: float, y: float) -> dict[str, object]:
    image = {"agentview": [x, y], "wrist": None}
    place = {"position": [0, 0, 0], "state": "table", "on": None, "image": image}
    return {"name": colour, "colour": colour, "shape": "cube", "size": 0.02, **place}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pictures of noise with two cubes each."""
    folder = tmp_path_factory.mktemp("scenes")
    generator = np.random.default_rng(0)
    with SceneWriter(folder / "cubes-0.parquet") as writer:
        for seed in range(8):
            objects = [thing("red", *generator.uniform(0, 1, 2)), thing("green", *generator.uniform(0, 1, 2))]
            gripper = {"position": [0, 0, 1], "image": {"agentview": [0.5, 0.25], "wrist": [0.5, 0.75]}}
            images = {camera: generator.integers(0, 256, (32, 32, 3), dtype=np.uint8) for camera in CAMERAS}
            writer.add(images, json.dumps({"world": "scenes:cubes", "seed": seed, "objects": objects, "gripper": gripper}))
    return folder


@pytest.fixture(scope="module")
def task(scenes: Path) -> vlm.VlmTask:
    return vlm.VlmTask(parse(vlm.Recipe, {**TINY, "data": str(scenes)}, "tiny"))


def test_every_word_of_scenes_and_worlds_is_in_the_vocabulary(task: vlm.VlmTask) -> None:
    from triune.envs.metaworld import INSTRUCTIONS

    tokenizer = build_tokenizer()
    generator = np.random.default_rng(1)
    asked = [turn for annotation in task.scenes.annotations for turn in turns(annotation, generator, 60)]
    assert {turn.kind for turn in asked} >= {"point", "colour", "relation", "count", "exist", "holding", "caption"}
    for text in [*(f"{turn.text} {turn.answer}" for turn in asked), *INSTRUCTIONS.values()]:
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids, text
    assert len(build_tokenizer()(" ".join((*TARGET_SLOTS, *DESTINATION_SLOTS))).input_ids) == 8


def test_batches_are_functions_of_their_index(task: vlm.VlmTask) -> None:
    first, other, again = task.batch(Part(5)), task.batch(Part(6)), task.batch(Part(5))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["images"], other["images"])


def test_a_packed_turn_is_what_it_is_alone(task: vlm.VlmTask) -> None:
    """Several turns in one sequence give the logits that each gives when it alone is asked, through transformers' own forward."""
    asked = [
        Turn("point", "lift the red cube", tuple(zip(TARGET_SLOTS, (0.1, 0.2, None, None), strict=True))),
        Turn("colour", "what color is the cube ?", answer="red"),
        Turn("point", "point to the gripper", tuple(zip(TARGET_SLOTS, (0.5, 0.25, 0.5, 0.75), strict=True))),
    ]
    packed = task.packer.pack([asked])
    pixels = torch.from_numpy(task.scenes.images[:1]).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
    with torch.inference_mode():
        mask = vlm.turn_mask(packed["turn"], torch.float32)
        _, (final, *_) = task.module(pixels, packed["ids"], mask, packed["positions"], packed["where"])
        text = "<image><image> point to the gripper <x1> <y1> <x2> <y2>"
        inputs = task.processor(text=text, images=[list(task.scenes.images[0])], return_tensors="pt")
        alone = task.module.vlm(**inputs).logits[0, -4:]
    torch.testing.assert_close(final[-4:], alone, atol=1e-4, rtol=1e-4)
    assert packed["word"].tolist()[:4] == [-1, -1, task.packer.none, task.packer.none]


def test_guides_lead_from_answers_to_nouns_and_from_nouns_to_things(task: vlm.VlmTask) -> None:
    marks = (("the red cube", (0.1, 0.2)), ("the green cube", (0.9, 0.7)))
    turn = Turn("relation", "is the red cube left of the green cube ?", answer="yes", marks=marks)
    packed = task.packer.pack([[turn]])
    base = len(task.packer.prefix)
    words = task.processor.tokenizer.convert_ids_to_tokens(packed["ids"][0, base : base + 10])
    red, green, asked = words.index("red") + 1, words.index("green") + 1, words.index("?")
    found = {(at - base, token, purpose, head) for _, at, token, purpose, head in packed["looks"].tolist()}
    image = task.packer._image_token
    assert found == {
        (red, image(0, 0.1, 0.2), vlm.THING, -1),
        (green, image(0, 0.9, 0.7), vlm.THING, -1),
        (asked, base + red, vlm.CLUE, 0),
        (asked, base + green, vlm.CLUE, 1),
    }


def test_where_nothing_is_annotated_nothing_is_asked() -> None:
    nowhere = {"image": {"agentview": [0.5, 0.5], "wrist": None}}
    annotation = {"objects": [], "gripper": nowhere, "instructions": [{"text": "close the door", "target": nowhere, "destination": None}]}
    assert {turn.kind for turn in turns(annotation, np.random.default_rng(0), 200)} == {"point"}


def test_soft_labels_are_centred(task: vlm.VlmTask) -> None:
    value = torch.tensor([0.25, 0.5, 0.731])
    soft = task.packer.soft(value)
    centres = (torch.arange(LOCATIONS) + 0.5) / LOCATIONS
    torch.testing.assert_close((soft * centres).sum(-1), value, atol=1e-3, rtol=0)


def test_losses_train_and_save(task: vlm.VlmTask, tmp_path: Path) -> None:
    batch = task.batch(Part(0))
    losses = task.losses(batch)
    losses["loss"].backward()
    trained = {name for name, parameter in task.module.named_parameters() if parameter.grad is not None and parameter.grad.abs().sum() > 0}
    assert any("vision_model" in name for name in trained) and any("text_model.layers.2" in name for name in trained)
    task.module.zero_grad()
    task.save(tmp_path, dict(task.module.named_parameters()))
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    assert len(AutoProcessor.from_pretrained(tmp_path).tokenizer) == model.config.text_config.vocab_size


def test_the_recipe_of_the_shipped_model_parses() -> None:
    recipe = load(vlm.Recipe, CONFIGS / "train" / "embedded_vlm.yaml")
    assert build_processor(recipe.model).image_seq_len == 36


# The shipped folder ---------------------------------------------------------------------------------------------------

SAMPLE = Path(__file__).parent / "scenes"


def test_the_shipped_model_is_small_and_loads_offline() -> None:
    folder = resolve_weights("embedded:v1", "vlm")
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= 10_000_000
    assert not any(path.suffix in (".bin", ".pt", ".pkl") for path in folder.rglob("*"))


def shipped() -> tuple[Any, Any, list[tuple[dict[str, Any], list[np.ndarray]]]]:
    """Model, processor, and stored scenes that it was not trained on."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = resolve_weights("embedded:v1", "vlm")
    scenes = []
    for record in json.loads((SAMPLE / "scenes.json").read_text()):
        images = [np.asarray(Image.open(io.BytesIO((SAMPLE / name).read_bytes())).convert("RGB")) for name in record["images"]]
        scenes += [(item, images) for item in record["objects"]]
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder), scenes


def test_the_shipped_model_points() -> None:
    """The slots' next tokens lie within 2 % of the image width, in the median."""
    model, processor, scenes = shipped()
    first = processor.tokenizer.convert_tokens_to_ids("<loc_0>")
    errors = []
    for item, images in scenes:
        text = f"<image><image> lift the {item['colour']} {item['shape']} <x1> <y1> <x2> <y2>"
        inputs = processor(text=text, images=[images], return_tensors="pt")
        with torch.inference_mode():
            said = model(**inputs).logits[0, -4:-2].argmax(-1) - first
        errors.append(np.hypot(*((said.numpy() + 0.5) / LOCATIONS - item["image"]["agentview"])))
    assert np.median(errors) < 0.02


def test_the_shipped_model_talks() -> None:
    model, processor, scenes = shipped()
    answers = []
    for item, images in scenes:
        text = f"<image><image> what color is the object at {locate(item['image']['agentview'])} ?"
        inputs = processor(text=text, images=[images], return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        answers.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip() == item["colour"])
    assert np.mean(answers) >= 0.8
