"""What is drawn for which operation, what an operation is, and which of them happen where."""

import colorsys
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

from simclr_jax import assemble
from simclr_jax.mesh import make_mesh
from simclr_jax.options import number, option_field
from simclr_jax.views import (
    OPERATIONS,
    OPTIONS,
    crops_for_classifiers,
    device,
    host,
    make_distortion,
)
from simclr_jax.views.color import Flip, turn_hue
from simclr_jax.views.crop import Crop
from simclr_jax.views.cutout import Cutout
from simclr_jax.views.distortion import Distortion, Operation, PixelOperation, key_of
from simclr_jax.views.noise import Noise
from simclr_jax.views.recrop import Recrop
from simclr_jax.views.rotation import Rotation
from simclr_jax.views.sobel import Sobel
from simclr_jax.views.solarize import Solarize

EVERYTHING = make_distortion(
    {"grey_probability": 0.2, "blur_probability": 0.5, "solarize_probability": 0.3}
)
MANY = 504


@dataclasses.dataclass(frozen=True)
class Whole(Crop):
    """No crop: compiled in no time, where the crop does not matter."""

    DRAWS: ClassVar = {"unused": 1}

    def window(self, xp: Any, height: Any, width: Any, u: dict[str, Any]) -> tuple:
        nothing = 0.0 * u["unused"][0]
        return nothing, nothing, nothing + height, nothing + width


def images(count=4, channels=3):
    rng = np.random.default_rng(3)
    return rng.integers(0, 256, (count, 16, 16, channels)).astype(np.uint8)


def on_host(x, draws, kind):
    made = [host.make_views(tf.constant(i), u, 16, kind) for i, u in zip(x, draws, strict=True)]
    return np.stack(made).astype(int)


distort = jax.jit(device.distort, static_argnums=2)


def on_device(x, draws, kind):
    """Views of images x, of which nothing is cropped away."""
    crops = x[:, np.newaxis].repeat(kind.views, axis=1)
    return np.round(255 * np.asarray(distort(crops, draws, kind))).astype(int)


# What is drawn


def draw_on_host(index, kind):
    epoch, index = tf.constant(2, tf.int64), tf.constant(index, tf.int64)
    return host.draw(7, epoch, index, kind).numpy()


def draw_on_device(index, kind):
    return np.asarray(device.draw(7, 2, index, kind))


def draw_from_one_stream(index, kind):
    """What draws must not be: slices of one run of numbers."""
    key = jax.random.fold_in(jax.random.key(7), index)
    return np.asarray(jax.random.uniform(key, (2, kind.draws)))


def without(kind, name):
    """The distortion with one operation switched off."""
    return dataclasses.replace(kind, operations=tuple(o for o in kind.operations if name != o.NAME))


def check_that_switching_changes_no_other_number(draw):
    everything = draw(5, EVERYTHING)
    for switched in EVERYTHING.chain:
        fewer = without(EVERYTHING, switched.NAME)
        assert fewer.draws < EVERYTHING.draws
        draws = draw(5, fewer)
        for step in (fewer.crop, *fewer.chain):
            before = EVERYTHING.numbers_of(step, everything)
            after = fewer.numbers_of(step, draws)
            assert before.keys() == after.keys() == step.DRAWS.keys()
            for name, count in step.DRAWS.items():
                assert before[name].shape == (2, count)
                np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("draw", [draw_on_host, draw_on_device])
def test_numbers_stay_the_same_when_another_operation_is_switched(draw):
    check_that_switching_changes_no_other_number(draw)


def test_slices_of_one_stream_would_not_stay_the_same():
    with pytest.raises(AssertionError):
        check_that_switching_changes_no_other_number(draw_from_one_stream)


