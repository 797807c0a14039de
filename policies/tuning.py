"""What of a model learns when it is fine-tuned: whole experts, parts of them, or low-rank adapters (peft)."""

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import nn

from ..config import Strict
from ..errors import UserError
from ..vla import Model
from ..vla.experts import Expert, PretrainedVLM

ADAPTER = "default"


class Lora(Strict):
    """Low-rank adapters beside linear layers (arXiv 2106.09685); with ``dora`` the weight's magnitude learns, too (arXiv 2402.09353).

    Attributes:
        alpha: their output counts ``alpha / rank``; by default once.
        targets: last part of the names of the linear layers that get one, such as ``[q_proj, v_proj]``; by default all of the expert's
            transformer layers, those of a VLM's vision tower excepted.
    """

    rank: PositiveInt = 16
    alpha: PositiveInt | None = None
    dropout: NonNegativeFloat = 0.0
    dora: bool = False
    targets: tuple[str, ...] | None = None


class Tuning(Strict):
    """How one expert learns.

    Attributes:
        frozen: it does not.
        freeze: parts of it that do not: prefixes of parameter names within the expert, such as ``model.model.vision_model``.
        lora: adapters learn in place of its weights.
        lr: factor on the learning rate.
    """

    frozen: bool = False
    freeze: tuple[str, ...] = ()
    lora: Lora | None = None
    lr: NonNegativeFloat = 1.0


def tune(model: Model, experts: Mapping[str, Tuning]) -> None:
    """Freeze and adapt ``model`` in place, as ``experts`` say by name. Adapters begin as zero, so the model acts as before.

    Raises:
        UserError: there is no such expert, part or linear layer, or peft is not installed.
    """
    for name, tuning in experts.items():
        if name not in model.mot.experts:
            raise UserError(f"experts.{name}: {model.spec.name} has no such expert; it has {', '.join(model.mot.experts)}")
        expert = model.mot.experts[name]
        for prefix in tuning.freeze:
            found = [p for n, p in expert.named_parameters() if n.startswith(prefix)]
            if not found:
                known = ", ".join(sorted({".".join(n.split(".")[:3]) for n, _ in expert.named_parameters()}))
                raise UserError(f"experts.{name}.freeze: no parameter begins with '{prefix}'; names begin with {known}")
            for parameter in found:
                parameter.requires_grad_(False)
        if tuning.frozen:
            expert.requires_grad_(False)
        if tuning.lora is not None:
            adapt(expert, name, tuning.lora)
    model.train(model.training)


def adapt(expert: Expert, name: str, lora: Lora) -> None:
    """Put adapters on the linear layers of an expert, whose own weights then do not learn.

    Raises:
        UserError: peft is not installed, or there is no such layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("adapters need peft, which is not installed; run: pip install 'triune-vla[train]'") from None
    linears = [n for n, part in expert.named_modules() if isinstance(part, nn.Linear)]
    if lora.targets is None:
        text = {id(part) for unit in expert.units() for part in unit.modules()}
        chosen = [n for n, part in expert.named_modules() if isinstance(part, nn.Linear) and id(part) in text]
    else:
        chosen = [n for n in linears if n.rpartition(".")[2] in lora.targets]
    if not chosen:
        known = ", ".join(sorted({n.rpartition(".")[2] for n in linears}))
        raise UserError(f"experts.{name}.lora.targets: no linear layer is called {lora.targets}; choose among {known}")
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha or lora.rank, lora_dropout=lora.dropout, use_dora=lora.dora, target_modules=chosen
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inject_adapter_in_model(config, expert, adapter_name=ADAPTER)


def merge(model: Model) -> None:
    """Add adapters to the weights beside which they stand; what is left are plain layers, which may be adapted anew."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "base_layer"):  # peft's layers alone
                layer: Any = child
                layer.merge()
                setattr(parent, name, layer.get_base_layer())
    for expert in model.mot.experts.values():
        vars(expert).pop("peft_config", None)


def narrow_frozen(model: Model) -> None:
    """Put weights that do not learn into bf16, but for those of VLMs that are not known to be right in it."""
    for expert in model.mot.experts.values():
        if isinstance(expert, PretrainedVLM) and not expert.family.narrows:
            continue
        for parameter in expert.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
