"""Views made on the host: TensorFlow operations on one image, for tf.data.

The numbers drawn for a view are keyed by (run seed, epoch, image index, operation), so they depend
neither on threads nor on the batch. An operation that was not drawn for a view is skipped. XLA compiles work
that is done pixel by pixel, and fuses it into one pass for each operation.

Measured at 224 px on one core, for one view: crop and resize 0.4 ms; jitter, grey and flip 0.3 ms
compiled, 1.0 ms as TensorFlow's operations; blur 0.2 to 0.3 ms, 0.85 ms as two products with a
banded matrix and 3.5 ms as a depthwise convolution.
"""

import itertools

import tensorflow as tf

from simclr_jax.views.crop import EvaluationView, resize_matrix
from simclr_jax.views.distortion import Distortion, key_of

# Pixels: for images up to this size, calling one operation after the other takes longer than what
# they compute. Both views are then made by one compiled program, of a whole batch if it is at hand.
SMALL = 64

# Quiet: views that are looked at are of images of many sizes, and each size is a program of its own.
tf.get_logger().setLevel("ERROR")

_PHILOX = 1  # tf.random.Algorithm.PHILOX


def _compiled(function):
    """Compiles a function of tensors of static shapes, and of hashable Python values."""
    return tf.function(function, jit_compile=True, autograph=False)


def draw(seed, epoch, index, distortion: Distortion):
    """Draws the numbers in [0, 1) that decide the views of an image.

    Args:
      seed, epoch, index: int64 scalars under 2^31.
      distortion: says how many numbers each of its steps needs.

    Returns:
      float32 [views, distortion.draws]. Each step's are a function of (seed, epoch, index, its name).
    """
    words = tf.stack([seed * 2**32 + epoch, index])
    return distortion.draws_of_views(tf, _uniform(words, tuple(distortion.sizes.items())))


@_compiled  # always: the compiled generator's numbers are others than the plain one's
def _uniform(words, sizes: tuple):
    """Draws numbers float32 [2, size] for each (name, size), keyed by the name and two words, int64.

    Philox takes a 64-bit key and a 128-bit counter, whose lower half counts the numbers; every
    (words, name) has a key and upper half of its own. No `seed` of TensorFlow's stateless operations:
    some of them, when compiled, take no notice of a word's upper 32 bits.
    """
    key, index = tf.unstack(words)
    numbers = []
    for name, size in sizes:
        counter = tf.stack([tf.zeros_like(index), index * 2**32 + key_of(name)])
        numbers.append(
            tf.raw_ops.StatelessRandomUniformV2(
                shape=[2, size],
                key=tf.cast([key], tf.uint64),
                counter=tf.cast(counter, tf.uint64),
                alg=_PHILOX,
            )
        )
    return tf.concat(numbers, axis=1)


def make_views(image, draws, size: int, distortion: Distortion):
    """Makes the views of one image.

    Args:
      image: uint8 [H, W, C], C 1 or 3.
      draws: float32 [views, distortion.draws] in [0, 1).
      size: height and width of a view, pixels.
      distortion: how strongly the views differ.

    Returns:
      uint8 [views, size, size, 3].
    """
    if _is_small(image):
        return _small_views(image, draws, size, distortion)
    return tf.stack([_view(image, of_view, size, distortion) for of_view in tf.unstack(draws)])


def make_crops(image, draws, size: int, distortion: Distortion):
    """Makes the crops of the views, uint8 [views, size, size, C]: the rest is left to the device.

    The arguments are those of `make_views`.
    """
    if _is_small(image):
        return _small_crops(image, draws, size, distortion)
    crops = [_crop(image, of_view, size, distortion) for of_view in tf.unstack(draws)]
    return tf.stack([_rounded(tf.clip_by_value(crop, 0.0, 255.0)) for crop in crops])


@_compiled
def of_each(images, seed, epochs, indices, make, size: int, distortion: Distortion):
    """Applies `make`, which is make_views or make_crops, to each of a batch of small images.

    Args:
      images: uint8 [n, H, W, C].
      seed: the run's seed.
      epochs, indices: int64 [n].
      make, size, distortion: see `make_views`.

    Returns:
      [n, views, size, size, ...], and the numbers drawn, float32 [n, views, distortion.draws].
    """

    def of_one(entry):
        image, epoch, index = entry
        draws = draw(seed, epoch, index, distortion)
        return make(image, draws, size, distortion), draws

    return tf.map_fn(of_one, (images, epochs, indices), fn_output_signature=(tf.uint8, tf.float32))


def _is_small(image) -> bool:
    return None not in image.shape[:2] and max(image.shape[:2]) <= SMALL


def _view(image, draws, size: int, distortion: Distortion):
    """Makes one view uint8 [size, size, 3] of image uint8 [H, W, C]."""
    chain = distortion.chain
    fused = len(list(itertools.takewhile(lambda operation: operation.FUSED, chain)))
    x = _begun(_crop(image, draws, size, distortion), draws, distortion, fused)
    for place in range(fused, len(chain)):
        if chain[place].FUSED:
            x = _continued(x, draws, distortion, place)
        else:
            x = chain[place].host(x, distortion.numbers_of(chain[place], draws))
    return _to_uint8(x)


