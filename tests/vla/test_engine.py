"""The denoise loop: what its plan prepares equals the model step by step, and what a step does not do."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from triune import UserError
from triune.vla import build, load_spec
from triune.vla.engine import Plan, infer
from triune.vla.flow import euler
from triune.vla.narrow import PatchProduct, narrow
from triune.vla.proofs import TOLERANCE, probe

NAMES = ["triune_tiny", "pi0_tiny", "pi05_tiny", "smolvla_tiny", "small_60m_tiny"]
SYNCS = ("item", "_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_to_cpu")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "masked_scatter")


class Watch(TorchDispatchMode):
    """What happens on tensors while it is on.

    Attributes:
        syncs: operations whose result the host waits for.
        selections: those that index with booleans.
        joined: the largest number of tokens that a ``cat`` made along the axis of keys.
    """

    def __init__(self) -> None:
        super().__init__()
        self.syncs: list[str] = []
        self.selections: list[str] = []
        self.joined = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        out = func(*args, **(kwargs or {}))
        if name in SYNCS:
            self.syncs.append(name)
        chosen = [i for a in args[1:2] for i in (a if isinstance(a, list | tuple) else [a])]
        if name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in chosen):
            self.selections.append(name)
        if name == "cat" and out.ndim == 4:
            self.joined = max(self.joined, out.shape[2])
        return out


def _buffers(plan: Plan) -> list[tuple[int, int]]:
    return [(r.keys.data_ptr(), r.values.data_ptr()) for r in plan.reads if r.keys is not None and r.values is not None]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_equals_the_model_step_by_step(name: str) -> None:
    model = build(load_spec(name)).eval()
    data = probe(model)
    with torch.no_grad():
        kept, _ = model.observe(data.inputs)
        plain = euler(lambda x, t: model.velocity(data.inputs, x, t[:, None].expand(x.shape[:2]), kept), data.noise, 3)
    torch.testing.assert_close(infer(model, data.inputs, data.noise, steps=3).actions, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_neither_waits_nor_selects_nor_allocates_keys(name: str) -> None:
    model = build(load_spec(name)).eval()
    data = probe(model)  # the second row has a shorter prompt, so there are masks
    with torch.inference_mode():
        plan = Plan(model, data.inputs, model.observe(data.inputs)[0], data.noise, 3)
        before, x = _buffers(plan), data.noise
        for step in range(3):
            with Watch() as watch:
                x = x + plan.velocity(x, step) / 3
            assert watch.syncs == [] and watch.selections == []
            assert watch.joined <= data.noise.shape[1]  # no keys of the prefix are joined to the chunk's
            assert _buffers(plan) == before
    assert before and all(read.own is None or read.keys is not None for read in plan.reads)


def test_the_watch_sees() -> None:
    x = torch.randn(1, 2, 8, 4)
    with Watch() as watch:
        x[x > 0].sum().item()
        torch.cat([x, x], dim=2)
    assert {"_local_scalar_dense", "nonzero"} & set(watch.syncs) and watch.selections == ["index"] and watch.joined == 16


def test_answers_may_be_learned_from(make_spec) -> None:
    model = build(make_spec()).eval()
    data = probe(model)
    weight = torch.ones((), requires_grad=True)
    (weight * infer(model, data.inputs, data.noise).actions).sum().backward()
    assert weight.grad is not None


def test_a_narrow_model_answers_nearly_the_same() -> None:
    model = build(load_spec("small_60m_tiny")).eval()
    data = probe(model)
    exact = infer(model, data.inputs, data.noise).actions
    answer = infer(narrow(model), data.inputs, data.noise).actions
    assert answer.dtype == exact.dtype and (answer - exact).norm() < 0.05 * (exact - data.noise).norm()
    assert model.vlm("obs").model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_what_is_not_known_to_be_right_in_bf16_is_refused() -> None:
    with pytest.raises(UserError, match="'und' is a 'smolvlm' model, not known to be right in bf16"):
        narrow(build(load_spec("smolvla_tiny")))


@pytest.mark.parametrize("bias", [True, False])
def test_patches_as_a_product_are_the_convolution(bias: bool) -> None:
    convolution = torch.nn.Conv2d(3, 5, (4, 2), stride=(4, 2), bias=bias)
    images = torch.randn(2, 3, 16, 8)
    torch.testing.assert_close(PatchProduct(convolution)(images), convolution(images))
