"""State dicts of NVIDIA's Isaac GR00T N1.5, N1.6 and N1.7 in our names (``gr00t/model/gr00t_n1d7/gr00t_n1d7.py``,
``gr00t_n1d6/gr00t_n1d6.py``, ``modules/dit.py``, ``modules/nvidia/Eagle-Block2A-2B-v2/modeling_eagle3_vl.py``; of N1.5
``gr00t/model/gr00t_n1.py`` and what it imports).

What differs beside names: 32 robots share one network and have an encoder and a decoder each, of which one robot's are kept;
theirs multiply from the right; two linear layers in a row become one; cosines come before sines in their time features, and shift
before scale in their last norm. N1.6's image tokens have the channels of their four patches in another order.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

BLOCK = re.compile(r"action_head\.(model|vl_self_attention)\.transformer_blocks\.(\d+)\.(.+)\.(weight|bias)")
STACKS = {"model": "act", "vl_self_attention": "vl"}
PARTS = {
    "norm1": "attention_norm",
    "norm1.linear": "attention_norm.modulation",
    "norm3": "ffn_norm",
    "attn1.to_q": "q",
    "attn1.to_k": "k",
    "attn1.to_v": "v",
    "attn1.to_out.0": "o",
    "ff.net.0.proj": "gate_up",
    "ff.net.2": "down",
}
ROBOT = {
    "state_encoder.layer1": "states.state.mlp.0",
    "state_encoder.layer2": "states.state.mlp.2",
    "action_encoder.W1": "actions.action.into",
    "action_encoder.W2": "actions.action.mix.0",
    "action_encoder.W3": "actions.action.mix.2",
    "action_decoder.layer1": "actions.action.out.0",
    "action_decoder.layer2": "actions.action.out.2",
}
TIME = {"linear_1": "mot.experts.act.time.mlp.0", "linear_2": "mot.experts.act.time.mlp.2"}
VLMS = {
    "backbone.model.vision_model.": "model.vision_tower.",
    "backbone.model.language_model.model.": "model.language_model.",
    "backbone.model.language_model.lm_head.": "lm_head.",
    "backbone.model.mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "backbone.model.mlp1.1.": "model.multi_modal_projector.linear_1.",
    "backbone.model.mlp1.3.": "model.multi_modal_projector.linear_2.",
    "backbone.eagle_model.vision_model.": "model.vision_tower.",
    "backbone.eagle_model.language_model.model.": "model.language_model.",
    "backbone.eagle_model.language_model.lm_head.": "lm_head.",
    "backbone.eagle_model.mlp1.0.": "model.multi_modal_projector.linear.",
    "backbone.model.": "",
}
"""Beginnings of a VLM's names -> those of its transformers modules: Eagle's of N1.6 and N1.5, then Qwen3-VL's, which are kept."""
PATCHES = re.compile(r"backbone\.model\.mlp1\.(0\.(weight|bias)|1\.weight)")
"""Tensors whose last axis has the channels of four patches."""
UNUSED = re.compile(r"action_head\.mask_token|backbone\.(eagle_)?model\.vision_model\.vision_model\.head\..+")
"""What an answer does not need: the place holder of dropped states, SigLIP's pooling."""


def groot_weights(state: Mapping[str, Tensor], robot: int, chunk: int) -> dict[str, Tensor]:
    """The state dict of ``Gr00tN1d7``, ``Gr00tN1d6`` or ``GR00T_N1_5`` as that of ``Model`` for the spec ``groot_n17``, ``groot_n16`` or
    ``groot_n15``.

    Args:
        robot: index of the encoders and decoder that are kept; chunk: places of actions.

    Raises:
        KeyError: a key that the network does not have, or lacks.
    """
    out: dict[str, Tensor] = {}
    refined = any(name.startswith("action_head.vl_self_attention.") for name in state)
    for name, tensor in state.items():
        if UNUSED.fullmatch(name):
            continue
        head, kind = name.removeprefix("action_head."), name.rpartition(".")[2]
        module = head.rpartition(".")[0]
        if (prefix := next((p for p in VLMS if name.startswith(p)), None)) is not None:
            grouped = tensor.unflatten(-1, (-1, 4)).mT.flatten(-2) if PATCHES.fullmatch(name) else tensor
            out[f"mot.experts.vlm.model.{VLMS[prefix]}{name.removeprefix(prefix)}"] = grouped
        elif (block := BLOCK.fullmatch(name)) is not None:
            layer, part = f"mot.experts.{STACKS[block[1]]}.layers.{block[2]}.", block[3]
            crosses = block[1] == "model" and int(block[2]) % 2 == 0 and part in ("attn1.to_q", "attn1.to_k", "attn1.to_v")
            out[f"{layer}{'cross.' if crosses else ''}{PARTS[part]}.{kind}"] = tensor
        elif module in ROBOT:
            out[f"{ROBOT[module]}.{'weight' if kind == 'W' else 'bias'}"] = tensor[robot].T if kind == "W" else tensor[robot]
        elif module.startswith("model.timestep_encoder.timestep_embedder."):
            swapped = module.endswith("linear_1") and kind == "weight"
            out[f"{TIME[module.rpartition('.')[2]]}.{kind}"] = torch.cat(tensor.chunk(2, 1)[::-1], 1) if swapped else tensor
        elif module == "model.proj_out_1":
            out[f"mot.experts.act.final_norm.modulation.{kind}"] = torch.cat(tensor.chunk(2)[::-1])
        elif module == "vlln":
            out[f"{'adapters.seen.0' if refined else 'mot.experts.act.adapter'}.{kind}"] = tensor
        elif module == "position_embedding":
            out["places.action"] = tensor[:chunk]
        elif module == "future_tokens":
            out["registers.registers"] = tensor
        elif module != "model.proj_out_2":
            raise KeyError(name)
    last, bias = (state[f"action_head.model.proj_out_2.{kind}"] for kind in ("weight", "bias"))
    first = "actions.action.out.0"
    weight = out[f"{first}.weight"]
    return out | {f"{first}.weight": weight @ last, f"{first}.bias": weight @ bias + out[f"{first}.bias"]}
