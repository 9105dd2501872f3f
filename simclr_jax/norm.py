"""BatchNorm, global over the batch: under `jit` over a sharded batch the mean is the batch's mean."""

import functools

from flax import linen as nn


def batch_norm(train: bool, dtype, momentum: float, epsilon: float = 1e-5):
    """A factory of BatchNorm layers that share their settings.

    Statistics are taken over all axes but the last, in float32 whatever `dtype` is, and over the
    global batch. Epsilon defaults to the published SimCLR code's.

    Args:
      train: use the batch's statistics and update the running ones; else use the running ones.
      dtype: of the output.
      momentum: share of the old running statistic kept at each step.
      epsilon: added to the variance.
    """
    return functools.partial(
        nn.BatchNorm,
        use_running_average=not train,
        momentum=momentum,
        epsilon=epsilon,
        dtype=dtype,
    )
