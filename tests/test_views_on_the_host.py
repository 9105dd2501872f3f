"""Every operation of the host's views against an independent one, and the draws against their odds."""

import colorsys
import logging

import jax
import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf
from PIL import Image

import simclr_jax
from simclr_jax import assemble, config
from simclr_jax.config.python_files import read_file
from simclr_jax.mesh import make_mesh
from simclr_jax.views import crop, device, host, make_distortion
from simclr_jax.views.blur import blur_sigma, blurred
from simclr_jax.views.color import ColorJitter, Grey, factor, saturate
from simclr_jax.views.crop import CROP_ATTEMPTS, Crop
from simclr_jax.views.distortion import Distortion

# One distortion for whole views, as TensorFlow compiles each anew; and one size, as also each size.
EVERYTHING = make_distortion(
    {"grey_probability": 0.2, "blur_probability": 0.5, "solarize_probability": 0.3}
)
SIZE = 40


def image(height=SIZE, width=SIZE, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def planar(x):
    """[H, W, C] to float32 [C, H, W]."""
    return tf.constant(np.moveaxis(np.asarray(x), -1, 0), tf.float32)


def interleaved(x):
    return np.moveaxis(np.asarray(x), 0, -1)


def draw(seed=0, epoch=0, index=0, kind=EVERYTHING):
    epoch, index = (tf.constant(i, tf.int64) for i in (epoch, index))
    return host.draw(seed, epoch, index, kind).numpy()


def many_windows(count, shape, **ranges):
    kind = Distortion(Crop(**ranges), ())
    draws = tf.random.stateless_uniform([count, kind.draws], seed=[1, 2])
    window = tf.function(
        lambda draws: tf.map_fn(
            lambda u: tf.stack(host.crop_window(tf.constant(shape), u, kind)), draws
        )
    )
    return window(draws).numpy().T


def test_crops_lie_in_the_image_and_have_the_asked_shapes():
    top, left, height, width = many_windows(2000, (200, 300, 3))
    assert np.all((top >= 0) & (left >= 0) & (top + height <= 200) & (left + width <= 300))
    area = height * width / (200 * 300)
    # Rounding to whole pixels moves an area of 70 x 70 px by up to 1.5 %.
    assert area.min() > 0.08 * 0.98
    assert area.max() <= 1
    ratio = width / height
    assert ratio.min() > 0.75 * 0.98
    assert ratio.max() < 4 / 3 * 1.02


def test_crops_reach_the_last_row_and_column_and_numbers_of_the_paper():
    u = {"attempts": np.full(2 * CROP_ATTEMPTS, 0.3), "position": np.asarray([0.999, 0.999])}
    top, left, height, width = Crop().window(np, 40.0, 30.0, u)
    assert (top + height, left + width) == (40, 30)
    u["position"] = np.zeros(2)
    assert Crop().window(np, 40.0, 30.0, u)[:2] == (0, 0)
    assert CROP_ATTEMPTS == 10  # torchvision's
    assert [blur_sigma(x) for x in (0.0, 1.0)] == [0.1, 2.0]  # appendix A


def test_crop_areas_are_uniform_and_aspects_log_uniform():
    # Up to half the area every aspect ratio fits into a square image, so nothing is rejected.
    top, left, height, width = many_windows(4000, (400, 400, 3), crop_area=(0.08, 0.5))
    area, log_ratio = height * width / 400**2, np.log(width / height)
    uniform = np.linspace(0, 1, 11)[1:-1]
    np.testing.assert_allclose(np.quantile(area, uniform), 0.08 + 0.42 * uniform, atol=0.02)
    edge = np.log(4 / 3)
    np.testing.assert_allclose(np.quantile(log_ratio, uniform), edge * (2 * uniform - 1), atol=0.03)
    np.testing.assert_allclose(np.mean(top / (400 - height)), 0.5, atol=0.02)
    np.testing.assert_allclose(np.mean(left / (400 - width)), 0.5, atol=0.02)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((1, 500), (0, 249, 1, 1)),
        ((500, 1), (249, 0, 1, 1)),
        ((1, 1), (0, 0, 1, 1)),
        ((60, 600), (0, 260, 60, 80)),
    ],
)
def test_images_that_no_attempt_fits_are_cropped_at_their_centre(shape, expected):
    kind = Distortion(Crop(crop_area=(0.9, 1.0)), ())
    window = host.crop_window(tf.constant([*shape, 3]), tf.fill([kind.draws], 0.999), kind)
    found = tuple(int(v) for v in window)
    assert found[2:] == expected[2:]
    assert abs(found[0] - expected[0]) <= 1
    assert abs(found[1] - expected[1]) <= 1


