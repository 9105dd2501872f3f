"""The views of SimCLR on the host: tf.data operations on one image.

The numbers drawn for a view are keyed by (run seed, epoch, image index), so they depend neither on
threads nor on the batch. What is drawn is computed and what is not is skipped. Pixel by pixel work
is compiled by XLA, which fuses it into one pass an operation.

Measured at 224 px on one core, for one view: crop and resize 0.4 ms; jitter, grey and flip 0.3 ms
compiled, 1.0 ms as TensorFlow's operations; blur 0.2 to 0.3 ms, 0.85 ms as two products with a
banded matrix and 3.5 ms as a depthwise convolution.
"""

import functools

import tensorflow as tf

from simclr_jax.data import distortion as d
from simclr_jax.data.distortion import Distortion

# Pixels: for images up to this size, calling one operation after the other takes longer than what
# they compute. Both views are then made by one compiled program, of a whole batch if it is at hand.
SMALL = 64


def _compiled(function):
    """Compiles a function of tensors of static shapes, and of hashable Python values."""
    return tf.function(function, jit_compile=True, autograph=False)


def draw(seed, epoch, index):
    """The numbers in [0, 1) that decide both views of an image: float32 [2, DRAWS_OF_A_VIEW].

    `seed`, `epoch` and `index` are int64 scalars; seed and epoch lie under 2^31.
    """
    # The stateless generators scramble their two 64-bit seed words, so neighbouring seeds are
    # independent; seed and epoch share a word, which keeps every triple distinct.
    return _uniform(tf.stack([seed * 2**32 + epoch, index]))


@_compiled  # always: the compiled generator's numbers are others than the plain one's
def _uniform(key):
    return tf.random.stateless_uniform([2, d.DRAWS_OF_A_VIEW], seed=key, alg="philox")


def two_views(image, draws, size: int, distortion: Distortion):
    """Two views of one image.

    Args:
      image: uint8 [H, W, C], C 1 or 3.
      draws: float32 [2, DRAWS_OF_A_VIEW] in [0, 1).
      size: height and width of a view, pixels.
      distortion: how strongly the views differ, and how many of the two are made.

    Returns:
      uint8 [views, size, size, 3].
    """
    if _is_small(image):
        return _small_views(image, draws, size, distortion)
    return tf.stack([_view(image, draws[v], size, distortion) for v in range(distortion.views)])


def two_crops(image, draws, size: int, distortion: Distortion):
    """The crops of both views, uint8 [2, size, size, C]: what is left to do, the device can."""
    if _is_small(image):
        return _small_crops(image, draws, size, distortion)
    crops = [_crop(image, draws[v], size, distortion) for v in range(distortion.views)]
    return tf.stack([_rounded(tf.clip_by_value(crop, 0.0, 255.0)) for crop in crops])


@_compiled
def of_each(images, seed, epochs, indices, make, size: int, distortion: Distortion):
    """`make`, which is two_views or two_crops, of each of a batch of small images [n, H, W, C], and
    the draws.

    Returns:
      [n, 2, size, size, ...]; float32 [n, 2, DRAWS_OF_A_VIEW].
    """

    def of_one(entry):
        image, epoch, index = entry
        draws = draw(seed, epoch, index)
        return make(image, draws, size, distortion), draws

    return tf.map_fn(of_one, (images, epochs, indices), fn_output_signature=(tf.uint8, tf.float32))


def _is_small(image) -> bool:
    return None not in image.shape[:2] and max(image.shape[:2]) <= SMALL


def _view(image, draws, size: int, distortion: Distortion):
    """One view uint8 [size, size, 3] of image uint8 [H, W, C]."""
    x = _recolored(_crop(image, draws, size, distortion), draws, distortion)
    if distortion.blur_probability > 0:
        u = d.named(draws)
        x = _maybe(
            u["blur"][0] < distortion.blur_probability,
            lambda x: blur(x, d.blur_sigma(u["sigma"][0])),
            x,
        )
    return _to_uint8(x)


