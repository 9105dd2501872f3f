"""Every operation of the views against an independent one, and the draws against their odds."""

import colorsys

import numpy as np
import pytest
import scipy.ndimage
import tensorflow as tf

from simclr_jax.data import distortion
from simclr_jax.data import host_augment as ha
from simclr_jax.data.distortion import Distortion


def image(height=40, width=30, channels=3, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, channels)).astype(np.uint8)


def planar(x):
    """[H, W, C] to float32 [C, H, W]."""
    return tf.constant(np.moveaxis(np.asarray(x), -1, 0), tf.float32)


def interleaved(x):
    return np.moveaxis(np.asarray(x), 0, -1)


def many_windows(count, shape, **ranges):
    draws = tf.random.stateless_uniform([count, distortion.DRAWS_OF_A_VIEW], seed=[1, 2])
    window = tf.function(lambda u: ha.crop_window(tf.constant(shape), u, Distortion(**ranges)))
    return np.stack([window(u) for u in draws]).T


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
    draws = tf.fill([distortion.DRAWS_OF_A_VIEW], 0.999)
    window = ha.crop_window(tf.constant([*shape, 3]), draws, Distortion(crop_area=(0.9, 1.0)))
    found = tuple(int(v) for v in window)
    assert found[2:] == expected[2:]
    assert abs(found[0] - expected[0]) <= 1
    assert abs(found[1] - expected[1]) <= 1


def test_resize_is_the_identity_at_its_own_size():
    x = image(16, 16)
    np.testing.assert_allclose(ha.resize(tf.constant(x), 16), x / 255, atol=1e-6)


@pytest.mark.parametrize("window", [(0, 0, 12, 10), (3, 2, 7, 5), (11, 9, 1, 1), (0, 1, 3, 8)])
def test_a_crop_by_matrices_equals_tensorflows_resize(window):
    x = image(12, 10)
    top, left, height, width = window
    cut = x[np.newaxis, top : top + height, left : left + width]
    expected = tf.image.resize(cut, [9, 9], "bicubic")[0]
    rows = distortion.resize_matrix(tf, float(top), float(height), 12, 9)
    columns = distortion.resize_matrix(tf, float(left), float(width), 10, 9)
    found = np.einsum("uh,hwc,vw->uvc", rows, x, columns)
    # TensorFlow rounds the offset of a tap to 1 / 1024 px.
    np.testing.assert_allclose(found, expected, atol=0.3)
    assert np.mean(np.abs(found - expected)) < 0.1


def test_brightness_and_contrast():
    x = tf.constant(image(8, 8) / 255, tf.float32)
    # Operation i alone: factor 0.5 is the neutral middle of each range.
    middle = [0.5] * 4

    def jitter(**changed):
        factors = [changed.get(k, m) for k, m in zip("bcsh", middle, strict=True)]
        return interleaved(
            ha.color_jitter(planar(x), factors, tf.range(4.0), 0.5, changed.get("kind", "additive"))
        )

    np.testing.assert_allclose(jitter(), x, atol=2e-6)
    np.testing.assert_allclose(jitter(b=0.75), np.clip(x + 0.2, 0, 1), atol=2e-6)
    np.testing.assert_allclose(
        jitter(b=0.75, kind="multiplicative"), np.clip(x * 1.2, 0, 1), atol=2e-6
    )
    mean = np.mean(x, axis=(0, 1))
    np.testing.assert_allclose(jitter(c=0.25), np.clip((x - mean) * 0.8 + mean, 0, 1), atol=2e-6)


def test_saturation_and_hue_equal_colorsys():
    x = image(6, 6) / 255
    factors = [0.5, 0.5, 0.25, 0.75]  # saturation x 0.8, hue + 0.05 of a turn
    found = interleaved(ha.color_jitter(planar(x), factors, tf.range(4.0), 0.5, "additive"))
    expected = np.empty_like(x)
    for index in np.ndindex(6, 6):
        hue, saturation, value = colorsys.rgb_to_hsv(*x[index])
        expected[index] = colorsys.hsv_to_rgb((hue + 0.05) % 1, saturation * 0.8, value)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_order_of_the_jitter_matters_and_is_drawn():
    x = tf.constant(image(8, 8) / 255, tf.float32)
    factors = [0.95, 0.05, 0.5, 0.5]
    forward, swapped = (
        interleaved(ha.color_jitter(planar(x), factors, order, 1.0, "additive"))
        for order in ([0.0, 0.1, 0.2, 0.3], [0.1, 0.0, 0.2, 0.3])
    )
    b = np.clip(x + 0.8 * 0.9, 0, 1)
    mean = b.mean(axis=(0, 1))
    factor = 0.2 + 1.6 * 0.05
    np.testing.assert_allclose(forward, np.clip((b - mean) * factor + mean, 0, 1), atol=1e-5)
    assert np.abs(forward - swapped).max() > 0.1


