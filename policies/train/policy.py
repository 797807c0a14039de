"""The recipe that trains a policy on demonstrations, from the beginning or from another policy's checkpoint.

Streams of frozen experts are a pure function of the frame and its words, so their keys and values are computed once and
kept (``cache``) where they fit; training then runs only what learns.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...config import dump
from ...data import Observation, Statistics
from ...data.augment import Factors
from ...data.loader import best_order
from ...data.sampler import Batch, ChunkSampler
from ...data.transforms import Affine
from ...vla import Inputs
from ...vla import build as build_model
from ...vla.engine import infer
from ...vla.foresight import LatentForesight
from ...vla.inputs import Targets
from ...vla.mot import KV
from ...vla.spec import FlowHead, LatentHead
from ..checkpoint import read_checkpoint, write_checkpoint, write_golden
from ..triune import from_checkpoint, graph_info, load_model, normaliser, prompt_encoder, read_statistics
from ..tuning import narrow_frozen, tune
from .demonstrations import make_sampler, measure, open_demonstrations
from .fit import check_dataset, encode_tasks, own_parameters, refuse_unlearned
from .frames import InMemory, Kept, Streamed, Views, open_frames, parts_of
from .loop import step_seed, to_device
from .optim import resolve_device, resolve_precision
from .policy_recipe import Recipe, policy_contract, recipe_settings, recipe_spec, references
from .team import Part

__all__ = ["PolicyTask", "Recipe", "build", "sketch"]

VALIDATION_BATCH = 32
"""Most samples of a validation batch."""


class PolicyTask:
    """See ``loop.Task``.

    Raises:
        UserError: the dataset's cameras, sizes or dimensions do not fit the spec.
    """

    def __init__(self, recipe: Recipe, out: Path) -> None:
        self.recipe, self.out = recipe, out
        self.base = None if recipe.init is None else read_checkpoint(recipe.init)
        self.spec = recipe_spec(recipe, self.base)
        self.device = resolve_device(recipe.train.device)
        self.demonstrations = open_demonstrations(recipe.data, recipe.robot, recipe.hold_out, recipe.train.seed)
        self.settings = recipe_settings(recipe, self.demonstrations.contract, self.base)
        check_dataset(self.demonstrations, self.spec, recipe.action_key, self.settings)
        self.module = build_model(self.spec, recipe.train.seed) if self.base is None else load_model(self.base, self.spec)
        tune(self.module, recipe.experts)
        if self.base is None:
            refuse_unlearned(self.spec, self.module)
        self.module.mot.checkpointing = recipe.checkpointing
        if recipe.frozen == "bf16" or (recipe.frozen == "auto" and self.device.type == "cuda" and self._low):
            narrow_frozen(self.module)
        self.module.to(self.device)
        self.contract = policy_contract(self.demonstrations.contract, recipe, self.spec, self.base)
        self._normalisers()
        heads = {n: h for n, h in self.spec.heads.items() if isinstance(h, LatentHead)}
        foreseen = next((h.cameras for h in heads.values()), ())
        ahead = max([h.horizon for h in heads.values()], default=0)
        order = best_order(self.demonstrations.datasets, self.spec.cameras)
        drawing = (recipe.train.seed, recipe.action_key, ahead, recipe.stride, order)
        self.sampler = make_sampler(self.demonstrations.sources, self.chunk, recipe.train.batch_size, *drawing)
        self.frames = open_frames(self.demonstrations, self.sampler, self.spec, foreseen, recipe.cache, recipe.workers)
        held = self.demonstrations.held
        self.held = make_sampler(held, self.chunk, min(recipe.train.batch_size, VALIDATION_BATCH), *drawing) if held else None
        self.held_frames = self._held_frames(foreseen)
        self.seeing = any(module.needs_present for module in self.module.foresight.values())
        self.said = self._encode_tasks()
        self.present, self.prefix = self._encode_prefixes()
        self.latent, self.latents = self._encode_latents()

    @property
    def chunk(self) -> int:
        return next(s.length for n, s in self.spec.streams.items() if isinstance(self.spec.heads.get(n), FlowHead))

    # loop.Task ------------------------------------------------------------------------------------------------------

    def batch(self, part: Part) -> dict[str, Any]:
        rng = np.random.default_rng(np.random.SeedSequence([self.recipe.train.seed, part.step, 1]))
        count, mine = self.recipe.train.batch_size, part.rows(self.recipe.train.batch_size)
        drawn = self.sampler.batch(part.step, part.number, part.of)
        state = self.state.normalise(drawn["state"])
        noise = self.recipe.state_noise * rng.standard_normal((count, state.shape[1]))[mine]
        batch = self._known(drawn, state + noise, part) | {"part": part}
        if part.of > 1:  # what the whole batch's means count, not this part's
            batch["whole"] = torch.from_numpy(self.sampler.batch(part.step)["mask"])
        if self.prefix is not None:
            variant = rng.integers(0, self.prefix.shape[0], count)[mine]
            # in numpy: torch would gather with threads of its own, beside those that compute the step before
            kept = self.prefix.view(torch.int16).numpy()[variant, self.present.rows(drawn["index"])]
            return batch | {"prefix": torch.from_numpy(kept).view(torch.bfloat16)}
        strength = self.recipe.augment
        factors = None if strength is None else strength.draw((count, len(self.spec.cameras)), rng)[mine]
        return batch | {"views": self.frames.views(drawn, part), "factors": factors}

    def losses(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        part = batch["part"]
        inputs, targets = self._inputs(batch), Targets(batch["actions"], batch["mask"], batch["future"])
        generator = torch.Generator().manual_seed(step_seed(self.recipe.train.seed, part.step))
        noise, time = self.module.draw(self.recipe.train.batch_size, generator)
        shares = self._shares(time, batch.get("whole"), part)
        mine = part.rows(self.recipe.train.batch_size)
        noise, time = ({n: t[mine] for n, t in drawn.items()} for drawn in (noise, time))
        cache = None
        if "prefix" in batch:  # (B, L, 2, G, T, H)
            layers = [layer.unbind(1) for layer in batch["prefix"].unbind(1)]
            own = self.module.vlm(self._prompt_stream).own(batch["ids"], batch["present"], self._size)
            kv = KV(tuple(k for k, _ in layers), tuple(v for _, v in layers), batch["present"], own)
            cache = {self._prompt_stream: kv}
        return self.module.losses(inputs, targets, noise, time, cache, shares, self.recipe.pack)

    def validate(self) -> dict[str, Any]:
        """Held-out losses; the error of predicted chunks, absolute and in network units, whole and per step; and per action in its unit."""
        if self.held is None:
            return {}
        sums: dict[str, Tensor] = {}
        error, counted = torch.zeros(self.chunk, self.contract.action.size), torch.zeros(self.chunk)
        for number in range(self.recipe.validation_batches):
            drawn = self.held.batch(number)
            part = Part(number)
            batch = self._known(drawn, self.state.normalise(drawn["state"]), part, self.held_frames)
            batch |= {"views": self.held_frames.views(drawn, part), "factors": None}
            batch = to_device(batch, self.device)
            inputs, targets = self._inputs(batch), Targets(batch["actions"], batch["mask"], batch["future"])
            generator = torch.Generator().manual_seed(step_seed(number, 3))
            noise, time = self.module.draw(len(drawn["index"]), generator)
            for name, value in self.module.losses(inputs, targets, noise, time).items():
                sums[f"held_out_{name}"] = sums.get(f"held_out_{name}", 0) + value.float() / self.recipe.validation_batches
            found = infer(self.module, inputs, noise).actions
            assert found is not None
            off, mask = (found.float() - targets.actions).abs().cpu()[..., : error.shape[1]], targets.mask.cpu()
            error += (off * mask[..., None]).sum(0)
            counted += mask.sum(0)
        scale = self.action.unnormalise(np.ones(error.shape[1], np.float32)) - self.action.unnormalise(np.zeros(error.shape[1], np.float32))
        per_step = error.mean(1) / counted.clamp(min=1)
        per_action = torch.from_numpy(np.abs(scale)) * error.sum(0) / counted.sum()
        return {
            **{name: float(value) for name, value in sums.items()},
            "open_loop_error": float(error.sum() / counted.sum() / error.shape[1]),
            "open_loop_error_per_step": per_step.tolist(),
            "open_loop_error_per_action": dict(zip(self.contract.action.names, per_action.tolist(), strict=True)),
        }

    def save(self, folder: Path, weights: dict[str, Tensor]) -> None:
        complete = weights.keys() == own_parameters(self.spec, self.module).keys()
        write_checkpoint(
            folder,
            spec=dump(self.spec),
            contract=self.contract,
            statistics={key: value.model_dump(mode="json") for key, value in self.statistics.items()},
            weights=weights,
            references=references(self.spec),
            settings=self.settings.model_dump(mode="json"),
            graph=graph_info(self.spec),
            base=None if complete or self.base is None else self.base.folder,
            experts={} if complete else self.recipe.experts,
        )
        policy = from_checkpoint(read_checkpoint(folder), precision="fp32", device="cpu")
        write_golden(folder, policy, self._golden_observations())

    # what a batch is made of ----------------------------------------------------------------------------------------

    def _known(self, drawn: Batch, state: np.ndarray, part: Part, frames: InMemory | Streamed | None = None) -> dict[str, Any]:
        """All but what is seen: states and actions padded to the network's sizes, words, and the future."""
        frames, action = frames or self.frames, self.settings.counted(drawn["action"], drawn["state"])
        head = next(h for h in self.spec.heads.values() if isinstance(h, FlowHead))
        ids, present = self._words(drawn, state)
        batch: dict[str, Any] = {
            "state": torch.from_numpy(_padded(self.settings.felt(state).astype(np.float32), self.spec.state_dim)),
            "actions": torch.from_numpy(_padded(self.action.normalise(action).astype(np.float32), head.action_dim)),
            "mask": torch.from_numpy(drawn["mask"]),
            "ids": ids,
            "present": present,
        }
        if self.latents is not None and self.latent.holds(drawn["future"]):
            batch["future"] = self._latents(drawn["future"])
            if self.seeing:
                batch["latents"] = self._latents(drawn["index"])
        else:
            batch["future"] = frames.future(drawn, part)
        return batch

    def _words(self, drawn: Batch, state: np.ndarray) -> tuple[Tensor, Tensor]:
        """Prompt ids and presence, (B, T); encoded for each sample where they tell the state."""
        tasks = self.demonstrations.task_of(drawn.get("dataset", np.zeros_like(drawn["index"])), drawn["index"])
        if self.said is not None:
            return self.said[0][tasks], self.said[1][tasks]
        words, template = self.settings.words, self.contract.prompt or "{instruction}"
        assert words is not None
        texts = [words.fill(template, self.demonstrations.tasks[task], row) for task, row in zip(tasks, state, strict=True)]
        return self.encoder(texts, self.spec.views)

    def _inputs(self, batch: dict[str, Any]) -> Inputs:
        images = self._pictures(batch["views"], batch["factors"]) if "views" in batch else None
        return Inputs(images, batch["ids"], batch["present"], batch["state"], batch.get("latents"))

    def _pictures(self, views: Views, factors: Factors | None) -> Tensor:
        """Images (B, V, 3, Y, X) of all cameras and their past, augmented and resized where they are."""
        varied = [v if factors is None else Factors(factors.values[:, i]).apply(v) for i, v in enumerate(views)]
        if self.settings.resize is None:
            return torch.cat(varied, dim=1).permute(0, 1, 4, 2, 3)
        return torch.cat([self.settings.resize(view.permute(0, 1, 4, 2, 3)) for view in varied], dim=1)

    def _shares(self, time: dict[str, Tensor], whole: Tensor | None, part: Part) -> dict[str, float]:
        """Flow -> what its mean over this part must be multiplied by, so that the mean of all parts is the mean of the batch: a part
        with more of its steps beyond the ends of episodes counts less."""
        if whole is None:
            return {}
        shares = {}
        for name, at in time.items():
            counted = at.cpu() < 1
            counted = counted & whole.cpu() if isinstance(self.spec.heads[name], FlowHead) else counted
            mine = counted[part.rows(len(counted))]
            shares[name] = part.of * float(mine.sum()) / max(1.0, float(counted.sum()))
        return shares

    # what is computed once ------------------------------------------------------------------------------------------

    @property
    def _prompt_stream(self) -> str:
        return next(n for n, s in self.spec.streams.items() if s.tokens == "prompt")

    def _learns(self, stream: str) -> bool:
        return any(p.requires_grad for p in self.module.mot.experts[self.module.graph.owner[stream]].parameters())

    def _normalisers(self) -> None:
        self.statistics: dict[str, Statistics | Affine]
        if self.recipe.statistics == "checkpoint" and self.base is not None:
            self.statistics = read_statistics(self.base)
        else:
            counted = self.settings.counted if self.settings.counts else None
            self.statistics = dict(measure(self.demonstrations, self.chunk, self.recipe.action_key, counted))
        self.state = normaliser(self.statistics["observation.state"], self.contract.state)
        self.action = normaliser(self.statistics["action"], self.contract.action)

    def _held_frames(self, foreseen: tuple[str, ...]) -> InMemory | Streamed:
        if self.held is None or isinstance(self.frames, InMemory):
            return self.frames
        return Streamed(self.held, self.spec, foreseen, self.recipe.cache, self.recipe.workers, alone=True)

    def _encode_tasks(self) -> tuple[Tensor, Tensor] | None:
        """Prompt ids and presence of every task, (tasks, T); None where prompts tell the state, too."""
        self.encoder = prompt_encoder(self.module, self.settings)
        vlm = self.module.vlm(self._prompt_stream)
        return encode_tasks(vlm, self.encoder, self.spec, self.demonstrations, self.settings, self.contract)

    @torch.no_grad()
    def _encode_latents(self) -> tuple[Kept, np.ndarray | None]:
        """Latent patches float16 (frames, T, P) of the frames that are foreseen or seen; None where frames are not in memory."""
        module = next((m for m in self.module.foresight.values() if isinstance(m, LatentForesight)), None)
        if module is None or not isinstance(self.frames, InMemory):
            return Kept(0, np.zeros(0, np.int64)), None
        drawn = [sampler.frames for sampler in (self.sampler, self.held) if isinstance(sampler, ChunkSampler)]
        future = np.concatenate([self.sampler.gather(frames)["future"] for frames in drawn if isinstance(self.sampler, ChunkSampler)])
        kept = Kept(len(self.frames), np.union1d(future, np.concatenate(drawn) if self.seeing else future))
        parts = []
        for _, frames in parts_of(kept.frames, "latents of frames"):
            with self._autocast():
                pixels = self.frames.future({"future": frames}, Part(0)).to(self.device)
                parts.append(module.encode(pixels).half().cpu().numpy())
        return kept, np.concatenate(parts)

    def _latents(self, frames: np.ndarray) -> Tensor:
        """Patches (B, T, P) of frames of the dataset."""
        assert self.latents is not None
        return torch.from_numpy(self.latents[self.latent.rows(frames)].astype(np.float32))

    @torch.no_grad()
    def _encode_prefixes(self) -> tuple[Kept, Tensor | None]:
        """Keys and values of the prompt stream at the frames that are drawn, (variants, frames, L, 2, G, T, H) in bf16; None if they
        change in training, or must not be kept."""
        stream, recipe = self._prompt_stream, self.recipe
        none = Kept(0, np.zeros(0, np.int64)), None
        if not isinstance(self.frames, InMemory) or not isinstance(self.sampler, ChunkSampler):
            return none
        kept = Kept(len(self.frames), self.sampler.frames)
        shape = self._prefix_shape(len(kept.frames))
        if shape is None:
            return none
        variants = shape[0]
        prefixes = torch.empty(shape, dtype=torch.bfloat16)
        self.module.eval()
        for variant in range(variants):
            rng = np.random.default_rng(np.random.SeedSequence([recipe.train.seed, variant, 2]))
            for rows, frames in parts_of(kept.frames, "frozen prefixes"):
                ids, present = (t.to(self.device) for t in self._words({"index": frames}, np.zeros(0)))
                strength = recipe.augment if variant else None
                factors = None if strength is None else strength.draw((len(frames), len(self.spec.cameras)), rng)
                images = self._pictures([view.to(self.device) for view in self.frames.at(frames)], factors)
                self._size = (images.shape[-2], images.shape[-1])
                with self._autocast():
                    _, kv = self.module.mot(self.module.embed([stream], Inputs(images, ids, present)), {}, keep=[stream])
                pairs = [torch.stack([k, v], dim=1) for k, v in zip(kv[stream].keys, kv[stream].values, strict=True)]
                prefixes[variant, rows] = torch.stack(pairs, dim=1).to(torch.bfloat16).cpu()
        return kept, prefixes

    @property
    def _low(self) -> bool:
        return resolve_precision(self.recipe.train.precision, self.device) == torch.bfloat16

    def _prefix_shape(self, frames: int) -> tuple[int, ...] | None:
        """(variants, frames, L, 2, G, T, H) of the prefixes that are kept; None if they change in training, or are too large."""
        stream, space, cache = self._prompt_stream, self.spec.space, self.recipe.cache
        if self._tells_state() or self._learns(stream):
            return None
        variants = 1 + (cache.variants if self.recipe.augment else 0)
        depth, length = self.module.vlm(stream).depth, self.spec.streams[stream].length
        shape = (variants, frames, depth, 2, space.kv_heads, length, space.head_dim)
        return None if 2 * np.prod(shape, dtype=np.float64) > cache.limit_gb * 1e9 else shape

    def _tells_state(self) -> bool:
        """Whether prompts tell the state."""
        return self.settings.words is not None and bool(self.settings.words.state_bins)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._low)

    def _golden_observations(self) -> list[Observation]:
        """Five frames spread over the first dataset."""
        dataset = self.demonstrations.datasets[0]
        starts = np.array([e.start for e in dataset.episodes])
        out = []
        for frame in np.linspace(0, len(dataset) - 1, 5).astype(int).tolist():
            episode = dataset.episodes[int(np.searchsorted(starts, frame, side="right")) - 1]
            images = {c: dataset.frames(c, [frame])[0] for c in self.spec.cameras}
            state = dataset.vectors["observation.state"][frame]
            out.append(Observation(images, state, episode.task, (frame - episode.start) / dataset.fps))
        return out


def build(recipe: Recipe, out: Path) -> PolicyTask:
    """The task of a recipe."""
    return PolicyTask(recipe, out)


def sketch(recipe: Recipe) -> PolicyTask:
    """The task without weights or data, for its shapes."""
    from .sketched import SketchedTask

    return SketchedTask(recipe)


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows (..., D) with zeros up to ``size`` (openpi's padding)."""
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, size - rows.shape[-1])])