def test_switching_off_by_the_options_is_leaving_out():
    options = {"grey_probability": 0.2, "blur_probability": 0.5}
    default, off = (make_distortion(options | more) for more in ({}, {"solarize_probability": 0.0}))
    assert default == off
    assert default.chain == without(EVERYTHING, "solarize").chain
    assert default.sizes == without(EVERYTHING, "solarize").sizes
    for one in EVERYTHING.chain:
        u = EVERYTHING.numbers_of(one, np.arange(EVERYTHING.draws))
        # Next to each other, and nobody else's.
        taken = np.concatenate(list(u.values()))
        np.testing.assert_array_equal(taken, np.arange(taken[0], taken[0] + len(taken)))
        assert len(taken) == EVERYTHING.sizes[one.NAME]


def check_that_numbers_are_independent(draws):
    """Of all numbers of both views of MANY images: each is uniform, and no two are correlated."""
    columns = draws.reshape(len(draws), -1)
    assert np.all((columns >= 0) & (columns < 1))
    # 72 tests: one of them in a thousand seeds.
    assert min(scipy.stats.kstest(column, "uniform").pvalue for column in columns.T) > 1e-5
    # Standard deviations: of the 8,000 coefficients one in a hundred seeds passes 5, by NumPy too.
    bound = 6.5 / np.sqrt(len(columns))
    correlation = np.corrcoef(columns.T)
    assert np.max(np.abs(correlation - np.eye(len(correlation)))) < bound
    # Nor do they follow from the numbers of the image before.
    width = columns.shape[1]
    assert np.max(np.abs(np.corrcoef(columns[:-1].T, columns[1:].T)[:width, width:])) < bound


@jax.jit
def draw_many(seed, epochs, indices):
    return jax.vmap(lambda e, i: device.draw(seed, e, i, EVERYTHING))(epochs, indices)


@tf.function
def draw_many_on_host(indices):
    return tf.map_fn(
        lambda i: host.draw(5, tf.constant(0, tf.int64), i, EVERYTHING),
        indices,
        fn_output_signature=tf.float32,
    )


def test_numbers_of_the_host_are_independent():
    check_that_numbers_are_independent(draw_many_on_host(tf.range(MANY, dtype=tf.int64)).numpy())


def test_numbers_of_the_device_are_independent():
    draws = np.array(draw_many(5, np.zeros(MANY, int), np.arange(MANY)))
    check_that_numbers_are_independent(draws)
    # As if two operations had one key.
    first, last = EVERYTHING.chain[0], EVERYTHING.chain[-1]
    EVERYTHING.numbers_of(last, draws)["solarize"][...] = EVERYTHING.numbers_of(first, draws)[
        "flip"
    ]
    with pytest.raises(AssertionError):
        check_that_numbers_are_independent(draws)


def test_two_keys_with_the_same_lower_half_draw_other_numbers():
    """Of the host, whose seed is the upper half of a 64-bit word and whose epoch is the lower."""
    kind = Distortion(Whole(), (Flip(),))
    zero, one, large = (tf.constant(i, tf.int64) for i in (0, 1, 2**31 - 1))
    drawn = [
        host.draw(seed, epoch, index, kind).numpy().tobytes()
        for seed in (0, 1, 2**31 - 1)
        for epoch in (zero, one, large)
        for index in (zero, one, large)
    ]
    assert len(set(drawn)) == 27


def test_names_have_distinct_keys_and_stay_what_they_are():
    names = [step.NAME for step in (Crop, *OPERATIONS)]
    # A changed name, or key, is another view of every image: a resumed run would go astray.
    assert names[:6] == ["crop", "flip", "color_jitter", "grey", "blur", "solarize"]
    assert names[6:] == ["sobel", "noise", "rotation", "cutout", "recrop"]
    assert len({key_of(name) for name in names}) == len(names)
    assert key_of("123456789") == 0xCBF43926  # CRC-32's published check value


def test_every_field_of_an_operation_is_an_option_with_its_default():
    options = {option.name: option for option in OPTIONS}
    made: Any
    for made in (Crop(), *(kind() for kind in OPERATIONS)):
        for field in dataclasses.fields(made):
            assert options[f"views.{field.name}"].default == getattr(made, field.name)
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)


