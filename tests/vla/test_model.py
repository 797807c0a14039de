"""The model from observation to action: engine, foresight, flow, prompts, tables."""

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from triune import UserError
from triune.vla import build, load_spec
from triune.vla.engine import infer
from triune.vla.experts.base import Context
from triune.vla.experts.pretrained import PromptEncoder
from triune.vla.flow import draw_times, grid, interpolate
from triune.vla.proofs import probe
from triune.vla.show import draw, facts, show
from triune.vla.spec import Flow


def test_velocity_leads_from_noise_to_data() -> None:
    noise, data = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    torch.testing.assert_close(interpolate(noise, data, torch.zeros(2, 3)), noise)
    torch.testing.assert_close(interpolate(noise, data, torch.ones(2, 3)), data)
    for shift in (1.0, 5.0):
        times = grid(7, shift)
        whole = noise + sum((b - a) * (data - noise) for a, b in zip(times[:-1], times[1:], strict=True))
        torch.testing.assert_close(whole, data)
    assert grid(4) == [0, 0.25, 0.5, 0.75, 1] and grid(2, 5.0)[1] == pytest.approx(1 - 5 * 0.5 / 3)


def test_beta_times_lie_near_noise() -> None:
    times = draw_times((20000,), Flow(), torch.Generator().manual_seed(0))
    assert times.min() >= 0 and times.max() < 1
    assert times.mean() == pytest.approx(1 - (0.999 * 0.6 + 0.001), abs=0.01)  # Beta(1.5, 1) has mean 0.6


def test_padding_reaches_nothing_through_hidden_states() -> None:
    """GR00T's refining layers and its action expert read states that are made of a prompt: of what is there alone."""
    model = build(load_spec("groot_n17_tiny")).eval()
    data = probe(model)
    absent = ~data.inputs.present
    assert absent.any()
    moved = {n: torch.zeros(2, model.spec.streams[n].length, w) for n, w in model.widths.items()}
    with torch.no_grad():
        plain = model.run(data.inputs, data.noisy, moved=moved)["action"]
        garbage = model.run(data.inputs, data.noisy, moved=moved | {"obs": moved["obs"] + 5 * absent[..., None]})["action"]
        shown = model.run(data.inputs, data.noisy, moved=moved | {"obs": moved["obs"] + 5 * ~absent[..., None]})["action"]
    assert torch.equal(plain, garbage) and not torch.allclose(plain, shown)


