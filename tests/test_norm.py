"""BatchNorm against statistics taken in float64 NumPy, group by group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from simclr_jax.mesh import batch_sharded, make_mesh
from simclr_jax.norm import batch_norm


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


def run(x, group, devices=1, **kwargs):
    norm = batch_norm(train=True, dtype=jnp.float32, momentum=0.9, group=group)(**kwargs)
    variables = norm.init(jax.random.key(0), x)
    apply = jax.jit(lambda v, x: norm.apply(v, x, mutable=["batch_stats"]))
    x = jax.device_put(x, batch_sharded(make_mesh(jax.devices()[:devices])))
    y, seen = apply(variables, x)
    return y, seen["batch_stats"]


@pytest.mark.parametrize("group", [0, 16, 8, 4, 2])
def test_groups_equal_the_reference_on_any_number_of_devices(group, devices):
    x = images(mean=3.0)
    y, stats = run(x, group, len(devices))
    expected, mean, var = normalized(x, group or 16)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(stats["mean"], 0.1 * mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-5)


def test_a_mean_of_1000_standard_deviations_is_no_trouble():
    x = images(mean=1000.0)
    y, stats = run(x, 0)
    expected, _, var = normalized(x, 16)
    # float32 keeps 1000 to 6e-5; the variance has no more error than that.
    np.testing.assert_allclose(y, expected, atol=2e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * var, rtol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(run(x, 0)[0] ** 3))(jnp.asarray(x))
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

    gradient = jax.grad(lambda x: jnp.sum(weight * run(x, group)[0]))(jnp.asarray(x))
    for index in list(np.ndindex(x.shape))[::5]:
        step = np.zeros(x.shape)
        step[index] = 1e-5
        difference = (value(x + step) - value(x - step)) / 2e-5
        np.testing.assert_allclose(gradient[index], difference, rtol=1e-4, atol=1e-4)


def test_over_the_whole_batch_it_is_flaxs_batchnorm():
    x = images(mean=2.0)
    y, stats = run(x, 0)
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)
    expected, seen = flax.apply(flax.init(jax.random.key(0), x), x, mutable=["batch_stats"])
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
