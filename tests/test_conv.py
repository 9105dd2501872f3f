"""The convolution and its gradients against loops in float64 and against XLA's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.conv import conv2d, filter_gradient

# images, size, channels in, out, filter size, stride. The first are convolved in blocks, the last
# three are smaller than the filter.
SHAPES = [
    (24, 16, 3, 8, 3, 1),
    (5, 13, 2, 4, 3, 1),
    (2, 33, 2, 4, 7, 1),
    (6, 9, 3, 8, 3, 2),
    (16, 7, 4, 6, 3, 1),
    (16, 7, 4, 6, 1, 2),
    (8, 14, 3, 5, 7, 2),
    (5, 2, 4, 6, 3, 1),
    (8, 4, 3, 5, 3, 2),
    (3, 1, 2, 3, 3, 1),
]


def arguments(n, size, channels, filters, k, stride):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, size, size, channels)).astype(np.float32)
    kernel = rng.normal(size=(k, k, channels, filters)).astype(np.float32)
    pad = (k - 1) // 2
    return x, kernel, (stride, stride), ((pad, pad), (pad, pad))


def reference(x, kernel, strides, padding):
    x = np.pad(np.asarray(x, np.float64), ((0, 0), *padding, (0, 0)))
    h, w = kernel.shape[:2]
    rows = range(0, x.shape[1] - h + 1, strides[0])
    columns = range(0, x.shape[2] - w + 1, strides[1])
    out = [[np.tensordot(x[:, r : r + h, c : c + w], kernel, 3) for c in columns] for r in rows]
    return np.asarray(out).transpose(2, 0, 1, 3)


def native(x, kernel, strides, padding):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_loops(shape, parts):
    x, kernel, strides, padding = arguments(*shape)
    expected = reference(x, kernel, strides, padding)
    found = conv2d(x, kernel, strides, padding, parts)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_equal_xlas(shape, parts):
    x, kernel, strides, padding = arguments(*shape)

    def gradients(convolve, *parts):
        return jax.grad(
            lambda x, k: jnp.sum(jnp.sin(convolve(x, k, strides, padding, *parts))), (0, 1)
        )(x, kernel)

    for ours, theirs in zip(gradients(conv2d, parts), gradients(native), strict=True):
        # Sums of up to 2,000 products of either sign: rounding follows the largest.
        atol = max(1e-4, 1e-5 * np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=atol)


def test_filter_gradients_in_bfloat16_add_up_in_float32():
    """Only the arguments and the result are rounded, by 2^-9 each."""
    x, kernel, strides, padding = arguments(64, 16, 3, 4, 3, 1)
    dy = np.random.default_rng(1).normal(size=(64, 16, 16, 4)).astype(np.float32)
    x, dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    found = filter_gradient(x, dy, kernel.shape, strides, padding)
    assert found.dtype == jnp.bfloat16
    x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
    (expected,) = jax.vjp(lambda k: native(x, k, strides, padding), kernel)[1](dy)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=0.05)


def test_a_sharded_batch_is_convolved_where_it_lies():
    """Over 8 devices the only communication is one sum of the filter's gradient."""
    from simclr_jax.mesh import batch_sharded, make_mesh, replicated

    mesh = make_mesh()
    x, kernel, strides, padding = arguments(32, 16, 4, 6, 3, 1)
    dy = np.ones((32, 16, 16, 6), np.float32)

    def forward_and_backward(x, dy):
        y, back = jax.vjp(lambda x, k: conv2d(x, k, strides, padding, mesh.size), x, kernel)
        return y, *back(dy)

    lies, everywhere = batch_sharded(mesh), replicated(mesh)
    run = jax.jit(forward_and_backward, in_shardings=lies, out_shardings=(lies, lies, everywhere))
    program = run.lower(x, dy).compile().as_text()
    assert "all-gather" not in program
    assert "all-to-all" not in program
    assert program.count(" all-reduce(") + program.count(" all-reduce-start(") == 1
    y, back = jax.vjp(lambda x, k: native(x, k, strides, padding), x, kernel)
    for found, expected in zip(run(x, dy), (y, *back(dy)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
