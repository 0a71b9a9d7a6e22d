"""The learning rate over the steps: a function of a step's number alone. It knows no torch."""

import math

from pipelines.config import TrainConfig


def learning_rate_factor(train: TrainConfig, step: int) -> float:
    """Share of the learning rate that the step after `step` steps is taken with."""
    factor = min(1.0, (step + 1) / max(1, train.warmup_steps))
    if train.lr_schedule == "cosine" and step >= train.warmup_steps:
        done = (step - train.warmup_steps) / max(1, train.num_steps - train.warmup_steps)
        factor *= 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return factor
