"""How the encoded images of a source become pixels, in the tf.data graph and outside of it.

TensorFlow is imported where it is used.
"""

from typing import Any

import numpy as np

from simclr_jax.data import pixels


class Decoding:
    """How the encoded images of a source become pixels. A source with a format of its own overrides `decode`.

    Attributes:
      sample_bits: see `pixels.read`.
    """

    sample_bits: int = 0

    def decode(self, image: Any, upright: bool = True) -> Any:
        """Decodes an encoded image to uint8 [H, W, C], in the tf.data graph.

        `upright`: turn it as the orientation in its EXIF data says.
        """
        from simclr_jax.data.decode import decode

        return decode(image, upright, self.sample_bits)

    def pixels(self, image: bytes, upright: bool = True) -> np.ndarray:
        """Decodes an encoded image as `decode` does, outside of a graph. Raises a ValueError if it cannot."""
        if type(self).decode is Decoding.decode:
            return pixels.read(image, upright, self.sample_bits)
        import tensorflow as tf

        from simclr_jax.data.decode import reason_of

        try:
            return self.decode(tf.constant(image), upright).numpy()
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

    def decode(self, image: Any, upright: bool = True) -> Any:
        return self.origin.decode(image, upright)

    def pixels(self, image: bytes, upright: bool = True) -> np.ndarray:
        return self.origin.pixels(image, upright)

    def problem(self, image: bytes) -> str | None:
        return self.origin.problem(image)
