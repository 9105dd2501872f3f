"""Rotation by 90, 180 or 270 degrees (paper, figures 4 and 5). Off by default: SimCLR does not use it."""

import dataclasses
from typing import Any, ClassVar

import numpy as np

from simclr_jax.options import number, option_field
from simclr_jax.views.distortion import Channels, Operation


@dataclasses.dataclass(frozen=True)
class Rotation(Operation):
    """Turns a view counter-clockwise by a quarter, a half or three quarters, each as often."""

    rotation_probability: float = option_field(
        0.0, number(0, 1), "probability that a view is turned by 90, 180 or 270 degrees"
    )

    NAME: ClassVar = "rotation"
    DRAWS: ClassVar = {"rotation": 1, "quarters": 1}

    def host(self, x: Any, u: dict[str, Any]) -> Any:
        import tensorflow as tf

        return self._turned(tf, x, u)

    def device(self, channels: Channels, u: dict[str, Any]) -> Channels:
        import jax.numpy as jnp

        return tuple(self._turned(jnp, c, u) for c in channels)

    def _turned(self, xp: Any, x: Any, u: dict[str, Any]) -> Any:
        third = 3.0 * u["quarters"][..., 0]
        across = xp.linalg.matrix_transpose(x)
        by = (across[..., ::-1, :], x[..., ::-1, ::-1], across[..., ::-1])
        turned = xp.where(third < 1, by[0], xp.where(third < 2, by[1], by[2]))
        return xp.where(self.happens(u), turned, x)

    def drawn(self, u: dict[str, np.ndarray], channels: int) -> str:
        return f"rotation {90 * (1 + int(3 * u['quarters'][0]))}°"
