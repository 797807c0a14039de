"""The same weights in lerobot's own pi0, pi0.5, SmolVLA and FastWAM and in ours: joint forward, gradients, cached denoising."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from triune.vla import Inputs, build, load_spec
from triune.vla.engine import Request, infer
from triune.vla.flow import interpolate
from triune.vla.inputs import Noisy, Targets
from triune.vla.model import Model
from triune.vla.weights.lerobot import fastwam_weights, pi_weights, smolvla_weights

from ..lerobot_peers import (
    ACTION,
    CHUNK,
    DEPTH,
    DIM,
    EXPERT,
    HEADS,
    SIDE,
    SMOL_GRID,
    SMOL_SIDE,
    pi_classes,
    pi_config,
    pi_fill,
    smol_config,
    smol_fill,
    smol_folder,
)

VIEWS, WORDS = 2, 7


def _ours(kind: str, peer: Any, folder: Path, make_spec: Callable[..., Any]) -> Model:
    """Our model of the same sizes with the peer's weights."""
    peer.paligemma_with_expert.paligemma.config.save_pretrained(folder)
    timed = {"time": "adaptive_norm"} if kind == "pi05" else {}
    act = {"width": EXPERT, "depth": DEPTH, "ffn": 36, "qk_norm": False, "activation": "gelu_tanh", "time_of": "1-t"} | timed
    grid = (SIDE // 14) ** 2
    action = {"expert": "act", "tokens": "actions", "length": CHUNK, "encoder": "linear" if timed else "mlp", "block": None}
    spec = make_spec(
        space={"heads": HEADS, "kv_heads": 1, "head_dim": DIM},
        experts={
            "und": {"weights": f"random:path:{folder}", "frozen": False},
            "gen": None,
            "act": act | {"time": timed.get("time", "none")},
        },
        streams={
            "obs": {"length": VIEWS * grid + WORDS},
            "future": None,
            "state": None if timed else {"encoder": "linear", "positions": "continue"},
            "action": action,
        },
        edges={
            "obs": {"obs": "full"},
            "future": None,
            "state": None if timed else {"obs": "full"},
            "action": {"future": None, "state": None if timed else "full"},
        },
        heads={"future": None, "action": {"action_dim": ACTION}},
        state_dim=ACTION,
    )
    model = build(spec)
    model.load_state_dict(pi_weights(peer.state_dict()))
    return model.eval()


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_pi(kind: str, make_spec: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = pi_classes(kind, monkeypatch)
    peer = getattr(module, {"pi0": "PI0Pytorch", "pi05": "PI05Pytorch"}[kind])(pi_config(package)).eval()
    pi_fill(peer)
    _compare(peer, _ours(kind, peer, tmp_path, make_spec), pi_weights, SIDE, (SIDE // 14) ** 2, state=kind == "pi0")


def test_smolvla(make_spec: Callable[..., Any], tmp_path: Path) -> None:
    """Every second layer of the expert reads the VLM's keys projected anew, the others join in self-attention."""
    from lerobot.policies.smolvla.modeling_smolvla import VLAFlowMatching

    smol_folder(tmp_path)
    peer = VLAFlowMatching(smol_config(tmp_path))
    smol_fill(peer)
    act = {"width": 24, "depth": 4, "ffn": 256, "qk_norm": False, "norm_eps": 1e-5, "time_of": "1-t", "time": "none", "cross": {}}
    spec = make_spec(
        space={"heads": 4, "kv_heads": 2, "head_dim": 8, "rope_theta": 10_000.0},
        experts={"und": {"weights": f"path:{tmp_path}", "layers": 4, "rotary": "space"}, "gen": None, "act": act},
        streams={
            "obs": {"length": VIEWS * 4 + WORDS, "scale": "sqrt_width"},
            "future": None,
            "state": {"expert": "und", "encoder": "linear", "positions": "continue"},
            "action": {"length": CHUNK, "block": None},
        },
        edges={"obs": {"obs": "full"}, "future": None, "state": {"obs": "full"}, "action": {"future": None, "action": "causal"}},
        heads={"future": None, "action": {"action_dim": ACTION}},
        state_dim=ACTION,
    )
    ours = build(spec)
    ours.load_state_dict(smolvla_weights(peer.state_dict()))
    _compare(peer.eval(), ours.eval(), smolvla_weights, SMOL_SIDE, SMOL_GRID, state=True)


def _compare(peer: Any, ours: Model, rename: Callable[..., dict[str, Tensor]], side: int, grid: int, state: bool) -> None:
    """Loss, gradients and a denoised chunk of both, with a shorter text and an absent camera in the second row."""
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, VIEWS, 3, side, side), generator=rng, dtype=torch.uint8)
    vlm = ours.vlm("obs")
    words = torch.randint(0, min(999, vlm.model.config.get_text_config().vocab_size), (2, WORDS), generator=rng)
    words = torch.where(words == vlm.image_token, 0, words)
    masks = torch.ones(2, WORDS, dtype=torch.bool)
    masks[1, 4:] = False
    seen = torch.tensor([[True, True], [True, False]])
    felt, noise, actions = (torch.randn(*shape, ACTION, generator=rng) for shape in ((2,), (2, CHUNK), (2, CHUNK)))
    time = torch.tensor([0.3, 0.8])
    pixels = list(vlm.normalise(images).unbind(1))
    theirs_in = (pixels, list(seen.unbind(1)), words, masks, *([felt] if state else []))
    ids = torch.cat([torch.full((2, VIEWS * grid), vlm.image_token), words], dim=1)
    present = torch.cat([seen.repeat_interleave(grid, dim=1), masks], dim=1)
    inputs = Inputs(images, ids, present, felt if state else None)

    # the loss, with noise at t = 1 there and at t = 0 here
    theirs = peer.forward(*theirs_in, actions, noise, time)
    targets = Targets(actions, torch.ones(2, CHUNK, dtype=torch.bool), torch.empty(0))
    loss = ours.losses(inputs, targets, {"action": noise}, {"action": (1 - time)[:, None].expand(2, CHUNK)})["loss"]
    assert float(loss.detach()) == pytest.approx(float(theirs.mean().detach()), abs=1e-5)

    # gradients of that loss
    theirs.mean().backward()
    loss.backward()
    mine = dict(ours.named_parameters())
    theirs_grad = {n: p.grad for n, p in peer.named_parameters() if p.grad is not None}
    scale = max(float(g.abs().max()) for g in theirs_grad.values())
    compared = 0
    for name, gradient in rename(theirs_grad).items():
        if name in mine and "norm" not in name and "out." not in name:  # these change their sign or their origin
            assert float((mine[name].grad - gradient).abs().max()) < 1e-4 * scale, name
            compared += 1
    assert compared > 20

    # denoising on cached keys, from the same noise
    with torch.no_grad():
        chunk = peer.sample_actions(*theirs_in, noise=noise)
    assert float((chunk - infer(ours, inputs, {"action": noise}, request=Request(steps=10)).actions).abs().max()) < 1e-5
    hidden = replace(inputs, present=torch.ones_like(present))
    assert float((chunk - infer(ours, hidden, {"action": noise}, request=Request(steps=10)).actions).abs().max()) > 1e-4  # padding matters


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_fastwam(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two denoisers in one space, a context for every layer, a first frame that is clean, and frames to come that nobody reads."""
    from lerobot.policies.fastwam.wan import modular
    from lerobot.policies.fastwam.wan.video_dit import WanVideoDiT

    spec = load_spec("fastwam_tiny")
    heads, size, depth = spec.space.heads, spec.space.head_dim, spec.experts["vid"].depth
    shared = {"eps": 1e-6, "num_heads": heads, "attn_head_dim": size, "num_layers": depth, "text_dim": 24, "freq_dim": 256}
    torch.manual_seed(0)
    wan = {
        "in_dim": 5,
        "out_dim": 5,
        "patch_size": (1, 2, 2),
        "seperated_timestep": True,
        "video_attention_mask_mode": "first_frame_causal",
    }
    video = WanVideoDiT(hidden_dim=48, ffn_dim=64, **wan, **shared)
    action = modular.ActionDiT(hidden_dim=32, ffn_dim=48, action_dim=7, **shared)
    mot = modular.MoT({"video": video, "action": action}, mot_checkpoint_mixed_attn=False)
    peer = modular.FastWAM(video, action, mot, vae=torch.nn.Identity(), text_dim=24, proprio_dim=8).eval()
    for name, parameter in peer.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
        if "norm" in name and name.endswith("weight"):
            parameter.data += 1
    ours = build(spec).eval()
    ours.load_state_dict(fastwam_weights(peer.state_dict(), heads))

    rng = torch.Generator().manual_seed(1)
    frames, noise_v = (torch.randn(2, 5, 3, 4, 6, generator=rng) for _ in range(2))
    actions, noise = (torch.randn(2, 8, 7, generator=rng) for _ in range(2))
    text, state = torch.randn(2, 6, 24, generator=rng), torch.randn(2, 8, generator=rng)
    there = torch.ones(2, 6, dtype=torch.bool)
    there[1, 4:] = False
    steps_v, steps_a = torch.tensor([700.0, 200.0]), torch.tensor([300.0, 900.0])

    # joint forward and loss
    context, mask = peer._append_proprio_to_context(text, there, state)
    scheduler = peer.train_video_scheduler
    latents = scheduler.add_noise(frames, noise_v, steps_v)
    latents[:, :, 0] = frames[:, :, 0]
    given = {"context": context, "context_mask": mask, "action": None, "fuse_vae_embedding_in_latents": True}
    given |= {"first_frame_latents": frames[:, :, :1], "image_is_pad": None, "action_is_pad": None}
    targets = {"latents": latents, "timestep_video": steps_v, "timestep_action": steps_a}
    targets["noisy_action"] = scheduler.add_noise(actions, noise, steps_a)
    seen, done = peer._run_training_mot(given, targets)
    theirs = peer._compute_training_video_loss(given, seen, noise_v - frames, steps_v)
    theirs = theirs + peer._compute_training_action_loss(given, done, noise - actions, steps_a)

    first, future, noise_f = _patches(frames[:, :, :1]), _patches(frames[:, :, 1:]), _patches(noise_v[:, :, 1:])
    inputs = Inputs(state=state, latents=first, features={"text": (text, there)})
    times = {n: (1 - t / 1000)[:, None].expand(2, spec.streams[n].length) for n, t in (("video", steps_v), ("action", steps_a))}
    kept = Targets(actions, torch.ones(2, 8, dtype=torch.bool), future)
    mine = ours.losses(inputs, kept, {"video": noise_f, "action": noise}, times)
    assert float(mine["loss"].detach()) == pytest.approx(float(theirs.detach()), rel=1e-5)

    noisy = {n: Noisy(interpolate(e, x, times[n]), times[n]) for n, e, x in (("video", noise_f, future), ("action", noise, actions))}
    with torch.no_grad():
        predicted = ours.joint(inputs, noisy)
    for name, other in (("video", _patches(seen[:, :, 1:])), ("action", done)):
        assert float((predicted[name] + other.detach()).abs().max()) < 1e-5, name

    # gradients
    theirs.backward()
    mine["loss"].backward()
    gradients = fastwam_weights({n: p.grad for n, p in peer.named_parameters() if p.grad is not None}, heads)
    scale = max(float(g.abs().max()) for g in gradients.values())
    compared = {
        n: p.grad
        for n, p in ours.named_parameters()
        if n in gradients and "table" not in n and "codec.out" not in n and "action.out" not in n
    }
    assert len(compared) > 60
    for name, gradient in compared.items():
        assert float((gradient - gradients[name]).abs().max()) < 1e-4 * scale, name

    # the present frame once, then ten steps of actions
    monkeypatch.setattr(peer, "_encode_input_image_latents_tensor", lambda **_: frames[:1, :, :1])
    monkeypatch.setattr(peer, "_make_action_latents", lambda *_: noise[:1].clone())
    monkeypatch.setattr(peer, "_normalize_infer_input_image", lambda image: (image, None, None))
    chunk = peer.infer_action(None, torch.zeros(1), 8, state[0], text[:1], there[:1], num_inference_steps=10)["action"]
    alone = Inputs(state=state[:1], latents=first[:1], features={"text": (text[:1], there[:1])})
    answer = infer(ours, alone, {"action": noise[:1]}).actions
    assert float((chunk - answer[0]).abs().max()) < 1e-5
    blind = infer(ours, replace(alone, latents=first[1:]), {"action": noise[:1]}).actions
    assert float((chunk - blind[0]).abs().max()) > 1e-3


def _patches(latents: Tensor) -> Tensor:
    """Latents (B, K, F, Y, X) as patches of two by two, (B, T, 4 K)."""
    cells = latents.unfold(3, 2, 2).unfold(4, 2, 2)  # (B, K, F, y, x, 2, 2)
    return cells.permute(0, 2, 3, 4, 1, 5, 6).flatten(4).flatten(1, 3)
