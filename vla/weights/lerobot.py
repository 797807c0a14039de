"""State dicts of lerobot's policies in our names: pi0, pi0.5, SmolVLA and FastWAM (``lerobot.policies``, version 0.6.1).

What differs beside names: their flow runs from t = 1 (noise) to 0 and regresses noise - data, so the output layer changes sign
and the spec says ``time_of: 1-t``; Gemma's norms multiply by 1 + weight; their adaptive norms gate a residual by g, ours by 1 + g.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

LAYER = re.compile(r"layers\.(\d+)\.(.+)")
NORMS = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}
OUTER = {
    "state_proj": "states.state.mlp.0",
    "action_in_proj": "actions.action.into",
    "action_time_mlp_in": "actions.action.mix.0",
    "action_time_mlp_out": "actions.action.mix.2",
    "time_mlp_in": "mot.experts.act.time.mlp.0",
    "time_mlp_out": "mot.experts.act.time.mlp.2",
}

WAN_LAYER = re.compile(r"mot\.layers\.(\d+)\.blocks\.(\w+)\.(.+)")
WAN_EXPERTS = {"video": "vid", "action": "act"}
WAN_PARTS = (
    {f"self_attn.{part}": part for part in "qkvo"}
    | {f"cross_attn.{part}": f"cross.{part}" for part in "qkvo"}
    | {
        "self_attn.norm_q": "q_norm",
        "self_attn.norm_k": "k_norm",
        "cross_attn.norm_q": "cross.q_norm",
        "cross_attn.norm_k": "cross.k_norm",
        "norm3": "cross.norm",
        "ffn.0": "gate_up",
        "ffn.2": "down",
    }
)


def pi_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``PI0Pytorch`` or ``PI05Pytorch`` as that of ``Model`` for the specs ``pi0`` and ``pi05``.

    A ``model.`` before every key, as in a saved policy, is dropped.

    Raises:
        KeyError: a key that neither network has.
    """
    out = _weights(state, "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert.model.", origin=1.0)
    head, words = "mot.experts.und.model.lm_head.weight", "mot.experts.und.model.model.language_model.embed_tokens.weight"
    tied = out.get(words, out.get(head))  # PaliGemma's are one; openpi's files hold the head alone
    return out if tied is None else out | {words: tied, head: tied}


def smolvla_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``VLAFlowMatching`` (SmolVLA) as that of ``Model`` for the spec ``smolvla``.

    Raises:
        KeyError: as ``pi_weights``.
    """
    return _weights(state, "vlm_with_expert.vlm.", "vlm_with_expert.lm_expert.", origin=0.0)


def _weights(state: Mapping[str, Tensor], vlm: str, expert: str, origin: float) -> dict[str, Tensor]:
    """Names changed, gate and up projections joined; a plain norm's weight counts from ``origin``."""
    out: dict[str, Tensor] = {}
    gates: dict[str, dict[str, Tensor]] = {}
    for full, tensor in state.items():
        key = full.removeprefix("model.")
        module, _, kind = key.rpartition(".")
        if key.startswith(vlm):
            out[f"mot.experts.und.model.{key.removeprefix(vlm)}"] = tensor
        elif key.startswith(expert) and (layer := LAYER.fullmatch(key.removeprefix(expert))):
            prefix, part = f"mot.experts.act.layers.{layer[1]}.", layer[2]
            name, _, rest = part.partition(".")
            if name in NORMS:
                out |= _norm(f"{prefix}{NORMS[name]}", rest, tensor, origin, gated=True)
            elif rest in ("gate_proj.weight", "up_proj.weight"):
                gates.setdefault(f"{prefix}gate_up.weight", {})[rest] = tensor
            elif name == "mlp":
                out[f"{prefix}down.weight"] = tensor
            else:
                out[f"{prefix}{rest[0]}.weight"] = tensor  # q_proj, k_proj, v_proj, o_proj
        elif key.startswith(expert + "norm."):
            out |= _norm("mot.experts.act.final_norm", key.removeprefix(expert + "norm."), tensor, origin, gated=False)
        elif module == "action_out_proj":
            out[f"actions.action.out.{kind}"] = -tensor
        elif key.endswith("expert.lm_head.weight"):
            continue  # the expert speaks no words
        else:
            out[f"{OUTER[module]}.{kind}"] = tensor
    return out | {name: torch.cat([pair["gate_proj.weight"], pair["up_proj.weight"]]) for name, pair in gates.items()}


