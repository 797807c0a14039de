"""Chunks that go on from the one before: lerobot's guidance and the paper's formula from the same velocity; settled actions; samples."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from triune.config import CONFIGS
from triune.vla import build, load_spec
from triune.vla.engine import Captured, Memory, Request, infer, infer_again
from triune.vla.flow import grid
from triune.vla.inputs import Noisy
from triune.vla.model import Model
from triune.vla.narrow import narrow
from triune.vla.proofs import Probe, probe
from triune.vla.realtime import Prefix, Realtime, guided, led, settled, strength

from ..tape import taped

Make = Callable[..., Any]
ACTS = sorted(p.stem for p in (CONFIGS / "model").glob("*_tiny.yaml") if p.stem != "mot_tiny")  # mot makes no actions
STEPS = 10
SCHEDULES = ("linear", "exp", "ones", "zeros")


def _velocity(x: Tensor, time: float) -> Tensor:
    """A nonlinear velocity that mixes steps and dimensions of a chunk (B, T, A)."""
    return torch.tanh(x.roll(1, 1) @ torch.linspace(-1, 1, 9).view(3, 3) + time) - x * x.mean(dim=1, keepdim=True)


def _integrated(velocity: Callable[[Mapping[str, Tensor], int], dict[str, Tensor]], noise: Tensor, steps: int = STEPS) -> Tensor:
    x = noise
    for run in range(steps):
        x = x + velocity({"action": x}, run)["action"] / steps
    return x


def _given(seed: int, left: int = 5) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, 3, generator=rng), torch.randn(2, left, 3, generator=rng)


def _ours(how: Realtime, noise: Tensor, left: Tensor, delay: int) -> Tensor:
    weights = torch.tensor([how.weights(delay, left.shape[1], 8)] * 2)
    long = torch.nn.functional.pad(left, (0, 0, 0, 8 - left.shape[1]))
    times = grid(STEPS)[:-1]
    lead = guided(lambda x, run: {"action": _velocity(x["action"], times[run])}, "action", Prefix(long, weights, how), times)
    return _integrated(lead, noise)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("jacobian", [True, False])
def test_guidance_is_lerobots(schedule: str, jacobian: bool) -> None:
    """lerobot 0.6.1's time runs from 1 (noise) to 0 and its velocity is noise - data. It computes the velocity before it asks for
    gradients, so that its Jacobian is the identity; with a velocity that asks for them itself it is the paper's."""
    from lerobot.configs import RTCAttentionSchedule
    from lerobot.policies.common.flow_matching import euler_integrate
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    def theirs(x: Tensor, time: Tensor) -> Tensor:
        return -_velocity(x.requires_grad_() if jacobian else x, 1 - float(time[0]))

    how = Realtime(schedule=schedule, jacobian=jacobian, horizon=6, most=5.0)
    for delay, left in ((2, 5), (0, 8), (4, 8), (5, 3)):
        noise, before = _given(delay, left)
        config = RTCConfig(prefix_attention_schedule=RTCAttentionSchedule[schedule.upper()], max_guidance_weight=5.0, execution_horizon=6)
        expected = euler_integrate(
            theirs, noise, STEPS, rtc_processor=RTCProcessor(config), rtc_enabled=True, inference_delay=delay, prev_chunk_left_over=before
        )
        torch.testing.assert_close(_ours(how, noise, before, delay), expected.detach(), atol=1e-5, rtol=0)
        plain = _integrated(lambda x, run: {"action": _velocity(x["action"], run / STEPS)}, noise)
        assert any(how.weights(delay, left, 8)) == bool((expected - plain).abs().max() > 0.05)


def test_guidance_is_the_papers() -> None:
    """Equations 2 to 5 of arXiv 2506.07339, with the whole Jacobian of the estimated chunk."""
    horizon, delay, executed, beta, n = 8, 2, 3, 5.0, 5
    noise, before = _given(3, horizon - executed)
    weights = []
    for i in range(horizon):
        c = (horizon - executed - i) / (horizon - executed - delay + 1)
        weights.append(1.0 if i < delay else c * (math.exp(c) - 1) / (math.e - 1) if i < horizon - executed else 0.0)
    weight = torch.tensor(weights).repeat_interleave(3)
    target = torch.cat([before, torch.zeros(2, executed, 3)], dim=1)
    expected = []
    for row in range(2):
        x = noise[row].flatten()
        for k in range(n):
            t = k / n

            def end(a: Tensor, t: float = t) -> Tensor:
                return a + (1 - t) * _velocity(a.view(1, horizon, 3), t).flatten()

            jacobian = torch.autograd.functional.jacobian(end, x)
            r2 = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
            scale = min(beta, (1 - t) / (t * r2)) if t else beta
            correction = ((target[row].flatten() - end(x)) * weight) @ jacobian
            x = x + (_velocity(x.view(1, horizon, 3), t).flatten() + scale * correction) / n
        expected.append(x.view(horizon, 3))
    how = Realtime()
    assert how.weights(delay, horizon - executed, horizon) == pytest.approx(weights)
    times = grid(n)[:-1]
    prefix = Prefix(target, torch.tensor([weights] * 2), how)
    lead = guided(lambda x, run: {"action": _velocity(x["action"], times[run])}, "action", prefix, times)
    torch.testing.assert_close(_integrated(lead, noise, n), torch.stack(expected), atol=1e-5, rtol=0)
    assert strength(0.0, beta) == beta and strength(0.5, beta) == pytest.approx(2.0) and strength(1.0, beta) == beta


