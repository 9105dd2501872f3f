"""From the content of an image file to pixels: uint8 [H, W, 3], as a person sees it on a white page.

What lies below transparent pixels is not meant to be seen: often black, often colours smeared over the
edge of the picture. Dropping the alpha channel would show it.

TensorFlow decodes JPEG, PNG and WebP. Pillow decodes the rest: TIFF, AVIF, JPEG 2000, PNM; BMP because
TensorFlow reads neither its palettes nor, into three channels, its alpha; GIF because TensorFlow makes
transparent pixels black, and decodes all frames for the first.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf
from PIL import Image

# The largest photographs of telephones have 200 million pixels; this is 0.8 GB once decoded.
MOST_PIXELS = 2**28

Image.MAX_IMAGE_PIXELS = None  # judged here, by the same limit for every format

# The first two bytes of a JPEG, PNG or RIFF (WebP) file. JPEG 2000 shares the first of JPEG.
_TENSORFLOWS = (b"\xff\xd8", b"\x89P", b"RI")


def decode(data: Any) -> Any:
    """Decodes the content of an image file, in the tf.data graph.

    Args:
      data: a scalar string. Of several frames the first is taken.

    Returns:
      uint8 [H, W, 3]. Grey becomes three equal channels.

    Raises:
      tf.errors.InvalidArgumentError: where the graph is run, if it is no image that can be read, has
        more than MOST_PIXELS pixels or more than 16 bits a channel.
    """
    # A graph takes a second to trace: once for all pipelines.
    return _traced(data)


def _any_format(data):
    data = _checked(data)
    decoded = tf.cond(_is_other(data), lambda: _by_pillow(data), lambda: _by_tensorflow(data))
    return tf.ensure_shape(decoded, [None, None, 3])


_traced = tf.function(_any_format, [tf.TensorSpec([], tf.string)], autograph=False)


def problem_of(data: bytes, how: Callable[[Any], Any] = decode) -> str | None:
    """Returns why the content of an image file cannot be decoded, or None if it can."""
    with contextlib.suppress(tf.errors.OpError):
        how(tf.constant(data))
        return None
    try:  # without a graph, whose error says where in the program before it says what
        (_any_format if how is decode else how)(tf.constant(data))
    except tf.errors.OpError as error:
        return reason_of(error)
    return None


def reason_of(error: Any) -> str:
    """Returns the message of a TensorFlow error without the name of the graph's node."""
    text = " ".join(str(error.message).split())
    return text.rpartition("}} ")[2].partition(" [Op:")[0].partition(" Condition x ")[0]


def pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels of a picture in any mode, uint8 [H, W, 3].

    Raises:
      ValueError: a channel has more than 16 bits, whose range nobody can know.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"32 bits a channel (mode {image.mode}): expected 8 or 16")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255
        grey = (np.asarray(image) // 256).astype(np.uint8)
        return np.repeat(grey[..., np.newaxis], 3, axis=-1)
    return np.asarray(on_white(image))


def on_white(image: Image.Image) -> Image.Image:
    """Converts a picture in any mode to RGB, transparent parts on white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _checked(data):
    """Returns the encoded image `data`, a scalar string, as it is.

    Raises:
      tf.errors.InvalidArgumentError: where the graph is run, if its header says that it has more than
        MOST_PIXELS pixels.
    """
    size, most = _pixels_of_header(data), tf.constant(MOST_PIXELS, tf.int64)
    message = f"the image has more than {MOST_PIXELS} pixels"
    with tf.control_dependencies([tf.debugging.assert_less_equal(size, most, message)]):
        return tf.identity(data)


def _pixels_of_header(data):
    """Reads width x height, int64, from the header of a JPEG, PNG, GIF, BMP or WebP file. Returns 0 for
    other files, and for headers that are cut off.
    """
    head = tf.io.decode_raw(tf.strings.substr(data, 0, 32), tf.uint8)
    head = tf.cast(tf.pad(head, [[0, 32 - tf.size(head)]]), tf.int64)

    def number(start, count, big_endian=False):
        order = range(count - 1, -1, -1) if big_endian else range(count)
        return tf.add_n([head[start + i] * 2 ** (8 * place) for place, i in enumerate(order)])

    def area(width, height):
        return tf.abs(width) * tf.abs(height)

    def jpeg():
        return tf.reduce_prod(tf.cast(tf.io.extract_jpeg_shape(data)[:2], tf.int64))

    def png():
        return area(number(16, 4, big_endian=True), number(20, 4, big_endian=True))

    def gif():
        return area(number(6, 2), number(8, 2))

    def bmp():
        # The height is signed: negative for rows from top to bottom.
        height = tf.cast(tf.cast(number(22, 4), tf.int32), tf.int64)
        return area(number(18, 4), height)

    def webp():
        # RFC 9649: extended, lossless, lossy. Sizes are of 24, 14 and 14 bits.
        lossless = number(21, 4)
        return tf.case(
            [
                (tf.equal(head[15], ord("X")), lambda: area(number(24, 3) + 1, number(27, 3) + 1)),
                (
                    tf.equal(head[15], ord("L")),
                    lambda: area(lossless % 2**14 + 1, lossless // 2**14 % 2**14 + 1),
                ),
            ],
            default=lambda: area(number(26, 2) % 2**14, number(28, 2) % 2**14),
        )

    first = {b"\xff\xd8": jpeg, b"\x89P": png, b"GI": gif, b"BM": bmp, b"RI": webp}
    return tf.case(
        [(tf.equal(head[0], a) & tf.equal(head[1], b), size) for (a, b), size in first.items()],
        default=lambda: tf.zeros([], tf.int64),
    )


def _is_other(data):
    """Whether the encoded image `data`, a scalar string, is none that TensorFlow decodes."""
    first = tf.strings.substr(data, 0, 2)
    return tf.reduce_all([tf.not_equal(first, some) for some in _TENSORFLOWS])


def _by_pillow(data):
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


def _by_tensorflow(data: Any):
    """Decodes a JPEG, PNG or WebP image, a scalar string, to uint8 [H, W, 3], in the tf.data graph.
    Grey becomes three equal channels; of several frames the first is taken.
    """

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
