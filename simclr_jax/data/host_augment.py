"""The views of SimCLR as tf.data operations on one image (paper, appendix A).

All chance is drawn at once, as numbers in [0, 1); what follows is a pure function of them. The
numbers are keyed by (run seed, epoch, image index), one row for each view: they depend neither on
threads nor on the batch.
"""

import dataclasses
import functools

import tensorflow as tf

CROP_ATTEMPTS = 10  # then the largest centred crop of an allowed aspect ratio is taken

# How many numbers in [0, 1) each decision takes, in order.
_DRAWS = {
    "crop": 2 * CROP_ATTEMPTS,
    "position": 2,
    "flip": 1,
    "jitter": 1,
    "factors": 4,
    "order": 4,
    "grey": 1,
    "blur": 1,
    "sigma": 1,
}

BLUR_SIGMA = (0.1, 2.0)  # pixels; paper, appendix A
GREY_WEIGHTS = (0.2989, 0.5870, 0.1140)  # ITU-R BT.601 luma, as tf.image.rgb_to_grayscale


@dataclasses.dataclass(frozen=True)
class Distortion:
    """How strongly views differ. The defaults are the paper's for ImageNet (appendix A).

    Attributes:
      crop_area: range of the crop's share of the image's area, uniform.
      crop_aspect: range of the crop's width / height, log-uniform.
      flip: mirror left-right with probability 0.5.
      color_strength: s; brightness, contrast and saturation vary by 0.8 s, hue by 0.2 s of a turn.
      jitter_probability: of the colour jitter as a whole.
      grey_probability: of dropping colour.
      brightness: "additive" (the paper's code) or "multiplicative" (the later code).
      blur_probability: of a Gaussian blur with sigma uniform in [0.1, 2] px, drawn per image.
    """

    crop_area: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = True
    color_strength: float = 1.0
    jitter_probability: float = 0.8
    grey_probability: float = 0.2
    brightness: str = "additive"
    blur_probability: float = 0.5


def two_views(image, seed, epoch, index, size: int, distortion: Distortion):
    """Two independent views of one image.

    Args:
      image: uint8 [H, W, C], C 1 or 3.
      seed, epoch, index: int64 scalars that together key all randomness; seed and epoch under 2^31.
      size: height and width of a view, pixels.
      distortion: how strongly the views differ.

    Returns:
      uint8 [2, size, size, 3].
    """
    # The stateless generators scramble their two 64-bit seed words, so neighbouring seeds are
    # independent; seed and epoch share a word, which keeps every triple distinct.
    key = tf.stack([seed * 2**32 + epoch, index])
    draws = tf.random.stateless_uniform([2, sum(_DRAWS.values())], seed=key)
    return tf.stack([view(image, draws[v], size, distortion) for v in range(2)])


def view(image, draws, size: int, distortion: Distortion):
    """One view uint8 [size, size, 3] of image uint8 [H, W, C] from draws [35] in [0, 1)."""
    u = dict(zip(_DRAWS, tf.split(draws, list(_DRAWS.values())), strict=True))
    top, left, height, width = crop_window(
        tf.shape(image), u["crop"], u["position"], distortion.crop_area, distortion.crop_aspect
    )
    x = resize(image[top : top + height, left : left + width], size)
    if distortion.flip:
        x = _maybe(u["flip"][0] < 0.5, tf.image.flip_left_right, x)
    if distortion.color_strength > 0:
        x = _maybe(
            u["jitter"][0] < distortion.jitter_probability,
            lambda x: color_jitter(
                x, u["factors"], u["order"], distortion.color_strength, distortion.brightness
            ),
            x,
        )
    if distortion.grey_probability > 0 and x.shape[-1] == 3:
        x = _maybe(u["grey"][0] < distortion.grey_probability, grey, x)
    if distortion.blur_probability > 0:
        low, high = BLUR_SIGMA
        x = _maybe(
            u["blur"][0] < distortion.blur_probability,
            lambda x: blur(x, low + (high - low) * u["sigma"][0]),
            x,
        )
    return to_uint8(x)


def _maybe(condition, function, x):
    """function(x) where the condition was drawn; what was not drawn is not computed."""
    return tf.cond(condition, lambda: function(x), lambda: x)


