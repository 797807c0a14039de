"""A recording of a call on a CPU, as strict as a CUDA graph: the same operations on the same memory, whatever that holds by then."""

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from triune.vla.inputs import Outputs

WAITS = ("item", "cpu", "numpy", "nonzero", "masked_select", "unique", "__bool__", "__int__", "__float__", "__index__")
FROM_HOST = ("tensor", "as_tensor", "from_numpy")


class Refuse(TorchFunctionMode):
    """Refuses what a graph cannot hold: reading back to the host (but for double-precision lists, which are times made there), and
    tensors of numbers from it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        waits = name in WAITS or (name == "tolist" and args[0].dtype != torch.float64)
        assert not waits and name not in FROM_HOST, f"a graph cannot hold {name}"
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Keeps every operation with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    @torch.inference_mode()
    def replay(self) -> None:
        """Every operation again; what it makes anew is put where it was. Views stay views of what they were."""
        for func, args, kwargs, out in self.done:
            if func._schema.is_mutable:
                func(*args, **kwargs)
            elif not _memory(out) <= _memory((args, kwargs)):
                for held, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                    held.copy_(new)


def taped(call: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], object]]:
    """``engine.Record`` by a tape."""
    with Refuse(), Tape() as tape:
        outputs = call()
    return outputs, tape.replay


def _tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _memory(tree: Any) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in _tensors(tree) if t.numel()}
