"""How the encoded images of a source become pixels, in the tf.data graph and outside of it.

TensorFlow is imported where it is used.
"""

from typing import Any

import numpy as np

from simclr_jax.data import pixels
from simclr_jax.data.pixels import ReadOptions


class Decoding:
    """How the encoded images of a source become pixels. A source with a format of its own overrides `decode`."""

    def decode(self, image: Any, options: ReadOptions = ReadOptions()) -> Any:
        """Decodes an encoded image to uint8 [H, W, C], in the tf.data graph."""
        from simclr_jax.data.decode import decode

        return decode(image, options)

    def pixels(self, image: bytes, options: ReadOptions = ReadOptions()) -> np.ndarray:
        """Decodes an encoded image as `decode` does, outside of a graph. Raises a ValueError if it cannot."""
        if type(self).decode is Decoding.decode:
            return pixels.read(image, options)
        import tensorflow as tf

        from simclr_jax.data.decode import reason_of

        try:
            return self.decode(tf.constant(image), options).numpy()
        except tf.errors.OpError as error:
            raise ValueError(reason_of(error)) from error

    def problem(self, image: bytes) -> str | None:
        """Returns why `decode` cannot decode an encoded image, or None if it can."""
        from simclr_jax.data.decode import problem_of

        if type(self).decode is Decoding.decode:
            return problem_of(image)
        try:
            self.pixels(image)
            return None
        except ValueError as error:
            return str(error)


class DecodedAs(Decoding):
    """Images that are decoded as those of the source they come from.

    Attributes:
      origin: that source.
    """

    origin: Decoding

    def decode(self, image: Any, options: ReadOptions = ReadOptions()) -> Any:
        return self.origin.decode(image, options)

    def pixels(self, image: bytes, options: ReadOptions = ReadOptions()) -> np.ndarray:
        return self.origin.pixels(image, options)

    def problem(self, image: bytes) -> str | None:
        return self.origin.problem(image)
