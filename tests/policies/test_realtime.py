"""Policies that are asked with what is left of the chunk before, for several chunks, and whose sessions end."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from triune import UserError
from triune.config import merge
from triune.data import ActionChunk
from triune.policies import Request, TriunePolicy, load_policy
from triune.policies.base import Policy
from triune.policies.train.recipe import run
from triune.vla.answers import Answers
from triune.vla.realtime import Realtime

from ..tape import taped
from .test_triune import observation

PHASES = {"see": {"kind": "prefill", "streams": ["obs"], "period": 2}, "feel": {"kind": "prefill", "streams": ["state"]}}
PHASES |= {"imagine": {"kind": "regress", "streams": ["future"]}, "act": {"kind": "denoise", "streams": ["action"], "steps": 3}}


@pytest.fixture(scope="module")
def bound(recipe_tree: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that was trained with up to three settled actions."""
    return _trained(recipe_tree, {"heads": {"action": {"prefix": 3}}}, tmp_path_factory.mktemp("bound"))


def _trained(recipe_tree: dict, changes: dict[str, Any], folder: Path) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(merge(recipe_tree, {"overrides": changes}), sort_keys=False))
    return run(str(folder / "recipe.yaml"), [], folder / "out", resume=False)


def _left(seed: int, steps: int = 4) -> ActionChunk:
    return ActionChunk(np.random.default_rng(seed).normal(size=(steps, 3)).astype(np.float32), 20.0)


def _asked(policy: Policy, requests: list[Request]) -> list[np.ndarray]:
    for request in requests:
        policy.reset(request.session, int(request.session))
    return [plan.chunk.actions for plan in policy.plan(requests)]


ASKS = [(None, 0, 1), (4, 1, 1), (5, 2, 1), (3, 3, 2), (6, 4, 1), (6, 5, 1), (6, 5, 2), (1, 5, 1), (None, 0, 1)]
"""Actions that are left, how many of them are settled, chunks that are drawn: plain, trained and guided."""


def _mixed(first: int = 1) -> list[Request]:
    return [
        Request(str(i), observation(i), None if left is None else _left(i, left), delay, samples)
        for i, (left, delay, samples) in enumerate(ASKS, first)
    ]


def test_settled_actions_begin_the_chunk(bound: Path) -> None:
    policy = load_policy(bound)
    assert policy.realtime == {"prefix": 3, "guided": True}
    left = _left(0)
    free, *ours = (_asked(policy, [Request("1", observation(), left if d is not None else None, d or 0)])[0] for d in (None, 1, 3))
    for delay, actions in zip((1, 3), ours, strict=True):
        np.testing.assert_allclose(actions[:delay], left.actions[:delay], atol=1e-5)
        assert not np.allclose(actions[delay:], free[delay:], atol=1e-3)
        assert not np.allclose(actions[delay], left.actions[delay], atol=1e-3)  # what is not settled is free


def test_more_than_was_trained_is_guided_or_refused(bound: Path, checkpoint: Path) -> None:
    left = _left(0, 5)
    guided = [
        _asked(load_policy(folder, realtime=how), [Request("1", observation(), left, delay)])[0]
        for folder, how, delay in ((bound, None, 4), (bound, Realtime(method="guided"), 2), (checkpoint, None, 0), (checkpoint, None, 2))
    ]
    for folder, actions, many in zip((bound, bound, checkpoint, checkpoint), guided, (4, 2, 2, 2), strict=True):
        plain = _asked(load_policy(folder), [Request("1", observation())])[0]
        assert np.abs(actions[:many] - left.actions[:many]).mean() < 0.5 * np.abs(plain[:many] - left.actions[:many]).mean()
    policy = load_policy(bound, realtime=Realtime(method="trained"))
    assert policy.realtime == {"prefix": 3, "guided": False}
    policy.reset("1", 1)
    with pytest.raises(UserError, match="trained with up to 3 settled actions, 4 are given"):
        policy.act(Request("1", observation(), left, delay=4))
    assert policy.sessions["1"].step == 0