@pytest.mark.parametrize("turns", [("words", "images"), ("images", "words"), ("all",)])
def test_cross_layers_read_words_and_images_by_turns(turns: tuple[str, ...]) -> None:
    """The first of two such layers reads what comes first in ``turns``, the second what follows."""
    spec = load_spec("groot_n17_tiny", [f"experts.act.cross.turns=[{', '.join(turns)}]", "experts.act.depth=4"])
    model = build(spec).eval()
    data = probe(model)
    picture = data.inputs.ids == model.vlm("obs").image_token
    assert picture.any() and (~picture & data.inputs.present).any()
    heard = {}
    act = model.mot.experts["act"]
    original = act.hear

    def hear(layer: int, x: torch.Tensor, context: Context, condition: torch.Tensor | None) -> torch.Tensor:
        heard[layer] = context.turns[layer // 2 % len(context.turns)].mask
        return original(layer, x, context, condition)

    act.hear = hear
    with torch.no_grad():
        model.run(data.inputs, data.noisy)
    present = data.inputs.present
    wanted = {"words": ~picture & present, "images": picture & present, "all": present}
    for number, layer in enumerate((0, 2)):
        mask = heard[layer][:, 0, 0]
        assert torch.equal(mask, wanted[turns[number % len(turns)]])


def test_inference_is_a_function_of_its_noise(make_spec) -> None:
    model = build(make_spec()).eval()
    data = probe(model)
    first, again = infer(model, data.inputs, data.noise), infer(model, data.inputs, data.noise)
    assert torch.equal(first.actions, again.actions) and first.actions.shape == (2, 6, 3)
    assert not torch.equal(first.actions, infer(model, data.inputs, {"action": data.noise["action"] + 1}).actions)


def test_a_prefix_kept_from_before_changes_nothing(make_spec) -> None:
    model = build(make_spec()).eval()
    data = probe(model)
    with torch.no_grad():
        kept, _ = model.observe(data.inputs)
    blind = replace(data.inputs, images=None)
    again = infer(model, blind, data.noise, {"obs": kept["obs"]})
    torch.testing.assert_close(again.actions, infer(model, data.inputs, data.noise).actions, atol=1e-6, rtol=0)


def test_cut_edges_change_the_answer_and_keep_the_weights(make_spec) -> None:
    spec = make_spec()
    whole, cut = build(spec).eval(), build(spec.cut(("action", "obs"))).eval()
    assert whole.state_dict().keys() == cut.state_dict().keys()
    data = probe(whole)
    assert not torch.equal(infer(whole, data.inputs, data.noise).actions, infer(cut, data.inputs, data.noise).actions)


def test_foresight_patches_come_back_as_latents(make_spec) -> None:
    module = build(make_spec()).foresight["future"]
    images = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    patches = module.encode(images)
    assert patches.shape == (2, 8, module.out.out_features)
    latents = module.autoencoder.encode(images.flatten(0, 1).float() / 127.5 - 1).latents
    direct = ((module.autoencoder.decode(latents).sample + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (module.decode(patches).flatten(0, 1).int() - direct.int()).abs().max() <= 1


@pytest.mark.parametrize("tokens", ["latents", "queries"])
def test_foresight_predicts_a_change(tokens: str, make_spec) -> None:
    model = build(make_spec(streams={"future": {"tokens": tokens}}, heads={"future": {"predicts": "change"}})).eval()
    module, data = model.foresight["future"], probe(model)
    now = module.encode(data.inputs.images)
    given = replace(data.inputs, images=None, latents=now)
    with torch.no_grad():
        kept, _ = model.observe(data.inputs)
        answers = [infer(model, inputs, data.noise, {"obs": kept["obs"]}) for inputs in (data.inputs, given)]
        torch.testing.assert_close(answers[0].foresight["future"], answers[1].foresight["future"])
        torch.testing.assert_close(answers[0].actions, answers[1].actions)
        module.out.weight.zero_()
        module.out.bias.zero_()
        torch.testing.assert_close(model.observe(data.inputs)[1]["future"], now)


def test_streams_of_latents_need_their_head(make_spec) -> None:
    with pytest.raises(UserError, match="holds latents, which a latent head makes"):
        make_spec(heads={"future": None}, streams={"future": {"tokens": "latents"}})


def test_foresight_length_must_fit_the_latents(make_spec) -> None:
    with pytest.raises(UserError, match="needs 8 tokens"):
        build(make_spec(streams={"future": {"length": 9}}))


def test_space_must_be_that_of_the_weights(make_spec) -> None:
    with pytest.raises(UserError, match="live in the attention space"):
        build(make_spec(space={"kv_heads": 4}))


def test_random_weights_are_the_same_each_time(make_spec, tiny_weights) -> None:
    spec = make_spec(experts={"und": {"weights": "random:" + tiny_weights["vlm"]}})
    a, b, trained = build(spec, seed=1), build(spec, seed=2), build(make_spec())
    first = lambda m: next(m.mot.experts["und"].parameters())  # noqa: E731
    assert torch.equal(first(a), first(b)) and not torch.equal(first(a), first(trained))


def test_prompts_hold_their_images_and_are_refused_when_too_long(make_spec) -> None:
    expert = build(make_spec()).mot.experts["und"]
    encoder, (rows, columns) = PromptEncoder(expert, 24), expert.grid((32, 32))
    ids, present = encoder(["lift the red cube", "lift the cube"], 2)
    assert ids.shape == (2, 24) and (ids == expert.image_token).sum(1).tolist() == [2 * rows * columns] * 2
    assert present.sum(1)[0] == present.sum(1)[1] + 1
    with pytest.raises(UserError, match="the spec's prompt stream holds 24"):
        encoder(["lift the red cube " * 10], 2)


def test_tables_and_drawing(make_spec, tiny_tree, tmp_path) -> None:
    spec = make_spec()
    data = facts(spec)
    assert data["trained"] < data["parameters"] and data["matrix"]["action"]["obs"] == "full"
    assert draw(spec).startswith("<svg")
    path = tmp_path / "probe.yaml"
    import yaml

    path.write_text(yaml.safe_dump(tiny_tree))
    console = Console(record=True, width=120)
    console.print(show(str(path), tmp_path / "probe.png"))
    text = console.export_text()
    assert "execution order and cache plan" in text and "causal" in text and (tmp_path / "probe.png").stat().st_size > 1000
