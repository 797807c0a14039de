"""Every architecture family, at the smallest size: our loop over transformers' modules equals transformers' own forward."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from triune import UserError
from triune.vla import build, load_spec
from triune.vla.engine import Captured, infer
from triune.vla.experts import PretrainedVLM
from triune.vla.experts.families import FAMILIES, Seen, flat_patches, positions
from triune.vla.model import sketch
from triune.vla.narrow import narrow
from triune.vla.proofs import TOLERANCE, cache_equivalence, expert_parity, gradient_probe, probe
from triune.vla.spec import PretrainedExpert

from ..tape import taped

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 99,
    "max_position_embeddings": 256,
}
TOWER: dict[str, Any] = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
IMAGE = 98
"""The id of image tokens."""


def _config(family: str) -> Any:
    """A tiny configuration: 32 px images become 2 x 2 tokens."""
    import transformers as hf

    qwen = {"image_token_id": IMAGE, "video_token_id": 97, "vision_start_token_id": 96, "vision_end_token_id": 95}
    tower = {"depth": 3, "hidden_size": 24, "intermediate_size": 32, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2}
    match family:
        case "idefics3":
            vision = {**TOWER, "image_size": 32, "patch_size": 8}
            return hf.Idefics3Config(
                text_config=hf.LlamaConfig(**TEXT), vision_config=vision, scale_factor=2, image_token_id=IMAGE, pad_token_id=0
            )
        case "paligemma":
            vision = {**TOWER, "image_size": 32, "patch_size": 16, "projection_dim": 32}
            text = hf.GemmaConfig(**TEXT)
            return hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32, hidden_size=32, image_token_index=IMAGE)
        case "cohere2_vision":  # the parts of small_60m: SigLIP and Qwen3
            vision = hf.SiglipVisionConfig(**TOWER, image_size=32, patch_size=8, vision_use_head=False)
            text = hf.Qwen3Config(**TEXT)
            return hf.Cohere2VisionConfig(
                text_config=text, vision_config=vision, downsample_factor=2, alignment_intermediate_size=32, image_token_id=IMAGE
            )
        case "lfm2_vl":  # the parts of GR00T N1.6: SigLIP 2 and Qwen3
            vision = hf.Siglip2VisionConfig(**TOWER, num_patches=9, patch_size=8, vision_use_head=False)
            text = hf.Qwen3Config(**TEXT)
            return hf.Lfm2VlConfig(text_config=text, vision_config=vision, projector_hidden_size=32, image_token_id=IMAGE)
        case "internvl":
            vision = hf.InternVLVisionConfig(**TOWER, image_size=[32, 32], patch_size=[8, 8])
            return hf.InternVLConfig(text_config=hf.Qwen3Config(**TEXT), vision_config=vision, image_token_id=IMAGE)
        case "qwen3_vl":
            vision = {**tower, "out_hidden_size": 32, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
            return hf.Qwen3VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **qwen)
        case _:
            vision = {**tower, "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 32}
            return hf.Qwen2_5_VLConfig(text_config={**TEXT, "rope_parameters": MROPE}, vision_config=vision, **qwen)


@pytest.fixture(scope="module", params=["idefics3", "paligemma", "cohere2_vision", "lfm2_vl", "internvl", "qwen3_vl", "qwen2_5_vl"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A family and a folder with a tiny random model of it."""
    from transformers import AutoModelForImageTextToText

    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(_config(request.param))
    for parameter in model.parameters():  # every part matters: fresh norms are 1 and fresh biases 0
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return request.param, folder


@pytest.fixture
def spec(family, make_spec):
    """Three experts around the family's VLM."""
    name, folder = family
    relation = "full" if FAMILIES[name].bidirectional else "causal"
    decoders = {"gen": {"depth": 3}, "act": {"depth": 3}}
    return make_spec(
        experts={"und": {"weights": f"path:{folder}"}, **decoders},
        edges={"obs": {"obs": relation}},
        streams={"obs": {"length": 18}},
    )


def test_alone_it_equals_transformers(spec) -> None:
    """With images and text, batched, the second row padded."""
    parity = expert_parity(build(spec))
    assert parity is not None and parity < TOLERANCE


def test_the_graph_holds_around_it(spec) -> None:
    model = build(spec)
    assert gradient_probe(model, tokens_per_stream=1) == []
    assert cache_equivalence(model) < TOLERANCE


