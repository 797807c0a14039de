"""The recipe that trains a policy on demonstrations.

Streams of frozen experts are a pure function of the frame and its words, so their keys and values are computed once and
kept (``cache``); training then runs only what learns.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from rich.console import Console
from rich.progress import track
from torch import Tensor

from ...config import Strict, dump, find, load_tree, merge, parse
from ...data import ChunkSampler, Contract, Dataset, Normaliser, Observation, compute_statistics, open_dataset
from ...errors import UserError
from ...vla import Inputs, Spec
from ...vla import build as build_model
from ...vla.flow import draw_times
from ...vla.foresight import LatentForesight
from ...vla.inputs import Targets
from ...vla.mot import KV
from ...vla.spec import FlowHead, LatentHead, PretrainedExpert
from ...vla.weights import Reference, make_reference
from ..checkpoint import read_checkpoint, write_checkpoint, write_golden
from ..triune import anchored, from_checkpoint, graph_info, prompt, prompt_encoder
from .optim import TrainConfig, resolve_device, resolve_precision

Kind = Literal["mean_std", "quantile", "min_max", "none"]


class Augment(Strict):
    """Photometric augmentation: each image's brightness, contrast and colour are scaled by 1 +- the given strength."""

    brightness: NonNegativeFloat = 0.2
    contrast: NonNegativeFloat = 0.2
    saturation: NonNegativeFloat = 0.2


class PrefixCache(Strict):
    """Frozen prefixes are kept in memory where they fit.

    Attributes:
        variants: augmented copies of each frame beside the plain one.
        limit_gb: above this size prefixes are computed in every step instead.
    """

    variants: NonNegativeInt = 1
    limit_gb: PositiveFloat = 8.0


class Recipe(Strict):
    """``kind: policy``.

    Attributes:
        spec: name of a model spec; overrides: merged into it.
        data: dataset folder.
        action_key: dataset column that is learned: ``action`` (as executed) or ``action.expert`` (the expert's noise-free label).
        executed: control steps that are executed of each chunk; the foresight looks this far by the spec's horizon.
        prompt: template of the words; ``{instruction}`` is filled in.
        stride: frames between the starts of training chunks; 2 halves what has to be encoded.
        state_noise: standard deviation added to the normalised state, so that the policy looks rather than counts.
        pack: whether the samples of a batch are laid end to end, so that padding and absent cameras are not computed. The same losses;
            for a GPU and a thousand tokens or more in a batch, where attention then skips what belongs to other samples.
    """

    kind: Literal["policy"]
    spec: str
    overrides: dict[str, Any] = {}
    data: str
    action_key: Literal["action", "action.expert"] = "action"
    executed: PositiveInt
    prompt: str = "{instruction}"
    normalise_state: Kind = "mean_std"
    normalise_action: Kind = "quantile"
    stride: PositiveInt = 1
    state_noise: NonNegativeFloat = 0.0
    pack: bool = False
    augment: Augment | None = Augment()
    cache: PrefixCache = PrefixCache()
    train: TrainConfig


