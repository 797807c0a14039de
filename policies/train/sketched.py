"""A policy recipe without its weights: the same networks and losses over batches of the right shapes."""

from pathlib import Path
from typing import Any

import torch

from ...data.loader import best_order
from ...data.sampler import ChunkSampler
from ...vla.foresight import LatentForesight
from ...vla.model import sketch
from ...vla.spec import FlowHead, LatentHead
from ..checkpoint import read_checkpoint
from ..tuning import tune
from .demonstrations import make_sampler, open_demonstrations
from .frames import fit
from .policy import PolicyTask, Recipe, check_dataset, recipe_spec
from .team import Part


class SketchedTask(PolicyTask):
    """``PolicyTask`` on the meta device. It opens the datasets and decodes one frame of each camera, nothing else.

    Attributes:
        samples: frames at which training chunks begin.

    Raises:
        UserError: as ``PolicyTask``, but for weights that are missing.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.out = recipe, Path()
        self.base = None if recipe.init is None else read_checkpoint(recipe.init)
        self.spec = recipe_spec(recipe, self.base)
        self.demonstrations = open_demonstrations(recipe.data, recipe.robot, recipe.hold_out, recipe.train.seed)
        check_dataset(self.demonstrations, self.spec, recipe)
        self.module = sketch(self.spec)
        with torch.device("meta"):
            tune(self.module, recipe.experts)
        if self.base is None:
            self._refuse_unlearned()
        self.module.mot.checkpointing = recipe.checkpointing
        self.settings = self._settings()
        heads = [h for h in self.spec.heads.values() if isinstance(h, LatentHead)]
        self.foreseen = next((h.cameras for h in heads), ())
        order = best_order(self.demonstrations.datasets, self.spec.cameras)
        drawing = (recipe.train.seed, recipe.action_key, max([h.horizon for h in heads], default=0), recipe.stride, order)
        samplers = [make_sampler([source], self.chunk, 1, *drawing) for source in self.demonstrations.sources]
        self.samples = sum(len(sampler.frames) for sampler in samplers if isinstance(sampler, ChunkSampler))
        self.kept = fit(self.demonstrations, self.spec, self.foreseen, recipe.cache)
        self.seeing = any(part.needs_present for part in self.module.foresight.values())

    def batch(self, part: Part) -> dict[str, Any]:
        """Tensors without values, in the shapes and types of ``PolicyTask.batch``."""
        rows, spec, dataset = self.recipe.train.batch_size, self.spec, self.demonstrations.datasets[0]
        head = next(h for h in spec.heads.values() if isinstance(h, FlowHead))
        length = spec.streams[self._prompt_stream].length
        batch: dict[str, Any] = {
            "part": part,
            "state": torch.empty(rows, spec.state_dim),
            "actions": torch.empty(rows, self.chunk, head.action_dim),
            "mask": torch.empty(rows, self.chunk, dtype=torch.bool),
            "ids": torch.empty(rows, length, dtype=torch.long),
            "present": torch.empty(rows, length, dtype=torch.bool),
            "future": torch.zeros(0),
        }
        sizes = {c: dataset.frames(c, [0]).shape[1:3] for c in dict.fromkeys((*spec.cameras, *self.foreseen))}
        latent = next((m for m in self.module.foresight.values() if isinstance(m, LatentForesight)), None)
        if latent is not None and self.kept:
            patches = (rows, next(spec.streams[n].length for n in self.module.foresight), latent.channels * latent.head.patch**2)
            batch["future"] = torch.empty(patches)
            if self.seeing:
                batch["latents"] = torch.empty(patches)
        elif self.foreseen:
            batch["future"] = torch.empty(rows, len(self.foreseen), 3, *sizes[self.foreseen[0]], dtype=torch.uint8)
        shape = self._prefix_shape(self.samples) if self.kept else None
        if shape is not None:
            self._size = (
                sizes[spec.cameras[0]] if self.settings.resize is None else (self.settings.resize.height, self.settings.resize.width)
            )
            return batch | {"prefix": torch.empty(rows, *shape[2:], dtype=torch.bfloat16)}
        views = [torch.empty(rows, spec.history.frames, *sizes[c], 3, dtype=torch.uint8) for c in spec.cameras]
        return batch | {"views": views, "factors": None}

    def _pictures(self, views: Any, factors: Any) -> torch.Tensor:
        """As in training; scaling may need another library, and only its sizes count here."""
        if self.settings.resize is None:
            return super()._pictures(views, factors)
        count = sum(view.shape[1] for view in views)
        return torch.empty(views[0].shape[0], count, 3, self.settings.resize.height, self.settings.resize.width, device=views[0].device)
