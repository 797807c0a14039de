"""What lerobot does before and after the policy: renaming, a batch dimension, the device. The rest the policy does itself."""

from typing import Any

from lerobot.processor import make_default_pre_post_processors

from .configuration_triune import TriuneConfig


def make_triune_pre_post_processors(config: TriuneConfig, dataset_stats: dict[str, Any] | None = None) -> tuple[Any, Any]:
    """lerobot's usual pipelines. ``dataset_stats`` are not needed: the policy normalises by statistics of its own, which it keeps."""
    return make_default_pre_post_processors(config, None)
