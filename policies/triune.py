"""A spec's model as a Policy: from observation to action chunk."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode

from ..config import load_tree, parse
from ..data import ActionChunk, Contract, Normaliser, Observation, Statistics, Vector
from ..data.transforms import Affine
from ..errors import UserError
from ..vla import Graph, Inputs, Model, Spec, build
from ..vla.answers import Answers
from ..vla.engine import Memory, cuda_graph, infer_again
from ..vla.engine import Request as How
from ..vla.experts.pretrained import PromptEncoder
from ..vla.narrow import narrow, narrows
from ..vla.realtime import Prefix, Realtime, check_settled, led, settled, trained
from ..vla.spec import PretrainedExpert
from ..vla.weights import anchor
from .base import Plan, Policy, Request
from .checkpoint import Checkpoint, Dtype, GraphInfo, find_checkpoint, read_checkpoint
from .inputs import PlainPrompts, Settings
from .lerobot import is_lerobot, load_lerobot
from .safety import default_limits
from .tuning import merge, tune

Method = Literal["plain", "trained", "guided"]
Precision = Literal["auto", "fp32", "bf16"]

BATCH = 4
"""Observations per forward. Smaller batches are padded to it: fp32 products of few tokens differ with the batch size, and
actions must be the same bit for bit whoever else is asking."""


class Undrawn(TorchFunctionMode):
    """Inside, no random weights are drawn, since others are about to take their place: at 3.5 billion that takes a minute."""

    DRAWS = frozenset({"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_"})

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.__name__ in self.DRAWS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@dataclass
class _Session:
    """``seen``: the views (V, 3, Y, X) of each call of the past that is still looked at, the oldest first. ``memory``: what phases
    that do not run at every call left."""

    seed: int
    step: int = 0
    seen: list[torch.Tensor] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)


class TriunePolicy(Policy):
    """``plan`` = prompt, prefix, foresight, denoise, unnormalise."""

    def __init__(
        self, model: Model, contract: Contract, statistics: dict[str, Statistics | Affine], settings: Settings | None = None
    ) -> None:
        self.model = model.eval()
        self.contract = contract
        self.settings = settings or Settings()
        self.state = normaliser(statistics["observation.state"], contract.state)
        self.action = normaliser(statistics["action"], contract.action)
        self.statistics = statistics
        known = {"state": statistics["observation.state"], "action": statistics["action"]}
        self.bands = {part: (s.q01, s.q99) for part, s in known.items() if isinstance(s, Statistics)}
        self.prompts = prompt_encoder(model, self.settings)
        self.image_token = model.vlm(next(n for n, s in model.spec.streams.items() if s.tokens == "prompt")).image_token
        self.sessions: dict[str, _Session] = {}
        slow = any(phase.period > 1 for phase in model.graph.phases.values())
        self.batch = 1 if slow else BATCH  # each session's slow phases are due at calls of its own
        history = model.spec.history
        if history.frames > 1 and contract.executed != history.every:
            raise UserError(
                f"{model.spec.name} looks back {history.every} steps at a time, and is asked every {contract.executed} (executed): "
                "frames in between are not shown to it; make history.every and executed the same"
            )
        self.device = next(model.parameters()).device
        self.dtype: Dtype = "bfloat16" if next(model.mot.parameters()).dtype == torch.bfloat16 else "float32"
        self.answers = Answers(self.model, cuda_graph if self.device.type == "cuda" else None)

    def reset(self, session: str, seed: int) -> None:
        self.sessions[session] = _Session(seed)

    def skip(self, session: str, plans: int) -> None:
        self.sessions[session].step += plans

    def close(self, session: str) -> None:
        self.sessions.pop(session, None)

    @property
    def limits(self) -> dict[str, Any]:
        return default_limits(self.statistics, self.contract, self.settings)

    @property
    def realtime(self) -> dict[str, int | bool]:
        method = self.settings.realtime.method
        return {"prefix": 0 if method == "guided" else trained(self.model), "guided": method != "trained"}

    def plan(self, requests: list[Request]) -> list[Plan]:
        """See ``Policy``. Requests whose prompts are padded to one length, and which want their answers alike, are answered together.

        Raises:
            UserError: a session was never reset, an observation or a prefix does not fit the contract, or more actions are settled than
                were in training and nothing else is allowed (``Realtime.method``).
        """
        kinds = [(self._length(r.observation), self._method(r), r.samples) for r in requests]
        plans: dict[int, Plan] = {}
        for kind in sorted(set(kinds)):
            asked = [i for i, needed in enumerate(kinds) if needed == kind]
            for start in range(0, len(asked), self.batch):
                part = asked[start : start + self.batch]
                plans |= zip(part, self._plan([requests[i] for i in part], *kind), strict=True)
        for request in requests:
            self._went_on(request)
        return [plans[i] for i in range(len(requests))]

    def _went_on(self, request: Request) -> None:
        """Keep what the session's next plan depends on."""
        session, frames = self.sessions[request.session], self.model.spec.history.frames
        session.step += 1
        if frames > 1:
            session.seen = [*session.seen, self._seen(request.observation)][1 - frames :]

    @torch.no_grad()
    def _plan(self, requests: list[Request], length: int, method: Method, samples: int) -> list[Plan]:
        began = time.perf_counter()
        past = [self.sessions[r.session].seen if r.session in self.sessions else [] for r in requests]
        missing = self.batch - len(requests)
        padded = requests + requests[-1:] * missing
        inputs = self.inputs([r.observation for r in padded], past + past[-1:] * missing)
        drawn = [self._noise(r, sample) for r in padded for sample in range(samples)]
        noise = {n: torch.from_numpy(np.stack([d[n] for d in drawn])).to(self.device, non_blocking=True) for n in drawn[0]}
        how = How(prefix=None if method == "plain" else self._prefix(padded, method, samples))
        encoded, ages = time.perf_counter(), {}
        if self.batch == 1:
            memory, now = self.sessions[requests[0].session].memory, requests[0].observation.timestamp
            outputs = infer_again(self.model, inputs, noise, memory, now, how)
            ages = {f"age of {n}": 1e3 * (now - ran) for n, ran in memory.ran.items() if self.model.graph.phases[n].period > 1}
        else:
            outputs = self.answers(inputs, noise, length, how)
        assert outputs.actions is not None
        actions = self.action.unnormalise(outputs.actions.float().cpu().numpy()[:, : self.contract.chunk, : self.contract.action.size])
        actions = self.settings.absolute(actions, np.stack([r.observation.state for r in padded for _ in range(samples)]))
        timing = {"encode": 1e3 * (encoded - began), "model": 1e3 * (time.perf_counter() - encoded)} | outputs.timing | ages
        rate, plans = self.contract.rate or 0.0, []
        for row, request in zip(range(0, len(actions), samples), requests, strict=False):
            chunks = tuple(ActionChunk(a, rate, request.observation.timestamp) for a in actions[row : row + samples])
            plans.append(Plan(chunks[0], self._drawing(outputs.foresight, row), timing=timing, samples=chunks if samples > 1 else ()))
        return plans

    def inputs(self, observations: Sequence[Observation], past: Sequence[list[torch.Tensor]] | None = None) -> Inputs:
        """Observations as the model's inputs.

        Args:
            past: for each, the views of calls before it, the oldest first; where they are too few the first one stands for them.

        Raises:
            UserError: a camera is missing or has another size, or the state has another length than the contract says.
        """
        for observation in observations:
            _check(observation, self.contract)
        spec, views = self.model.spec, self.model.spec.cameras
        frames = [[*seen, self._seen(o)] for o, seen in zip(observations, past or [[]] * len(observations), strict=True)]
        filled = [seen[:1] * (spec.history.frames - len(seen)) + seen for seen in frames]
        images = torch.stack([torch.stack(seen, dim=1).flatten(0, 1) for seen in filled])
        state: np.ndarray = self.state.normalise(np.stack([o.state for o in observations])).astype(np.float32)
        ids, present = self.prompts([self._text(o, row) for o, row in zip(observations, state, strict=True)], spec.views)
        seen = torch.tensor([[c in o.images for c in views] for o in observations])
        if not seen.all():  # image tokens stand in the order of the views, as many of each
            slots = ids == self.image_token
            present[slots] = seen.repeat_interleave(int(slots[0].sum()) // len(views), dim=1).flatten()
        felt = self.settings.felt(state)
        padded = np.pad(felt, ((0, 0), (0, self.model.spec.state_dim - felt.shape[1])))
        return Inputs(images, ids, present, torch.from_numpy(padded)).each(lambda t: t.to(self.device, non_blocking=True))

    def _length(self, observation: Observation) -> int:
        """Tokens that the observation's prompt is padded to."""
        _check(observation, self.contract)
        state: np.ndarray = self.state.normalise(observation.state).astype(np.float32)
        ids, present = self.prompts([self._text(observation, state)], self.model.spec.views)
        return self.answers.length(ids[0], present[0])

    def _seen(self, observation: Observation) -> torch.Tensor:
        """The views of one observation, (V, 3, Y, X), cameras in the spec's order."""
        return torch.stack([self._view(observation, camera) for camera in self.model.spec.cameras])

    def _view(self, observation: Observation, camera: str) -> torch.Tensor:
        """The picture of one camera, (3, Y, X) from 0 to 255; black where it is absent."""
        known = next(c for c in self.contract.cameras if c.name == camera)
        image = observation.images.get(camera, np.zeros((known.height or 1, known.width or 1, 3), np.uint8))
        pixels = torch.tensor(image).permute(2, 0, 1)
        return pixels if self.settings.resize is None else self.settings.resize(pixels)

    def _text(self, observation: Observation, state: np.ndarray) -> str:
        """What the observation's prompt says after its images; ``state`` is normalised."""
        words = self.settings.words
        if words is None:
            return prompt(self.contract, observation.instruction)
        return words.fill(self.contract.prompt or "{instruction}", observation.instruction, state)

    def _method(self, request: Request) -> Method:
        """How a request is answered, which is well formed."""
        how, prefix = self.settings.realtime.method, request.prefix
        if request.session not in self.sessions:
            raise UserError(f"session '{request.session}' has not begun: call reset(session, seed) before the first plan")
        if request.samples < 1 or request.delay < 0:
            raise UserError(f"samples count from 1 and delay from 0, not {request.samples} and {request.delay}")
        if prefix is None or not len(prefix):
            return "plain"
        if prefix.actions.shape[1] != self.contract.action.size:
            have, needed = prefix.actions.shape[1], self.contract.action
            raise UserError(f"the prefix has actions of {have} numbers, the policy's have {needed.size}: {', '.join(needed.names)}")
        count = min(request.delay, len(prefix))
        if how == "trained":
            check_settled(self.model, count)
        return "trained" if how == "trained" or (how == "auto" and 0 < trained(self.model) >= count) else "guided"

    def _prefix(self, requests: list[Request], method: Method, samples: int) -> Prefix:
        """What is left of the chunks before, each as often as there are samples, in network units."""
        length, size = self.model.flow_shapes()[self.model.action_stream]
        steps, state = self.contract.chunk or length, np.stack([r.observation.state for r in requests])
        given = [r.prefix.actions[:steps] for r in requests if r.prefix is not None]
        filled = np.stack([np.pad(a, ((0, steps - len(a)), (0, 0)), mode="edge") for a in given])  # normalised as the chunk it stands in
        actions: np.ndarray = self.action.normalise(self.settings.counted(filled, state)).astype(np.float32)
        rows = torch.from_numpy(np.pad(actions, ((0, 0), (0, 0), (0, size - actions.shape[2])))).to(self.device, non_blocking=True)
        delays, left = [min(r.delay, len(a)) for r, a in zip(requests, given, strict=True)], [len(a) for a in given]
        if method == "trained":
            prefix = settled(self.model, rows, delays)
        else:
            prefix = led(self.model, rows, self.settings.realtime, delays, left)
        return prefix.each(lambda t: t.repeat_interleave(samples, dim=0))

    def _noise(self, request: Request, sample: int = 0) -> dict[str, np.ndarray]:
        """Standard normal (T, X) for every flow, a function of (seed, step of the session, sample) alone."""
        session = self.sessions[request.session]
        out, which = {}, [sample] if sample else []
        for number, (name, shape) in enumerate(self.model.flow_shapes().items()):
            rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([session.seed, session.step, number, *which])))
            out[name] = rng.standard_normal(shape, dtype=np.float32)
        return out

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


