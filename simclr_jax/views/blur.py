"""Gaussian blur (paper, appendix A): S / 10 pixels wide, sigma uniform in [0.1, 2] px, drawn per view.

On the host, for large views, a program with a shorter kernel runs where sigma is so small that the outer taps
weigh nothing, as for most draws. On the device, blur is two products with a banded matrix, which is the identity
for a view that is not blurred. Pixels outside the image count as 0.
"""

import dataclasses
import functools
import math
from typing import Any, ClassVar

from simclr_jax.options import number, option_field
from simclr_jax.views.distortion import Channels, Operation, happening

BLUR_SIGMA = (0.1, 2.0)  # pixels; paper, appendix A

# A Gaussian of sigma s has 2e-5 of its weight beyond this many s: 0.005 grey levels of 255.
_REACH = 4.3


@dataclasses.dataclass(frozen=True)
class Blur(Operation):
    """Blurs a view."""

    blur_probability: float = option_field(
        0.5, number(0, 1), "probability that a view is blurred; 0 for small images"
    )

    NAME: ClassVar = "blur"
    DRAWS: ClassVar = {"blur": 1, "sigma": 1}
    FUSED: ClassVar = False

    def host(self, x: Any, u: dict[str, Any]) -> Any:
        return happening(self.happens(u), lambda x: blurred(x, blur_sigma(u["sigma"][0])), x)

    def host_small(self, x: Any, u: dict[str, Any]) -> Any:
        import tensorflow as tf

        radius = blur_radius(x.shape[1])
        if radius == 0:
            return x
        weights = blur_weights(tf, blur_sigma(u["sigma"][0]), radius)
        return happening(self.happens(u), lambda x: _filtered(x, weights, _filter_axis), x)

    def device(self, channels: Channels, u: dict[str, Any]) -> Channels:
        import jax

        sigma = blur_sigma(u["sigma"])[..., 0]
        band = banded(channels[0].shape[-1], sigma, self.happens(u))
        # A blurred value must be right to half a grey level.
        product = functools.partial(jax.numpy.matmul, precision=jax.lax.Precision.HIGHEST)
        across = jax.numpy.swapaxes(band, -1, -2)
        return tuple(product(product(band, c), across) for c in channels)

    def drawn(self, u: dict[str, Any], channels: int) -> str:
        return f"blur, sigma {float(blur_sigma(u['sigma'][0])):.1f} px"


def blur_radius(size: int) -> int:
    """Returns the taps on each side for a view of `size` px: the kernel's width is S / 10."""
    return size // 10 // 2


def blur_radii(size: int) -> list[tuple[int, float]]:
    """Lists (radius, largest sigma for which it is enough) for a view of `size` px, ascending."""
    full = blur_radius(size)
    shorter = sorted({-(-full // 4), -(-full // 2)} - {0, full})
    return [*((r, (r + 0.5) / _REACH) for r in shorter), (full, math.inf)]


def blur_weights(xp: Any, sigma: Any, radius: int) -> list:
    """Computes the 2 radius + 1 taps, which sum to 1; sigma in px, of any shape."""
    taps = [xp.exp(-(i * i) / (2.0 * sigma * sigma)) for i in range(-radius, radius + 1)]
    total = sum(taps)
    return [tap / total for tap in taps]


def blur_sigma(drawn: Any) -> Any:
    """Turns a number in [0, 1) into sigma, px."""
    low, high = BLUR_SIGMA
    return low + (high - low) * drawn


def banded(size: int, sigma: Any, drawn: Any) -> Any:
    """Computes [..., size, size], whose product with a column of pixels blurs it; the identity where
    not `drawn`. `sigma`, px, and `drawn` are [..., 1, 1].
    """
    import jax.numpy as jnp

    radius = blur_radius(size)
    distance = jnp.abs(jnp.arange(size)[:, jnp.newaxis] - jnp.arange(size)).astype(jnp.float32)
    middle = blur_weights(jnp, sigma, radius)[radius]  # one over the sum of the taps
    taps = jnp.exp(-distance * distance / (2.0 * sigma * sigma)) * middle
    return jnp.where(drawn, jnp.where(distance <= radius, taps, 0.0), distance == 0)


def blurred(x: Any, sigma: Any) -> Any:
    """Blurs x [C, S, S] by TensorFlow; sigma in px."""
    import tensorflow as tf

    radii = blur_radii(x.shape[1])

    def with_radius(radius):
        return _filtered(x, blur_weights(tf, sigma, radius), _compiled_filter())

    enough = [tf.cast(sigma > most, tf.int32) for _, most in radii[:-1]]
    return tf.switch_case(
        tf.add_n(enough) if enough else tf.constant(0),
        [functools.partial(with_radius, radius) for radius, _ in radii],
    )


def _filtered(x: Any, weights: list, filter_axis: Any) -> Any:
    import tensorflow as tf

    radius = len(weights) // 2
    if radius == 0:
        return x
    taps = tf.stack(weights)
    # Padded outside of what is compiled: within, each tap would ask whether it is in the padding.
    x = filter_axis(tf.pad(x, [[0, 0], [radius, radius], [0, 0]]), taps, 1)
    return filter_axis(tf.pad(x, [[0, 0], [0, 0], [radius, radius]]), taps, 2)


def _filter_axis(x: Any, weights: Any, axis: int) -> Any:
    """Sums x, shifted along an axis by each tap and weighted by it."""
    taps = weights.shape[0]
    length = x.shape[axis] - taps + 1
    shifted = [x[:, i : i + length] if axis == 1 else x[:, :, i : i + length] for i in range(taps)]
    return sum(weights[i] * part for i, part in enumerate(shifted))


@functools.cache
def _compiled_filter() -> Any:
    import tensorflow as tf

    return tf.function(_filter_axis, jit_compile=True, autograph=False)
