"""As for a policy in the process: the server normalises."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors

from .configuration_triune_remote import TriuneRemoteConfig


def make_triune_remote_pre_post_processors(config: TriuneRemoteConfig, dataset_stats: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """lerobot's usual pipelines, without statistics."""
    return make_default_pre_post_processors(config, None)
