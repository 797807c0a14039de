"""A spec's model as a Policy: from observation to action chunk."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from ..config import load_tree, parse
from ..data import ActionChunk, Contract, Normaliser, Observation, Statistics
from ..errors import UserError
from ..vla import Inputs, Model, Spec, build
from ..vla.engine import infer
from ..vla.experts.pretrained import PromptEncoder
from .base import Plan, Policy, Request
from .checkpoint import Checkpoint, read_checkpoint

BATCH = 4
"""Observations per forward. Smaller batches are padded to it: fp32 products of few tokens differ with the batch size, and
actions must be the same bit for bit whoever else is asking."""


@dataclass
class _Session:
    seed: int
    step: int = 0


class TriunePolicy(Policy):
    """``plan`` = prompt, prefix, foresight, denoise, unnormalise."""

    def __init__(self, model: Model, contract: Contract, statistics: dict[str, Statistics]) -> None:
        self.model = model.eval()
        self.contract = contract
        self.state = Normaliser(statistics["observation.state"], contract.state.normalisation or "none")
        self.action = Normaliser(statistics["action"], contract.action.normalisation or "none")
        self.prompts = prompt_encoder(model)
        self.sessions: dict[str, _Session] = {}
        self.device = next(model.parameters()).device

    def reset(self, session: str, seed: int) -> None:
        self.sessions[session] = _Session(seed)

    def plan(self, requests: list[Request]) -> list[Plan]:
        """See ``Policy``.

        Raises:
            UserError: a session was never reset, or an observation does not fit the contract.
        """
        plans: list[Plan] = []
        for start in range(0, len(requests), BATCH):
            plans += self._plan(requests[start : start + BATCH])
        return plans

    @torch.no_grad()
    def _plan(self, requests: list[Request]) -> list[Plan]:
        began = time.perf_counter()
        padded = requests + [requests[-1]] * (BATCH - len(requests))
        inputs = self.inputs([r.observation for r in padded])
        noise = {self.model.action_stream: torch.from_numpy(np.stack([self._noise(r) for r in padded])).to(self.device)}
        encoded = time.perf_counter()
        outputs = infer(self.model, inputs, noise)
        assert outputs.actions is not None
        for request in requests:
            self.sessions[request.session].step += 1
        actions = self.action.unnormalise(outputs.actions.float().cpu().numpy())
        timing = {"encode": 1e3 * (encoded - began), "model": 1e3 * (time.perf_counter() - encoded)}
        rate = self.contract.rate or 0.0
        return [
            Plan(ActionChunk(actions[i], rate, r.observation.timestamp), self._drawing(outputs.foresight, i), timing=timing)
            for i, r in enumerate(requests)
        ]

    def inputs(self, observations: Sequence[Observation]) -> Inputs:
        """Observations as the model's inputs.

        Raises:
            UserError: a camera is missing or has another size, or the state has another length than the contract says.
        """
        for observation in observations:
            _check(observation, self.contract)
        images = np.stack([np.stack([o.images[c] for c in self.model.spec.cameras]) for o in observations])
        state = self.state.normalise(np.stack([o.state for o in observations])).astype(np.float32)
        ids, present = self.prompts([prompt(self.contract, o.instruction) for o in observations], len(self.model.spec.cameras))
        pixels = torch.from_numpy(images).permute(0, 1, 4, 2, 3)
        return Inputs(pixels.to(self.device), ids.to(self.device), present.to(self.device), torch.from_numpy(state).to(self.device))

    def _noise(self, request: Request) -> np.ndarray:
        """Standard normal (C, A), a function of (seed, step of the session) alone."""
        if request.session not in self.sessions:
            raise UserError(f"session '{request.session}' has not begun: call reset(session, seed) before the first plan")
        if request.prefix is not None or request.samples != 1:
            raise UserError("this policy plans one chunk from the present observation; it takes neither a prefix nor several samples")
        session = self.sessions[request.session]
        spec = self.model.spec
        shape = (spec.streams[self.model.action_stream].length, self.contract.action.size)
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([session.seed, session.step, 0])))
        return rng.standard_normal(shape, dtype=np.float32)

    def _drawing(self, foresight: dict[str, torch.Tensor], row: int) -> Callable[[], dict[str, np.ndarray]] | None:
        """Decodes the predicted latents of one row, camera -> (H, W, 3) uint8, when it is called."""
        latents = {name: patches[row : row + 1].clone() for name, patches in foresight.items()}

        @torch.no_grad()
        def draw() -> dict[str, np.ndarray]:
            out: dict[str, np.ndarray] = {}
            for name, patches in latents.items():
                module = self.model.foresight[name]
                frames = module.decode(patches)[0].permute(0, 2, 3, 1).cpu().numpy()
                out |= dict(zip(module.head.cameras, frames, strict=True))
            return out

        return draw if latents else None


def prompt(contract: Contract, instruction: str) -> str:
    """The text that goes with an instruction: the contract's template, filled in."""
    return (contract.prompt or "{instruction}").replace("{instruction}", instruction)