def _crop(image, draws, size: int, distortion: Distortion):
    """The crop of a view, float32 [size, size, C], up to 255, which bicubic interpolation passes."""
    top, left, height, width = tf.unstack(_window(tf.shape(image), draws, distortion))
    return _resized(image[top : top + height, left : left + width], size)


def crop_window(shape, draws, distortion: Distortion):
    """(top, left, height, width) of the crop of an image of this shape, floats."""
    u, full = d.named(draws), tf.cast(shape, tf.float32)
    area, aspect = distortion.crop_area, distortion.crop_aspect
    return d.crop_window(tf, full[0], full[1], u["crop"], u["position"], area, aspect)


@_compiled
def _window(shape, draws, distortion: Distortion):
    return tf.cast(tf.stack(crop_window(shape, draws, distortion)), tf.int32)


def _resized(image, size: int):
    # The published code's tf.image.resize: bicubic, not antialiased.
    x = tf.image.resize(image[tf.newaxis], [size, size], tf.image.ResizeMethod.BICUBIC)[0]
    return tf.ensure_shape(x, [size, size, image.shape[-1]])


def resize(image, size: int):
    """uint8 [H, W, C] to float32 [size, size, C] in [0, 1], bicubic, not antialiased."""
    return tf.clip_by_value(_resized(image, size) / 255.0, 0.0, 1.0)


@_compiled
def _small_views(image, draws, size: int, distortion: Distortion):
    views = []
    for v in range(distortion.views):
        x = _recolor(_small_crop(image, draws[v], size, distortion), draws[v], distortion)
        radius = d.blur_radius(size)
        if distortion.blur_probability > 0 and radius > 0:
            u = d.named(draws[v])
            weights = d.blur_weights(tf, d.blur_sigma(u["sigma"][0]), radius)
            x = _maybe(
                u["blur"][0] < distortion.blur_probability,
                functools.partial(_blur, weights=weights, filter_axis=_filter_axis),
                x,
            )
        views.append(_interleaved(x))
    return tf.stack(views)


@_compiled
def _small_crops(image, draws, size: int, distortion: Distortion):
    crops = tf.stack(
        [_small_crop(image, draws[v], size, distortion) for v in range(distortion.views)]
    )
    return _rounded(tf.transpose(tf.clip_by_value(crops, 0.0, 255.0), [0, 2, 3, 1]))


def _small_crop(image, draws, size: int, distortion: Distortion):
    """`_crop` as two matrix products, [C, size, size]: XLA has no slice whose shape was drawn."""
    top, left, height, width = crop_window(image.shape, draws, distortion)
    rows = d.resize_matrix(tf, top, height, image.shape[0], size)
    columns = d.resize_matrix(tf, left, width, image.shape[1], size)
    height, width, channels = image.shape
    x = rows @ tf.reshape(tf.cast(image, tf.float32), [height, width * channels])
    x = tf.transpose(tf.reshape(x, [size, width, channels]), [2, 0, 1])
    x = tf.reshape(x, [channels * size, width]) @ tf.transpose(columns)
    return tf.reshape(x, [channels, size, size])


def _recolor(crop, draws, distortion: Distortion):
    """What a view is but for its blur, in [0, 1]: [C, size, size] of its crop of that shape."""
    u = d.named(draws)
    x = tf.clip_by_value(crop / 255.0, 0.0, 1.0)
    if distortion.flip:
        x = _maybe(u["flip"][0] < 0.5, lambda x: x[:, :, ::-1], x)
    if distortion.color_strength > 0:
        x = _maybe(
            u["jitter"][0] < distortion.jitter_probability,
            lambda x: color_jitter(
                x, u["factors"], u["order"], distortion.color_strength, distortion.brightness
            ),
            x,
        )
    if distortion.grey_probability > 0 and x.shape[0] == 3:
        x = _maybe(u["grey"][0] < distortion.grey_probability, grey, x)
    return x


@_compiled
def _recolored(crop, draws, distortion: Distortion):
    return _recolor(tf.transpose(crop, [2, 0, 1]), draws, distortion)


def _maybe(condition, function, x):
    """function(x) where the condition was drawn; what was not drawn is not computed."""
    return tf.cond(condition, lambda: function(x), lambda: x)