def test_nothing_left_is_the_plain_answer(bound: Path) -> None:
    policy = load_policy(bound)
    plain, empty = (_asked(policy, [Request("1", observation(), left, 2)])[0] for left in (None, _left(0, 0)))
    np.testing.assert_array_equal(plain, empty)


def test_answers_do_not_depend_on_who_else_asks(bound: Path) -> None:
    policy, requests = load_policy(bound), _mixed()
    together = _asked(policy, requests)
    for request, actions in zip(requests, together, strict=True):
        np.testing.assert_array_equal(_asked(policy, [request])[0], actions)


def test_recorded_answers_are_the_same(bound: Path) -> None:
    """One recording for each kind of call, whatever is left and however long the delay is."""
    policy, requests = load_policy(bound), _mixed()
    plain = _asked(policy, requests)
    policy.answers = Answers(policy.model, taped)
    for ours, theirs in zip(_asked(policy, requests), plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert len(policy.answers.graphs) == len({(policy._method(r), r.samples) for r in requests}) == 5
    others = _mixed(21)
    again = _asked(policy, others)
    assert len(policy.answers.graphs) == 5
    policy.answers = Answers(policy.model)
    for ours, theirs in zip(again, _asked(policy, others), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_several_chunks_are_drawn(checkpoint: Path) -> None:
    policy = load_policy(checkpoint)
    plans = []
    for samples in (1, 3, 3):
        policy.reset("s", 5)
        plans.append(policy.act(Request("s", observation(), samples=samples)))
    one, three, again = plans
    assert one.samples == () and len(three.samples) == 3 and three.samples[0] is three.chunk
    np.testing.assert_allclose(three.chunk.actions, one.chunk.actions, atol=1e-5)
    for a, b in zip(three.samples, again.samples, strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
    assert all(np.abs(three.samples[i].actions - three.samples[j].actions).max() > 0.01 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert three.foresight is not None and three.foresight()["wrist"].shape == one.foresight()["wrist"].shape  # type: ignore[misc]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"samples": 0}, "samples count from 1"),
        ({"delay": -1}, "delay from 0, not 1 and -1"),
        ({"prefix": ActionChunk(np.zeros((2, 4)), 20.0)}, "actions of 4 numbers, the policy's have 3: x, y, z"),
    ],
)
def test_what_does_not_fit_is_refused(wrong: dict[str, Any], message: str, checkpoint: Path) -> None:
    policy = load_policy(checkpoint)
    policy.reset("s", 0)
    with pytest.raises(UserError, match=message):
        policy.act(Request("s", observation(), **wrong))


def test_a_slow_vlm_goes_on_and_tells_its_age(recipe_tree: dict, tmp_path: Path) -> None:
    policy = load_policy(_trained(recipe_tree, {"heads": {"action": {"prefix": 3}}, "schedule": PHASES}, tmp_path))
    policy.reset("s", 0)
    left, seen = _left(0), observation()
    ages = []
    for step, delay in enumerate((2, 3, 5)):
        at = type(seen)(seen.images, seen.state, seen.instruction, 0.25 * step)
        plan = policy.act(Request("s", at, left, delay))
        ages.append(plan.timing["age of see"])
        if delay <= 3:
            np.testing.assert_allclose(plan.chunk.actions[:delay], left.actions[:delay], atol=1e-5)
    assert ages == pytest.approx([0, 250, 0])


def test_sessions_do_not_pile_up(checkpoint: Path) -> None:
    policy = load_policy(checkpoint)
    policy.close("never")
    for i in range(20):
        policy.reset(str(i), i)
        policy.close(str(i))
    assert policy.sessions == {}
    with pytest.raises(UserError, match="session '3' has not begun"):
        policy.act(Request("3", observation()))


def test_settings_travel_with_the_checkpoint(bound: Path) -> None:
    policy = load_policy(bound, realtime=Realtime(schedule="linear", horizon=3))
    assert policy.settings.realtime.weights(1, 5, 6) == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])
    assert load_policy(bound).settings.realtime == Realtime()
    assert isinstance(policy, TriunePolicy) and torch.is_grad_enabled()