def test_resize_is_the_identity_at_its_own_size():
    x = image(16, 16)
    np.testing.assert_allclose(host.resize(tf.constant(x), 16), x / 255, atol=1e-6)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("window", [(0, 0, 12, 10), (3, 2, 7, 5), (11, 9, 1, 1), (0, 1, 3, 8)])
def test_a_crop_by_matrices_equals_tensorflows_resize(window, antialias):
    x = image(12, 10)
    top, left, height, width = window
    cut = x[np.newaxis, top : top + height, left : left + width]
    expected = tf.image.resize(cut, [5, 5], "bicubic", antialias=antialias)[0]
    rows = crop.resize_matrix(tf, float(top), float(height), 12, 5, antialias)
    columns = crop.resize_matrix(tf, float(left), float(width), 10, 5, antialias)
    found = np.einsum("uh,hwc,vw->uvc", rows, x, columns)
    # TensorFlow rounds the offset of a tap to 1 / 1024 px.
    np.testing.assert_allclose(found, expected, atol=0.3)
    assert np.mean(np.abs(found - expected)) < 0.1


def test_antialiasing_averages_what_a_smaller_view_is_made_of():
    """Pillow's bicubic reduction; moving the picture by a pixel changes the view less than without."""
    x = image(96, 96)
    expected = np.asarray(Image.fromarray(x).resize((24, 24), Image.BICUBIC)).astype(int)
    view = crop.EvaluationView(24, antialias=True)
    found = view.of(x).astype(int)
    assert np.max(np.abs(found - expected)) <= 1
    without = crop.EvaluationView(24).of(x).astype(int)
    assert np.mean(np.abs(without - expected)) > 5
    np.testing.assert_array_equal(host.center_crop(tf.constant(x), view), found)


def jittered(x, factors, order=(0.0, 0.1, 0.2, 0.3), strength=1.0, brightness="additive"):
    jitter = ColorJitter(strength, 1.0, brightness)
    return interleaved(jitter.jittered(planar(x), factors, tf.constant(order)))


def test_brightness_and_contrast():
    x = tf.constant(image(8, 8) / 255, tf.float32)

    def jitter(b=0.5, c=0.5, kind="additive"):
        # 0.5 is the neutral middle of each range.
        return jittered(x, [b, c, 0.5, 0.5], strength=0.5, brightness=kind)

    np.testing.assert_allclose(jitter(), x, atol=2e-6)
    np.testing.assert_allclose(jitter(b=0.75), np.clip(x + 0.2, 0, 1), atol=2e-6)
    np.testing.assert_allclose(
        jitter(b=0.75, kind="multiplicative"), np.clip(x * 1.2, 0, 1), atol=2e-6
    )
    mean = np.mean(x, axis=(0, 1))
    np.testing.assert_allclose(jitter(c=0.25), np.clip((x - mean) * 0.8 + mean, 0, 1), atol=2e-6)


def test_saturation_and_hue_equal_colorsys():
    x = image(6, 6) / 255
    found = jittered(x, [0.5, 0.5, 0.25, 0.75], strength=0.5)  # saturation x 0.8, hue + 0.05
    expected = np.empty_like(x)
    for index in np.ndindex(6, 6):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[index])
        expected[index] = colorsys.hsv_to_rgb((hue + 0.05) % 1, saturation * 0.8, value)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_order_of_the_jitter_matters_and_is_drawn():
    x = tf.constant(image(8, 8) / 255, tf.float32)
    factors = [0.95, 0.05, 0.5, 0.5]
    forward = jittered(x, factors, [0.0, 0.1, 0.2, 0.3])
    swapped = jittered(x, factors, [0.1, 0.0, 0.2, 0.3])
    b = np.clip(x + 0.8 * 0.9, 0, 1)
    mean = b.mean(axis=(0, 1))
    factor = 0.2 + 1.6 * 0.05
    np.testing.assert_allclose(forward, np.clip((b - mean) * factor + mean, 0, 1), atol=1e-5)
    assert np.abs(forward - swapped).max() > 0.1


