"""The denoise loop: what its plan prepares equals the model step by step, and what a step does not do."""

import pytest
import torch

from triune.vla import build, load_spec
from triune.vla.engine import infer
from triune.vla.flow import euler
from triune.vla.proofs import TOLERANCE, probe

NAMES = ["triune_tiny", "pi0_tiny", "pi05_tiny", "smolvla_tiny", "small_60m_tiny"]


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_equals_the_model_step_by_step(name: str) -> None:
    model = build(load_spec(name)).eval()
    data = probe(model)
    with torch.no_grad():
        kept, _ = model.observe(data.inputs)
        plain = euler(lambda x, t: model.velocity(data.inputs, x, t[:, None].expand(x.shape[:2]), kept), data.noise, 3)
    torch.testing.assert_close(infer(model, data.inputs, data.noise, steps=3).actions, plain, atol=TOLERANCE, rtol=0)
