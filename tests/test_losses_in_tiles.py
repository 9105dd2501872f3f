"""NT-Xent in tiles: equal to the dense loss, which test_losses.py holds against Algorithm 1."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import algorithm_1, random_pairs

from simclr_jax.losses import nt_xent, nt_xent_chunked
from simclr_jax.losses.softmax_tiles import terms_in_tiles
from simclr_jax.mesh import batch_sharded, make_mesh

# Tiles of 2B = 64 rows that divide them, that do not, that hold all, and that are larger; with the
# devices that the rows are divided over.
GRID = [(2, 1), (16, 1), (24, 1), (1024, 1), (16, 2), (24, 4), (64, 4), (2, 8), (24, 8), (1024, 8)]


def both(loss, z):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))(z)


def softmax_in_tiles(*args, **options):
    return terms_in_tiles(*args, **options).loss()


@functools.cache
def of_dense(dense, tau):
    return both(lambda z: dense(z, tau), random_pairs(pairs=32))


def check_tiles(in_tiles, dense, chunk, devices, tau):
    """Value, metrics and gradient of a loss in tiles are those of the dense one. Returns the value."""
    z = random_pairs(pairs=32)
    mesh = make_mesh(jax.devices()[:devices], fsdp=min(2, devices))
    (loss, metrics), gradient = both(
        lambda z: in_tiles(z, tau, chunk=chunk, mesh=mesh), jax.device_put(z, batch_sharded(mesh))
    )
    (dense_loss, dense_metrics), dense_gradient = of_dense(dense, tau)
    # A cosine is off by some 1e-7, so a logit by 1e-7 / tau.
    tolerance = max(1e-5, 1e-6 / tau)
    np.testing.assert_allclose(loss, dense_loss, rtol=tolerance)
    np.testing.assert_allclose(
        gradient, dense_gradient, atol=tolerance * np.abs(dense_gradient).max()
    )
    assert metrics.keys() == dense_metrics.keys()
    for name, value in dense_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=tolerance, atol=1e-6, err_msg=name)
    return loss


@pytest.mark.parametrize(("chunk", "devices"), GRID)
def test_value_metrics_and_gradient_are_the_dense_ones(chunk, devices):
    tau = 0.01 if chunk in (24, 1024) else 0.5
    loss = check_tiles(nt_xent_chunked, nt_xent, chunk, devices, tau)
    expected = algorithm_1(random_pairs(pairs=32), tau)[0]
    np.testing.assert_allclose(loss, expected, rtol=max(1e-5, 1e-6 / tau))


def test_the_gradient_of_dot_products_of_any_size_is_finite():
    """Logits of unit vectors are 2 / tau apart at most, which lets one exponential serve two anchors. These are not."""
    z = jnp.asarray(20 * random_pairs())

    def in_tiles(z):
        return softmax_in_tiles(z, 0.5, normalized=False, chunk=6)

    (loss, _), gradient = both(in_tiles, z)
    (expected, _), dense_gradient = both(lambda z: nt_xent(z, 0.5, normalized=False), z)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    scale = np.abs(dense_gradient).max()
    np.testing.assert_allclose(gradient, dense_gradient, atol=1e-5 * scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_64_bit_numbers_change_no_contract(dtype):
    z = random_pairs(pairs=32).astype(dtype)
    with jax.enable_x64(True):
        (loss, _), gradient = both(lambda z: nt_xent_chunked(z, 0.5, chunk=6), jnp.asarray(z))
    (expected, _), dense_gradient = both(lambda z: nt_xent(z, 0.5), z.astype(np.float32))
    assert gradient.dtype == dtype
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, dense_gradient, atol=1e-5 * np.abs(dense_gradient).max())


def test_the_cotangent_scales_the_gradient_and_the_metrics_have_none():
    z = jnp.asarray(random_pairs())

    @jax.jit
    def gradients(z):
        once = jax.grad(lambda z: nt_xent_chunked(z, 0.1)[0])(z)
        thrice = jax.grad(lambda z: 3 * nt_xent_chunked(z, 0.1)[0])(z)
        return (
            once,
            thrice,
            jax.grad(lambda z: nt_xent_chunked(z, 0.1)[1]["contrastive_entropy"])(z),
        )

    once, thrice, of_metrics = gradients(z)
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-5, atol=1e-7)
    assert not np.any(of_metrics)


def test_collapsed_projections_score_zero_not_one():
    """Equal similarities are equal to the last bit in every tile, and a tie counts against."""
    z = jnp.broadcast_to(jnp.asarray(random_pairs(pairs=1, width=128)[:1]), (32, 128))
    _, metrics = nt_xent_chunked(z, 0.1, chunk=12)
    assert metrics["contrastive_top1"] == 0
    assert metrics["contrastive_top5"] == 0


def test_an_odd_tile_is_refused():
    with pytest.raises(ValueError, match="chunk=3: expected an even number"):
        nt_xent_chunked(jnp.ones((8, 4)), 0.1, chunk=3)


@pytest.mark.parametrize("loss", [nt_xent, nt_xent_chunked])
@pytest.mark.parametrize("tau", [0.0, -1.0])
def test_a_temperature_that_is_not_above_0_is_refused(loss, tau):
    with pytest.raises(ValueError, match=f"temperature={tau}: expected a number above 0"):
        loss(jnp.ones((4, 2)), tau)


@pytest.mark.parametrize("loss", [nt_xent, nt_xent_chunked])
@pytest.mark.parametrize("rows", [0, 7])
def test_projections_without_partners_are_refused(loss, rows):
    with pytest.raises(ValueError, match=f"z has {rows} rows: expected an even number"):
        loss(jnp.ones((rows, 4)), 0.1)


PROGRAM = """
import json, pathlib, re
import jax, jax.numpy as jnp
from simclr_jax.losses import nt_xent_chunked