def _norm(name: str, rest: str, tensor: Tensor, origin: float, gated: bool) -> dict[str, Tensor]:
    """A plain norm's ``weight``, or an adaptive one's ``dense.weight`` and ``dense.bias`` (scale, shift and gate)."""
    if rest == "weight":
        return {f"{name}.weight": origin + tensor}
    scale, shift, gate = tensor.chunk(3)
    kind = rest.removeprefix("dense.")
    out = {f"{name}.modulation.{kind}": torch.cat([scale, shift])}
    if kind == "bias":
        out[f"{name}.weight"] = torch.ones_like(scale)
    if gated:
        out[f"{name}.gating.{kind}"] = gate - 1 if kind == "bias" else gate
    return out


def fastwam_weights(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """The state dict of FastWAM's network (``policies/fastwam/wan/modular.py``) as that of ``Model`` for the spec ``fastwam``.

    Its rotary pairs neighbouring channels, ours the halves of a head, so the channels of queries and keys change their order; its
    gates are g, ours 1 + g; its velocity points to the noise.

    Args:
        heads: of the attention space.

    Raises:
        KeyError: a key that the network does not have.
    """
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        if (layer := WAN_LAYER.fullmatch(key)) is not None:
            prefix, part = f"mot.experts.{WAN_EXPERTS[layer[2]]}.layers.{layer[1]}.", layer[3]
            module, _, kind = part.rpartition(".")
            if part == "modulation":
                for norm, rows in zip(("attention_norm", "ffn_norm"), tensor[0].split(3), strict=True):
                    out[f"{prefix}{norm}.table"] = rows - rows.new_tensor([[0.0], [0.0], [1.0]])
                continue
            attention, _, name = module.partition(".")
            turned = attention == "self_attn" and name in ("q", "k", "norm_q", "norm_k")
            out[f"{prefix}{WAN_PARTS[module]}.{kind}"] = _halves(tensor, heads) if turned else tensor
            continue
        module, _, kind = key.rpartition(".")
        parts = module.split(".")
        expert = WAN_EXPERTS[parts[2]] if parts[0] == "mot" else ""
        match parts[3:] if expert else parts:
            case ["text_embedding", number]:
                out[f"mot.experts.{expert}.adapter.{number}.{kind}"] = tensor
            case ["time_embedding", number]:  # cosines come first there
                swapped = torch.cat(tensor.chunk(2, dim=1)[::-1], dim=1) if number == "0" and kind == "weight" else tensor
                out[f"mot.experts.{expert}.time.mlp.{number}.{kind}"] = swapped
            case ["time_projection", "1"]:
                out[f"mot.experts.{expert}.modulation.{kind}"] = tensor
            case ["proprio_encoder"]:
                out[f"states.state.mlp.0.{kind}"] = tensor
            case ["patch_embedding"]:
                out[f"foresight.video.codec.into.{kind}"] = tensor.flatten(1) if kind == "weight" else tensor
            case ["head"] if kind == "modulation":
                out[f"mot.experts.{expert}.final_norm.table"] = tensor[0]
            case ["head", "head"]:
                cells = tensor.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1)  # channels first, as in our patches
                out[f"foresight.video.codec.out.{kind}"] = -cells
            case ["action_encoder"]:
                out[f"actions.action.into.{kind}"] = tensor
            case ["head"]:
                out[f"actions.action.out.{kind}"] = -tensor
            case _:
                raise KeyError(key)
    return out


def _halves(tensor: Tensor, heads: int) -> Tensor:
    """Channels (N*H, ...) of which neighbours turn together, in the order in which the halves of a head do."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
