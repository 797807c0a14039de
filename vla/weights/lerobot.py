"""State dicts of lerobot's policies in our names: pi0 and pi0.5 (``lerobot.policies.pi0``, ``pi05``, version 0.6.1).

What differs beside names: their flow runs from t = 1 (noise) to 0 and regresses noise - data, so the output layer changes sign
and the spec says ``time_of: 1-t``; Gemma's norms multiply by 1 + weight; their adaptive norms gate a residual by g, ours by 1 + g.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

VLM, EXPERT = "paligemma_with_expert.paligemma.", "paligemma_with_expert.gemma_expert.model."
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


def pi_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of ``PI0Pytorch`` or ``PI05Pytorch`` as that of ``Model`` for the specs ``pi0`` and ``pi05``.

    A ``model.`` before every key, as in a saved policy, is dropped.

    Raises:
        KeyError: a key that neither network has.
    """
    out: dict[str, Tensor] = {}
    gates: dict[str, dict[str, Tensor]] = {}
    for full, tensor in state.items():
        key = full.removeprefix("model.")
        module, _, kind = key.rpartition(".")
        if key.startswith(VLM):
            out[f"mot.experts.und.model.{key.removeprefix(VLM)}"] = tensor
        elif key.startswith(EXPERT) and (layer := LAYER.fullmatch(key.removeprefix(EXPERT))):
            prefix, part = f"mot.experts.act.layers.{layer[1]}.", layer[2]
            name, _, rest = part.partition(".")
            if name in NORMS:
                out |= _norm(f"{prefix}{NORMS[name]}", rest, tensor, gated=True)
            elif rest in ("gate_proj.weight", "up_proj.weight"):
                gates.setdefault(f"{prefix}gate_up.weight", {})[rest] = tensor
            elif name == "mlp":
                out[f"{prefix}down.weight"] = tensor
            else:
                out[f"{prefix}{rest[0]}.weight"] = tensor  # q_proj, k_proj, v_proj, o_proj
        elif key.startswith(EXPERT + "norm."):
            out |= _norm("mot.experts.act.final_norm", key.removeprefix(EXPERT + "norm."), tensor, gated=False)
        elif module == "action_out_proj":
            out[f"actions.action.out.{kind}"] = -tensor
        elif key == "paligemma_with_expert.gemma_expert.lm_head.weight":
            continue  # the expert speaks no words
        else:
            out[f"{OUTER[module]}.{kind}"] = tensor
    head, words = "mot.experts.und.model.lm_head.weight", "mot.experts.und.model.model.language_model.embed_tokens.weight"
    tied = out.get(words, out.get(head))  # PaliGemma's are one; openpi's files hold the head alone
    if tied is not None:
        out[words] = out[head] = tied
    return out | {name: torch.cat([pair["gate_proj.weight"], pair["up_proj.weight"]]) for name, pair in gates.items()}


def _norm(name: str, rest: str, tensor: Tensor, gated: bool) -> dict[str, Tensor]:
    """A plain norm's ``weight``, or an adaptive one's ``dense.weight`` and ``dense.bias`` (scale, shift and gate)."""
    if rest == "weight":
        return {f"{name}.weight": 1 + tensor}
    scale, shift, gate = tensor.chunk(3)
    kind = rest.removeprefix("dense.")
    out = {f"{name}.modulation.{kind}": torch.cat([scale, shift])}
    if kind == "bias":
        out[f"{name}.weight"] = torch.ones_like(scale)
    if gated:
        out[f"{name}.gating.{kind}"] = gate - 1 if kind == "bias" else gate
    return out
