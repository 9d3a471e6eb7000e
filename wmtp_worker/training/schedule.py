"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

import math

from wmtp_worker.settings.schema import TrainingSettings


def learning_rate(step: int, training: TrainingSettings) -> float:
    """Linear warm-up, then a cosine down to `min_lr_ratio · lr` (Loshchilov & Hutter 2017, eq. 5, one cycle).

    `step` counts from 0: the rate of the optimizer step that is about to be taken.
    """
    if step < training.warmup_steps:
        return training.lr * (step + 1) / training.warmup_steps
    span = max(training.max_steps - training.warmup_steps, 1)
    share = min((step - training.warmup_steps) / span, 1.0)
    floor = training.min_lr_ratio
    return training.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share)))