@_compiled
def _begun(crop, draws, distortion: Distortion, count: int):
    """Applies the first `count` operations to a crop [S, S, C] up to 255: [C, S, S] in [0, 1]."""
    x = tf.clip_by_value(tf.transpose(crop, [2, 0, 1]) / 255.0, 0.0, 1.0)
    for operation in distortion.chain[:count]:
        x = operation.host(x, distortion.numbers_of(operation, draws))
    return x


@_compiled
def _continued(x, draws, distortion: Distortion, place: int):
    operation = distortion.chain[place]
    return operation.host(x, distortion.numbers_of(operation, draws))


def _crop(image, draws, size: int, distortion: Distortion):
    """Crops a view, float32 [size, size, C] from 0 to 255; bicubic interpolation may overshoot these a little."""
    top, left, height, width = tf.unstack(_window(tf.shape(image), draws, distortion))
    window = image[top : top + height, left : left + width]
    return _resized(window, size, distortion.crop.antialias)


def crop_window(shape, draws, distortion: Distortion):
    """Computes (top, left, height, width), floats, of the crop of an image of this shape."""
    full = tf.cast(shape, tf.float32)
    numbers = distortion.numbers_of(distortion.crop, draws)
    return distortion.crop.window(tf, full[0], full[1], numbers)


@_compiled
def _window(shape, draws, distortion: Distortion):
    return tf.cast(tf.stack(crop_window(shape, draws, distortion)), tf.int32)


def _resized(image, size: int, antialias: bool):
    x = tf.image.resize(image[tf.newaxis], [size, size], "bicubic", antialias=antialias)[0]
    return tf.ensure_shape(x, [size, size, image.shape[-1]])


def resize(image, size: int, antialias: bool = False):
    """Resizes uint8 [H, W, C] to float32 [size, size, C] in [0, 1], bicubic; `antialias`: see `Crop`."""
    return tf.clip_by_value(_resized(image, size, antialias) / 255.0, 0.0, 1.0)


@_compiled
def _small_views(image, draws, size: int, distortion: Distortion):
    views = []
    for of_view in tf.unstack(draws):
        crop = _small_crop(image, of_view, size, distortion)
        x = tf.clip_by_value(crop / 255.0, 0.0, 1.0)
        for operation in distortion.chain:
            x = operation.host_small(x, distortion.numbers_of(operation, of_view))
        views.append(_interleaved(x))
    return tf.stack(views)


@_compiled
def _small_crops(image, draws, size: int, distortion: Distortion):
    crops = tf.stack(
        [_small_crop(image, of_view, size, distortion) for of_view in tf.unstack(draws)]
    )
    return _rounded(tf.transpose(tf.clip_by_value(crops, 0.0, 255.0), [0, 2, 3, 1]))


def _small_crop(image, draws, size: int, distortion: Distortion):
    """Crops like `_crop`, to [C, size, size], by two matrix products: XLA cannot slice a window of random size."""
    top, left, height, width = crop_window(image.shape, draws, distortion)
    antialias = distortion.crop.antialias
    rows = resize_matrix(tf, top, height, image.shape[0], size, antialias)
    columns = resize_matrix(tf, left, width, image.shape[1], size, antialias)
    height, width, channels = image.shape
    x = rows @ tf.reshape(tf.cast(image, tf.float32), [height, width * channels])
    x = tf.transpose(tf.reshape(x, [size, width, channels]), [2, 0, 1])
    x = tf.reshape(x, [channels * size, width]) @ tf.transpose(columns)
    return tf.reshape(x, [channels, size, size])


def _interleaved(x):
    """Turns [C, S, S] in [0, 1] into uint8 [S, S, 3]; one channel becomes three."""
    return three_channels(_rounded(tf.transpose(x, [1, 2, 0]) * 255.0))


_to_uint8 = _compiled(_interleaved)


def _rounded(x):
    return tf.cast(tf.round(x), tf.uint8)


def three_channels(x):
    """Turns [..., 1 or 3] into [..., 3]."""
    return tf.repeat(x, 3, axis=-1) if x.shape[-1] == 1 else x


def center_crop(image, view: EvaluationView):
    """Makes the evaluation view, uint8 [size, size, 3], of an image uint8 [H, W, 1 or 3]."""
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    short = tf.cast(tf.minimum(height, width), tf.float64)  # as in `crop.center_square`
    side = tf.maximum(1, tf.cast(tf.round(view.proportion * short), tf.int32))
    top, left = (height - side + 1) // 2, (width - side + 1) // 2
    x = resize(image[top : top + side, left : left + side], view.size, view.antialias)
    return three_channels(_rounded(x * 255.0))
