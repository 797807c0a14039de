"""The denoise loop: what its plan prepares equals the model step by step, and what a step does not do."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from triune import UserError
from triune.config import CONFIGS
from triune.vla import build, load_spec
from triune.vla.engine import Plan, Request, infer
from triune.vla.flow import grid
from triune.vla.inputs import Noisy
from triune.vla.mot import Clock, Pass
from triune.vla.narrow import PatchProduct, narrow
from triune.vla.proofs import TOLERANCE, probe

NAMES = sorted(p.stem for p in (CONFIGS / "model").glob("*_tiny.yaml"))
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
    return [(held.keys.data_ptr(), held.values.data_ptr()) for held in plan.body._held.values()]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_equals_the_model_run_by_run(name: str) -> None:
    model = build(load_spec(name)).eval()
    data = probe(model)
    phase_name, phase = next((n, p) for n, p in model.graph.phases.items() if p.kind == "denoise")
    flows = [n for n in phase.streams if n in model.spec.flows]
    with torch.no_grad():
        kept, _ = model.observe(data.inputs)
        x = {n: data.noise[n] for n in flows}
        for now, then in itertools.pairwise(grid(3, phase.shift or model.spec.flow(flows[0]).shift)):
            noisy = {n: Noisy(v, torch.full(v.shape[:2], now)) for n, v in x.items()}
            for n, v in model.velocity(phase.streams, data.inputs, noisy, kept).items():
                x[n] = x[n] + (then - now) * v
    outputs = infer(model, data.inputs, data.noise, request=Request(steps=3))
    for n in flows:
        answer = outputs.actions if n in model.actions else outputs.foresight[n]
        torch.testing.assert_close(answer, x[n], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_neither_waits_nor_selects_nor_allocates_keys(name: str) -> None:
    model = build(load_spec(name)).eval()
    data = probe(model)  # the second row has a shorter prompt, so there are masks
    phase = next(p for p in model.graph.phases.values() if p.kind == "denoise")
    x = {n: data.noise[n] for n in phase.streams if n in model.spec.flows}
    with torch.inference_mode():
        clocks = {n: Clock((0.0, 0.25, 0.5, 0.75)) for n in x}
        plan = Plan(model, phase, data.inputs, model.observe(data.inputs)[0], x, clocks)
        plan.velocity(x, 0)  # the first run makes the buffers
        before = _buffers(plan)
        for run in (1, 2, 3):
            with Watch() as watch:
                plan.velocity(x, run)
            assert watch.syncs == [] and watch.selections == []
            assert watch.joined <= sum(
                model.spec.streams[n].length for n in phase.streams
            )  # no keys of the prefix are joined to the live ones
            assert _buffers(plan) == before
    assert before or not any(model.graph.edges[r, c].via == "keys" for r, c in model.graph.edges if r in phase.streams)


def test_streams_that_read_all_need_no_mask(make_spec) -> None:
    """Prompt and proprioception run in one phase and read each other's columns differently: two products, no mask."""
    model = build(make_spec(edges={"obs": {"obs": "full"}, "state": {"obs": "full"}})).eval()
    data = probe(model)
    inputs = replace(data.inputs, present=None)
    names = next(iter(model.graph.phases.values())).streams
    assert names == ("obs", "state")
    masks = []
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            body = Pass(model.mot, tokens := model.embed(names, inputs), {})
            body.run({n: t.x for n, t in tokens.items()}, keep=names)
            masks.append([[group.mask for group in groups] for groups in body._groups.values()])
    assert masks[0] == [[None, None]] and len(masks[1][0]) == 1 and masks[1][0][0] is not None


class Constants(TorchFunctionMode):
    """Counts tensors made of numbers on the host, which a CUDA graph cannot record."""

    made = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.made += getattr(func, "__name__", "") in ("tensor", "as_tensor", "from_numpy")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["fastwam_tiny", "hy_vla_tiny", "mot_tiny", "pi0_tiny", "pi05_tiny", "small_60m_tiny"])
def test_a_whole_call_can_be_recorded(name: str) -> None:
    """From frames to actions nothing is read back and nothing comes from the host: transformers' towers of Qwen-VL and SmolVLM are not
    of this kind."""
    model = build(load_spec(name)).eval()
    data = probe(model)
    with Watch() as watch, Constants() as constants:
        infer(model, data.inputs, data.noise)
    assert watch.syncs == [] and constants.made == 0


def test_the_watch_sees() -> None:
    x = torch.randn(1, 2, 8, 4)
    with Watch() as watch:
        x[x > 0].sum().item()
        torch.cat([x, x], dim=2)
    with Constants() as constants:
        torch.tensor([1.0])
    assert constants.made == 1
    assert {"_local_scalar_dense", "nonzero"} & set(watch.syncs) and watch.selections == ["index"] and watch.joined == 16


def test_answers_may_be_learned_from(make_spec) -> None:
    model = build(make_spec()).eval()
    data = probe(model)
    weight = torch.ones((), requires_grad=True)
    (weight * infer(model, data.inputs, data.noise).actions).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("name", ["small_60m_tiny", "pi0_tiny", "groot_n17_tiny", "twinbrain_tiny", "fastwam_tiny"])
def test_a_narrow_model_answers_nearly_the_same(name: str) -> None:
    """Also where layers read hidden states and have no keys, norms are of other kinds, and projections have biases."""
    model = build(load_spec(name)).eval()
    data = probe(model)
    exact = infer(model, data.inputs, data.noise).actions
    answer = infer(narrow(model), data.inputs, data.noise).actions
    assert answer.dtype == exact.dtype and 0 < (answer - exact).norm() < 0.02 * (exact - data.noise["action"]).norm()
    assert all(buffer.dtype != torch.bfloat16 for buffer in model.buffers())


def test_what_is_not_known_to_be_right_in_bf16_is_refused() -> None:
    with pytest.raises(UserError, match="'und' is a 'smolvlm' model, not known to be right in bf16"):
        narrow(build(load_spec("smolvla_tiny")))


@pytest.mark.parametrize("bias", [True, False])
def test_patches_as_a_product_are_the_convolution(bias: bool) -> None:
    convolution = torch.nn.Conv2d(3, 5, (4, 2), stride=(4, 2), bias=bias)
    images = torch.randn(2, 3, 16, 8)
    torch.testing.assert_close(PatchProduct(convolution)(images), convolution(images))
