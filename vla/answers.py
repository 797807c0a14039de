"""Answers to prompts of any length: each padded no further than to the next of a few lengths, and recorded once where there is a GPU."""

import warnings
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .engine import Captured, Record, Request, infer, unrecordable
from .inputs import Inputs, Outputs
from .model import Model

ROOM = (16, 32, 64, 128)
"""Tokens after a prompt's last image token to which it is padded; above them to the stream's own length."""

GRAPHS = 8
"""Recordings that are kept, the latest used."""


class Answers:
    """``infer`` for prompts of any length.

    Trailing padding carries nothing, so that actions are the same within rounding whatever a prompt is padded to. To the last bit they
    are the same for one length and batch size alone: ``length`` is a function of the prompt itself.

    Args:
        record: as in ``Captured``; without it every call runs anew.
    """

    def __init__(self, model: Model, record: Record | None = None) -> None:
        self.model = model
        self.prompt = next(n for n, s in model.spec.streams.items() if s.tokens == "prompt")
        self.full = model.spec.streams[self.prompt].length
        self.record = record
        if record is not None and (reason := unrecordable(model.graph)) is not None:
            warnings.warn(f"{model.spec.name} runs without a graph: {reason}", stacklevel=2)
            self.record = None
        self.trims = trims(model)
        self.models = {self.full: model}
        self.graphs: OrderedDict[tuple[object, ...], Captured] = OrderedDict()

    def length(self, ids: Int[Tensor, "T"], present: Bool[Tensor, "T"]) -> int:
        """Tokens that a prompt is padded to: those of its images and the least of ``ROOM`` that holds the rest, or the stream's length."""
        if not self.trims:
            return self.full
        places = torch.arange(1, len(ids) + 1, device=ids.device)
        shown = int((places * (ids == self.model.vlm(self.prompt).image_token)).amax())
        end = int((places * present).amax())
        return min((shown + room for room in ROOM if end <= shown + room < self.full), default=self.full)

    def __call__(self, inputs: Inputs, noise: Mapping[str, Tensor], length: int, request: Request | None = None) -> Outputs:
        """As ``infer``, for prompts of which ``length`` tokens are needed."""
        assert inputs.ids is not None and inputs.present is not None, "a prompt has ids, of which some are present"
        if length not in self.models:
            self.models[length] = self.model.shortened(length)
        model, inputs = self.models[length], replace(inputs, ids=inputs.ids[:, :length], present=inputs.present[:, :length])
        if self.record is None:
            return infer(model, inputs, noise, request=request)
        request = request or Request()
        how = request.steps, request.mode, None if request.prefix is None else repr(request.prefix.guide)
        shapes = (*how, *((t.shape, t.dtype) for t in (*inputs.tensors(), *noise.values(), *request.tensors())))
        if shapes not in self.graphs:
            self.graphs[shapes] = Captured(model, inputs, noise, record=self.record, request=request)
        self.graphs.move_to_end(shapes)
        if len(self.graphs) > GRAPHS:
            self.graphs.popitem(last=False)
        return self.graphs[shapes](inputs, noise, request)


def trims(model: Model) -> bool:
    """Whether prompts may be shorter than their stream: padding stands at their end, all that has ids is a prompt, and no phase keeps
    keys of a prompt for the next one."""
    streams, graph = model.spec.streams, model.graph
    prompts = [n for n, s in streams.items() if s.tokens == "prompt"]
    slow = any(phase.period > 1 for phase in graph.phases.values())
    words = any(s.tokens == "words" for s in streams.values())
    return not (slow or words or any(n in graph.interleaved or streams[n].grid is not None for n in prompts))
