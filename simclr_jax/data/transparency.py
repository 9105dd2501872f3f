"""Transparent images, as a person sees them on a white page.

What lies below transparent pixels is not meant to be seen: often black, often colours smeared over the
edge of the picture. Dropping the alpha channel would show it.
"""

from typing import Any

import numpy as np
from PIL import Image


def on_white(image: Image.Image) -> Image.Image:
    """A picture in Pillow's mode RGB, of one in any mode."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def decode_on_white(data: Any):
    """An encoded JPEG, PNG or WebP image, a scalar string, to uint8 [H, W, 3], in the tf.data graph.
    Grey becomes three equal channels; of several frames the first is taken.
    """
    import tensorflow as tf

    def plain():
        return tf.io.decode_image(data, channels=3, expand_animations=False)

    def transparent():
        image = tf.ensure_shape(
            tf.io.decode_image(data, channels=4, expand_animations=False), [None, None, 4]
        )
        x = tf.cast(image, tf.int32)
        alpha = x[..., 3:]
        return tf.cast((x[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)

    def byte(position):
        return tf.strings.substr(data, position, 1)

    def is_one_of(value, some: bytes):
        return tf.reduce_any([tf.equal(value, some[i : i + 1]) for i in range(len(some))])

    long_enough = tf.strings.length(data) > 25

    def png_may_be():
        # The colour type: palette, grey with alpha, colour with alpha; or one transparent colour, in
        # a chunk before the pixels. \C is any byte, also of what is no UTF-8.
        head = tf.strings.substr(data, 0, 4096)
        one_colour = tf.strings.regex_full_match(head, r"(?s)\C*tRNS\C*")
        return is_one_of(byte(25), b"\x03\x04\x06") | one_colour

    def webp_may_be():
        return is_one_of(byte(0), b"R") & is_one_of(byte(15), b"XL")  # extended, lossless

    may_be = tf.cond(
        long_enough,
        lambda: tf.cond(is_one_of(byte(0), b"\x89"), png_may_be, webp_may_be),
        lambda: False,
    )
    return tf.cond(may_be, transparent, plain)


def pixels(image: Image.Image) -> np.ndarray:
    """uint8 [H, W, 3] of a picture. Raises a ValueError if a channel has more than 16 bits, whose range
    nobody can know.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}): expected 8 or 16")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        grey = (np.asarray(image) // 256).astype(np.uint8)
        return np.repeat(grey[..., np.newaxis], 3, axis=-1)
    return np.asarray(on_white(image))