def test_one_channel_jitters_as_three_equal_ones():
    grey = image(8, 8, 1) / 255
    factors, order = [0.7, 0.2, 0.9, 0.9], [0.3, 0.1, 0.2, 0.0]
    one, three = (jittered(x, factors, order) for x in (grey, grey.repeat(3, -1)))
    np.testing.assert_allclose(one.repeat(3, -1), three, atol=1e-5)


def test_grey_is_bt601_luma():
    x = image(5, 5) / 255
    expected = (x @ [0.2989, 0.5870, 0.1140])[..., np.newaxis].repeat(3, -1)
    found = Grey(1.0).host(planar(x), {"grey": tf.constant([0.0])})
    np.testing.assert_allclose(interleaved(found), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_scipys(sigma):
    x = image(60, 60) / 255
    expected = scipy.ndimage.gaussian_filter(
        x, (sigma, sigma, 0), mode="constant", radius=(3, 3, 0)
    )
    # 0.005 of a grey level: the taps that are left out where sigma is small.
    np.testing.assert_allclose(interleaved(blurred(planar(x), sigma)), expected, atol=2e-5)


def make_views(x, draws):
    return host.make_views(tf.constant(x), draws, SIZE, EVERYTHING).numpy()


def test_views_are_a_function_of_seed_epoch_and_index():
    x = image()

    def two(*key):
        return make_views(x, draw(*key))

    first = two(0, 0, 0)
    np.testing.assert_array_equal(first, two(0, 0, 0))
    assert first.shape == (2, SIZE, SIZE, 3)
    assert first.dtype == np.uint8
    others = [first[1], *(two(*key)[0] for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))]
    for other in others:
        assert np.mean(first[0] != other) > 0.5


def test_small_images_have_the_views_of_large_ones():
    """One compiled program of both views, and one operation after the other."""
    x = image()
    large = tf.function(
        lambda x, draws: host.make_views(x, draws, SIZE, EVERYTHING),
        input_signature=[
            tf.TensorSpec([None, None, 3], tf.uint8),
            tf.TensorSpec([2, EVERYTHING.draws]),
        ],
    )
    draws = [draw(index=i) for i in range(20)]
    small = np.stack([make_views(x, u) for u in draws]).astype(int)
    large = np.stack([large(x, u) for u in draws]).astype(int)
    # Strong contrast and hue turn TensorFlow's 1 / 1024 px into a few grey levels.
    assert np.mean(np.abs(small - large)) < 0.15
    assert np.mean(np.abs(small - large) > 2) < 0.01


# Operation: how often it happens, and whether a view shows that it did.
HAPPENS = {
    "flip": (0.5, lambda view, plain: np.array_equal(view, plain[:, ::-1])),
    "color_jitter": (0.8, lambda view, plain: not np.array_equal(view, plain)),
    "grey": (0.2, lambda view, plain: np.ptp(view, axis=-1).max() == 0),
    "blur": (0.5, lambda view, plain: not np.array_equal(view, plain)),
    "solarize": (0.3, lambda view, plain: np.array_equal(view, np.minimum(plain, 255 - plain))),
}


@pytest.mark.whole
def test_images_of_many_sizes_are_no_warning():
    """Each size is compiled, of which TensorFlow warns from the fifth on."""
    said: list[logging.LogRecord] = []
    kind = Distortion(Crop(), ())

    class Heard(logging.Handler):
        def emit(self, record):
            said.append(record)

    handler, logger = Heard(), tf.get_logger()
    logger.addHandler(handler)
    try:
        for side in range(8, 16):
            host.make_views(tf.zeros([side, 8, 3], tf.uint8), tf.zeros([2, kind.draws]), 8, kind)
        logger.error("an error is said")
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in said] == ["an error is said"]


