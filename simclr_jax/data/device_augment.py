"""The views of SimCLR on the device: the same formulas as on the host, for a batch at once.

A device does not branch by image, so each of the four places in the order of the colour jitter is
one operation whose numbers make it what was drawn: hue and saturation that do not change, or a
factor of one and nothing added, are the identity. That is one pass a place, where computing all
four operations and choosing would be four. Blur, of a sigma for each image, is two products with a
banded matrix, the identity where none was drawn.
"""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.data import distortion as d
from simclr_jax.data.distortion import Distortion


def draw(seed: int, epoch, index):
    """The numbers in [0, 1) that decide both views of an image: [2, DRAWS_OF_A_VIEW].

    A function of (seed, epoch, index), int scalars, as on the host; with other numbers.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), index)
    return jax.random.uniform(key, (2, d.DRAWS_OF_A_VIEW))


def views_of(images, seed: int, epochs, indices, size: int, distortion: Distortion):
    """The crops of both views of some images, and the draws that decide the rest of them.

    Args:
      images: uint8 [N, H, W, C], of which these are taken:
      epochs, indices: int [b].

    Returns:
      uint8 [b, views, size, size, C], float32 [b, views, DRAWS_OF_A_VIEW].
    """

    def of_one(epoch, index):
        draws = draw(seed, epoch, index)[: distortion.views]
        make = functools.partial(crop, images[index], size=size, distortion=distortion)
        return jax.vmap(make)(draws), draws

    return jax.vmap(of_one)(epochs, indices)


def crop(image, draws, size: int, distortion: Distortion):
    """The crop of one view, uint8 [size, size, C], of image uint8 [H, W, C]."""
    u, (height, width, _) = d.named(draws), image.shape
    area, aspect = distortion.crop_area, distortion.crop_aspect
    top, left, crop_height, crop_width = d.crop_window(
        jnp, float(height), float(width), u["crop"], u["position"], area, aspect
    )
    rows = d.resize_matrix(jnp, top, crop_height, height, size)
    columns = d.resize_matrix(jnp, left, crop_width, width, size)
    return _resize(image, rows, columns)


def center_crop(images, size: int, proportion: float):
    """The evaluation views, uint8 [N, size, size, C], of images uint8 [N, H, W, C]: the largest
    centred square, of which the middle `proportion` of each side is kept and resized.
    """
    _, height, width, _ = images.shape
    side = max(1, round(proportion * min(height, width)))
    rows = d.resize_matrix(jnp, float((height - side + 1) // 2), float(side), height, size)
    columns = d.resize_matrix(jnp, float((width - side + 1) // 2), float(side), width, size)
    return jax.vmap(functools.partial(_resize, rows=rows, columns=columns))(images)


def _resize(image, rows, columns):
    # Products of integers up to 255 and weights: half a grey level needs more than bfloat16.
    x = jnp.einsum(
        "uh,hwc,vw->uvc",
        rows,
        image.astype(jnp.float32),
        columns,
        precision=jax.lax.Precision.HIGHEST,
    )
    return jnp.round(jnp.clip(x, 0.0, 255.0)).astype(jnp.uint8)


def recolor(crops, draws, distortion: Distortion):
    """Views in [0, 1] of their crops: flip, colour jitter, grey and blur.

    Args:
      crops: uint8 [..., S, S, C], C 1 or 3.
      draws: [..., DRAWS_OF_A_VIEW] in [0, 1), for each crop.
      distortion: how strongly views differ.

    Returns:
      float32 [..., S, S, 3].
    """
    x = crops.astype(jnp.float32) / 255.0
    u = d.named(draws[..., jnp.newaxis, jnp.newaxis, :])  # each [..., 1, 1, n]
    if distortion.flip:
        x = jnp.where(u["flip"] < 0.5, x[..., ::-1, :], x)
    channels = tuple(x[..., c] for c in range(x.shape[-1]))
    if distortion.color_strength > 0:
        channels = jitter(channels, u, distortion)
    if distortion.grey_probability > 0 and len(channels) == 3:
        luma, drawn = d.luma(channels), u["grey"][..., 0] < distortion.grey_probability
        channels = tuple(jnp.where(drawn, luma, c) for c in channels)
    x = jnp.stack(channels, axis=-3)  # [..., C, S, S]
    if distortion.blur_probability > 0:
        drawn = u["blur"] < distortion.blur_probability
        x = blur(x, d.blur_sigma(u["sigma"]), drawn)
    x = jnp.moveaxis(x, -3, -1)
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))


def jitter(channels: tuple, u: dict, distortion: Distortion) -> tuple:
    """The colour jitter of the channels [..., S, S], where it was drawn, in the order drawn."""
    strength, spread = distortion.color_strength, 0.8 * distortion.color_strength
    happens = u["jitter"][..., 0] < distortion.jitter_probability
    brightness, contrast, saturation, hue = range(4)
    operations = 4 if len(channels) == 3 else 2
    factors = u["factors"]
    turns = jnp.argsort(u["order"][..., :operations], axis=-1)
    for place in range(operations):
        turn = turns[..., place]

        def when(operation, value, otherwise, turn=turn):
            return jnp.where(happens & (turn == operation), value, otherwise)

        if operations == 4:
            by = when(hue, d.turn(factors[..., hue], 0.2 * strength), 0.0)
            channels = d.turn_hue(jnp, channels, by)
            by = when(saturation, d.factor(factors[..., saturation], spread), 1.0)
            channels = d.saturate(jnp, channels, by)
        times = when(contrast, d.factor(factors[..., contrast], spread), 1.0)
        plus = jnp.zeros_like(times)
        if distortion.brightness == "additive":
            plus = when(brightness, d.turn(factors[..., brightness], spread), 0.0)
        else:
            times = when(brightness, d.factor(factors[..., brightness], spread), times)
        about_mean = turn == contrast  # what contrast pivots on; brightness on zero
        changed = []
        for c in channels:
            mean = jnp.mean(c, axis=(-2, -1), keepdims=True)
            pivot = jnp.where(about_mean, mean, 0.0)
            changed.append(jnp.clip((c - pivot) * times + pivot + plus, 0.0, 1.0))
        channels = tuple(changed)
    return channels


def blur(x, sigma, drawn):
    """Gaussian blur of x [..., C, S, S] where `drawn`, with sigma in px, both [..., 1, 1, 1], over
    S / 10 pixels; outside the image is 0.
    """
    size = x.shape[-1]
    radius = d.blur_radius(size)
    distance = jnp.abs(jnp.arange(size)[:, jnp.newaxis] - jnp.arange(size)).astype(jnp.float32)
    middle = d.blur_weights(jnp, sigma, radius)[radius]  # one over the sum of the taps
    taps = jnp.exp(-distance * distance / (2.0 * sigma * sigma)) * middle
    band = jnp.where(drawn, jnp.where(distance <= radius, taps, 0.0), distance == 0)
    precision = jax.lax.Precision.HIGHEST  # a blurred value must be right to half a grey level
    x = jnp.matmul(band, x, precision=precision)
    return jnp.matmul(x, jnp.swapaxes(band, -1, -2), precision=precision)
