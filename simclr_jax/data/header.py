"""How large an image says it is, before it is decoded: a few kB may stand for gigabytes."""

import tensorflow as tf

# The largest photographs of telephones have 200 million pixels; this is 0.8 GB once decoded.
MOST_PIXELS = 2**28


def checked(data):
    """The encoded image `data`, a scalar string, if it says that it has at most MOST_PIXELS.

    Raises InvalidArgumentError where the graph is run, if it has more.
    """
    size, most = pixels(data), tf.constant(MOST_PIXELS, tf.int64)
    message = f"the image has more than {MOST_PIXELS} pixels"
    with tf.control_dependencies([tf.debugging.assert_less_equal(size, most, message)]):
        return tf.identity(data)


def pixels(data):
    """Width x height, int64, as the header of a JPEG, PNG, GIF, BMP or WebP file says; 0 for what
    is none of them, and for headers that are cut off.
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