def crop_window(shape, attempts, position, area, aspect):
    """The Inception crop: (top, left, height, width), int32 pixels.

    Of `attempts` [2 * n] in [0, 1), pairs of (area, aspect ratio), the first that fits into the
    image is taken; if none does, the centred crop of the nearest allowed aspect ratio.
    `position` [2] in [0, 1) places it.
    """
    full_height = tf.cast(shape[0], tf.float32)
    full_width = tf.cast(shape[1], tf.float32)
    attempts = tf.reshape(attempts, [-1, 2])
    areas = (area[0] + (area[1] - area[0]) * attempts[:, 0]) * full_height * full_width
    log_low, log_high = tf.math.log(float(aspect[0])), tf.math.log(float(aspect[1]))
    ratios = tf.exp(log_low + (log_high - log_low) * attempts[:, 1])
    widths, heights = tf.round(tf.sqrt(areas * ratios)), tf.round(tf.sqrt(areas / ratios))
    fits = (widths >= 1) & (heights >= 1) & (widths <= full_width) & (heights <= full_height)
    first = tf.argmax(fits)  # the first True, or 0

    ratio = tf.clip_by_value(full_width / full_height, aspect[0], aspect[1])
    whole_width = tf.maximum(1.0, tf.minimum(full_width, tf.round(full_height * ratio)))
    whole_height = tf.maximum(1.0, tf.minimum(full_height, tf.round(full_width / ratio)))
    any_fits = tf.reduce_any(fits)
    height = tf.where(any_fits, heights[first], whole_height)
    width = tf.where(any_fits, widths[first], whole_width)
    position = tf.where(any_fits, position, 0.5)
    top = tf.floor(position[0] * (full_height - height + 1))
    left = tf.floor(position[1] * (full_width - width + 1))
    return tuple(tf.cast(v, tf.int32) for v in (top, left, height, width))


def resize(image, size: int):
    """uint8 [H, W, C] to float32 [size, size, C] in [0, 1], bicubic, not antialiased: the
    published code's `tf.image.resize`.
    """
    resized = tf.image.resize(image[tf.newaxis], [size, size], tf.image.ResizeMethod.BICUBIC)[0]
    resized = tf.ensure_shape(resized, [size, size, image.shape[-1]])
    return tf.clip_by_value(resized / 255.0, 0.0, 1.0)


def color_jitter(x, factors, order, strength: float, brightness: str):
    """Brightness, contrast, saturation and hue of x [H, W, C] in the order that `order` [4] sorts,
    clipped to [0, 1] after each; `factors` [4] in [0, 1) says how much of each.

    On one channel, saturation and hue are the identity, and are left out.
    """

    def factor(i, spread):
        low = max(0.0, 1.0 - spread)
        return low + (1.0 + spread - low) * factors[i]

    def change_brightness(x):
        if brightness == "additive":
            return x + 0.8 * strength * (2.0 * factors[0] - 1.0)
        return x * factor(0, 0.8 * strength)

    def change_contrast(x):
        mean = tf.reduce_mean(x, axis=(0, 1))
        return (x - mean) * factor(1, 0.8 * strength) + mean

    def change_saturation(x):
        return tf.image.adjust_saturation(x, factor(2, 0.8 * strength))

    def change_hue(x):
        return tf.image.adjust_hue(x, 0.2 * strength * (2.0 * factors[3] - 1.0))

    operations = [change_brightness, change_contrast]
    if x.shape[-1] == 3:
        operations += [change_saturation, change_hue]
    turns = tf.argsort(order[: len(operations)])
    for turn in range(len(operations)):
        branches = [functools.partial(operation, x) for operation in operations]
        x = tf.clip_by_value(tf.switch_case(turns[turn], branches), 0.0, 1.0)
    return x


def grey(x):
    """x [H, W, 3] as its luma, in three equal channels."""
    luma = tf.tensordot(x, tf.constant(GREY_WEIGHTS), 1)
    return tf.repeat(luma[..., tf.newaxis], 3, axis=-1)


def blur(x, sigma):
    """Gaussian blur of x [S, S, C], sigma in pixels, over S / 10 pixels; outside the image is 0.

    A separable filter as two products with a banded matrix: on a CPU this is 4 times as fast as
    a depthwise convolution (224 px, one core).
    """
    size, _, channels = x.shape
    radius = size // 10 // 2
    offsets = tf.range(-radius, radius + 1, dtype=tf.float32)
    weights = tf.exp(-tf.square(offsets) / (2.0 * tf.square(sigma)))
    weights /= tf.reduce_sum(weights)
    distance = tf.range(size)[:, tf.newaxis] - tf.range(size)[tf.newaxis]
    band = tf.where(
        tf.abs(distance) <= radius,
        tf.gather(weights, tf.clip_by_value(distance + radius, 0, 2 * radius)),
        0.0,
    )
    rows = tf.reshape(band @ tf.reshape(x, [size, size * channels]), [size, size, channels])
    return tf.einsum("vw,hwc->hvc", band, rows)


def center_crop(image, size: int, proportion: float):
    """The evaluation view, uint8 [size, size, 3]: the largest centred square, of which the middle
    `proportion` of each side is kept and resized.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    short = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.maximum(1, tf.cast(tf.round(proportion * short), tf.int32))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    return to_uint8(resize(image[top : top + side, left : left + side], size))


def to_uint8(x):
    """float [H, W, C] in [0, 1] to uint8 [H, W, 3]; one channel becomes three."""
    x = tf.cast(tf.round(x * 255.0), tf.uint8)
    return tf.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x