def prompt_encoder(model: Model, settings: Settings | None = None) -> PromptEncoder | PlainPrompts:
    """The tokenizer of the model's prompt stream."""
    name, stream = next((n, s) for n, s in model.spec.streams.items() if s.tokens == "prompt")
    if settings is None or settings.words is None:
        return PromptEncoder(model.vlm(name), stream.length)
    assert settings.resize is not None  # as ``Settings`` demands
    return PlainPrompts(model.vlm(name), stream.length, settings.words, (settings.resize.height, settings.resize.width))


def load_policy(
    path: str | Path, cuts: tuple[tuple[str, str], ...] = (), precision: Precision = "auto", realtime: Realtime | None = None
) -> TriunePolicy:
    """The policy of a checkpoint or run folder, on a GPU when one is present.

    Args:
        cuts: edges ``(row, col)`` of the attention graph to do without, for an ablation.
        precision: what its weights are held in; ``auto`` is bf16 on a GPU where every pretrained expert is known to be right in it, fp32
            elsewhere.
        realtime: how a chunk goes on from the one before, where it is not as the checkpoint says.

    Raises:
        UserError: no checkpoint there, a damaged one, an edge to cut that does not exist, or an expert that is not known to be right
            in bf16.
    """
    policy = from_checkpoint(read_checkpoint(path), cuts, precision)
    if realtime is not None:
        policy.settings = policy.settings.model_copy(update={"realtime": realtime})
    return policy


