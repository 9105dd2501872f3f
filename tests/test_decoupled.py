"""DCL against loops in float64, and in tiles against dense; test_device_invariance.py has its steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import algorithm_1, random_pairs
from test_losses_in_tiles import check_tiles, softmax_in_tiles

from simclr_jax import assemble
from simclr_jax.losses import dcl, nt_xent
from simclr_jax.losses.contract import MASKED, positives, similarities
from simclr_jax.mesh import make_mesh


def loops(z, tau):
    """Yeh et al. 2022, equation 6, pair by pair: the positive is left out of the denominator."""
    z = np.asarray(z, np.float64)
    n = len(z)
    s = np.array([[a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in z] for a in z]) / tau
    losses = []
    for i in range(n):
        j = i ^ 1
        negatives = [s[i, k] for k in range(n) if k not in (i, j)]
        largest = max(negatives)
        denominator = sum(np.exp(x - largest) for x in negatives)
        losses.append(-s[i, j] + largest + np.log(denominator))
    return np.mean(losses)


@pytest.mark.parametrize("tau", [0.01, 0.1, 1.0])
def test_the_loss_equals_loops_and_the_metrics_those_of_nt_xent(tau):
    z = random_pairs()
    loss, metrics = dcl(jnp.asarray(z), tau)
    np.testing.assert_allclose(loss, loops(z, tau), rtol=1e-6, atol=1e-6 / tau)
    _, top1, top5, entropy = algorithm_1(z, tau)
    assert metrics["contrastive_top1"] == pytest.approx(top1)
    assert metrics["contrastive_top5"] == pytest.approx(top5)
    np.testing.assert_allclose(metrics["contrastive_entropy"], entropy, rtol=1e-5, atol=1e-5)


def test_the_gradient_equals_finite_differences_of_loops():
    z = random_pairs(pairs=3, width=4).astype(np.float64)
    gradient = jax.jit(jax.grad(lambda z: dcl(z, 0.2)[0]))(jnp.asarray(z, jnp.float32))
    for index in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[index] = 1e-6
        difference = (loops(z + step, 0.2) - loops(z - step, 0.2)) / 2e-6
        np.testing.assert_allclose(gradient[index], difference, rtol=1e-4, atol=1e-5)


def self_left_in(z, tau):
    logits, is_partner = similarities(z, tau)
    logits = jnp.where(jnp.eye(len(z)), 1 / tau, logits)
    positive = positives(logits, is_partner)
    return jnp.mean(jax.nn.logsumexp(jnp.where(is_partner, MASKED, logits), axis=1) - positive)


def mean_over_negatives(z, tau):
    return dcl(z, tau)[0] - np.log(len(z) - 2)


@pytest.mark.parametrize(
    "broken", [lambda z, tau: nt_xent(z, tau)[0], self_left_in, mean_over_negatives]
)
def test_the_loops_reject_broken_losses(broken):
    """The positive left in is NT-Xent."""
    z = random_pairs(noise=0.3)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(broken(jnp.asarray(z), 0.5), loops(z, 0.5), rtol=1e-3)


def test_it_goes_below_zero_where_positives_are_near():
    z = np.repeat(np.eye(8, dtype=np.float32), 2, axis=0)
    loss, _ = dcl(jnp.asarray(z), 0.1)
    np.testing.assert_allclose(loss, -10 + np.log(14), rtol=1e-6)
    assert loss < 0


@pytest.mark.parametrize(("chunk", "devices"), [(2, 1), (24, 1), (1024, 1), (16, 4), (24, 8)])
def test_in_tiles_value_metrics_and_gradient_are_the_dense_ones(chunk, devices):
    in_tiles = functools.partial(softmax_in_tiles, positive_in_sum=False)
    check_tiles(in_tiles, dcl, chunk, devices, tau=0.01 if chunk == 24 else 0.5)


@pytest.mark.parametrize("chunk", [None, 6])
def test_the_lowest_temperature_gives_numbers(chunk):
    """Logits up to 1000: the positive, which is not in the sum, overflows an exponential."""
    z = jnp.asarray(random_pairs(noise=0.01))
    loss = dcl
    if chunk:
        loss = functools.partial(softmax_in_tiles, chunk=chunk, positive_in_sum=False)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(lambda z: loss(z, 1e-3), has_aux=True))(
        z
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))
    assert all(np.isfinite(v) for v in metrics.values())
    np.testing.assert_allclose(value, loops(z, 1e-3), rtol=1e-3)


def test_a_run_says_which_loss_it_uses(tiny):
    tiny.loss.name = "dcl"
    mesh = make_mesh(jax.devices()[:1])
    assert assemble.contrastive_loss(tiny, mesh).text == "DCL, dense for this size, tau 0.5"
    tiny.data.batch_size = 4096
    assert assemble.contrastive_loss(tiny, mesh).text == "DCL, chunked for this size, tau 0.5"