z = jax.random.normal(jax.random.key(0), (2 * 8192, 128))
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
before = peak()
(loss, _), gradient = jax.jit(jax.value_and_grad(lambda z: nt_xent_chunked(z, 0.1), has_aux=True))(z)
norm = float(jnp.linalg.norm(gradient))
# Not getrusage: on Linux its maximum begins at that of the process that started this one.
print(json.dumps({"loss": float(loss), "norm": norm, "more": peak() - before}))
"""


def memory(loss, images):
    """Bytes that the compiled loss and its gradient take beside z and the gradient."""
    z = jax.ShapeDtypeStruct((2 * images, 128), jnp.float32)
    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(z).compile()
    return program.memory_analysis().temp_size_in_bytes


def test_8192_images_take_a_twentieth_of_the_memory_of_their_similarities():
    """Which are 1.1 GB; the dense loss and its gradient hold them at least once."""
    similarities = 4 * (2 * 8192) ** 2
    assert memory(lambda z: nt_xent_chunked(z, 0.1), 8192) < similarities / 20
    assert memory(lambda z: nt_xent(z, 0.1), 8192) > similarities


@pytest.mark.slow
def test_8192_images_take_less_than_half_a_gigabyte():
    """Peak resident memory of a process of its own; the similarities alone would be 1.1 GB, the dense
    loss and its gradient hold several such matrices.
    """
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=True
    )
    result = json.loads(process.stdout)
    assert result["more"] < 5e8
    # Random directions: 16383 candidates, cosines of variance 1 / 128, so logits of 100 / 128.
    np.testing.assert_allclose(result["loss"], np.log(16383) + 100 / 128 / 2, rtol=0.01)
    assert 0 < result["norm"] < 1


@pytest.mark.parametrize("tau", [1 / 30, 1 / 31, 1 / 100])
def test_far_apart_normalisers_keep_the_gradient(tau):
    """Where one exponential serves two, and where it would leave float32's range: anchors whose log-normalisers lie
    2 / tau apart, as one pair is alone on the far side of all others.
    """
    rng = np.random.default_rng(0)
    z = np.array([[1.0, 0.0, 0.0]] * 30 + [[-1.0, 0.0, 0.0]] * 2) + 0.05 * rng.normal(size=(32, 3))
    z[31] = -z[31] + 0.3  # and its partner is on this side
    at = jnp.asarray(z, jnp.float32)
    ours = jax.grad(lambda z: nt_xent_chunked(z, tau, chunk=8)[0])(at)
    dense = jax.grad(lambda z: nt_xent(z, tau)[0])(at)
    assert np.abs(dense).max() > 0.1
    np.testing.assert_allclose(ours, dense, atol=2e-5 * float(np.abs(dense).max()))
