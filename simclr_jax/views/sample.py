"""Makes views of an image to be looked at, as training makes them, and says what was drawn for each."""

from typing import NamedTuple

import jax
import numpy as np

from simclr_jax.views import device
from simclr_jax.views.distortion import Distortion
from simclr_jax.views.placement import HostCrops, Resident, Views, ViewSettings


class SampledView(NamedTuple):
    """A view.

    Attributes:
      image: uint8 [S, S, 3].
      drawn: what was drawn for it, a line for the crop and for each operation that happened.
    """

    image: np.ndarray
    drawn: list[str]


def sample_views(views: Views, image: np.ndarray, index: int, epochs: int) -> list[SampledView]:
    """Makes the views that training sees of one image in its first `epochs` epochs.

    Args:
      views: how a run makes its views.
      image: uint8 [H, W, C].
      index: the image's place in the training split, which decides the numbers drawn.
      epochs: how many.

    Returns:
      both views of each epoch.
    """
    settings = views.settings
    found = []
    for epoch in range(epochs):
        made, draws = _made(views, image, epoch, index)
        for one, numbers in zip(made, draws, strict=True):
            found.append(SampledView(one, settings.distortion.describe(image.shape, numbers)))
    return found


def _made(views: Views, image: np.ndarray, epoch: int, index: int) -> tuple:
    """Returns views uint8 [V, S, S, 3] and the numbers drawn for them, float32 [V, draws]."""
    settings = views.settings
    seed, size, distortion = settings.order.seed, settings.size, settings.distortion
    if isinstance(views, Resident):
        draws = device.draw(seed, epoch, index, distortion)
        crops = jax.numpy.stack([device.crop(image, one, size, distortion) for one in draws])
        return _distorted(crops, draws, distortion), np.asarray(draws)
    return _on_the_host(image, epoch, index, settings, crops_only=isinstance(views, HostCrops))


def _on_the_host(
    image: np.ndarray, epoch: int, index: int, settings: ViewSettings, crops_only: bool
) -> tuple:
    # Imported here: this needs TensorFlow, which takes 10 s to import.
    import tensorflow as tf

    from simclr_jax.views import host

    size, distortion = settings.size, settings.distortion
    seed, epoch, index = (tf.constant(n, tf.int64) for n in (settings.order.seed, epoch, index))
    draws = host.draw(seed, epoch, index, distortion)
    if not crops_only:
        return host.make_views(tf.constant(image), draws, size, distortion).numpy(), draws.numpy()
    crops = host.make_crops(tf.constant(image), draws, size, distortion).numpy()
    return _distorted(crops, draws.numpy(), distortion), draws.numpy()


def _distorted(crops, draws, distortion: Distortion) -> np.ndarray:
    views = np.asarray(device.distort(crops, draws, distortion))
    return np.round(255 * np.clip(views, 0, 1)).astype(np.uint8)