def _built(name: str) -> tuple[Model, Probe]:
    """A small model of random weights that are large enough to bend its flow."""
    model = build(load_spec(name)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model, probe(model)


def _slowly(model: Model, data: Probe, prefix: Prefix, steps: int) -> Tensor:
    """The chunk by whole forwards over the cache at each step, as in training: no plan, no buffers, nothing prepared."""
    name = model.action_stream
    with torch.no_grad():
        kept, _ = model.observe(data.inputs)
    phase = next(p for p in model.graph.phases.values() if p.kind == "denoise" and name in p.streams)
    flows = [n for n in phase.streams if n in model.spec.flows]
    grids = {n: grid(steps, phase.shift or model.spec.flow(n).shift) for n in flows}
    x = {n: data.noise[n] for n in flows}
    here = prefix.weights[..., None] > 0
    if prefix.guide is None:
        x[name] = torch.where(here, prefix.actions, x[name])
    for run in range(steps):
        times = {n: torch.full(x[n].shape[:2], grids[n][run]) for n in flows}
        if prefix.guide is None:
            times[name] = times[name].masked_fill(here[..., 0], 1.0)
        start = x[name].clone().requires_grad_()
        v = model.velocity(phase.streams, data.inputs, {n: Noisy(start if n == name else x[n], times[n]) for n in flows}, kept)
        if prefix.guide is not None:
            t = grids[name][run]
            end = start + (1 - t) * v[name]
            error = ((prefix.actions - end) * prefix.weights[..., None]).detach()
            v[name] = v[name] + strength(t, prefix.guide.most) * torch.autograd.grad(end, start, error)[0]
        for n in flows:
            moved = x[n] + v[n].detach() * (grids[n][run + 1] - grids[n][run])
            x[n] = torch.where(here, x[n], moved) if n == name and prefix.guide is None else moved
    return x[name]


def _before(model: Model, seed: int, left: int = 4) -> Tensor:
    _, size = model.flow_shapes()[model.action_stream]
    return torch.randn(2, left, size, generator=torch.Generator().manual_seed(seed))


def _begun(model: Model, before: Tensor, counts: tuple[int, int]) -> Prefix:
    """Settled actions, however many the spec was trained with."""
    loose = led(model, before, Realtime(schedule="zeros"), counts)
    return replace(loose, guide=None)


@pytest.mark.parametrize("name", ACTS)
def test_chunks_go_on_in_every_spec(name: str) -> None:
    """Guided and settled, each the same as by whole forwards; each row by its own delay; and the same again from a recording."""
    model, data = _built(name)
    plain = infer(model, data.inputs, data.noise, request=Request(steps=3)).actions
    before = _before(model, 5)
    for prefix in (led(model, before, Realtime(), (1, 2), (4, 3)), _begun(model, before, (1, 3))):
        how = Request(steps=3, prefix=prefix)
        answer = infer(model, data.inputs, data.noise, request=how).actions
        torch.testing.assert_close(answer, _slowly(model, data, prefix, 3), atol=2e-5, rtol=2e-5)
        assert (answer - plain).abs().amax(dim=(1, 2)).min() > 1e-2
        captured = Captured(model, data.inputs, data.noise, record=taped, request=how)
        other = probe(model, seed=1)
        for given, counts in ((data, (2, 1)), (other, (3, 0))):
            changed = led(model, _before(model, 6), Realtime(), counts) if prefix.guide else _begun(model, _before(model, 6), counts)
            now = Request(steps=3, prefix=changed)
            assert torch.equal(
                captured(given.inputs, given.noise, now).actions, infer(model, given.inputs, given.noise, request=now).actions
            )
    nothing = replace(prefix, weights=torch.zeros_like(prefix.weights))
    for none in (nothing, replace(nothing, guide=Realtime())):
        again = infer(model, data.inputs, data.noise, request=Request(steps=3, prefix=none)).actions
        torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-5)


