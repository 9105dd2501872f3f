"""Gaussian noise (paper, figures 4 and 5, where no strength is published). Off by default: SimCLR does not
use it.
"""

import dataclasses
from typing import Any, ClassVar

from simclr_jax.options import number, option_field
from simclr_jax.views.distortion import Channels, Operation, happening


@dataclasses.dataclass(frozen=True)
class Noise(Operation):
    """Adds normal numbers, one for each pixel and channel, and clips.

    A pixel's number is a function of two drawn numbers, which key a generator. Host and device have other
    generators: unlike all other operations this one is equal on both in distribution only.
    """

    noise_probability: float = option_field(
        0.0, number(0, 1), "probability that a view gets Gaussian noise"
    )
    noise_strength: float = option_field(
        0.1, number(0, 1), "standard deviation of the noise; pixels are in [0, 1]"
    )

    NAME: ClassVar = "noise"
    DRAWS: ClassVar = {"noise": 1, "key": 2}

    def host(self, x: Any, u: dict[str, Any]) -> Any:
        import tensorflow as tf

        def noisy(x):
            added = tf.random.stateless_normal(x.shape, tf.cast(u["key"] * 2.0**24, tf.int32))
            return tf.clip_by_value(x + self.noise_strength * added, 0.0, 1.0)

        return happening(self.happens(u), noisy, x)

    def device(self, channels: Channels, u: dict[str, Any]) -> Channels:
        import jax
        import jax.numpy as jnp

        views = channels[0].shape[:-2]
        words = (u["key"] * 2.0**24).astype(jnp.uint32).reshape(-1, 2)

        def added(words):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), words[0]), words[1])
            return jax.random.normal(key, (len(channels), *channels[0].shape[-2:]))

        normal = jax.vmap(added)(words).reshape(*views, len(channels), *channels[0].shape[-2:])
        happens = self.happens(u)
        return tuple(
            jnp.where(happens, jnp.clip(c + self.noise_strength * normal[..., i, :, :], 0, 1), c)
            for i, c in enumerate(channels)
        )
