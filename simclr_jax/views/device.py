"""Views made on the device: the same formulas as on the host, for a batch at once. No TensorFlow."""

import functools

import jax
import jax.numpy as jnp

from simclr_jax.views.crop import EvaluationView, center_square, resize_matrix
from simclr_jax.views.distortion import Distortion, key_of


def draw(seed: int, epoch, index, distortion: Distortion):
    """Draws the numbers in [0, 1) that decide the views of an image: [views, distortion.draws].

    The numbers of a step are a function of (seed, epoch, index, the step's name), as on the host, but they
    are not equal to the host's.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), index)
    parts = [
        jax.random.uniform(jax.random.fold_in(key, key_of(name)), (2, size))
        for name, size in distortion.sizes.items()
    ]
    return distortion.draws_of_views(jnp, jnp.concatenate(parts, axis=1))


def crops_of(images, seed: int, epochs, indices, size: int, distortion: Distortion):
    """Makes the crops of the views of some images.

    Args:
      images: uint8 [N, H, W, C].
      seed: the run's seed.
      epochs, indices: int [b], the epoch of each view and the index of its image.
      size: height and width of a view, pixels.
      distortion: how strongly views differ.

    Returns:
      crops uint8 [b, views, size, size, C], and the draws that decide the rest of each view,
      float32 [b, views, distortion.draws].
    """

    def of_one(epoch, index):
        draws = draw(seed, epoch, index, distortion)
        make = functools.partial(crop, images[index], size=size, distortion=distortion)
        return jax.vmap(make)(draws), draws

    return jax.vmap(of_one)(epochs, indices)


def crop(image, draws, size: int, distortion: Distortion):
    """Crops one view, uint8 [size, size, C], of image uint8 [H, W, C]."""
    height, width, _ = image.shape
    numbers = distortion.numbers_of(distortion.crop, draws)
    top, left, crop_height, crop_width = distortion.crop.window(
        jnp, float(height), float(width), numbers
    )
    antialias = distortion.crop.antialias
    rows = resize_matrix(jnp, top, crop_height, height, size, antialias)
    columns = resize_matrix(jnp, left, crop_width, width, size, antialias)
    return _resize(image, rows, columns)


def center_crop(images, view: EvaluationView):
    """Makes the evaluation views, uint8 [N, size, size, C], of images uint8 [N, H, W, C]."""
    _, height, width, _ = images.shape
    top, left, side = center_square(height, width, view.proportion)
    rows = resize_matrix(jnp, float(top), float(side), height, view.size, view.antialias)
    columns = resize_matrix(jnp, float(left), float(side), width, view.size, view.antialias)
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


def distort(crops, draws, distortion: Distortion):
    """Makes views in [0, 1] of their crops: applies all operations of the distortion.

    Args:
      crops: uint8 [..., S, S, C], C 1 or 3.
      draws: [..., distortion.draws] in [0, 1), for each crop.
      distortion: how strongly views differ.

    Returns:
      float32 [..., S, S, 3].
    """
    x = crops.astype(jnp.float32) / 255.0
    channels = tuple(x[..., c] for c in range(x.shape[-1]))
    draws = draws[..., jnp.newaxis, jnp.newaxis, :]
    for operation in distortion.chain:
        channels = operation.device(channels, distortion.numbers_of(operation, draws))
    x = jnp.stack(channels, axis=-1)
    return jnp.broadcast_to(x, (*x.shape[:-1], 3))