def color_jitter(x, factors, order, strength: float, brightness: str):
    """Brightness, contrast, saturation and hue of x [C, H, W] in the order that `order` [4] sorts,
    clipped to [0, 1] after each; `factors` [4] in [0, 1) says how much of each.

    On one channel, saturation and hue are the identity, and are left out.
    """
    spread = 0.8 * strength

    def change_brightness(x):
        if brightness == "additive":
            return x + d.turn(factors[0], spread)
        return x * d.factor(factors[0], spread)

    def change_contrast(x):
        mean = tf.reduce_mean(x, axis=(1, 2), keepdims=True)
        return (x - mean) * d.factor(factors[1], spread) + mean

    def change_saturation(x):
        return tf.stack(d.saturate(tf, tf.unstack(x), d.factor(factors[2], spread)))

    def change_hue(x):
        return tf.stack(d.turn_hue(tf, tf.unstack(x), d.turn(factors[3], 0.2 * strength)))

    operations = [change_brightness, change_contrast]
    if x.shape[0] == 3:
        operations += [change_saturation, change_hue]
    turns = tf.argsort(order[: len(operations)])

    def take_turn(place, x):
        branches = [functools.partial(operation, x) for operation in operations]
        return place + 1, tf.clip_by_value(tf.switch_case(turns[place], branches), 0.0, 1.0)

    # A loop, so that each operation is compiled once and not once for each place in the order.
    return tf.while_loop(lambda place, x: place < len(operations), take_turn, (0, x))[1]


def grey(x):
    """x [3, H, W] as its luma, in three equal channels."""
    return tf.stack([d.luma(tf.unstack(x))] * 3)


def blur(x, sigma):
    """Gaussian blur of x [C, S, S], sigma in pixels, over S / 10 pixels; outside the image is 0."""
    radii = d.blur_radii(x.shape[1])

    def with_radius(radius):
        return _blur(x, d.blur_weights(tf, sigma, radius), _filtered_axis)

    enough = [tf.cast(sigma > most, tf.int32) for _, most in radii[:-1]]
    return tf.switch_case(
        tf.add_n(enough) if enough else tf.constant(0),
        [functools.partial(with_radius, radius) for radius, _ in radii],
    )


def _blur(x, weights, filter_axis):
    radius = len(weights) // 2
    if radius == 0:
        return x
    weights = tf.stack(weights)
    # Padded outside of what is compiled: within, each tap would ask whether it is in the padding.
    x = filter_axis(tf.pad(x, [[0, 0], [radius, radius], [0, 0]]), weights, 1)
    return filter_axis(tf.pad(x, [[0, 0], [0, 0], [radius, radius]]), weights, 2)


def _filter_axis(x, weights, axis: int):
    """The sum of x, shifted along an axis by each tap and weighted by it."""
    taps = weights.shape[0]
    length = x.shape[axis] - taps + 1
    shifted = [x[:, i : i + length] if axis == 1 else x[:, :, i : i + length] for i in range(taps)]
    return sum(weights[i] * part for i, part in enumerate(shifted))


_filtered_axis = _compiled(_filter_axis)


def _interleaved(x):
    """[C, S, S] in [0, 1] to uint8 [S, S, 3]; one channel becomes three."""
    return three_channels(_rounded(tf.transpose(x, [1, 2, 0]) * 255.0))


_to_uint8 = _compiled(_interleaved)


def _rounded(x):
    return tf.cast(tf.round(x), tf.uint8)


def three_channels(x):
    """[..., 1 or 3] to [..., 3]."""
    return tf.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x


def center_crop(image, size: int, proportion: float):
    """The evaluation view, uint8 [size, size, 3]: the largest centred square, of which the middle
    `proportion` of each side is kept and resized.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    short = tf.cast(tf.minimum(height, width), tf.float32)
    side = tf.maximum(1, tf.cast(tf.round(proportion * short), tf.int32))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    x = resize(image[top : top + side, left : left + side], size)
    return three_channels(_rounded(x * 255.0))
