"""The max-pool and its gradient against loops in float64."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.encoders.pool import max_pool
from simclr_jax.mesh import batch_sharded, make_mesh

SYMMETRIC = ((1, 1), (1, 1))
SHAPES = [(8, 12, 16, 3), (8, 7, 9, 2), (8, 3, 4, 1), (8, 2, 2, 2)]


def images(shape, dtype=np.float32):
    """Of few values, so that many windows have more than one greatest pixel."""
    return np.random.default_rng(0).integers(-9, 10, shape).astype(dtype)


def reference(x, padding, dy=None, first=True):
    """Pools x; with dy, returns d loss / d x: of equal pixels the first of a window takes all of it."""
    x = np.asarray(x, np.float64)
    if padding == "SAME":
        outs = [-(-n // 2) for n in x.shape[1:3]]
        alls = [max(0, 2 * (m - 1) + 3 - n) for m, n in zip(outs, x.shape[1:3], strict=True)]
        padding = [(n // 2, n - n // 2) for n in alls]
    padded = np.pad(x, ((0, 0), *padding, (0, 0)), constant_values=-np.inf)
    h, w = ((n - 3) // 2 + 1 for n in padded.shape[1:3])
    y, dx = np.empty((len(x), h, w, x.shape[3])), np.zeros(padded.shape)
    for n, i, j, c in np.ndindex(y.shape):
        window = padded[n, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3, c]
        y[n, i, j, c] = window.max()
        if dy is not None:
            where = np.argwhere(window == window.max())[0 if first else -1]
            dx[n, 2 * i + where[0], 2 * j + where[1], c] += dy[n, i, j, c]
    if dy is None:
        return y
    (top, _), (left, _) = padding
    return dx[:, top : top + x.shape[1], left : left + x.shape[2]]


def gradient(x, padding, dy):
    return jax.jit(lambda x, dy: jax.vjp(lambda x: max_pool(x, padding), x)[1](dy)[0])(x, dy)


@pytest.mark.parametrize(
    "devices", [1, 8, *(pytest.param(n, marks=pytest.mark.whole) for n in (2, 4))]
)
@pytest.mark.parametrize("padding", ["SAME", SYMMETRIC])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_loops(shape, padding, devices):
    x = images(shape)
    expected = reference(x, padding)
    dy = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32)
    rows = batch_sharded(make_mesh(jax.devices()[:devices]))
    placed = jax.device_put(x, rows)
    np.testing.assert_array_equal(jax.jit(max_pool, static_argnums=1)(placed, padding), expected)
    found = gradient(placed, padding, jax.device_put(dy, rows))
    np.testing.assert_allclose(found, reference(x, padding, dy), atol=1e-6)


def test_which_of_equal_pixels_it_is_makes_a_difference():
    """The test above needs images with equal pixels to see it."""
    x = images(SHAPES[0])
    dy = np.random.default_rng(1).normal(size=reference(x, "SAME").shape)
    first, last = (reference(x, "SAME", dy, first=way) for way in (True, False))
    assert np.abs(first - last).max() > 0.1


def test_in_bfloat16_the_gradient_is_rounded_once():
    x = images(SHAPES[0], jnp.bfloat16)
    dy = np.random.default_rng(1).normal(size=reference(x, "SAME").shape).astype(jnp.bfloat16)
    found = gradient(x, "SAME", dy)
    assert found.dtype == jnp.bfloat16
    expected = reference(x, "SAME", np.asarray(dy, np.float64))
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_what_is_not_a_number_stays_in_sight():
    x = images(SHAPES[0])
    x[0, 5, 5, 0] = np.nan
    y, _ = jax.value_and_grad(lambda x: jnp.sum(max_pool(x, "SAME")))(x)
    assert np.isnan(y)


@pytest.mark.parametrize(("platform", "scatters"), [("cpu", False), ("cuda", False), ("tpu", True)])
def test_only_a_tpu_scatters(platform, scatters):
    x = jax.ShapeDtypeStruct(SHAPES[0], jnp.bfloat16)
    of = jax.jit(jax.grad(lambda x: jnp.sum(max_pool(x, "SAME")).astype(jnp.float32)))
    program = jax.export.export(of, platforms=[platform])(x).mlir_module()
    assert ("select_and_scatter" in program) == scatters
