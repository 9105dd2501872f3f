"""Makes views of an image to be looked at, as training makes them, and says what was drawn for each."""

from typing import NamedTuple

import numpy as np

from simclr_jax.views.placement import Views


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
    distortion, found = views.settings.distortion, []
    for epoch in range(epochs):
        made, draws = views.sample(image, epoch, index)
        for one, numbers in zip(made, draws, strict=True):
            found.append(SampledView(one, distortion.describe(image.shape, numbers)))
    return found