def test_each_step_happens_as_often_as_asked():
    """The numbers of 600 views; an interval of 3.3 standard deviations, so 1 in 1000 seeds would fail.
    And of 40 views, that an operation happens where its number says so.
    """
    plain = image()
    draws = np.stack([draw(7, index=i) for i in range(300)])
    crops = EVERYTHING.numbers_of(EVERYTHING.crop, draws)["attempts"]
    crops[..., 0], crops[..., 1] = 1.0, 0.5  # all of a square image
    happening = {
        operation.NAME: next(iter(EVERYTHING.numbers_of(operation, draws).values()))
        for operation in EVERYTHING.chain
    }
    assert happening.keys() == HAPPENS.keys()
    drawn = {name: u[..., 0] < HAPPENS[name][0] for name, u in happening.items()}
    for u in happening.values():
        u[...] = 0.999  # `draws` now has nothing happen
    np.testing.assert_array_equal(make_views(plain, draws[0]), [plain, plain])
    for operation in EVERYTHING.chain:
        name = operation.NAME
        probability, shows = HAPPENS[name]
        deviation = np.sqrt(probability * (1 - probability) / drawn[name].size)
        assert np.mean(drawn[name]) == pytest.approx(probability, abs=3.3 * deviation)
        expected, alone = drawn[name][:20], draws[:20].copy()
        numbers = EVERYTHING.numbers_of(operation, alone)
        if name == "blur":
            numbers["sigma"][...] = 1.0  # the largest: a small one changes nothing
        # Just below the probability, and at it.
        next(iter(numbers.values()))[..., 0] = np.where(expected, probability - 1e-6, probability)
        found = [[shows(view, plain) for view in make_views(plain, u)] for u in alone]
        np.testing.assert_array_equal(found, expected, err_msg=name)


def test_one_channel_images_become_three():
    kind = Distortion(EVERYTHING.crop, EVERYTHING.operations, views=1)
    x = tf.constant(image(12, 12, 1))
    for i in range(4):
        seen = host.make_views(x, draw(index=i, kind=kind), 8, kind).numpy()
        assert seen.shape == (1, 8, 8, 3)
        assert np.ptp(seen, axis=-1).max() == 0


def test_center_crop_keeps_the_middle():
    x = np.zeros((40, 60, 3), np.uint8)
    x[5:35, 15:45] = 200  # the middle 0.75 of the centred 40 x 40 square
    kept = host.center_crop(tf.constant(x), crop.EvaluationView(32, 0.75)).numpy()
    assert kept.shape == (32, 32, 3)
    np.testing.assert_array_equal(kept, 200)
    whole = host.center_crop(tf.constant(x[:32, :32]), crop.EvaluationView(32))
    np.testing.assert_array_equal(whole, x[:32, :32])


def test_views_from_python_are_those_of_training(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    found = simclr_jax.make_views("digits", image, epoch=1, index=7, **{"data.image_size": 8})
    c = config.default()
    config.set_options(c, config.flatten(read_file("digits")) | {"data.image_size": 8})
    views = assemble.views(c, make_mesh(jax.devices()[:1]))
    np.testing.assert_array_equal(found, views.sample(image, 1, 7)[0])
    assert (found.shape, found.dtype) == ((2, 8, 8, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "one.png")
    of_file = simclr_jax.make_views(
        "digits", tmp_path / "one.png", epoch=1, index=7, **{"data.image_size": 8}
    )
    np.testing.assert_array_equal(of_file, found)
    assert not np.array_equal(
        simclr_jax.make_views("digits", image, **{"data.image_size": 8}), found
    )
    with pytest.raises(ValueError, match=r"an image is float64 \[20, 30, 3\]: expected uint8"):
        simclr_jax.make_views("digits", image / 255)


def test_saturation_stays_at_most_1():
    """More of it changes neither hue nor value."""
    x = np.random.default_rng(0).random((3, 50))
    found = np.stack(saturate(np, tuple(x), 1.5))
    for pixel, rgb in zip(found.T, x.T, strict=True):
        h, s, v = colorsys.rgb_to_hsv(*rgb)
        np.testing.assert_allclose(pixel, colorsys.hsv_to_rgb(h, min(1, 1.5 * s), v), atol=1e-6)
    assert factor(0.0, 1.6) == 0.0


def test_the_numbers_of_a_view_stay_what_they_were():
    """A run that is resumed by another version sees the same views."""
    distortion = make_distortion({})
    on_host = host.draw(1, tf.constant(2, tf.int64), tf.constant(3, tf.int64), distortion)
    np.testing.assert_allclose(on_host[:, -1], [0.695444, 0.865018], atol=1e-6)
    on_device = device.draw(1, 2, 3, distortion)
    np.testing.assert_allclose(on_device[:, -1], [0.178000, 0.453750], atol=1e-6)