class PolicyTask:
    """See ``loop.Task``.

    Raises:
        UserError: the dataset's cameras, sizes or dimensions do not fit the spec.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.spec = anchored(recipe_spec(recipe), Path.cwd())  # a checkpoint's own relative paths are inside its folder
        self.dataset = open_dataset(recipe.data)
        check_dataset(self.dataset, self.spec, recipe)
        self.module = build_model(self.spec, recipe.train.seed)
        self.device = resolve_device(recipe.train.device)
        self.module.to(self.device)
        self.contract = policy_contract(self.dataset.contract, recipe, self.chunk)
        found = compute_statistics(self.dataset)
        self.statistics = {"observation.state": found["observation.state"], "action": found[recipe.action_key]}
        self.state = Normaliser(self.statistics["observation.state"], recipe.normalise_state)
        self.action = Normaliser(self.statistics["action"], recipe.normalise_action)
        horizon = max([h.horizon for h in self.spec.heads.values() if isinstance(h, LatentHead)], default=0)
        self.sampler = ChunkSampler(
            self.dataset,
            self.chunk,
            recipe.train.batch_size,
            recipe.train.seed,
            action_key=recipe.action_key,
            foresight=horizon,
            stride=recipe.stride,
        )
        self.images = np.stack([self.dataset.load_images(c) for c in self.spec.cameras], axis=1)  # (frames, V, H, W, 3)
        self.prompts = self._encode_prompts()
        self.present = Kept(len(self.images), self.sampler.frames)
        self.seeing = any(module.needs_present for module in self.module.foresight.values())
        frames = self.sampler.gather(self.sampler.frames)["future"]
        self.latent = Kept(len(self.images), np.union1d(frames, self.sampler.frames if self.seeing else frames))
        self.latents = self._encode_latents()
        self.prefix = self._encode_prefixes()

    @property
    def chunk(self) -> int:
        return next(s.length for n, s in self.spec.streams.items() if isinstance(self.spec.heads.get(n), FlowHead))

    # loop.Task ------------------------------------------------------------------------------------------------------

    def batch(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(np.random.SeedSequence([self.recipe.train.seed, index, 1]))
        drawn = self.sampler.batch(index)
        frames = drawn["index"]
        state = self.state.normalise(drawn["state"])
        state = state + self.recipe.state_noise * rng.standard_normal(state.shape)
        ids, present = self.prompts
        batch: dict[str, Any] = {
            "state": torch.from_numpy(state.astype(np.float32)),
            "actions": torch.from_numpy(self.action.normalise(drawn["action"]).astype(np.float32)),
            "mask": torch.from_numpy(drawn["mask"]),
            "future": self._latents(drawn["future"]),
            "ids": ids[frames],
            "present": present[frames],
        }
        if self.seeing:
            batch["latents"] = self._latents(frames)
        if self.prefix is not None:
            variant = rng.integers(0, self.prefix.shape[0], len(frames))
            # in numpy: torch would gather with threads of its own, beside those that compute the step before
            kept = self.prefix.view(torch.int16).numpy()[variant, self.present.rows(frames)]
            batch["prefix"] = torch.from_numpy(kept).view(torch.bfloat16)
        else:
            views = self._views(frames)
            views = views if self.recipe.augment is None else augment(views, self.recipe.augment, rng)
            batch["images"] = torch.from_numpy(views).permute(0, 1, 4, 2, 3)
        return batch

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        inputs = Inputs(batch.get("images"), batch.get("ids"), batch["present"], batch["state"], batch.get("latents"))
        targets = Targets(batch["actions"], batch["mask"], batch["future"])
        noise, time = self._noise(targets)
        cache = None
        if "prefix" in batch:  # (B, L, 2, G, T, H)
            layers = [layer.unbind(1) for layer in batch["prefix"].unbind(1)]
            height, width = self.images.shape[2:4]
            own = self.module.vlm(self._prompt_stream).own(batch["ids"], batch["present"], (height, width))
            kv = KV(tuple(k for k, _ in layers), tuple(v for _, v in layers), batch["present"], own)
            cache = {self._prompt_stream: kv}
        return self.module.losses(inputs, targets, noise, time, cache, self.recipe.pack)

    def _noise(self, targets: Targets) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Noise and time of every flow; the steps of a chunk that are settled before carry t = 1."""
        noise: dict[str, Tensor] = {}
        time: dict[str, Tensor] = {}
        for name in self.spec.flows:
            head = self.spec.flow(name)
            noise[name] = torch.randn_like(self.module.data(name, targets))
            rows, length = noise[name].shape[:2]
            drawn = draw_times((rows, 1), head).to(targets.actions.device).expand(rows, length)
            if isinstance(head, FlowHead) and head.prefix:
                settled = torch.randint(0, head.prefix + 1, (rows, 1), device=drawn.device)
                drawn = torch.where(torch.arange(length, device=drawn.device) < settled, 1.0, drawn)
            time[name] = drawn
        return noise, time

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        statistics = {key: value.model_dump(mode="json") for key, value in self.statistics.items()}
        tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        write_checkpoint(
            folder,
            spec=dump(self.spec),
            contract=self.contract,
            statistics=statistics,
            weights=tensors,
            references=references(self.spec),
            graph=graph_info(self.spec),
        )
        policy = from_checkpoint(read_checkpoint(folder), precision="fp32")
        write_golden(folder, policy, self._golden_observations())

    # what is computed once ------------------------------------------------------------------------------------------

    @property
    def _prompt_stream(self) -> str:
        return next(n for n, s in self.spec.streams.items() if s.tokens == "prompt")

    def _encode_prompts(self) -> tuple[Tensor, Tensor]:
        """Prompt ids and presence of every frame, (frames, T)."""
        encoder = prompt_encoder(self.module)
        tasks = [e.task for e in self.dataset.episodes]
        ids, present = encoder([prompt(self.contract, task) for task in tasks], self.spec.views)
        owner = torch.repeat_interleave(torch.arange(len(tasks)), torch.tensor([e.length for e in self.dataset.episodes]))
        return ids[owner], present[owner]

    @torch.no_grad()
    def _encode_latents(self) -> np.ndarray:
        """Latent patches of the frames in ``self.latent``, float16 (frames, T, P): what the foresight expert sees and predicts."""
        module = next((m for m in self.module.foresight.values() if isinstance(m, LatentForesight)), None)
        if module is None:
            return np.zeros((len(self.latent.frames), 0, 0), np.float16)
        views = [self.spec.cameras.index(c) for c in module.head.cameras]
        parts = []
        for _, frames in parts_of(self.latent.frames, "latents of frames"):
            with self._autocast():
                parts.append(module.encode(self._pixels(self.images[frames][:, views])).half().cpu().numpy())
        return np.concatenate(parts)

    def _views(self, frames: np.ndarray) -> np.ndarray:
        """Images (B, V, H, W, 3) seen at frames of the dataset: the past of each camera (``spec.History``), the oldest first."""
        history = self.spec.history
        starts = np.array([e.start for e in self.dataset.episodes])
        first = starts[np.searchsorted(starts, frames, side="right") - 1]
        past = [np.maximum(frames - back * history.every, first) for back in range(history.frames - 1, -1, -1)]
        return np.stack([self.images[at] for at in past], axis=2).reshape(len(frames), -1, *self.images.shape[2:])

    def _latents(self, frames: np.ndarray) -> Tensor:
        """Patches (B, T, P) of frames of the dataset."""
        return torch.from_numpy(self.latents[self.latent.rows(frames)].astype(np.float32))

    @torch.no_grad()
    def _encode_prefixes(self) -> Tensor | None:
        """Keys and values of the frozen prompt stream at the frames in ``self.present``, (variants, frames, L, 2, G, T, H) in bf16;
        None if they must not be kept."""
        stream, space = self._prompt_stream, self.spec.space
        expert, recipe = self.module.graph.owner[stream], self.recipe
        variants = 1 + (recipe.cache.variants if recipe.augment else 0)
        shape = (
            variants,
            len(self.present.frames),
            self.module.vlm(stream).depth,
            2,
            space.kv_heads,
            self.spec.streams[stream].length,
            space.head_dim,
        )
        if not self.spec.experts[expert].frozen or 2 * np.prod(shape, dtype=np.float64) > recipe.cache.limit_gb * 1e9:
            return None
        kept = torch.empty(shape, dtype=torch.bfloat16)
        ids, present = self.prompts
        self.module.eval()
        for variant in range(variants):
            rng = np.random.default_rng(np.random.SeedSequence([recipe.train.seed, variant, 2]))
            for rows, frames in parts_of(self.present.frames, "frozen prefixes"):
                views = self._views(frames)
                views = views if variant == 0 or recipe.augment is None else augment(views, recipe.augment, rng)
                inputs = Inputs(self._pixels(views), ids[frames].to(self.device), present[frames].to(self.device))
                with self._autocast():
                    _, kv = self.module.mot(self.module.embed([stream], inputs), {}, keep=[stream])
                pairs = [torch.stack([k, v], dim=1) for k, v in zip(kv[stream].keys, kv[stream].values, strict=True)]
                kept[variant, rows] = torch.stack(pairs, dim=1).to(torch.bfloat16).cpu()
        return kept

    def _autocast(self) -> torch.autocast:
        precision = resolve_precision(self.recipe.train.precision, self.device)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == torch.bfloat16)

    def _pixels(self, views: np.ndarray) -> Tensor:
        return torch.from_numpy(views).permute(0, 1, 4, 2, 3).to(self.device)

    def _golden_observations(self) -> list[Observation]:
        """Five frames spread over the dataset."""
        picks = np.linspace(0, len(self.images) - 1, 5).astype(int)
        starts = np.array([e.start for e in self.dataset.episodes])
        out = []
        for frame in picks:
            episode = self.dataset.episodes[int(np.searchsorted(starts, frame, side="right")) - 1]
            images = {c: self.images[frame, v] for v, c in enumerate(self.spec.cameras)}
            state = self.dataset.vectors["observation.state"][frame]
            out.append(Observation(images, state, episode.task, (int(frame) - episode.start) / self.dataset.fps))
        return out


