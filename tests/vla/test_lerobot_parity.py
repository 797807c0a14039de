"""The same weights in lerobot's own pi0, pi0.5 and SmolVLA and in ours: joint forward, gradients, cached denoising."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from triune.vla import Inputs, build
from triune.vla.engine import infer
from triune.vla.model import Model, Targets
from triune.vla.weights.lerobot import pi_weights, smolvla_weights

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
    loss = ours.losses(inputs, targets, noise, (1 - time)[:, None].expand(2, CHUNK))["loss"]
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
    assert float((chunk - infer(ours, inputs, noise, steps=10).actions).abs().max()) < 1e-5
    hidden = replace(inputs, present=torch.ones_like(present))
    assert float((chunk - infer(ours, hidden, noise, steps=10).actions).abs().max()) > 1e-4  # padding matters
