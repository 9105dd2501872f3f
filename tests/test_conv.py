"""The convolution and its gradients against loops in float64 and against XLA's own."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.encoders import conv
from simclr_jax.encoders.conv import conv2d, filter_gradient
from simclr_jax.mesh import batch_sharded, make_mesh, replicated, traced_on

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


@pytest.fixture(params=["AVX-512", "AVX2"], autouse=True)
def vectors(request, monkeypatch):
    """Both ways of the CPU, whichever this one is."""
    monkeypatch.setattr(conv, "wide_vectors", lambda: request.param == "AVX-512")


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_loops_and_gradients_equal_xlas(shape):
    """By one device, and as 8 devices would walk through the blocks."""
    x, kernel, strides, padding = arguments(*shape)
    expected = reference(x, kernel, strides, padding)

    def value_and_gradients(convolve):
        def value(x, kernel):
            y = convolve(x, kernel, strides, padding)
            return jnp.sum(jnp.sin(y)), y

        (_, y), gradients = jax.value_and_grad(value, (0, 1), has_aux=True)(x, kernel)
        return y, gradients

    @jax.jit
    def all_ways():
        on_eight = traced_on(make_mesh(), lambda: value_and_gradients(conv2d))
        return value_and_gradients(conv2d), on_eight(), value_and_gradients(native)

    *ours, (_, theirs) = all_ways()
    for found, gradients in ours:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)
        for own, other in zip(gradients, theirs, strict=True):
            # Sums of up to 2,000 products of either sign: rounding follows the largest.
            atol = max(1e-4, 1e-5 * np.abs(other).max())
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("shape", [SHAPES[0], *SHAPES[4:6], SHAPES[7], (6, 9, 4, 8, 3, 2)])
@pytest.mark.parametrize("multiplies_bfloat16", [False, True])
def test_in_bfloat16_only_arguments_and_results_are_rounded(
    shape, multiplies_bfloat16, monkeypatch
):
    """As loops in float64 over the same bfloat16 numbers, but for the result's rounding, 2^-9 of it; the gradient by
    the input, which XLA computes where the stride is 2, may also be rounded a tap of the filter.
    """
    monkeypatch.setattr(conv, "narrow_products", lambda: multiplies_bfloat16)
    x, kernel, strides, padding = arguments(*shape)
    x, kernel = (jnp.asarray(a, jnp.bfloat16) for a in (x, kernel))
    exact_x, exact_kernel = (np.asarray(a, np.float32) for a in (x, kernel))
    y, back = jax.vjp(lambda x, k: conv2d(x, k, strides, padding), x, kernel)
    expected = reference(exact_x, exact_kernel, strides, padding)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8, atol=1e-3)
    dy = jnp.asarray(np.random.default_rng(1).normal(size=y.shape), jnp.bfloat16)
    _, exact = jax.vjp(lambda x, k: native(x, k, strides, padding), exact_x, exact_kernel)
    for found, other in zip(back(dy), exact(np.asarray(dy, np.float32)), strict=True):
        assert found.dtype == jnp.bfloat16
        atol = 2**-7 * float(np.abs(other).max())
        np.testing.assert_allclose(found.astype(jnp.float32), other, rtol=2**-8, atol=atol)


def test_second_derivatives_in_bfloat16_are_not_lost(monkeypatch):
    """As XLA's convolution in float32 has them, but for the rounding of what is added up, 2^-8 of it."""
    monkeypatch.setattr(conv, "narrow_products", lambda: True)
    x, kernel, strides, padding = arguments(4, 8, 4, 6, 3, 1)

    def curvature(convolve, dtype):
        def value(t):
            y = convolve(jnp.asarray(t * x, dtype), jnp.asarray(kernel, dtype))
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        return float(jax.grad(jax.grad(value))(1.0))

    exact = curvature(lambda x, k: native(x, k, strides, padding), jnp.float32)
    found = curvature(lambda x, k: conv2d(x, k, strides, padding), jnp.bfloat16)
    np.testing.assert_allclose(found, exact, rtol=2**-7)