def test_one_channel_jitters_as_three_equal_ones():
    grey = image(8, 8, 1) / 255
    factors, order = [0.7, 0.2, 0.9, 0.9], tf.constant([0.3, 0.1, 0.2, 0.0])
    one, three = (
        interleaved(ha.color_jitter(planar(x), factors, order, 1.0, "additive"))
        for x in (grey, grey.repeat(3, -1))
    )
    np.testing.assert_allclose(one.repeat(3, -1), three, atol=1e-5)


def test_grey_is_bt601_luma():
    x = image(5, 5) / 255
    expected = (x @ [0.2989, 0.5870, 0.1140])[..., np.newaxis].repeat(3, -1)
    np.testing.assert_allclose(interleaved(ha.grey(planar(x))), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_equals_scipys(sigma):
    x = image(60, 60) / 255
    expected = scipy.ndimage.gaussian_filter(
        x, (sigma, sigma, 0), mode="constant", radius=(3, 3, 0)
    )
    # 0.005 of a grey level: the taps that are left out where sigma is small.
    np.testing.assert_allclose(interleaved(ha.blur(planar(x), sigma)), expected, atol=2e-5)


def views(count, kind, shape=(40, 30, 3), size=20, seed=7):
    x = tf.constant(image(*shape))
    found, _ = ha.of_each(
        tf.stack([x] * count),
        seed,
        np.zeros(count, int),
        np.arange(count),
        ha.two_views,
        size,
        kind,
    )
    return found.numpy()


def test_views_are_a_function_of_seed_epoch_and_index():
    x, d = tf.constant(image()), Distortion()

    def two(seed, epoch, index):
        draws = ha.draw(seed, tf.constant(epoch, tf.int64), tf.constant(index, tf.int64))
        return ha.two_views(x, draws, 24, d).numpy()

    first = two(0, 0, 0)
    np.testing.assert_array_equal(first, two(0, 0, 0))
    assert first.shape == (2, 24, 24, 3)
    assert first.dtype == np.uint8
    others = [first[1], *(two(*key)[0] for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)))]
    for other in others:
        assert np.mean(first[0] != other) > 0.5


def test_small_images_have_the_views_of_large_ones():
    """One compiled program of both views, and one operation after the other."""
    x, kind = image(40, 30), Distortion()
    large = tf.function(
        lambda x, draws: ha.two_views(x, draws, 24, kind),
        input_signature=[
            tf.TensorSpec([None, None, 3], tf.uint8),
            tf.TensorSpec([2, distortion.DRAWS_OF_A_VIEW]),
        ],
    )
    draws = [ha.draw(0, tf.constant(0, tf.int64), tf.constant(i, tf.int64)) for i in range(20)]
    small = np.stack([ha.two_views(tf.constant(x), u, 24, kind) for u in draws]).astype(int)
    large = np.stack([large(x, u) for u in draws]).astype(int)
    # Strong contrast and hue turn TensorFlow's 1 / 1024 px into a few grey levels.
    assert np.mean(np.abs(small - large)) < 0.15
    assert np.mean(np.abs(small - large) > 2) < 0.01


def test_each_step_happens_as_often_as_asked():
    """Of 600 views; an interval of 3.3 standard deviations, so 1 in 1000 seeds would fail."""
    whole = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)}
    off = whole | {
        "flip": False,
        "color_strength": 0.0,
        "grey_probability": 0.0,
        "blur_probability": 0.0,
    }
    shape = (20, 20, 3)
    plain = image(*shape)

    def share(changed, **options):
        seen = views(300, Distortion(**(off | options)), shape).reshape(-1, *shape)
        return np.mean([changed(v) for v in seen])

    def near(p):
        return pytest.approx(p, abs=3.3 * np.sqrt(p * (1 - p) / 600))

    different = lambda v: not np.array_equal(v, plain)  # noqa: E731
    assert share(different) == 0
    assert share(lambda v: np.array_equal(v, plain[:, ::-1]), flip=True) == near(0.5)
    assert share(different, color_strength=1.0) == near(0.8)
    assert share(lambda v: np.ptp(v, axis=-1).max() == 0, grey_probability=0.2) == near(0.2)
    assert share(different, blur_probability=0.5) == pytest.approx(
        0.5, abs=0.12
    )  # low sigma: no change


def test_one_channel_images_become_three():
    seen = views(4, Distortion(), shape=(12, 12, 1), size=8)
    assert seen.shape == (4, 2, 8, 8, 3)
    assert np.ptp(seen, axis=-1).max() == 0


def test_center_crop_keeps_the_middle():
    x = np.zeros((40, 60, 3), np.uint8)
    x[5:35, 15:45] = 200  # the middle 0.75 of the centred 40 x 40 square
    kept = ha.center_crop(tf.constant(x), 32, 0.75).numpy()
    assert kept.shape == (32, 32, 3)
    np.testing.assert_array_equal(kept, 200)
    np.testing.assert_array_equal(ha.center_crop(tf.constant(x[:32, :32]), 32, 1.0), x[:32, :32])
