"""The peer of the inference benchmark: the weights of a model in transformers' own modules, put together the ordinary way.

The prefix is computed once and kept in a ``DynamicCache``, as openpi and lerobot do. The experts are ``Qwen3Model`` run over
embeddings with that cache, one after the other; each denoise step makes its mask and positions, and is cropped off the cache.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, DynamicCache, Qwen3Config, Qwen3Model

from ...vla import Inputs, Model
from ...vla.experts import Decoder
from ...vla.flow import sinusoid
from ...vla.spec import TimeFeatures


class Composed(nn.Module):
    """What ``model`` computes, for specs of the shape of ``small_60m``: a causal VLM, a foresight stream of queries, one token of
    state, and a chunk of actions that the flow time joins by an MLP; each stream reads all before it.

    Args:
        attention: the implementation that transformers' modules use, ``eager`` or ``sdpa``.
    """

    vlm: Any
    foresight: Any
    state: Any
    action: Any
    mean: Tensor
    std: Tensor

    def __init__(self, model: Model, attention: str) -> None:
        super().__init__()
        vlm = model.vlm("obs")
        self.vlm = _like(vlm.model, attention)
        self.steps: int = next(phase.steps or 10 for phase in model.graph.phases.values() if phase.kind == "denoise")
        self.gen, self.act = (_decoder(model.mot.experts[name], attention) for name in ("gen", "act"))
        heads = (model.foresight["future"], model.states["state"], model.actions["action"])
        self.foresight, self.state, self.action = (copy.deepcopy(head) for head in heads)
        mean, std = (torch.tensor(v)[:, None, None] for v in (vlm.family.mean, vlm.family.std))
        self.mean, self.std = nn.Buffer(mean, persistent=False), nn.Buffer(std, persistent=False)

    def narrow(self) -> "Composed":
        """With weights in bf16; buffers, such as rotary frequencies, keep fp32, as ``from_pretrained`` leaves them."""
        for parameter in self.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        return self

    @torch.inference_mode()
    def forward(self, inputs: Inputs, noise: Tensor) -> Tensor:
        """Actions (B, C, A) for observations ``inputs``."""
        assert inputs.images is not None and inputs.ids is not None and inputs.present is not None and inputs.state is not None
        dtype, batch = self.action.out.weight.dtype, len(noise)
        pixels = ((inputs.images.flatten(0, 1).float() / 255 - self.mean) / self.std).to(dtype)
        cache = DynamicCache()
        self.vlm.model(
            input_ids=inputs.ids, pixel_values=pixels, attention_mask=inputs.present.long(), past_key_values=cache, use_cache=True
        )
        present, reach = inputs.present, inputs.present.sum(1, keepdim=True)

        queries = self.foresight.queries[None].expand(batch, -1, -1)
        hidden, present, reach = self._extend(self.gen, queries, present, reach, cache)
        self.foresight.out(hidden)  # the foresight is part of the answer
        state = self.state(inputs.state.to(dtype))
        _, present, reach = self._extend(self.act, state, present, reach, cache)

        x, length = noise, cache.get_seq_length()
        for step in range(self.steps):
            time = torch.full((batch, x.shape[1]), step / self.steps, device=x.device)
            tokens = self.action.into(x.to(dtype))
            tokens = self.action.mix(torch.cat([tokens, sinusoid(time, TimeFeatures(), tokens.shape[-1]).to(dtype)], dim=-1))
            hidden, _, _ = self._extend(self.act, tokens, present, reach, cache)
            cache.crop(length)
            x = x + self.action.out(hidden).to(x.dtype) / self.steps
        return x

    @staticmethod
    def _extend(expert: Any, tokens: Tensor, present: Tensor, reach: Tensor, cache: DynamicCache) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of ``tokens`` that read all that is present and each other, and what is present after them."""
        batch, count = tokens.shape[:2]
        present = torch.cat([present, present.new_ones(batch, count)], dim=1)
        allowed = present[:, None, None, :].expand(batch, 1, count, -1)
        mask = torch.zeros(allowed.shape, dtype=tokens.dtype, device=tokens.device).masked_fill(~allowed, torch.finfo(tokens.dtype).min)
        positions = reach + torch.arange(count, device=tokens.device)
        out = expert(inputs_embeds=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.last_hidden_state, present, reach + count


def _like(vlm: Any, attention: str) -> Any:
    """A transformers model of its own with the weights of ``vlm``."""
    config = copy.deepcopy(vlm.config)
    out = AutoModelForImageTextToText.from_config(config, dtype=torch.float32, attn_implementation=attention)
    out.load_state_dict(vlm.state_dict())
    return out.eval()


def _decoder(expert: Any, attention: str) -> Qwen3Model:
    """Our decoder as a ``Qwen3Model`` without words."""
    assert isinstance(expert, Decoder) and expert.time is None and expert.config.qk_norm, "the peer knows plain decoders with q and k norms"
    config, space = expert.config, expert.space
    theirs = Qwen3Config(
        vocab_size=1,
        hidden_size=config.width,
        intermediate_size=config.ffn,
        num_hidden_layers=config.depth,
        num_attention_heads=space.heads,
        num_key_value_heads=space.kv_heads,
        head_dim=space.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": space.rope_theta},
        attn_implementation=attention,
    )
    state: dict[str, Any] = {"norm.weight": expert.state_dict()["final_norm.weight"], "embed_tokens.weight": torch.zeros(1, config.width)}
    for i in range(config.depth):
        part = expert._layer(i)
        gate, up = part.gate_up.weight.chunk(2)
        state |= {
            f"layers.{i}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": part.attention_norm.weight,
                "self_attn.q_proj": part.q.weight,
                "self_attn.k_proj": part.k.weight,
                "self_attn.v_proj": part.v.weight,
                "self_attn.o_proj": part.o.weight,
                "self_attn.q_norm": part.q_norm.weight,
                "self_attn.k_norm": part.k_norm.weight,
                "post_attention_layernorm": part.ffn_norm.weight,
                "mlp.gate_proj": gate,
                "mlp.up_proj": up,
                "mlp.down_proj": part.down.weight,
            }.items()
        }
    out = Qwen3Model(theirs)
    out.load_state_dict(state)
    return out.eval()
