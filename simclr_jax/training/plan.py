"""How long a run is, and how fast it learns, for a training split of a certain size."""

import dataclasses

from simclr_jax.errors import UserError
from simclr_jax.training.optimizer import scaled_learning_rate


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length and the peak learning rate of a run.

    Attributes:
      steps: steps of the whole run.
      warmup_steps: the first steps, in which the learning rate rises; at most half of the run.
      learning_rate: its peak.
    """

    steps: int
    warmup_steps: int
    learning_rate: float


def check_enough(batch_size: int, images: int) -> None:
    """Raises a UserError if a batch is larger than the data set, or an image would have no negatives."""
    if images < 2:
        raise UserError(
            f"{images} training image{'s' * (images != 1)}: expected two or more, as the loss compares "
            "different images"
        )
    if batch_size > images:
        raise UserError(
            f"data.batch_size={batch_size} is more than the {images} training images, so that images "
            f"would be their own negatives: expected at most {images}"
        )


def make_plan(
    images: int,
    batch_size: int,
    *,
    steps: int,
    epochs: float,
    warmup_epochs: float,
    learning_rate: float,
    scaling: str,
) -> Plan:
    """Turns epochs into steps, rounded, and scales the learning rate by the batch.

    Args:
      images: images of the training split.
      batch_size: B, images of the global batch.
      steps: above 0: the steps of the run, whatever `epochs` says.
      epochs: passes over the training split.
      warmup_epochs: passes in which the learning rate rises.
      learning_rate, scaling: see `optimizer.scaled_learning_rate`.
    """
    steps_per_epoch = images / batch_size
    steps = steps or max(1, round(epochs * steps_per_epoch))
    warmup = round(warmup_epochs * steps_per_epoch)
    rate = scaled_learning_rate(learning_rate, scaling, batch_size)
    return Plan(steps, min(warmup, steps // 2), rate)
