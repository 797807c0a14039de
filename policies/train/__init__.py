"""Training: one loop for every kind of recipe."""

from .loop import Hook, StepReport, Task, TrainConfig, step_seed, train

__all__ = ["Hook", "StepReport", "Task", "TrainConfig", "step_seed", "train"]
