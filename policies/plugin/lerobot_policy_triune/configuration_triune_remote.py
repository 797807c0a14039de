"""A policy on another computer, for lerobot: ``--policy.type=triune_remote --policy.url=wss://...``."""

from dataclasses import dataclass, field

from lerobot.configs import NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig

from triune import UserError


@PreTrainedConfig.register_subclass("triune_remote")
@dataclass
class TriuneRemoteConfig(PreTrainedConfig):
    """Asks an action server of Triune. Its token comes from the environment variable ``TRIUNE_TOKEN`` alone: lerobot logs all options.

    Attributes:
        url: ``ws://host:port`` or ``wss://host:port`` of the server.
        ca: file of certificates to trust instead of the system's.
        timeout: seconds to wait for a plan.
        jpeg: quality to send pictures with; pixels unless given.
        resize: (height, width) that pictures are scaled down to fit in, before they are sent.
        n_action_steps: how many steps of a chunk are executed; as the server says unless given.
    """

    url: str | None = None
    ca: str | None = None
    timeout: float = 30.0
    jpeg: int | None = None
    resize: tuple[int, int] | None = None
    n_action_steps: int | None = None

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.IDENTITY)
    )

    @property
    def observation_delta_indices(self) -> None:
        return None

    @property
    def action_delta_indices(self) -> None:
        return None

    @property
    def reward_delta_indices(self) -> None:
        return None

    def get_optimizer_preset(self) -> AdamWConfig:
        """
        Raises:
            UserError: always; nothing learns here.
        """
        raise UserError("a policy behind a server is not trained from here: train where its checkpoint lies, and serve that")

    def get_scheduler_preset(self) -> None:
        return None

    def validate_features(self) -> None:
        """Whether robot and policy fit together is asked of the server's contract, when the policy is made."""
