"""A Triune policy as lerobot's trainer and evaluators use one.

Inside works triune's own policy: it resizes, normalises, tokenises and denoises as in ``vla eval``, and training makes its inputs by
the same code. What lerobot saves is a Triune checkpoint, with lerobot's files beside.
"""

from collections import deque
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor

from triune import UserError
from triune.config import dump
from triune.data import Contract, Dataset, Observation, open_dataset
from triune.data.readers.metadata import camera_name
from triune.policies import Request, read_checkpoint
from triune.policies import TriunePolicy as Acting
from triune.policies.checkpoint import write_checkpoint, write_golden
from triune.policies.inputs import Resize, Settings
from triune.policies.train.policy_recipe import references
from triune.policies.triune import from_checkpoint, graph_info
from triune.vla import Inputs, build
from triune.vla.inputs import Targets
from triune.vla.spec import LatentHead
from triune.vla.weights import anchor

from .begin import adopted, fitted, five_frames, statistics
from .configuration_triune import NETWORK, TriuneConfig, chunk, local_folder
from .seen import observations


class TriunePolicy(PreTrainedPolicy):
    """See ``lerobot.policies.pretrained.PreTrainedPolicy``. It takes observations as they are and answers in physical units.

    Args:
        config: with ``pretrained_path`` where it was saved before.
        dataset_stats: not used; lerobot's quantiles are averages over episodes.
        dataset_meta: of the dataset to train on. A new policy has sizes, names and statistics from its frames.

    Raises:
        UserError: nothing says what the policy is made of, or the dataset does not fit it.
    """

    config_class = TriuneConfig
    name = "triune"

    def __init__(self, config: TriuneConfig, dataset_stats: Any = None, dataset_meta: Any = None) -> None:
        super().__init__(config)
        self.config: TriuneConfig = config
        self.source: dict[str, str] = {}
        folder = config.folder()
        dataset = None if dataset_meta is None else open_dataset(dataset_meta.root)
        if folder is not None:
            self._open(folder, dataset)
        elif dataset is not None:
            self._begin(dataset)
        else:
            raise UserError("a new Triune policy learns its sizes from a dataset; give a saved one to act with: --policy.path=<folder>")
        self.model = self.acting.model
        self.offsets = config.observation_offsets
        contract = self.acting.contract
        if (contract.executed or 0) > (contract.chunk or 0):
            raise UserError(
                f"a chunk has {contract.chunk} steps, not {contract.executed} that could be executed; lower --policy.n_action_steps"
            )
        config.chunk_size, config.n_action_steps = contract.chunk, contract.executed
        keys = {camera_name(key): key for key in config.image_features}
        config.input_features = features(contract, self.acting.settings, keys)
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (contract.action.size,))}
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_name_or_path: str | Path,
        *,
        config: TriuneConfig | None = None,
        revision: str | None = None,
        dataset_stats: Any = None,
        dataset_meta: Any = None,
        **options: Any,
    ) -> "TriunePolicy":
        """A policy that lerobot or ``vla train`` saved, in evaluation mode.

        Args:
            pretrained_name_or_path: a folder, or a hub id.
            options: lerobot's others; weights are always read strictly.
        """
        folder = local_folder(str(pretrained_name_or_path), revision)
        config = config or PreTrainedConfig.from_pretrained(folder)
        config.pretrained_path = folder
        policy = cls(config, dataset_stats, dataset_meta)
        return policy.to(config.device).eval()

    def _begin(self, dataset: Dataset) -> None:
        """A new policy for ``dataset``."""
        config = self.config
        config.validate_features()
        spec = fitted(config.resolve(), dataset)
        found = statistics(dataset)
        size = config.image_size
        said = {
            "cameras": tuple(camera for camera in dataset.contract.cameras if camera.name in spec.cameras),
            "state": dataset.contract.state.model_copy(update={"normalisation": config.state_normalisation}),
            "action": dataset.contract.action.model_copy(update={"normalisation": config.action_normalisation}),
            "chunk": chunk(spec),
            "executed": config.n_action_steps or chunk(spec),
            "prompt": config.prompt,
        }
        self.acting = Acting(
            build(spec, torch.initial_seed()),
            dataset.contract.model_copy(update=said),
            found,
            Settings(resize=None if size is None else Resize(height=size[0], width=size[1])),
        )
        self.statistics = {name: values.model_dump(mode="json") for name, values in found.items()}
        self.pretrained, self.golden = references(spec), five_frames(dataset, spec.cameras)

    def _open(self, folder: Path, dataset: Dataset | None) -> None:
        """A policy that was saved in ``folder``; ``dataset`` is what it goes on to learn."""
        config, born = self.config, PreTrainedConfig.from_pretrained(folder)
        changed = [f"--policy.{word}" for word in NETWORK if getattr(born, word) != getattr(config, word)]
        if changed:
            way_out = f"leave out {', '.join(changed)}, or make a new policy with --policy.type=triune"
            raise UserError(f"{folder} says what its network is made of; {way_out}")
        checkpoint = read_checkpoint(folder)
        contract = checkpoint.contract
        if config.n_action_steps is not None:
            contract = contract.model_copy(update={"executed": config.n_action_steps})
        self.statistics = checkpoint.statistics
        if dataset is not None:
            contract, self.statistics = adopted(contract, self.statistics, dataset, config.new_statistics)
        self.acting = from_checkpoint(replace(checkpoint, contract=contract, statistics=self.statistics))
        self.pretrained = {n: r.model_copy(update={"ref": anchor(r.ref, folder)}) for n, r in checkpoint.info.weights.items()}
        self.source, self.golden = checkpoint.info.source, checkpoint.observations()

    # training -------------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch as lerobot's loader makes it, and its terms.

        Args:
            batch: images (B[, T], 3, Y, X) from 0 to 1 and states (B[, T], S) at the T frames of ``observation_offsets``, actions (B, C, A)
                in physical units, ``action_is_pad`` (B, C), ``task``.
        """
        targets = self._targets(batch)
        terms = self.model.losses(self._inputs(batch), targets, *self.model.draw(len(targets.actions)))
        loss = terms.pop("loss")
        return loss, {f"{name}_loss": term.item() for name, term in terms.items()}

    def get_optim_params(self) -> list[Tensor]:
        """What learns: not the frozen experts."""
        return list(self.model.trained().values())

    def _inputs(self, batch: dict[str, Any]) -> Inputs:
        """As the policy sees these observations when it acts."""
        inputs, frames = self._seen(batch, self.offsets.index(0)), self.model.spec.history.frames
        if frames == 1:
            return inputs
        past = [self._view(batch, frame) for frame in range(frames)]
        return replace(inputs, images=torch.stack(past, dim=2).flatten(1, 2))

    def _targets(self, batch: dict[str, Any]) -> Targets:
        """Normalised actions, which of them are there, and what is to be foreseen."""
        device = self._on_device()
        actions = self.acting.action.normalise(batch["action"].float().cpu().numpy()).astype(np.float32)
        spare = self.model.flow_shapes()[self.model.action_stream][1] - actions.shape[-1]
        actions = np.pad(actions, ((0, 0), (0, 0), (0, spare)))
        future = torch.zeros(len(actions), 0, 0, device=device)
        if self.offsets[-1] > 0:
            spec = self.model.spec
            head = next(h for h in spec.heads.values() if isinstance(h, LatentHead))
            future = self._view(batch, len(self.offsets) - 1)[:, [spec.cameras.index(camera) for camera in head.cameras]]
        return Targets(torch.from_numpy(actions).to(device), ~batch["action_is_pad"].to(device), future)

    def _view(self, batch: dict[str, Any], frame: int) -> Tensor:
        """The cameras' pictures (B, V, 3, Y, X) at one of the frames."""
        images = self._seen(batch, frame).images
        assert images is not None
        return images.unflatten(1, (-1, self.model.spec.history.frames))[:, :, -1]

    def _seen(self, batch: dict[str, Any], frame: int) -> Inputs:
        self._on_device()
        return self.acting.inputs(self._observations(batch, frame))

    # acting ---------------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """Begin new episodes in every row; their noise follows from torch's generator, which lerobot seeds."""
        self.acting.sessions.clear()
        self._queue: deque[Tensor] = deque()
        self._asked = 0

    def select_action(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """The next action of each row, (B, A); a chunk is planned when the steps that are executed of the last one are over."""
        if not self._queue:
            planned = self.predict_action_chunk(batch, **options)
            self._queue.extend(planned[:, : self.config.n_action_steps].unbind(1))
        return self._queue.popleft()

    def predict_action_chunk(self, batch: dict[str, Any], **options: Any) -> Tensor:
        """A chunk (B, C, A) for each row, in physical units.

        Raises:
            UserError: an option is given that the policy has not, such as ``noise`` or a committed prefix.
        """
        given = [name for name, value in options.items() if value is not None]
        if given:
            raise UserError(
                f"a Triune policy in lerobot takes no {', '.join(given)}; its noise follows from torch.manual_seed before reset()"
            )
        device = self._on_device()
        with torch.inference_mode(False):  # what the model keeps between calls must serve training too
            rate, executed = self.acting.contract.rate or 1.0, self.config.n_action_steps or 1
            seen = self._observations(batch, 0, self._asked * executed / rate)
            self._asked += 1
            for row in range(len(seen)):
                if str(row) not in self.acting.sessions:
                    self.acting.reset(str(row), int(torch.randint(2**31, ())))
            plans = self.acting.plan([Request(str(row), observation) for row, observation in enumerate(seen)])
            return torch.from_numpy(np.stack([plan.chunk.actions for plan in plans])).to(device)

    def _on_device(self) -> torch.device:
        """Where lerobot has put the weights."""
        self.acting.device = next(self.model.parameters()).device
        return self.acting.device

    def _observations(self, batch: dict[str, Any], frame: int, timestamp: float = 0.0) -> list[Observation]:
        """The rows of a batch at one of its frames."""
        return observations(self.acting.contract, batch, frame, timestamp)

    # saving ---------------------------------------------------------------------------------------------------------

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        """A Triune checkpoint with lerobot's ``config.json``; of the weights those that learn, from ``state_dict`` where it is given."""
        learnt = {n: p if state_dict is None else state_dict[f"model.{n}"] for n, p in self.model.trained().items()}
        write_checkpoint(
            save_directory,
            spec=dump(self.model.spec),
            contract=self.acting.contract,
            statistics=self.statistics,
            weights={name: value.detach().cpu().contiguous() for name, value in learnt.items()},
            references=self.pretrained,
            settings=self.acting.settings.model_dump(mode="json"),
            source=self.source,
            graph=graph_info(self.model.spec),
        )
        self.config._save_pretrained(save_directory)
        if self.golden:
            write_golden(save_directory, from_checkpoint(read_checkpoint(save_directory)), self.golden)

    def push_model_to_hub(
        self, cfg: Any, peft_model: Any = None, state_dict: dict[str, Tensor] | None = None, dataset_meta: Any = None
    ) -> None:
        """As lerobot does, and with the golden pictures, which it leaves out."""
        super().push_model_to_hub(cfg, peft_model, state_dict, dataset_meta)
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, state_dict=state_dict)
            HfApi().upload_folder(repo_id=str(self.config.repo_id), folder_path=folder, commit_message="Golden observations")


def features(contract: Contract, settings: Settings, keys: dict[str, str]) -> dict[str, PolicyFeature]:
    """What a policy of that contract sees, in lerobot's words; ``keys``: camera -> its name in lerobot, where that is known."""
    out = {}
    for camera in contract.cameras:
        fitted = settings.resize
        size = (camera.height or (fitted.height if fitted else 0), camera.width or (fitted.width if fitted else 0))
        out[keys.get(camera.name, f"observation.images.{camera.name}")] = PolicyFeature(FeatureType.VISUAL, (3, *size))
    return out | {"observation.state": PolicyFeature(FeatureType.STATE, (contract.state.size,))}