def prompt_encoder(model: Model) -> PromptEncoder:
    """The tokenizer of the model's prompt stream."""
    name, stream = next((n, s) for n, s in model.spec.streams.items() if s.tokens == "prompt")
    return PromptEncoder(model.vlm(name), stream.length)


def load_policy(path: str | Path, cuts: tuple[tuple[str, str], ...] = ()) -> TriunePolicy:
    """The policy of a checkpoint or run folder, on a GPU when one is present.

    Args:
        cuts: edges ``(row, col)`` of the attention graph to do without, for an ablation.

    Raises:
        UserError: no checkpoint there, a damaged one, or an edge to cut that does not exist.
    """
    return from_checkpoint(read_checkpoint(path), cuts)


def from_checkpoint(checkpoint: Checkpoint, cuts: tuple[tuple[str, str], ...] = ()) -> TriunePolicy:
    """The policy of a checkpoint that was read."""
    for name in checkpoint.info.weights:
        checkpoint.reference(name)  # the frozen weights must be those that were trained with
    spec = parse(Spec, load_tree(checkpoint.spec), checkpoint.spec)
    model = build(spec.cut(*cuts))
    load_trained(model, checkpoint.weights)
    statistics = {key: Statistics.model_validate(value) for key, value in checkpoint.statistics.items()}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TriunePolicy(model.to(device), checkpoint.contract, statistics)


def load_trained(model: Model, file: Path) -> None:
    """Put a checkpoint's trained weights into ``model``.

    Raises:
        UserError: names or shapes are not those of the spec.
    """
    weights, own = load_file(file), model.trained()
    if weights.keys() != own.keys():
        odd = sorted(weights.keys() ^ own.keys())
        raise UserError(
            f"{file} does not fit its spec: {len(odd)} names differ, first {odd[0]}; the checkpoint is not whole, copy it again"
        )
    for name, parameter in own.items():
        if parameter.shape != weights[name].shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(weights[name].shape)}, the spec says {tuple(parameter.shape)}; "
                "the checkpoint is not whole, copy it again"
            )
        parameter.data.copy_(weights[name])


def _check(observation: Observation, contract: Contract) -> None:
    for camera in contract.cameras:
        if camera.name not in observation.images:
            there = ", ".join(observation.images) or "none"
            raise UserError(f"the policy needs camera '{camera.name}', the observation has {there}; map your cameras to its names")
        height, width, _ = observation.images[camera.name].shape
        if (camera.height, camera.width) != (height, width):
            raise UserError(
                f"camera '{camera.name}' is {height}x{width}, the policy was trained on {camera.height}x{camera.width}; "
                "render or resize to that size"
            )
    size, needed = len(observation.state), contract.state
    if size != needed.size:
        raise UserError(f"the state has {size} numbers, the policy needs {needed.size}: {', '.join(needed.names)}")