# Solarize


def test_solarize_is_off_by_default(tiny):
    assert tiny.views.solarize_probability == 0
    assert "solarize" not in make_distortion({}).sizes
    assert [o.NAME for o in make_distortion({}).chain] == ["flip", "color_jitter", "grey", "blur"]
    assert [o.NAME for o in OPERATIONS].index("solarize") == 4  # after what the paper does


def solarized(x, threshold):
    """In grey levels, for integers."""
    return np.where(x / 255 < threshold, x, 255 - x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 1.0])
def test_solarize_inverts_what_is_at_least_the_threshold(threshold, channels):
    levels = np.arange(256).reshape(16, 16)
    x = np.stack([np.roll(levels, 7 * c) for c in range(channels)])
    planes = (x / 255).astype(np.float32)
    kind = Solarize(0.3, threshold)
    for drawn, expected in ((0.29, solarized(x, threshold)), (0.3, x)):
        found = kind.host(tf.constant(planes), {"solarize": tf.constant([drawn])})
        np.testing.assert_allclose(255 * found.numpy(), expected, atol=1e-4)
        u = {"solarize": jnp.full((1, 1, 1), drawn)}
        found = np.stack(kind.device(tuple(map(jnp.asarray, planes)), u))
        np.testing.assert_allclose(255 * found.reshape(x.shape), expected, atol=1e-4)
    assert solarized(np.array([254, 255]), 1.0).tolist() == [254, 0]


