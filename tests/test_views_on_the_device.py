"""Views made on the device against those made on the host: each operation, whole views, and what
is drawn.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import tensorflow as tf

from simclr_jax.views import device, host, make_distortion
from simclr_jax.views.color import ColorJitter
from simclr_jax.views.crop import EvaluationView
from simclr_jax.views.distortion import Distortion

# One distortion, one size and one number of images for all, as each other is compiled anew. What
# does not matter to a test does not happen: its numbers say so.
EVERYTHING = make_distortion(
    {"grey_probability": 0.2, "blur_probability": 0.5, "solarize_probability": 0.3}
)
SIZE, COUNT = 40, 24


def images(channels=3):
    """Smooth colours with noise, like photographs: pure noise has no hue to speak of."""
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0, 255, (COUNT, 5, 5, channels))
    smooth = scipy.ndimage.zoom(coarse, (1, SIZE / 5, SIZE / 5, 1), order=1)
    noise = rng.normal(0, 8, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def drawn(kind=EVERYTHING, only=None, crop=False):
    """Draws for COUNT images, where no operation happens but `only`, and with `crop` the crop."""
    draws = np.random.default_rng(2).random((COUNT, 2, kind.draws), np.float32)
    if not crop:
        attempts = kind.numbers_of(kind.crop, draws)["attempts"]
        attempts[..., 0], attempts[..., 1] = 1.0, 0.5  # all of a square image
    for operation in kind.chain:
        if only not in (operation.NAME, "all"):
            for u in kind.numbers_of(operation, draws).values():
                u[...] = 0.999
    return draws


def host_views(x, draws):
    made = [
        host.make_views(tf.constant(i), u, SIZE, EVERYTHING) for i, u in zip(x, draws, strict=True)
    ]
    return np.stack(made).astype(int)


def host_views_uncompiled(x, draws, kind):
    """Views of crops x, without XLA: the operations alone."""

    def view(x, u):
        x = tf.constant(np.moveaxis(x, -1, 0) / 255, tf.float32)
        for operation in kind.chain:
            x = operation.host(x, kind.numbers_of(operation, u))
        return np.broadcast_to(np.moveaxis(x, 0, -1), (SIZE, SIZE, 3))

    made = [[view(i, u) for u in two] for i, two in zip(x, draws, strict=True)]
    return np.round(255 * np.asarray(made)).astype(int)


distorted = jax.jit(device.distort, static_argnums=2)


@jax.jit
def crops_and_views(x, draws):
    crop = functools.partial(device.crop, size=SIZE, distortion=EVERYTHING)
    crops = jax.vmap(jax.vmap(crop, (None, 0)))(x, draws)
    return crops, device.distort(crops, draws, EVERYTHING)


def device_views(x, draws):
    return integers(crops_and_views(x, draws)[1])


def integers(views):
    return np.round(255 * np.asarray(views)).astype(int)


ORDERS = {"hue first": [0.9, 0.8, 0.7, 0.1], "as listed": [0.1, 0.2, 0.3, 0.4]}
OPERATIONS = [operation.NAME for operation in EVERYTHING.chain]


def assert_equal_to_one_grey_level(one, other):
    assert one.shape == other.shape
    assert np.max(np.abs(one - other)) <= 1
    assert np.mean(one != other) < 0.01  # rounded the other way


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_is_the_hosts_to_one_grey_level(operation):
    x, draws = images(), drawn(only=operation)
    found = device_views(x, draws)
    assert_equal_to_one_grey_level(found, host_views(x, draws))
    assert np.mean(found != x[:, np.newaxis]) > 0.1  # something was done


@pytest.mark.parametrize("operation", OPERATIONS)
def test_each_operation_on_one_channel_is_the_hosts_to_one_grey_level(operation):
    x, draws = images(channels=1), drawn(only=operation)
    two = x[:, np.newaxis].repeat(2, axis=1)
    found = integers(distorted(two, draws, EVERYTHING))
    assert_equal_to_one_grey_level(found, host_views_uncompiled(x, draws, EVERYTHING))


@pytest.mark.parametrize(
    ("jitter", "channels"),
    [
        (ColorJitter(1.0, 1.0, "multiplicative"), 1),
        (ColorJitter(0.5, 0.8), 1),
        (ColorJitter(0.5, 0.8, "multiplicative"), 3),
    ],
)
def test_other_jitter_is_the_hosts_to_one_grey_level(jitter, channels):
    kind = Distortion(EVERYTHING.crop, (jitter,))
    x, draws = images(channels=channels), drawn(kind, only="all")
    found = integers(distorted(x[:, np.newaxis].repeat(2, axis=1), draws, kind))
    assert_equal_to_one_grey_level(found, host_views_uncompiled(x, draws, kind))


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("turned", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_one_part_of_the_jitter_alone(turned, order):
    x, draws = images(), drawn()
    (jitter,) = (o for o in EVERYTHING.chain if o.NAME == "color_jitter")
    numbers = EVERYTHING.numbers_of(jitter, draws)  # views into the array
    numbers["jitter"][...] = 0.0
    numbers["factors"][...] = 0.5  # neutral
    numbers["factors"][..., turned] = 0.8
    numbers["order"][...] = order
    found, expected = device_views(x, draws), host_views(x, draws)
    assert np.max(np.abs(found - expected)) <= 1
    assert np.mean(np.abs(expected - x[:, np.newaxis])) > 1  # something was done


def test_whole_views_are_the_hosts():
    x, draws = images(), drawn(only="all", crop=True)
    difference = np.abs(device_views(x, draws) - host_views(x, draws))
    # The crop is rounded to uint8 in between, which contrast and saturation then multiply.
    assert np.mean(difference) < 0.3
    assert np.mean(difference > 3) < 0.01


def test_a_crop_is_the_hosts():
    x, draws = images(), drawn(crop=True)
    crops, views = crops_and_views(x, draws)
    np.testing.assert_array_equal(crops, integers(views))  # nothing else happens
    assert np.max(np.abs(host_views(x, draws) - np.asarray(crops).astype(int))) <= 1


@pytest.mark.parametrize(
    ("shape", "proportion", "antialias"),
    [((28, 28, 1), 1.0, False), ((30, 41, 3), 0.875, False), ((70, 90, 3), 0.875, True)],
)
def test_evaluation_views_are_the_hosts(shape, proportion, antialias):
    x = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    view = EvaluationView(28, proportion, antialias)
    expected = np.stack([host.center_crop(tf.constant(i), view) for i in x]).astype(int)
    cropped = jax.jit(device.center_crop, static_argnums=1)
    found = np.asarray(cropped(x, view)).astype(int)
    assert np.max(np.abs(expected - found)) <= 1


def test_an_antialiased_crop_is_the_hosts():
    kind = Distortion(dataclasses.replace(EVERYTHING.crop, antialias=True), ())
    x, draws = images()[:4], drawn(kind, crop=True)[:4]
    made = jax.vmap(jax.vmap(functools.partial(device.crop, size=12, distortion=kind), (None, 0)))
    found = np.asarray(made(x, draws)).astype(int)
    small = [host.make_crops(tf.constant(a), d, 12, kind) for a, d in zip(x, draws, strict=True)]
    # Large images take TensorFlow's resize, which rounds the offset of a tap.
    large = [[host._crop(a, view, 12, kind) for view in d] for a, d in zip(x, draws, strict=True)]
    assert np.max(np.abs(found - np.asarray(small).astype(int))) <= 1
    assert np.max(np.abs(found - np.clip(large, 0, 255))) <= 2


MANY = 21 * COUNT


@jax.jit
def draw_many(seed, epochs, indices):
    return jax.vmap(lambda e, i: device.draw(seed, e, i, EVERYTHING))(epochs, indices)


def test_draws_are_a_function_of_seed_epoch_and_index():
    epochs, indices = np.zeros((2, MANY), int)
    epochs[1], indices[2] = 1, 1
    first, epoch, index, again, *_ = draw_many(0, epochs, indices)
    seed, *_ = draw_many(1, epochs, indices)
    np.testing.assert_array_equal(first, again)
    for other in (seed, epoch, index):
        assert np.all(np.abs(first - other) > 0)
    assert np.all(first[0] != first[1])


@pytest.mark.whole
def test_views_are_distributed_as_the_hosts():
    """Of 1,000 views each; a two-sample Kolmogorov-Smirnov test of some summaries of a view."""
    x = images()
    draws = np.asarray(draw_many(5, np.zeros(MANY, int), np.arange(MANY)))

    @tf.function
    def draws_of(indices):
        return tf.map_fn(
            lambda i: host.draw(5, tf.constant(0, tf.int64), i, EVERYTHING),
            indices,
            fn_output_signature=tf.float32,
        )

    host_draws = draws_of(tf.range(MANY, dtype=tf.int64)).numpy()
    parts = [slice(i, i + COUNT) for i in range(0, MANY, COUNT)]
    on_host = np.concatenate([host_views(x, host_draws[part]) for part in parts])
    on_device = np.concatenate([device_views(x, draws[part]) for part in parts])

    def summaries(views):
        v = views.astype(np.float32).reshape(-1, SIZE, SIZE, 3) / 255
        mean = v.mean(axis=(1, 2))
        yield from mean.T
        yield v.std(axis=(1, 2, 3))
        yield np.ptp(v, axis=-1).mean(axis=(1, 2))  # colourfulness
        yield np.abs(np.diff(v, axis=1)).mean(axis=(1, 2, 3))  # sharpness
        yield (mean @ [1, -2, 1]) / (mean.sum(axis=1) + 1e-6)  # hue

    for one, other in zip(summaries(on_host), summaries(on_device), strict=True):
        # The same images, so the two are closer than independent samples: a low bar would do too.
        assert scipy.stats.ks_2samp(one, other).pvalue > 0.01