def test_several_chunks_of_one_observation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as each alone, and the observation is looked at once, not once a chunk."""
    for name in ("small_60m_tiny", "triune_tiny", "motus_tiny", "groot_n17_tiny", "smolvla_tiny"):
        model, data = _built(name)
        others = {n: torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(7)).transpose(0, 1) for n, x in data.noise.items()}
        together = infer(model, data.inputs, {n: x.flatten(0, 1) for n, x in others.items()})
        for sample in (0, 1):
            alone = infer(model, data.inputs, {n: x[:, sample] for n, x in others.items()})
            torch.testing.assert_close(together.actions[sample::2], alone.actions, atol=1e-5, rtol=1e-5)
            for stream, patches in alone.foresight.items():
                torch.testing.assert_close(together.foresight[stream][sample::2], patches, atol=1e-5, rtol=1e-5)
    model, data = _built("small_60m_tiny")
    rows, observe = [], model.vlm("obs").embed
    monkeypatch.setattr(model.vlm("obs"), "embed", lambda images, *rest: rows.append(len(images)) or observe(images, *rest))
    infer(model, data.inputs, {n: x.repeat_interleave(3, 0) for n, x in data.noise.items()})
    assert rows == [2]


def test_slow_phases_and_what_is_left(make_spec: Make) -> None:
    """A VLM that looks at every second call, in a plain one, is read by a guided one."""
    phases = {"see": {"kind": "prefill", "streams": ["obs"], "period": 2}, "feel": {"kind": "prefill", "streams": ["state"]}}
    phases |= {"imagine": {"kind": "regress", "streams": ["future"]}, "act": {"kind": "denoise", "streams": ["action"]}}
    model = build(make_spec(schedule=phases)).eval()
    first, second = probe(model, seed=0), probe(model, seed=1)
    later = replace(first.inputs, images=second.inputs.images, state=second.inputs.state)
    prefix, memory = led(model, _before(model, 0), Realtime(), (2, 2)), Memory()
    infer_again(model, first.inputs, first.noise, memory, now=0.0)
    answer = infer_again(model, later, first.noise, memory, now=0.1, request=Request(prefix=prefix))
    mixed = replace(later, images=first.inputs.images)
    torch.testing.assert_close(answer.actions, infer(model, mixed, first.noise, request=Request(prefix=prefix)).actions)
    memory = Memory()  # and the other way round
    infer_again(model, first.inputs, first.noise, memory, now=0.0, request=Request(prefix=prefix))
    plain = infer_again(model, later, first.noise, memory, now=0.1)
    torch.testing.assert_close(plain.actions, infer(model, mixed, first.noise).actions)


def test_guidance_goes_back_through_packed_layers() -> None:
    """In bf16 the derivative is that of fp32 within rounding, not the identity."""
    model, data = _built("small_60m_tiny")
    prefix = led(model, 2 * _before(model, 1), Realtime(), (2, 2))
    exact, flat = (
        infer(model, data.inputs, data.noise, request=Request(prefix=replace(prefix, guide=Realtime(jacobian=j)))).actions
        for j in (True, False)
    )
    narrowed = infer(narrow(model), data.inputs, data.noise, request=Request(prefix=prefix)).actions
    far = (exact - flat).abs().max()
    assert far > 0.1 and (narrowed - exact).abs().max() < 0.2 * far


def test_what_was_left_is_taken_up(make_spec: Make) -> None:
    """A tiny policy of two ways, each as good: without what is left it changes its mind between chunks; guided or trained it does not."""
    model = build(make_spec(heads={"action": {"prefix": 3}})).train()
    data = probe(model, batch=32)
    way = torch.linspace(0.5, 1.5, 6)[:, None].expand(6, 3)
    rng = torch.Generator().manual_seed(0)
    optimiser = torch.optim.AdamW(model.trained().values(), lr=3e-3)
    with torch.no_grad():
        cache = {"obs": model.observe(data.inputs)[0]["obs"]}
    for _ in range(150):
        signs = torch.randint(0, 2, (32, 1, 1), generator=rng) * 2.0 - 1
        noise, time = model.draw(32, rng)
        loss = model.losses(data.inputs, replace(data.targets, actions=signs * way), noise, time, cache)["action"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval()
    before = (torch.arange(32) % 2 * 2.0 - 1)[:, None, None] * way[2:]  # two of six actions were executed
    noise = {"action": torch.randn(32, 6, 3, generator=rng)}

    def chunk(prefix: Prefix | None) -> Tensor:
        return infer(model, data.inputs, noise, cache, Request(prefix=prefix)).actions

    def jump(actions: Tensor) -> Tensor:
        """Between the last action of the chunk before that is executed and the first of the new one, (B,)."""
        return (actions[:, 2] - before[:, 1]).abs().mean(-1)

    plain, delays = chunk(None), [2] * 32
    assert (jump(plain) > 1.5).float().mean() > 0.2  # the other way
    for prefix in (led(model, before, Realtime(), delays), settled(model, before, delays)):
        assert jump(chunk(prefix)).mean() < 0.4 * jump(plain).mean() and jump(chunk(prefix)).max() < 1
    ones = led(model, before, Realtime(schedule="ones", most=10.0), delays)
    apart = [(actions[:, :4] - before).abs().mean() for actions in (chunk(ones), plain)]
    assert apart[0] < 0.1 * apart[1]  # what counts 1 is reproduced
