"""Every way to attend beside a reference that goes token by token, in double precision."""

import math

import pytest
import torch
from torch import Tensor

from triune.vla.attention import attend, bias, blocks, rotary, rotate


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax over what each row may read, one query head and one token at a time."""
    batch, heads, rows, size = q.shape
    out = torch.zeros(batch, rows, heads, size, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            group = h * k.shape[1] // heads
            for i in range(rows):
                seen = mask[b % len(mask), 0, i].nonzero()[:, 0].tolist()
                scores = [float(q[b, h, i].double() @ k[b, group, j].double()) / math.sqrt(size) for j in seen]
                weights = [math.exp(s - max(scores)) for s in scores]
                for j, weight in zip(seen, weights, strict=True):
                    out[b, i, h] += weight / sum(weights) * v[b, group, j].double()
    return out.flatten(2)


def _given(rows: int, columns: int, heads: int, groups: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(rows + columns)
    q, k, v = (torch.randn(batch, n, t, 8, generator=rng) for n, t in ((heads, rows), (groups, columns), (groups, columns)))
    mask = torch.rand(batch, 1, rows, columns, generator=rng) < 0.6
    mask[..., 0] = True
    return q, k, v, mask


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [5, 260])  # few rows go by products, many by the fused kernel
def test_attention_equals_the_reference(rows: int, groups: int) -> None:
    q, k, v, mask = _given(rows, 7, 4, groups, batch=2 if rows < 100 else 1)
    right = _reference(q, k, v, mask)
    for way in (mask, bias(mask, q.dtype)):
        torch.testing.assert_close(attend(q, k, v, way).double(), right, atol=1e-5, rtol=0)
    open_to_all = torch.ones_like(mask)
    torch.testing.assert_close(attend(q, k, v, None).double(), _reference(q, k, v, open_to_all), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("groups", [2, 4])
def test_blocks_of_a_mask_equal_the_reference(groups: int) -> None:
    """What a GPU runs on long sequences, here without its compiled kernel."""
    q, k, v, mask = _given(130, 150, 4, groups, batch=1)
    mask[:, :, :, 128:] = False
    mask[:, :, 128:, 1:] = False
    plan = blocks(mask)
    assert plan.kv_num_blocks.tolist() == [[[1, 1]]]  # of two by two blocks of tokens the right ones are empty
    torch.testing.assert_close(attend(q, k, v, plan).double(), _reference(q, k, v, mask), atol=1e-5, rtol=0)


def test_gradients_of_both_ways_agree() -> None:
    q, k, v, mask = _given(5, 7, 4, 2)
    found = []
    for many in (False, True):
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        rows, seen = (leaves[0], mask) if not many else (leaves[0].repeat(1, 1, 60, 1), mask.repeat(1, 1, 60, 1))
        (attend(rows, leaves[1], leaves[2], seen) ** 2).sum().div(60 if many else 1).backward()
        found.append([t.grad for t in leaves])
    for few, lots in zip(*found, strict=True):
        torch.testing.assert_close(few, lots, atol=1e-5, rtol=1e-4)


def test_rotary_products_depend_on_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 16).unbind()
    at = lambda p: rotary(torch.tensor([[p]]), 16, 10_000.0)  # noqa: E731
    near, far = ((rotate(q, at(a)) * rotate(k, at(b))).sum() for a, b in ((3, 1), (103, 101)))
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)