def test_weights_in_bf16_change_no_more_than_rounding_does(family, spec) -> None:
    """Image tokens, and keys and values of a prompt, beside the same weights rounded and computed with in fp32."""
    exact, rounded, held = (build(spec).eval() for _ in range(3))
    if family[0] == "idefics3":
        with pytest.raises(UserError, match="not known to be right in bf16"):
            narrow(held)
        return
    for parameter in rounded.parameters():
        parameter.data = parameter.data.bfloat16().float()
    data = probe(exact)
    read = []
    for model in (exact, rounded, narrow(held)):
        with torch.no_grad():
            inputs = replace(data.inputs, state=data.inputs.state.to(next(model.mot.parameters()).dtype))
            kept = model.observe(inputs)[0]["obs"]
            read.append([t.float() for t in (*model.vlm("obs").look(data.inputs.images), *kept.keys, *kept.values)])
    for right, near, found in zip(*read, strict=True):
        assert (found - right).norm() < 5 * (near - right).norm() < 0.1 * right.norm()


def test_a_call_around_it_can_be_recorded(family, spec) -> None:
    """Its tower too, unless it ``waits``: then the tape refuses it."""
    model = build(spec).eval()
    first, second = probe(model, seed=0), probe(model, seed=1)
    captured = Captured(model, first.inputs, first.noise, record=taped)
    assert torch.equal(captured(second.inputs, second.noise).actions, infer(model, second.inputs, second.noise).actions)
    if model.vlm("obs").family.waits:
        with pytest.raises(AssertionError, match="a graph cannot hold"):
            taped(lambda: infer(model, first.inputs, first.noise))


def test_deepstack_left_out_is_noticed(family, spec, monkeypatch: pytest.MonkeyPatch) -> None:
    own = FAMILIES[family[0]]
    monkeypatch.setitem(FAMILIES, family[0], replace(own, images=lambda model, pixels: Seen(own.images(model, pixels).tokens)))
    assert (expert_parity(build(spec)) > 1e-3) == (family[0] == "qwen3_vl")  # the others have none


def test_layers_without_attention_are_refused(tmp_path: Path) -> None:
    from transformers import Lfm2Config, Lfm2VlConfig

    text = Lfm2Config(**TEXT, layer_types=["conv", "full_attention", "conv"])
    Lfm2VlConfig(text_config=text, vision_config=_config("lfm2_vl").vision_config).save_pretrained(tmp_path)
    with torch.device("meta"), pytest.raises(UserError, match="some layers of its 'lfm2' have no attention"):
        PretrainedVLM(PretrainedExpert(weights=f"random:path:{tmp_path}"))


def test_pixels_are_cut_as_the_processor_cuts_them() -> None:
    from transformers import Qwen2VLImageProcessor

    processor = Qwen2VLImageProcessor(patch_size=8, merge_size=2, temporal_patch_size=2, min_pixels=32 * 32, max_pixels=32 * 32)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    theirs = processor(list(images), return_tensors="pt")["pixel_values"]
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    torch.testing.assert_close(flat_patches((images / 255 - mean) / std, 8, 2, 2), theirs, atol=1e-5, rtol=0)


def test_multimodal_positions_are_those_of_transformers() -> None:
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_config(_config("qwen3_vl")).model
    row = [5, *[IMAGE] * 6, 7, 8, *[IMAGE] * 6, 9, 10, 11]
    ids = torch.tensor([row, row])
    present = torch.ones_like(ids, dtype=torch.bool)
    present[1, 15:] = False
    grids = torch.tensor([[1, 4, 6]] * 4)  # patches: 2 x 3 tokens
    theirs, _ = model.get_rope_index(ids, (ids == IMAGE).int(), grids, attention_mask=present.long())
    ours = positions(ids == IMAGE, present, (2, 3))
    assert torch.equal(ours.positions, theirs)
    assert ours.reach[:, 0].tolist() == (theirs.amax((0, 2)) + 1).tolist()


def test_a_missing_view_moves_nothing(spec) -> None:
    """The tokens after an absent view have the positions that they have when the view was never there (InternVLA-A1's trap)."""
    model = build(spec).eval()
    data = probe(model, batch=1)
    rows, columns = model.vlm("obs").grid((32, 32))
    view = rows * columns + 1
    present = torch.ones_like(data.inputs.present)
    present[:, :view] = False
    shorter = build(spec.model_validate(spec.model_dump() | {"streams": _shortened(spec, view)})).eval()
    shorter.load_state_dict(model.state_dict())
    with torch.no_grad():
        whole = model.joint(replace(data.inputs, present=present), data.noisy)["action"]
        inputs = replace(data.inputs, images=data.inputs.images[:, 1:], ids=data.inputs.ids[:, view:], present=None)
        cut = shorter.joint(inputs, data.noisy)["action"]
    torch.testing.assert_close(whole, cut, atol=TOLERANCE, rtol=0)


