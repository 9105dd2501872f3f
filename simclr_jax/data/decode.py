"""From the content of an image file to pixels, in the tf.data graph.

TensorFlow decodes JPEG, except CMYK, without a lock between threads. `pixels.py` decodes everything else: TensorFlow
reads only some kinds of PNG, GIF, BMP and WebP, and shows the colours that transparent pixels hide.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from simclr_jax.data import pixels
from simclr_jax.data.pixels import ReadOptions

# EXIF data come first in a JPEG (EXIF 2.32, section 4.5.5); some programs write segments of their own
# before them. To search all 64 kB that a segment may have would take a tenth of the time of decoding.
_EXIF_WITHIN = 2**13


def decode(data: Any, options: ReadOptions = ReadOptions()) -> Any:
    """Decodes the content of an image file, in the tf.data graph.

    Args:
      data: a scalar string. Of several frames the first is taken.
      options: how to read it.

    Returns:
      uint8 [H, W, 3]. Grey becomes three equal channels.

    Raises:
      tf.errors.InvalidArgumentError: where the graph is run, if it is no image that can be read or has
        more than `pixels.MOST_PIXELS` pixels; `problem_of` says why.
    """
    return _graph(options)(data)


def _any_format(data, options):
    image = tf.cond(
        tf.equal(tf.strings.substr(data, 0, 2), b"\xff\xd8"),
        lambda: _jpeg(data, options),
        lambda: _by_pillow(data, options),
    )
    return tf.ensure_shape(image, [None, None, 3])


@functools.cache  # a graph takes a second to trace: once for all pipelines
def _graph(options: ReadOptions) -> Callable:
    def traced(data):
        return _any_format(data, options)

    return tf.function(traced, [tf.TensorSpec([], tf.string)], autograph=False)


def problem_of(data: bytes) -> str | None:
    """Returns why `decode` cannot decode the content of an image file, or None if it can."""
    options = ReadOptions(sample_bits=16)  # with which `pixels` says nothing of scales
    try:
        decode(tf.constant(data), options)
        return None
    except tf.errors.OpError as error:
        problem = reason_of(error)
    try:
        pixels.read(data, options)
    except ValueError as error:
        return str(error)
    return problem  # a JPEG that Pillow reads


def reason_of(error: Any) -> str:
    """Returns the message of a TensorFlow error without the name of the graph's node."""
    text = " ".join(str(error.message).split())
    return text.rpartition("}} ")[2].partition(" [Op:")[0].partition(" Condition x ")[0]


def _jpeg(data, options):
    shape = tf.io.extract_jpeg_shape(data)
    return tf.cond(
        tf.equal(shape[2], 4),  # CMYK, which Pillow inverts whatever program wrote it
        lambda: _by_pillow(data, options),
        lambda: _by_tensorflow(data, shape, options.upright),
    )


def _by_tensorflow(data, shape, upright):
    """Decodes a JPEG of `shape` [3], as its header says: height, width, channels."""
    size = tf.reduce_prod(tf.cast(shape[:2], tf.int64))
    most = tf.constant(pixels.MOST_PIXELS, tf.int64)
    message = f"the image has more than {pixels.MOST_PIXELS} pixels"
    with tf.control_dependencies([tf.debugging.assert_less_equal(size, most, message)]):
        # TensorFlow's own choice is 9 % faster, and off by one grey level in the mean: here the pixels
        # are Pillow's.
        image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    if not upright:
        return image
    head = tf.strings.substr(data, 0, _EXIF_WITHIN)
    # \C is any byte, also of what is no UTF-8.
    has_exif = tf.strings.regex_full_match(head, r"(?s)\C*Exif\x00\x00\C*")
    return tf.cond(has_exif, lambda: _upright(image, data), lambda: image)


def _upright(image, data):
    """Turns pixels [H, W, 3] as the EXIF orientation of the file's content `data` says."""
    orientation = tf.numpy_function(
        lambda content: np.int64(pixels.orientation_of(_bytes(content))), [data], tf.int64
    )
    return tf.cond(
        tf.equal(orientation, 1),
        lambda: image,
        lambda: tf.ensure_shape(
            tf.numpy_function(pixels.turned, [image, orientation], tf.uint8), [None, None, 3]
        ),
    )


def _by_pillow(data, options):
    """Decodes `data` to uint8 [H, W, 3] where the graph is run. Raises InvalidArgumentError there."""

    def read(content):
        try:
            return pixels.read(_bytes(content), options)
        except ValueError:
            return np.zeros((0, 0, 3), np.uint8)

    image = tf.ensure_shape(tf.numpy_function(read, [data], tf.uint8), [None, None, 3])
    there = tf.debugging.assert_positive(tf.size(image), "not an image that can be read")
    with tf.control_dependencies([there]):
        return tf.identity(image)


def _bytes(content) -> bytes:
    """The content of a string tensor as `tf.numpy_function` hands it over: an array if run eagerly."""
    return bytes(content.item() if isinstance(content, np.ndarray) else content)
