"""A model for inference in bf16: weights held in it, and what is slow in it on a CPU done another way."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .experts import Decoder, PretrainedVLM
from .experts.decoder import DecoderLayer
from .model import Model


def narrow(model: Model) -> Model:
    """``model`` with its weights in bf16, in place, for inference alone. Buffers, such as rotary frequencies, stay as they are.

    On a CPU with bf16 instructions the linear layers of the experts are packed too (``Packed``) and are parameters no more.

    Raises:
        UserError: a pretrained expert's architecture is not known to be right in bf16 (``Family.narrows``).
    """
    for name in _not_known(model):
        kind = cast(PretrainedVLM, model.mot.experts[name]).model.config.model_type
        raise UserError(f"{model.spec.name}: expert '{name}' is a '{kind}' model, not known to be right in bf16; keep this model in fp32")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    patches_as_products(model)
    if next(model.parameters()).device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for expert in model.mot.experts.values():
            if isinstance(expert, PretrainedVLM):
                _pack(expert.model.model)
            elif isinstance(expert, Decoder):
                for part in expert.layers:
                    _pack_layer(cast(DecoderLayer, part))
    return model


def narrows(model: Model) -> bool:
    """Whether ``narrow`` takes the model."""
    return not _not_known(model)


def _not_known(model: Model) -> list[str]:
    """Pretrained experts of families that were not tried in bf16."""
    return [n for n, expert in model.mot.experts.items() if isinstance(expert, PretrainedVLM) and not expert.family.narrows]


def patches_as_products(module: nn.Module) -> None:
    """Put ``PatchProduct`` in the place of every convolution within ``module`` that cuts images into patches, with its very weights."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and child.kernel_size == child.stride and child.padding in ("valid", (0, 0)) and child.groups == 1:
                setattr(parent, name, PatchProduct(child))


class PatchProduct(nn.Module):
    """A convolution whose patches do not overlap, as one matrix product.

    oneDNN has no fast convolution of this kind in bf16: two images of 256 pixels in patches of 16 took 46 ms on one core of a Xeon
    with AMX, the product takes 0.7 ms.
    """

    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias, self.side = convolution.weight, convolution.bias, convolution.stride

    def forward(self, x: Float[Tensor, "N K Y X"]) -> Float[Tensor, "N D y x"]:
        rows, columns = self.side
        cells = x.unfold(2, rows, rows).unfold(3, columns, columns).permute(0, 2, 3, 1, 4, 5)  # (N, y, x, K, rows, columns)
        return F.linear(cells.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class Packed(nn.Module):
    """A linear layer whose weight lies as oneDNN's bf16 product reads it, so that it is not laid out anew at each call; ``gelu``
    (of the tanh kind) follows within the product. The operations are those that torch.compile uses on CPUs.

    They know no derivatives: where one is asked for (``realtime.guided``), that by ``x`` is a product with the weight packed the other
    way round, at the first such call.
    """

    packed = True

    def __init__(self, weight: Float[Tensor, "Z D"], bias: Float[Tensor, "Z"] | None = None, gelu: bool = False) -> None:
        super().__init__()
        self.weight: Any = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
        self.bias = None if bias is None else bias.detach()
        self.then: tuple[str, list[Any], str] = ("gelu", [], "tanh") if gelu else ("none", [], "")
        self.turned: Any = None

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S Z"]:
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Derived.apply(x, self))  # type: ignore[no-untyped-call]
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, *self.then)


class _Derived(torch.autograd.Function):
    """``Packed`` with its derivative by what it is given."""

    @staticmethod
    def forward(context: Any, x: Tensor, layer: Packed) -> Tensor:
        assert layer.then[0] == "none", "the derivative of the GELU within a packed product is not written"
        context.layer = layer
        return torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, *layer.then)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        layer = context.layer
        if layer.turned is None:
            layer.turned = torch.ops.mkldnn._reorder_linear_weight(layer.weight.to_dense().t().contiguous())
        return torch.ops.mkldnn._linear_pointwise(gradients[0].contiguous(), layer.turned, None, "none", [], ""), None


def _pack(module: nn.Module) -> None:
    """Pack every linear layer within ``module``, together with the tanh GELU behind it where there is one (SigLIP's MLP)."""
    from transformers.activations import GELUTanh

    for parent in list(module.modules()):
        fused = isinstance(getattr(parent, "activation_fn", None), GELUTanh) and isinstance(getattr(parent, "fc1", None), nn.Linear)
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, Packed(child.weight, child.bias, gelu=fused and name == "fc1"))
        if fused:
            parent.activation_fn = nn.Identity()


def _pack_layer(part: DecoderLayer) -> None:
    """Pack the products of our own layer, and q, k and v once more as the one that ``ReadyDecoder`` uses."""
    own = [child for name, child in part.named_children() if name in ("q", "k", "v")]  # a layer that reads hidden states instead has none
    if len({child.in_features for child in own}) == 1 and own[0].bias is None:
        part.qkv = Packed(torch.cat([child.weight for child in own]))
    for name, child in list(part.named_children()):
        if type(child) is nn.Linear:
            setattr(part, name, Packed(child.weight, child.bias))