def test_a_prefix_kept_for_training_counts_on(spec) -> None:
    """Keys and values alone do not say where a prompt ends that counts in its own way; training rebuilds that from the ids."""
    model = build(spec).eval()
    data = probe(model)
    with torch.no_grad():
        kept = model.observe(data.inputs)[0]["obs"]
        vlm = model.vlm("obs")
        rebuilt = replace(kept, own=vlm.own(data.inputs.ids, data.inputs.present, (32, 32)))
        blind = replace(data.inputs, images=None)
        whole = model.joint(data.inputs, data.noisy)["action"]
        again = model.joint(blind, data.noisy, {"obs": rebuilt})["action"]
        drifted = model.joint(blind, data.noisy, {"obs": replace(kept, own=None)})["action"]
    torch.testing.assert_close(whole, again, atol=TOLERANCE, rtol=0)
    assert torch.allclose(whole, drifted, atol=TOLERANCE) == (vlm.family.axes == 1)


def _shortened(spec: Any, tokens: int) -> dict[str, Any]:
    streams = spec.model_dump()["streams"]
    streams["obs"]["length"] -= tokens
    return streams


def _published(name: str) -> Any:
    """Configurations as their authors published them (the model cards' ``config.json``)."""
    import transformers as hf

    qwen = {"vocab_size": 151_936, "tie_word_embeddings": True}
    match name:
        case "Qwen3-VL-2B" | "Qwen3-VL-4B":
            small = name.endswith("2B")
            text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16}
            large = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
            text = {**(text if small else large), "num_key_value_heads": 8, "head_dim": 128, **qwen}
            vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "patch_size": 16}
            vision |= {"out_hidden_size": text["hidden_size"], "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17]}
            return hf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
        case "Qwen2.5-VL-3B":
            text = {"hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36, "num_attention_heads": 16, **qwen}
            text |= {
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
            }
            vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
            return hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
        case "PaliGemma-3B-224":
            text = {"hidden_size": 2048, "intermediate_size": 16_384, "num_hidden_layers": 18, "num_attention_heads": 8, "head_dim": 256}
            text |= {"num_key_value_heads": 1, "vocab_size": 257_216, "model_type": "gemma"}
            vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16, "patch_size": 14}
            vision |= {"image_size": 224, "projection_dim": 2048, "model_type": "siglip_vision_model", "vision_use_head": False}
            return hf.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=2048, hidden_size=2048)
        case "InternVL3.5-2B":
            text = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128}
            text = hf.Qwen3Config(**text, num_key_value_heads=8, vocab_size=151_936)
            vision = hf.InternVLVisionConfig(image_size=[448, 448], patch_size=[14, 14])  # InternViT-300M
            return hf.InternVLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)
        case _:
            text = {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32, "num_attention_heads": 15, "head_dim": 64}
            text |= {"num_key_value_heads": 5, "vocab_size": 49_280, "model_type": "llama"}
            vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 16}
            return hf.SmolVLMConfig(text_config=text, vision_config={**vision, "image_size": 512}, scale_factor=4)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen3-VL-2B", 2_127_532_032),
        ("Qwen3-VL-4B", 4_437_815_808),
        ("Qwen2.5-VL-3B", 3_754_622_976),
        ("InternVL3.5-2B", 2_348_273_664),  # its card: 2.35 B
        ("PaliGemma-3B-224", 2_923_466_480),
        ("SmolVLM2-500M", 507_482_304),
    ],
)
def test_full_size_builds_without_memory(name: str, parameters: int, tmp_path: Path) -> None:
    _published(name).save_pretrained(tmp_path)
    with torch.device("meta"):
        vlm = PretrainedVLM(PretrainedExpert(weights=f"random:path:{tmp_path}"))
    assert sum(p.numel() for p in vlm.parameters()) == parameters
    assert vlm.space.head_dim == vlm.head_dim


def test_the_model_for_measuring_has_its_size() -> None:
    """A VLM of 41.6 M parameters (ViT-S/16, projector, 12 layers of Qwen3) and two experts of 12 layers of 256."""
    model = sketch(load_spec("small_60m"))
    sizes = {name: sum(p.numel() for p in expert.parameters()) for name, expert in model.mot.experts.items()}
    assert sizes == {"und": 41_630_976, "gen": 10_231_552, "act": 10_231_552}
    assert model.vlm("obs").grid((256, 256)) == (8, 8)