class Kept:
    """Which frames of a dataset something was computed for, and in which row it stands."""

    def __init__(self, total: int, frames: np.ndarray) -> None:
        self.frames = frames
        self._row = np.full(total, -1, np.int64)
        self._row[frames] = np.arange(len(frames))

    def rows(self, frames: np.ndarray) -> np.ndarray:
        """Rows of ``frames``, all of which must be kept."""
        return self._row[frames]


def parts_of(frames: np.ndarray, what: str, size: int = 64) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows and frames in parts of ``size``, with a progress bar on standard error."""
    starts = range(0, len(frames), size)
    for start in track(starts, f"encoding {what}", console=Console(stderr=True), transient=True):
        yield slice(start, start + size), frames[start : start + size]


def build(recipe: Recipe, out: Path) -> PolicyTask:
    """The task of a recipe."""
    return PolicyTask(recipe, out)


def recipe_spec(recipe: Recipe) -> Spec:
    """The recipe's spec with its overrides."""
    path = find(recipe.spec, "model")
    return parse(Spec, merge(load_tree(path), recipe.overrides), f"{path} with the recipe's overrides")


def policy_contract(data: Contract, recipe: Recipe, chunk: int) -> Contract:
    """The dataset's conventions with what training adds: normalisation, chunk, executed steps, prompt."""
    state = data.state.model_copy(update={"normalisation": recipe.normalise_state})
    action = data.action.model_copy(update={"normalisation": recipe.normalise_action})
    return data.model_copy(update={"state": state, "action": action, "chunk": chunk, "executed": recipe.executed, "prompt": recipe.prompt})