@pytest.mark.parametrize("channels", [1, 3])
def test_solarized_views_of_host_and_device_differ_by_one_grey_level_at_most(channels):
    kind = Distortion(Whole(), (Solarize(0.3, 0.4),))
    x = images(24, channels)
    draws = np.random.default_rng(0).random((24, 2, kind.draws), np.float32)
    happens = kind.numbers_of(kind.chain[0], draws)["solarize"] < 0.3
    pairs = x[:, np.newaxis].repeat(2, axis=1).repeat(3 // channels, axis=-1)
    expected = np.where(happens[..., np.newaxis, np.newaxis], solarized(pairs, 0.4), pairs)
    found = on_host(x, draws, kind), on_device(x, draws, kind)
    assert 0.15 < np.mean(happens) < 0.45
    for views in found:
        assert views.shape == (24, 2, 16, 16, 3)
        assert np.max(np.abs(views - expected)) <= 1


# The other operations of figure 5


def sobel_by_loops(x):
    """x float64 [H, W, C] in [0, 1]."""
    grey = x @ [0.2989, 0.5870, 0.1140] if x.shape[-1] == 3 else x[..., 0]
    padded = np.pad(grey, 1, "edge")
    weights = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    out = np.zeros_like(grey)
    for r in range(grey.shape[0]):
        for c in range(grey.shape[1]):
            part = padded[r : r + 3, c : c + 3]
            out[r, c] = np.hypot(np.sum(weights * part), np.sum(weights.T * part)) / 4
    return np.repeat(np.minimum(out, 1)[..., np.newaxis], x.shape[-1], axis=-1)


def hidden_by_loops(x, place, share):
    found, size = x.copy(), len(x)
    for r in range(size):
        for c in range(size):
            far = max(abs(r + 0.5 - size * place[0]), abs(c + 0.5 - size * place[1]))
            if far < 0.5 * share * size:
                found[r, c] = 0.5
    return found


def expected_of(name, x, u):
    if name == "sobel":
        return sobel_by_loops(x)
    if name == "rotation":
        return np.rot90(x, 1 + int(3 * u["quarters"][0]))
    return hidden_by_loops(x, u["place"], 0.5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "operation", [Sobel(0.5), Rotation(0.5), Cutout(0.5)], ids=lambda o: o.NAME
)
def test_operations_of_figure_5_equal_loops_on_host_and_device(operation, channels):
    kind = Distortion(Whole(), (operation,))
    x = images(24, channels)
    draws = np.random.default_rng(0).random((24, 2, kind.draws), np.float32)
    found = on_host(x, draws, kind), on_device(x, draws, kind)
    happened = 0
    for i in range(24):
        for v in range(2):
            u = kind.numbers_of(operation, draws[i, v])
            happens = u[operation.NAME][0] < 0.5
            happened += happens
            one = x[i].astype(np.float64) / 255
            expected = 255 * (expected_of(operation.NAME, one, u) if happens else one)
            for views in found:
                assert np.max(np.abs(views[i, v] - expected)) <= 1
            assert bool(operation.describe(u, channels)) == happens
    assert 12 < happened < 36


def test_noise_is_normal_keyed_by_the_view_and_clipped():
    kind = Distortion(Whole(), (Noise(0.5, 0.1),))
    x = np.full((24, 16, 16, 3), 128, np.uint8)
    draws = np.random.default_rng(0).random((24, 2, kind.draws), np.float32)
    happens = kind.numbers_of(kind.chain[0], draws)["noise"][..., 0] < 0.5
    for make in (on_host, on_device):
        views = make(x, draws, kind).astype(np.float64) / 255
        np.testing.assert_array_equal(make(x, draws, kind) / 255, views)  # the same each time
        added = views[happens] - 128 / 255
        assert np.all(views[~happens] == 128 / 255)
        assert added.std() == pytest.approx(0.1, rel=0.02)
        assert abs(added.mean()) < 0.002
        flat = added.reshape(len(added), -1)
        between = np.corrcoef(flat) - np.eye(len(flat))
        assert np.abs(between).max() < 0.2  # views have noise of their own
        channels = np.corrcoef(added.reshape(-1, 3).T) - np.eye(3)
        assert np.abs(channels).max() < 0.05
        white = make(np.full_like(x, 255), draws, kind)
        assert white.max() == 255


def test_a_crop_of_the_crop_is_that_of_the_crop_itself():
    """Of a view that is the whole image: what the first crop makes of the image with the same numbers."""
    again = Distortion(Whole(), (Recrop(0.5),))
    x = images(24)
    draws = np.random.default_rng(0).random((24, 2, again.draws), np.float32)
    u = again.numbers_of(again.chain[0], draws)
    once = Distortion(Crop(), ())
    numbers = np.concatenate([u["attempts"], u["position"]], axis=-1)
    crop = jax.jit(jax.vmap(lambda i, n: jax.vmap(lambda one: device.crop(i, one, 16, once))(n)))
    expected = np.asarray(crop(x, numbers)).astype(int)
    whole = x[:, np.newaxis].repeat(2, axis=1)
    happens = (u["recrop"] < 0.5)[..., np.newaxis, np.newaxis]
    for found in (on_host(x, draws, again), on_device(x, draws, again)):
        assert np.max(np.abs(found - np.where(happens, expected, whole))) <= 1
    assert 12 < happens.sum() < 36


def test_on_one_branch_one_view_is_the_crop_and_the_other_the_crop_with_the_operations():
    """On host and device; with all operations at all times but those whose identity is not exact."""
    options = {
        "one_branch": True,
        "color_strength": 0.0,
        "grey_probability": 0.0,
        "blur_probability": 0.0,
        "solarize_probability": 1.0,
        "sobel_probability": 1.0,
        "noise_probability": 1.0,
        "rotation_probability": 1.0,
        "cutout_probability": 1.0,
        "recrop_probability": 1.0,
    }
    kind, alone = make_distortion(options), make_distortion({"one_branch": True, "flip": False})
    alone = dataclasses.replace(alone, operations=())
    both = dataclasses.replace(kind, one_branch=False)
    x = images(8)
    for draw in (draw_on_host, draw_on_device):
        draws = np.stack([draw(i, kind) for i in range(8)])
        free = np.stack([draw(i, both) for i in range(8)])
        crop = kind.sizes["crop"]
        np.testing.assert_array_equal(draws[:, 0, :crop], free[:, 0, :crop])
        np.testing.assert_array_equal(draws[:, 1, :crop], free[:, 0, :crop])
        np.testing.assert_array_equal(draws[:, 1, crop:], free[:, 1, crop:])
        for make in (on_host, on_device):
            views = make(x, draws, kind)
            cropped = make(x, draws[..., :crop], alone)
            np.testing.assert_array_equal(views[:, 0], cropped[:, 0])
            np.testing.assert_array_equal(cropped[:, 0], cropped[:, 1])
            assert np.all(np.any(views[:, 0] != views[:, 1], axis=(1, 2, 3)))
    assert not crops_for_classifiers({"one_branch": True}).one_branch


def test_the_first_operation_comes_before_the_others():
    names = [o.NAME for o in make_distortion({"first": "cutout"}).operations]
    assert names[0] == "cutout"
    assert names[1:] == [o.NAME for o in OPERATIONS if o.NAME != "cutout"]


# What classifiers see

AT_ALL_TIMES = {
    "color_strength": 1.0,
    "jitter_probability": 1.0,
    "grey_probability": 1.0,
    "blur_probability": 1.0,
    "solarize_probability": 1.0,
}


def test_classifiers_train_on_crops_and_flips_and_nothing_else(tiny):
    kind = crops_for_classifiers(AT_ALL_TIMES | {"crop_area": (0.5, 1.0)})
    assert kind == Distortion(Crop(crop_area=(0.5, 1.0)), (Flip(),), views=1)
    tiny.views.update(AT_ALL_TIMES)
    for placement in ("host", "device"):
        tiny.data.placement = placement
        made = assemble.classifier_views(tiny, make_mesh(jax.devices()[:1]), 16)
        assert made.settings.distortion == Distortion(Crop(), (Flip(),), views=1)
        assert "solarize" in assemble.views(tiny, made.settings.mesh).settings.distortion.sizes

    kind = dataclasses.replace(kind, crop=Whole())
    x = images()
    draws = np.zeros((4, 1, kind.draws), np.float32)
    flipped = np.array([True, False, True, False])
    kind.numbers_of(kind.chain[0], draws)["flip"][:, 0, 0] = np.where(flipped, 0.49, 0.5)
    expected = np.where(flipped[:, None, None, None], x[:, :, ::-1], x)[:, np.newaxis]
    np.testing.assert_array_equal(on_host(x, draws, kind), expected)
    np.testing.assert_array_equal(on_device(x, draws, kind), expected)


# A new operation


@dataclasses.dataclass(frozen=True)
class Darken(PixelOperation):
    """Divides by a number: an operation that happens or not, and has one formula."""

    darken_probability: float = option_field(0.0, number(0, 1), "of a darker view")
    darken_by: float = option_field(2.0, number(1, 10), "how much darker")

    NAME: ClassVar = "darken"
    DRAWS: ClassVar = {"darken": 1}

    @property
    def probability(self):
        return self.darken_probability

    def formula(self, xp, channels):
        return tuple(c / self.darken_by for c in channels)


@dataclasses.dataclass(frozen=True)
class Tint(Operation):
    """Lightens each channel by what is drawn for it: an operation with both its ways written out."""

    tint_strength: float = option_field(0.0, number(0, 1), "most that is added")

    NAME: ClassVar = "tint"
    DRAWS: ClassVar = {"channels": 3, "strength": 1}

    @property
    def is_on(self):
        return self.tint_strength > 0

    def host(self, x, u):
        added = self.tint_strength * u["strength"] * u["channels"]
        return tf.clip_by_value(x + added[:, tf.newaxis, tf.newaxis], 0.0, 1.0)

    def describe(self, u, channels):
        return f"tint {u['strength'][0]:.1f}"

    def device(self, channels, u):
        most = self.tint_strength * u["strength"][..., 0]
        return tuple(
            jnp.clip(c + most * u["channels"][..., i], 0.0, 1.0) for i, c in enumerate(channels)
        )


def test_a_new_operation_works_on_host_and_device():
    """It costs its class and a place among the operations; nothing else knows its name."""
    options = {"darken_probability": 0.5, "darken_by": 4.0, "tint_strength": 0.5}
    kind = make_distortion(options, (Flip, Darken, Tint))
    assert kind.operations == (Flip(), Darken(0.5, 4.0), Tint(0.5))
    kind = Distortion(Whole(), kind.operations)
    assert list(kind.sizes) == ["crop", "flip", "darken", "tint"]

    x = images(24)
    draws = np.stack([draw_on_host(i, kind) for i in range(24)])
    flip, darken, tint = (kind.numbers_of(o, draws) for o in kind.chain)
    views = (x[:, np.newaxis] / 255).repeat(2, axis=1)

    def where(u, changed):
        return np.where(u[..., np.newaxis, np.newaxis] < 0.5, changed, views)

    views = where(flip["flip"], views[..., ::-1, :])
    views = where(darken["darken"], views / 4)
    added = 0.5 * tint["strength"] * tint["channels"]
    expected = 255 * np.minimum(1, views + added[:, :, np.newaxis, np.newaxis])
    for found in (on_host(x, draws, kind), on_device(x, draws, kind)):
        assert np.max(np.abs(found - expected)) <= 1

    # The numbers of the others are those without the new ones, on the host and on the device.
    old = Distortion(Whole(), (Flip(),))
    for draw in (draw_on_host, draw_on_device):
        np.testing.assert_array_equal(draw(3, kind)[:, : old.draws], draw(3, old))


# Hue under rounding


class Rounding:
    """NumPy, but a maximum comes out one unit in the last place above or below each of its operands,
    as when a compiler computes an operand twice and rounds it in two ways.
    """

    def __init__(self, towards):
        self._towards = np.float32(towards)

    def maximum(self, a, b):
        return np.nextafter(np.maximum(a, b), self._towards, dtype=np.float32)

    def __getattr__(self, name):
        return getattr(np, name)


def hue_by_equality(xp, rgb, turn):
    """What `turn_hue` must not do: it asks which channel equals the maximum."""
    r, g, b = rgb
    value = xp.maximum(xp.maximum(r, g), b)
    chroma = value - xp.minimum(xp.minimum(r, g), b)
    per = 1.0 / xp.maximum(chroma, 1e-9)
    hue = xp.where(
        value == r,
        (g - b) * per,
        xp.where(value == g, 2.0 + (b - r) * per, 4.0 + (r - g) * per),
    )
    hue = hue + 6.0 * turn + 6.0
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = hue + offset
        k = k - 6.0 * xp.floor(k / 6.0)
        channels.append(value - chroma * xp.maximum(0.0, xp.minimum(1.0, xp.minimum(k, 4.0 - k))))
    return tuple(channels)


def check_hue(turn_hue, xp):
    """Against colorsys, with greys and pairs of equal channels among the colours."""
    rng = np.random.default_rng(0)
    x = rng.integers(1, 256, (400, 3))
    x[:40] = x[:40, :1]  # grey
    for i in range(3):
        x[40 + 20 * i : 60 + 20 * i, i] = x[40 + 20 * i : 60 + 20 * i, i - 1]
    x = (x / 255).astype(np.float32)
    turns = rng.uniform(-0.2, 0.2, len(x)).astype(np.float32)
    expected = []
    for color, turn in zip(x.tolist(), turns.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*color)
        expected.append(colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value))
    found = np.stack(turn_hue(xp, tuple(x.T), turns), axis=-1)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("xp", [np, Rounding(2), Rounding(0)], ids=["exact", "up", "down"])
def test_hue_is_turned_right_however_the_maximum_is_rounded(xp):
    check_hue(turn_hue, xp)


def test_hue_by_equality_with_the_maximum_is_right_only_without_rounding():
    check_hue(hue_by_equality, np)
    for xp in (Rounding(2), Rounding(0)):
        with pytest.raises(AssertionError):
            check_hue(hue_by_equality, xp)
