"""A model for inference in bf16: weights held in it, and modules of transformers that are slow in it done another way."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .experts import PretrainedVLM
from .model import Model


def narrow(model: Model) -> Model:
    """``model`` with its weights in bf16, in place, for inference alone. Buffers, such as rotary frequencies, stay as they are.

    Raises:
        UserError: a pretrained expert's architecture does not stand bf16 (``Family.narrows``).
    """
    for name, expert in model.mot.experts.items():
        if isinstance(expert, PretrainedVLM) and not expert.family.narrows:
            kind = expert.model.config.model_type
            raise UserError(f"{model.spec.name}: expert '{name}' is a '{kind}' model, which goes wrong in bf16; keep this model in fp32")
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    patches_as_products(model)
    return model


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