def check_dataset(dataset: Dataset, spec: Spec, recipe: Recipe) -> None:
    """Refuse a dataset that does not fit the spec.

    Raises:
        UserError: naming the camera, the dimensions or the column that differ.
    """
    check_spec(spec)
    missing = [c for c in spec.cameras if c not in dataset.cameras]
    if missing:
        raise UserError(
            f"{dataset.path} has no camera {', '.join(missing)} (it has {', '.join(dataset.cameras)}), which {spec.name} sees; "
            "record it, or set overrides.cameras to what there is"
        )
    if recipe.action_key not in dataset.vectors:
        known = ", ".join(k for k in dataset.vectors if k.startswith("action"))
        raise UserError(f"{dataset.path} has no column '{recipe.action_key}'; set action_key to one of {known}")
    head = next(h for h in spec.heads.values() if isinstance(h, FlowHead))
    for what, want, key in (("state", spec.state_dim, "observation.state"), ("action", head.action_dim, recipe.action_key)):
        have = dataset.vectors[key].shape[1]
        if have != want:
            raise UserError(
                f"{dataset.path}: '{key}' has {have} dimensions, {spec.name} takes {want} for its {what}; "
                f"set the spec's {what}_dim or use the robot's own spec"
            )


def check_spec(spec: Spec) -> None:
    """Refuse a spec that takes what this kind of recipe does not make of a dataset.

    Raises:
        UserError: naming the stream or the head.
    """
    given = [f"streams.{n} ({s.tokens})" for n, s in spec.streams.items() if s.tokens in ("features", "words")]
    given += [f"heads.{n} (latents)" for n, h in spec.heads.items() if isinstance(h, LatentHead) and h.autoencoder is None]
    if given or not any(s.tokens == "prompt" for s in spec.streams.values()):
        what = ", ".join(given) or "no prompt"
        raise UserError(
            f"{spec.name} takes {what}, which policy recipes do not make of a dataset; they encode prompts by a pretrained VLM and "
            "frames by the head's autoencoder: use a spec with these, or call Model.losses with tensors of your own"
        )


def references(spec: Spec) -> dict[str, Reference]:
    """The frozen weights that a checkpoint of ``spec`` stands on, with their hashes."""
    found = {n: make_reference(e.reference, "vlm") for n, e in spec.experts.items() if isinstance(e, PretrainedExpert)}
    return found | {
        n: make_reference(h.autoencoder, "autoencoder") for n, h in spec.heads.items() if isinstance(h, LatentHead) and h.autoencoder
    }


def augment(images: np.ndarray, strength: Augment, rng: np.random.Generator) -> np.ndarray:
    """Photometric variants of uint8 images (B, V, H, W, 3), each image with its own factors."""
    shape = (*images.shape[:2], 1, 1, 1)
    brightness, contrast, saturation = (
        rng.uniform(1 - s, 1 + s, shape).astype(np.float32) for s in (strength.brightness, strength.contrast, strength.saturation)
    )
    x = images.astype(np.float32) * brightness
    x = (x - x.mean((2, 3, 4), keepdims=True)) * contrast + x.mean((2, 3, 4), keepdims=True)
    grey = x.mean(-1, keepdims=True)
    return ((x - grey) * saturation + grey).round().clip(0, 255).astype(np.uint8)
