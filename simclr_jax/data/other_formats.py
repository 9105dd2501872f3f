"""Images that TensorFlow does not decode, by Pillow: TIFF, BMP, GIF, AVIF, JPEG 2000, PNM.

BMP is among them because TensorFlow reads neither its palettes nor, into three channels, its alpha;
GIF because it makes transparent pixels black, and decodes all frames for the first.
"""

import io
import warnings
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

from simclr_jax.data.header import MOST_PIXELS
from simclr_jax.data.transparency import pixels

Image.MAX_IMAGE_PIXELS = None  # judged here, by the same limit as the others

# The first two bytes of a JPEG, PNG or RIFF (WebP) file. JPEG 2000 shares the first of JPEG.
_TENSORFLOWS = (b"\xff\xd8", b"\x89P", b"RI")


def is_other(data):
    """Whether the encoded image `data`, a scalar string, is none that TensorFlow decodes."""
    first = tf.strings.substr(data, 0, 2)
    return tf.reduce_all([tf.not_equal(first, some) for some in _TENSORFLOWS])


def decode(data):
    """`data` to uint8 [H, W, 3], where the graph is run. Raises InvalidArgumentError there."""
    image = tf.numpy_function(_decode, [data], tf.uint8)
    image = tf.ensure_shape(image, [None, None, 3])
    enough = tf.debugging.assert_positive(
        tf.size(image),
        f"not an image that can be read, or one of more than {MOST_PIXELS} pixels or 16 bits a channel",
    )
    with tf.control_dependencies([enough]):
        return tf.identity(image)


def _decode(data: Any) -> np.ndarray:
    content = bytes(
        data.item() if isinstance(data, np.ndarray) else data
    )  # an array if run eagerly
    nothing = np.zeros((0, 0, 3), np.uint8)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MOST_PIXELS:
                    return nothing
                return pixels(image)
    # Whatever a damaged file may lead to: the graph says that it cannot be read.
    except Exception:
        return nothing