def open_policy(path: str | Path, cuts: tuple[tuple[str, str], ...] = (), precision: Precision = "auto") -> Policy:
    """The policy at ``path``: ours, as ``load_policy`` says, or one that lerobot saved, which acts as it is.

    Raises:
        UserError: as ``load_policy``, or edges or a precision are named for a policy of lerobot.
    """
    folder = find_checkpoint(path)
    if not is_lerobot(folder):
        return load_policy(folder, cuts, precision)
    if cuts or precision != "auto":
        raise UserError(f"{path} is a policy of lerobot, which has no edges to cut and its own precision; leave both out")
    return load_lerobot(folder)


def from_checkpoint(
    checkpoint: Checkpoint, cuts: tuple[tuple[str, str], ...] = (), precision: Precision = "auto", device: str | None = None
) -> TriunePolicy:
    """The policy of a checkpoint that was read, on ``device`` or on a GPU when one is present."""
    if precision not in get_args(Precision):
        raise UserError(f"precision is one of {', '.join(get_args(Precision))}, not '{precision}'")
    settings = parse(Settings, checkpoint.info.settings, checkpoint.folder / "policy.json")
    model = load_model(checkpoint, spec_of(checkpoint).cut(*cuts))
    model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if precision == "bf16" or (precision == "auto" and next(model.parameters()).device.type == "cuda" and narrows(model)):
        model = narrow(model)
    return TriunePolicy(model, checkpoint.contract, read_statistics(checkpoint), settings)


