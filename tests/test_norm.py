"""BatchNorm against statistics taken in float64 NumPy, group by group."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from simclr_jax.encoders.norm import batch_norm, moments, normalize
from simclr_jax.mesh import batch_sharded, make_mesh


def normalized(x, group, epsilon=1e-5):
    """Each run of `group` rows of x [N, ..., C] normalised by its own mean and variance, and the
    means over the groups of both.
    """
    x = np.asarray(x, np.float64)
    parts, means, variances = [], [], []
    for start in range(0, len(x), group):
        rows = x[start : start + group].reshape(-1, x.shape[-1])
        mean, var = rows.mean(axis=0), rows.var(axis=0)
        parts.append((x[start : start + group] - mean) / np.sqrt(var + epsilon))
        means.append(mean)
        variances.append(var)
    return np.concatenate(parts), np.mean(means, axis=0), np.mean(variances, axis=0)


def images(mean=0.0):
    return (mean + np.random.default_rng(0).normal(size=(16, 5, 4, 3))).astype(np.float32)


def train(x, group):
    """Returns y and the running statistics after one step from 0 and 1."""
    norm = batch_norm(train=True, dtype=jnp.float32, momentum=0.9, group=group)()
    channels = x.shape[-1]
    y, seen = norm.apply(
        {
            "params": {"scale": jnp.ones(channels), "bias": jnp.zeros(channels)},
            "batch_stats": {"mean": jnp.zeros(channels), "var": jnp.ones(channels)},
        },
        x,
        mutable=["batch_stats"],
    )
    return y, seen["batch_stats"]


GROUPS = (0, 16, 8, 4, 2)


@functools.cache
def grouped(devices):
    """{group: result of `train`} of images over so many devices, by one program."""
    x = jax.device_put(images(mean=3.0), batch_sharded(make_mesh(jax.devices()[:devices])))
    return jax.jit(lambda x: {group: train(x, group) for group in GROUPS})(x)


@pytest.mark.parametrize("group", GROUPS)
def test_groups_equal_the_reference_on_any_number_of_devices(group, devices):
    y, stats = grouped(len(devices))[group]
    expected, mean, var = normalized(images(mean=3.0), group or 16)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_it_starts_at_scale_1_bias_0_mean_0_and_variance_1():
    """As `train` above supposes."""
    norm = batch_norm(train=True, dtype=jnp.float32, momentum=0.9)()
    variables = norm.init(jax.random.key(0), images())
    for name, value in {"scale": 1, "bias": 0}.items():
        np.testing.assert_array_equal(variables["params"][name], np.full(3, value))
    for name, value in {"mean": 0, "var": 1}.items():
        np.testing.assert_array_equal(variables["batch_stats"][name], np.full(3, value))


def test_a_mean_of_1000_standard_deviations_is_no_trouble():
    x = images(mean=1000.0)

    def cubes(x):
        y, stats = train(x, 0)
        return jnp.sum(y**3), (y, stats)

    (_, (y, stats)), gradient = jax.jit(jax.value_and_grad(cubes, has_aux=True))(x)
    expected, _, var = normalized(x, 16)
    # float32 keeps 1000 to 6e-5; the variance has no more error than that.
    np.testing.assert_allclose(y, expected, atol=2e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)
    assert np.all(np.isfinite(gradient))


def test_the_textbook_formula_fails_where_ours_does_not():
    """E[x^2] - E[x]^2 in float32: what the test above guards against."""
    x = jnp.asarray(images(mean=1000.0))
    var = jnp.mean(x * x, axis=(0, 1, 2)) - jnp.mean(x, axis=(0, 1, 2)) ** 2
    assert np.abs(var - 1).max() > 0.02


@pytest.mark.parametrize("group", [0, 4])
def test_the_gradient_is_that_of_the_formula_with_no_term_left_out(group):
    """Against finite differences in float64."""
    x = images()[:8, :2, :2, :2]
    weight = np.random.default_rng(1).normal(size=x.shape)

    def value(x):
        return np.sum(weight * normalized(x, group or 8)[0])

    gradient = np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(weight * train(x, group)[0])))(x))
    for index in list(np.ndindex(x.shape))[::5]:
        step = np.zeros(x.shape)
        step[index] = 1e-5
        difference = (value(x + step) - value(x - step)) / 2e-5
        np.testing.assert_allclose(gradient[index], difference, rtol=1e-4, atol=1e-4)


def of_float64(x, scale, dy, epsilon=1e-5):
    """d loss / d (x, scale, bias) of a whole batch, by Ioffe and Szegedy 2015, section 3."""
    x, scale, dy = (np.asarray(a, np.float64) for a in (x, scale, dy))
    axes = tuple(range(x.ndim - 1))
    mean, inverse = x.mean(axes), 1 / np.sqrt(x.var(axes) + epsilon)
    dhat, hat = dy * scale, (x - mean) * inverse
    count = x.size / x.shape[-1]
    by_var = (dhat * (x - mean)).sum(axes) * -0.5 * inverse**3
    by_mean = -inverse * dhat.sum(axes)
    dx = dhat * inverse + by_var * 2 * (x - mean) / count + by_mean / count
    return dx, (dy * hat).sum(axes), dy.sum(axes)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2**-8)])
def test_its_gradients_are_rounded_once(dtype, tolerance):
    """In bfloat16 too: their terms are added in float32. 2**-8 is half a step of its 8 bits."""
    rng = np.random.default_rng(2)
    x, dy = (jnp.asarray(a, dtype) for a in (images(mean=3.0), rng.normal(size=images().shape)))
    scale, bias = jnp.asarray([0.5, 1.0, 2.0]), jnp.asarray([0.1, -0.1, 0.0])

    def y(x, scale, bias):
        return normalize(x[None], scale, bias, 1e-5, dtype)[0][0]

    found = jax.jit(lambda *of, dy: jax.vjp(y, *of)[1](dy))(x, scale, bias, dy=dy)
    assert [a.dtype for a in found] == [dtype, jnp.float32, jnp.float32]
    for a, b in zip(found, of_float64(x, scale, dy), strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=2e-5)


def test_over_the_whole_batch_it_is_flaxs_batchnorm():
    x = images(mean=2.0)
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)

    def theirs(x):
        return flax.apply(flax.init(jax.random.key(0), x), x, mutable=["batch_stats"])

    (y, stats), (expected, seen) = jax.jit(lambda x: (train(x, 0), theirs(x)))(x)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        stats,
        seen["batch_stats"],
    )


def test_evaluation_uses_the_running_statistics():
    x = images()
    norm = batch_norm(train=False, dtype=jnp.float32, momentum=0.9, group=4)(use_bias=False)
    variables = norm.init(jax.random.key(0), x)
    assert "bias" not in variables["params"]
    variables["batch_stats"] = {"mean": jnp.full(3, 2.0), "var": jnp.full(3, 4.0)}
    np.testing.assert_allclose(norm.apply(variables, x), (x - 2) / np.sqrt(4 + 1e-5), rtol=1e-5)


def test_a_constant_channel_of_bfloat16_has_no_negative_variance():
    x = jnp.asarray(np.full((1, 1000, 64), np.linspace(500, 1500, 64)), jnp.bfloat16)
    assert np.all(np.asarray(jax.jit(moments)(x)[1]) >= 0)
