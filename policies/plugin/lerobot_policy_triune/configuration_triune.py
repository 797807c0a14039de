"""What lerobot asks of a Triune policy before it is built: ``--policy.<field>``, and which frames training needs."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import snapshot_download
from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, CosineDecayWithWarmupSchedulerConfig

from triune import UserError
from triune.config import find, load_tree, merge, parse
from triune.policies.triune import anchored
from triune.vla import Spec
from triune.vla.spec import FlowHead, LatentHead

NETWORK = ("spec", "overrides", "image_size", "prompt", "state_normalisation", "action_normalisation")
"""What is said once, when a policy is made; afterwards its folder says it."""


@PreTrainedConfig.register_subclass("triune")
@dataclass
class TriuneConfig(PreTrainedConfig):
    """A policy that is made from ``spec``, or was saved (``--policy.path``), by lerobot or by ``vla train``.

    Attributes:
        spec: name of a model spec, or path of its YAML file.
        overrides: dotted ``key=value`` changes of the spec. Sizes of states and actions need none: they are the dataset's.
        image_size: (height, width) that pictures are fitted into, the rest black; as they are unless given.
        prompt: template of the words; ``{instruction}`` is filled in.
        state_normalisation, action_normalisation: ``mean_std``, ``quantile``, ``min_max`` or ``none``, by statistics of all frames.
        chunk_size: control steps of a chunk; as the spec says unless given.
        n_action_steps: how many of them are executed; the whole chunk, or what a saved policy says, unless given.
        new_statistics: training of a saved policy normalises by the dataset's statistics rather than by those it was trained with.
    """

    spec: str | None = None
    overrides: list[str] = field(default_factory=list)
    image_size: tuple[int, int] | None = None
    prompt: str = "{instruction}"
    state_normalisation: str = "mean_std"
    action_normalisation: str = "quantile"
    chunk_size: int | None = None
    n_action_steps: int | None = None
    new_statistics: bool = False

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    optimizer_lr: float = 1e-4
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 1e-5

    def folder(self) -> Path | None:
        """Where the saved policy lies, downloaded if it is a hub id; ``None`` for one that is made anew."""
        return None if self.pretrained_path is None else local_folder(str(self.pretrained_path), self.pretrained_revision)

    def resolve(self) -> Spec:
        """The spec; a new one still has its own sizes of states and actions.

        Raises:
            UserError: no spec is named, it does not exist or is wrong, or ``chunk_size`` is not that of a saved policy.
        """
        folder = self.folder()
        if folder is not None:
            spec = anchored(parse(Spec, load_tree(folder / "spec.yaml"), folder / "spec.yaml"), folder)
            if self.chunk_size not in (None, chunk(spec)):
                raise UserError(f"{folder} plans chunks of {chunk(spec)} steps, not {self.chunk_size}; leave out --policy.chunk_size")
            return spec
        if self.spec is None:
            raise UserError("a new policy needs a spec: --policy.spec=triune_tiny, or the path of a YAML file; a saved one --policy.path")
        path = find(self.spec, "model")
        tree = load_tree(path, self.overrides)
        if self.chunk_size is not None:
            tree = merge(tree, {"streams": {action_head(parse(Spec, tree, path)): {"length": self.chunk_size}}})
        return anchored(parse(Spec, tree, path), Path.cwd())

    @property
    def observation_offsets(self) -> list[int]:
        """Frames that training needs, counted from the present one: the past that is looked at, the present, the one that is foreseen."""
        spec = self.resolve()
        ahead = max([head.horizon for head in spec.heads.values() if isinstance(head, LatentHead)], default=0)
        past = [-spec.history.every * back for back in range(spec.history.frames - 1, 0, -1)]
        return [*past, 0, *([ahead] if ahead else [])]

    @property
    def observation_delta_indices(self) -> list[int] | None:
        offsets = self.observation_offsets
        return offsets if len(offsets) > 1 else None

    @property
    def action_delta_indices(self) -> list[int]:
        return list(range(chunk(self.resolve())))

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        return AdamWConfig(
            lr=self.optimizer_lr,
            betas=self.optimizer_betas,
            eps=self.optimizer_eps,
            weight_decay=self.optimizer_weight_decay,
            grad_clip_norm=self.optimizer_grad_clip_norm,
        )

    def get_scheduler_preset(self) -> CosineDecayWithWarmupSchedulerConfig:
        return CosineDecayWithWarmupSchedulerConfig(
            peak_lr=self.optimizer_lr,
            decay_lr=self.scheduler_decay_lr,
            num_warmup_steps=self.scheduler_warmup_steps,
            num_decay_steps=self.scheduler_decay_steps,
        )

    def validate_features(self) -> None:
        """
        Raises:
            UserError: there is no camera, state or action to learn from.
        """
        missing = [
            what
            for what, there in (("camera", self.image_features), ("state", self.robot_state_feature), ("action", self.action_feature))
            if not there
        ]
        if missing:
            raise UserError(
                f"the features have no {' and no '.join(missing)}; a Triune policy needs observation.images.*, observation.state and action"
            )


def action_head(spec: Spec) -> str:
    """The head that denoises chunks of actions.

    Raises:
        UserError: the spec has none.
    """
    found = [name for name, head in spec.heads.items() if isinstance(head, FlowHead)]
    if not found:
        raise UserError(f"{spec.name} has no flow head of actions, so it is no policy; choose another spec")
    return found[0]


def chunk(spec: Spec) -> int:
    """Control steps of a chunk."""
    return spec.streams[action_head(spec)].length


def local_folder(path: str, revision: str | None = None) -> Path:
    """The folder ``path``, or the snapshot of the hub repository of that name, from the local cache or downloaded."""
    return Path(path) if Path(path).is_dir() else Path(snapshot_download(path, revision=revision))