def spec_of(checkpoint: Checkpoint) -> Spec:
    """A checkpoint's spec, its paths counted from the checkpoint.

    Raises:
        UserError: its attention graph is not the one that was trained.
    """
    spec = anchored(parse(Spec, load_tree(checkpoint.spec), checkpoint.spec), checkpoint.folder)
    _check_graph(spec, checkpoint)
    return spec


def read_statistics(checkpoint: Checkpoint) -> dict[str, Statistics | Affine]:
    """What normalises a checkpoint's states and actions."""
    kinds = {key: Affine if "shift" in value else Statistics for key, value in checkpoint.statistics.items()}
    return {key: kinds[key].model_validate(value) for key, value in checkpoint.statistics.items()}


def load_model(checkpoint: Checkpoint, spec: Spec) -> Model:
    """The model of ``spec``, which has the names and shapes of the checkpoint's own, with the checkpoint's weights; adapters are merged.

    Raises:
        UserError: the weights of it, or of what it stands on, are missing or others.
    """
    lineage = checkpoint.lineage()
    for part in lineage:
        for name in part.info.weights:
            part.reference(name)  # the frozen weights must be those that were trained with
    drawn = any(isinstance(e, PretrainedExpert) and e.fresh and e.frozen for e in spec.experts.values())  # again, rather than stored
    with nullcontext() if drawn else Undrawn():
        model = build(spec)
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in lineage:
        frozen = tuple(f"mot.experts.{n}." for n, e in spec_of(part).experts.items() if e.frozen)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(frozen))
        tune(model, part.info.experts)
        load_trained(model.trained(), part.weights)
        merge(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    return model


def graph_info(spec: Spec) -> GraphInfo:
    """The attention graph of ``spec`` as a checkpoint keeps it."""
    graph = Graph(spec)
    return GraphInfo(hash=graph.hash(), matrix=graph.table())


def _check_graph(spec: Spec, checkpoint: Checkpoint) -> None:
    """Refuse to run another graph than was trained, whatever became of the words in between."""
    trained, now = checkpoint.info.graph, Graph(spec).table()
    if trained is None or trained.matrix == now:
        return
    odd = [
        f"{row} <- {col}" for row in trained.matrix for col in trained.matrix[row] if now.get(row, {}).get(col) != trained.matrix[row][col]
    ]
    raise UserError(
        f"{checkpoint.folder}: spec.yaml says another attention graph than was trained ({', '.join(odd) or 'other streams'}); "
        f"put the spec back, or use triune-vla {checkpoint.info.versions['triune-vla']}, which wrote it"
    )


def anchored(spec: Spec, folder: Path) -> Spec:
    """``spec`` with every relative ``path:`` counted from ``folder``: a checkpoint's own for what it holds itself."""
    tree = spec.model_dump(mode="json")
    for part in (*tree["experts"].values(), *tree["heads"].values()):
        part |= {word: anchor(part[word], folder) for word in ("weights", "autoencoder") if part.get(word)}
    return parse(Spec, tree, spec.name)


def load_trained(own: Mapping[str, torch.Tensor], file: Path) -> None:
    """Put a checkpoint's trained weights into the parameters ``own``.

    Raises:
        UserError: names or shapes are not those of the spec.
    """
    weights = load_file(file)
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


def normaliser(found: Statistics | Affine, vector: Vector) -> Normaliser | Affine:
    """What brings the values of a vector into network units and back."""
    return found if isinstance(found, Affine) else Normaliser(found, vector.normalisation or "none")


def _check(observation: Observation, contract: Contract) -> None:
    sees = any(name in observation.images for name in contract.camera_names)
    for camera in contract.cameras:
        if camera.name not in observation.images:
            if camera.optional and sees:
                continue
            there = ", ".join(observation.images) or "none"
            raise UserError(f"the policy needs camera '{camera.name}', the observation has {there}; map your cameras to its names")
        height, width, _ = observation.images[camera.name].shape
        if camera.height and (camera.height, camera.width) != (height, width):
            raise UserError(
                f"camera '{camera.name}' is {height}x{width}, the policy was trained on {camera.height}x{camera.width}; "
                "render or resize to that size"
            )
    size, needed = len(observation.state), contract.state
    if size != needed.size:
        raise UserError(f"the state has {size} numbers, the policy needs {needed.size}: {', '.join(needed.names)}")
