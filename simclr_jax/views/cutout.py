"""Cutout: hides a square (DeVries and Taylor 2017, arXiv 1708.04552), one of the operations of the paper's
figure 5, which publishes no size for it. Off by default: SimCLR does not use it.
"""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from simclr_jax.options import number, option_field
from simclr_jax.views.distortion import Channels, Operation

_HIDDEN = 0.5  # the middle of the range, as cutout's zero is the mean of normalised images


@dataclasses.dataclass(frozen=True)
class Cutout(Operation):
    """Makes a square grey. Its centre is uniform over the view, so part of it may lie outside."""

    cutout_probability: float = option_field(
        0.0, number(0, 1), "probability that a square of a view is hidden"
    )
    cutout_size: float = option_field(
        0.5, number(0.01, 2), "side of the hidden square, as a share of the view's side"
    )

    NAME: ClassVar = "cutout"
    DRAWS: ClassVar = {"cutout": 1, "place": 2}

    def host(self, x: Any, u: dict[str, Any]) -> Any:
        import tensorflow as tf

        return tf.where(self._hidden(tf, x.shape[-1], u), _HIDDEN, x)

    def device(self, channels: Channels, u: dict[str, Any]) -> Channels:
        import jax.numpy as jnp

        hidden = self._hidden(jnp, channels[0].shape[-1], u)
        return tuple(jnp.where(hidden, _HIDDEN, c) for c in channels)

    def _hidden(self, xp: Any, size: int, u: dict[str, Any]) -> Any:
        """Returns which pixels [..., size, size] the square covers; none where it was not drawn."""
        middles = np.arange(size, dtype=np.float32) + 0.5
        half = 0.5 * self.cutout_size * size
        rows = xp.abs(middles[:, np.newaxis] - size * u["place"][..., 0]) < half
        columns = xp.abs(middles[np.newaxis] - size * u["place"][..., 1]) < half
        return rows & columns & self.happens(u)