def test_filter_gradients_in_bfloat16_add_up_in_float32():
    """Only the arguments and the result are rounded, by 2^-9 each."""
    x, kernel, strides, padding = arguments(64, 16, 3, 4, 3, 1)
    dy = np.random.default_rng(1).normal(size=(64, 16, 16, 4)).astype(np.float32)
    half_x, half_dy = jnp.asarray(x, jnp.bfloat16), jnp.asarray(dy, jnp.bfloat16)
    found = filter_gradient(half_x, half_dy, kernel.shape, strides, padding)
    assert found.dtype == jnp.bfloat16
    x, dy = (np.asarray(half.astype(jnp.float32)) for half in (half_x, half_dy))
    (expected,) = jax.vjp(lambda k: native(x, k, strides, padding), kernel)[1](dy)
    np.testing.assert_allclose(found.astype(jnp.float32), expected, rtol=2**-8, atol=0.05)


MOVES = ("all-gather", "all-to-all", "collective-permute")


def forward_and_backward(x, dy):
    _, kernel, strides, padding = arguments(32, 16, 4, 6, 3, 1)
    y, back = jax.vjp(lambda x, k: conv2d(x, k, strides, padding), x, kernel)
    return y, *back(dy)


def compiled_over_eight(function):
    mesh = make_mesh()
    lies = batch_sharded(mesh)
    run = jax.jit(function, in_shardings=lies, out_shardings=(lies, lies, replicated(mesh)))
    x, *_ = arguments(32, 16, 4, 6, 3, 1)
    dy = np.ones((32, 16, 16, 6), np.float32)
    return run.lower(x, dy).compile().as_text(), run(x, dy), (x, dy)


def test_a_sharded_batch_is_convolved_where_it_lies():
    """Over 8 devices the only communication is one sum of the filter's gradient."""
    program, found, (x, dy) = compiled_over_eight(traced_on(make_mesh(), forward_and_backward))
    assert not any(name in program for name in MOVES)
    assert program.count(" all-reduce(") + program.count(" all-reduce-start(") == 1
    _, kernel, strides, padding = arguments(32, 16, 4, 6, 3, 1)
    y, back = jax.vjp(lambda x, k: native(x, k, strides, padding), x, kernel)
    for own, expected in zip(found, (y, *back(dy)), strict=True):
        np.testing.assert_allclose(own, expected, rtol=1e-4, atol=1e-4)


def test_not_told_of_the_devices_it_moves_images():
    """What `traced_on` is for."""
    program, _, _ = compiled_over_eight(forward_and_backward)
    assert any(name in program for name in MOVES)


def test_inside_a_trace_the_mesh_can_be_asked_for():
    seen = []

    def ask(x):
        seen.append(jax.sharding.get_abstract_mesh().size)
        return x

    jax.eval_shape(traced_on(make_mesh(), ask), jnp.zeros(8))
    jax.eval_shape(traced_on(make_mesh(jax.devices()[:2]), ask), jnp.zeros(8))
    jax.eval_shape(ask, jnp.zeros(8))
    assert seen == [8, 2, 0]


SQUARES = [(4, 12, 3, 5, 7, 2), (3, 8, 3, 4, 3, 2), (2, 10, 1, 4, 3, 2), (2, 14, 4, 3, 7, 2)]


@pytest.mark.parametrize("shape", SQUARES)
def test_a_gpus_convolution_of_squares_equals_loops(shape):
    """The first layer as a GPU computes it, with its gradients, here on a CPU."""
    x, kernel, strides, padding = arguments(*shape)
    way = conv._fastest_on_gpu(x, kernel, strides, padding)
    y, back = jax.vjp(lambda x, k: way(x, k, strides, padding), x, kernel)
    np.testing.assert_allclose(y, reference(x, kernel, strides, padding), rtol=1e-4, atol=1e-4)
    expected, theirs = jax.vjp(lambda x, k: native(x, k, strides, padding), x, kernel)
    for ours, other in zip(back(expected), theirs(expected), strict=True):
        np.testing.assert_allclose(ours, other, rtol=1e-4, atol=1e-3)


def test_a_gpu_convolves_squares_where_channels_are_few():
    def first_filter(shape, platform):
        x, kernel, strides, padding = arguments(*shape)
        of = jax.jit(lambda *a: conv2d(*a, strides, padding))
        program = jax.export.export(of, platforms=[platform])(x, kernel).mlir_module()
        return "4x4x16x64" in program

    assert first_filter((2, 8, 3, 64, 7, 2), "cuda")
    assert not first_filter((2, 8, 3, 64, 7, 2), "tpu")
    assert not first_filter((2, 9, 3, 64, 7, 2), "cuda")  # of an odd size
    assert not first_filter((2, 8, 64, 64, 7, 2), "cuda")
