"""Networks that take no memory: shapes and types run through them, and what they would have held and computed is counted."""

import gc
import weakref
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, _is_tensor_constructor  # type: ignore[attr-defined]  # not exported
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

KNOWN = 1 << 16
"""Most numbers of a tensor whose values are computed although nothing else is."""

SLACK = 1.02
"""A peak counts when it is this much above the last."""

_EMPTY = (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default, torch.ops.aten.empty_permuted.default)


class Imagined(FakeTensorMode):
    """torch's fake tensors, of which small ones that follow from constants alone have values.

    Vision towers of transformers 5.5 read sizes of images and places of patches back to the host (``Family.waits``).
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def may_turn_const(self, t: Tensor) -> bool:
        return t.numel() <= KNOWN and type(t) is Tensor and t.device.type == "cpu"

    def dispatch(self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        makes = _is_tensor_constructor(func) and func not in _EMPTY and torch.Tag.nondeterministic_seeded not in func.tags
        if makes and not any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, given))):
            size = args[0] if args and isinstance(args[0], list | tuple) else ()
            if prod(size) <= KNOWN:
                with _disable_current_modes():
                    made = func(*args, **given)
                if self.may_turn_const(made):
                    return self.fake_tensor_converter.from_real_tensor(self, made, make_constant=True)
        return super().dispatch(func, types, args, given)


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still held, once for each storage; works on real tensors, too.

    Attributes:
        now, peak: bytes without gradients of parameters; grads: those; together: most bytes of both at one time. A peak is the true one
            or up to ``SLACK`` below it: Python's collector runs before a new one counts, since the modes that watch (torch's pytrees) hold
            tensors in reference cycles, which a run without them does not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.grads = self.together = 0
        self._live: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                self._add(tensor)
        return out

    def watch(self, parameters: Iterator[nn.Parameter]) -> list[RemovableHandle]:
        """Tell gradients of ``parameters`` from all else."""
        return [p.register_post_accumulate_grad_hook(self._accumulated) for p in parameters if p.requires_grad]

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            return
        self._live[key] = size
        self.now += size
        weakref.finalize(storage, self._gone, key)
        if self.now > SLACK * self.peak or self.now + self.grads > SLACK * self.together:
            self._collect()
            self.peak, self.together = max(self.peak, self.now), max(self.together, self.now + self.grads)

    def _collect(self) -> None:
        """What one round sets free may be all that kept other cycles alive."""
        before = -1
        while before != self.now:
            before = self.now
            gc.collect()

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        size = self._live.get(parameter.grad.untyped_storage()._cdata, 0)
        if size:
            self._live[parameter.grad.untyped_storage()._cdata] = 0
            self.now, self.grads = self.now - size, self.grads + size

    def _gone(self, key: int) -> None:
        self.now -= self._live.pop(key)


def imagine(module: nn.Module, device: torch.device, low: dict[int, torch.dtype] | None = None) -> None:
    """Put tensors without memory in place of all of a module's parameters and buffers, those that are shared once; inside ``Imagined``.

    Args:
        low: id of a parameter -> another type for it.
    """
    made: dict[int, Tensor] = {}
    for part in _parts(module):
        for held in (part._parameters, part._buffers):
            for name, old in held.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=(low or {}).get(id(old), old.dtype), device=device)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                    made[-id(old)] = old  # its id stays its own
                held[name] = made[id(old)]  # type: ignore[assignment]


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    """All modules, and autoencoders that foresight holds out of their sight."""
    for part in module.modules():
        yield part
        hidden = vars(part).get("autoencoder")
        if isinstance(hidden, nn.Module):
            yield from hidden.modules()
