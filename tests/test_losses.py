"""NT-Xent against Algorithm 1 written as loops in float64, and against the published code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.losses import nt_xent
from simclr_jax.losses.classification import cross_entropy
from simclr_jax.losses.contract import normalize


def algorithm_1(z, tau):
    """The paper's Algorithm 1, pair by pair, with the metrics, from z [2B, D]."""
    z = np.asarray(z, np.float64)
    n = len(z)
    s = np.array([[a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in z] for a in z])
    losses, top1, top5, entropies = [], [], [], []
    for i in range(n):
        j = i + 1 if i % 2 == 0 else i - 1
        others = [k for k in range(n) if k != i]
        largest = max(s[i, k] / tau for k in others)
        denominator = sum(np.exp(s[i, k] / tau - largest) for k in others)
        losses.append(-(s[i, j] / tau - largest - np.log(denominator)))
        rank = sum(s[i, k] >= s[i, j] for k in others if k != j)
        top1.append(rank < 1)
        top5.append(rank < 5)
        p = [np.exp(s[i, k] / tau - largest) / denominator for k in others]
        entropies.append(-sum(q * np.log(q) for q in p if q > 0))
    return np.mean(losses), np.mean(top1), np.mean(top5), np.mean(entropies)


def random_pairs(pairs=8, width=16, noise=1.0):
    rng = np.random.default_rng(0)
    base = np.repeat(rng.normal(size=(pairs, width)), 2, axis=0)
    return (base + noise * rng.normal(size=base.shape)).astype(np.float32)


def interleave(ab):
    """Rows a_0 ... a_n, b_0 ... b_n to a_0, b_0, a_1, b_1, ..."""
    return np.stack(np.split(ab, 2), axis=1).reshape(ab.shape)


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5, 1.0])
def test_loss_and_metrics_equal_algorithm_1(tau):
    z = random_pairs()
    loss, metrics = nt_xent(jnp.asarray(z), tau)
    expected = algorithm_1(z, tau)
    # Logits carry an absolute error of 1e-7 / tau in float32.
    np.testing.assert_allclose(loss, expected[0], rtol=1e-6, atol=1e-6 / tau)
    assert metrics["contrastive_top1"] == pytest.approx(expected[1])
    assert metrics["contrastive_top5"] == pytest.approx(expected[2])
    np.testing.assert_allclose(metrics["contrastive_entropy"], expected[3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_value_and_gradient_equal_the_published_codes(golden, tau):
    z = interleave(golden["loss_hidden"])
    (loss, _), gradient = jax.value_and_grad(nt_xent, has_aux=True)(jnp.asarray(z), tau)
    # The published loss sums over the two views: twice the mean over 2B anchors.
    np.testing.assert_allclose(2 * loss, golden[f"loss_tau{tau}_norm1"], rtol=2e-6)
    expected = interleave(golden[f"loss_tau{tau}_norm1_grad"])
    np.testing.assert_allclose(2 * gradient, expected, rtol=1e-4, atol=2e-6)


def test_gradient_equals_finite_differences_of_algorithm_1():
    z = random_pairs(pairs=3, width=4).astype(np.float64)
    gradient = jax.grad(lambda z: nt_xent(z, 0.2)[0])(jnp.asarray(z, jnp.float32))
    for index in np.ndindex(z.shape):
        step = np.zeros_like(z)
        step[index] = 1e-6
        difference = (algorithm_1(z + step, 0.2)[0] - algorithm_1(z - step, 0.2)[0]) / 2e-6
        np.testing.assert_allclose(gradient[index], difference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tau", [0.01, 0.1])
def test_finite_at_low_temperature_and_at_zero_rows(tau):
    z = random_pairs(noise=0.01)
    z[3] = 0
    (loss, metrics), gradient = jax.value_and_grad(nt_xent, has_aux=True)(jnp.asarray(z), tau)
    assert np.isfinite(loss)
    assert np.all(np.isfinite(gradient))
    assert all(np.isfinite(v) for v in metrics.values())


def test_collapsed_projections_score_zero_not_one():
    loss, metrics = nt_xent(jnp.ones((16, 4)), 0.1)
    np.testing.assert_allclose(loss, np.log(15), rtol=1e-6)
    np.testing.assert_allclose(metrics["contrastive_entropy"], np.log(15), rtol=1e-6)
    assert metrics["contrastive_top1"] == 0
    assert metrics["contrastive_top5"] == 0


def test_bfloat16_projections_are_computed_in_float32():
    z = jnp.asarray(random_pairs(), jnp.bfloat16)
    loss, _ = nt_xent(z, 0.1)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, algorithm_1(z, 0.1)[0], rtol=1e-6)


def wrong_partners(z, tau):
    return nt_xent(jnp.roll(z, 1, axis=0), tau)


def self_not_masked(z, tau):
    z = normalize(z)
    logits = z @ z.T / tau
    positive = logits[jnp.arange(len(z)), jnp.arange(len(z)) ^ 1]
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive), {}


@pytest.mark.parametrize("broken", [wrong_partners, self_not_masked])
def test_the_oracle_rejects_broken_losses(broken):
    z = random_pairs()
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(
            broken(jnp.asarray(z), 0.5)[0], algorithm_1(z, 0.5)[0], rtol=1e-3
        )


def test_cross_entropy_and_accuracy():
    logits = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 2.0, 0.0]])
    labels = np.array([0, 1, 2])
    loss, accuracy = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(p[np.arange(3), labels]).mean(), rtol=1e-6)
    assert accuracy == pytest.approx(2 / 3)


def test_rows_without_a_label_do_not_count():
    logits = jnp.asarray([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [1.0, 2.0, 0.0], [0.0, 0.0, 9.0]])
    labels = jnp.asarray([0, -1, 2, -2])
    labelled = cross_entropy(logits[::2], labels[::2])
    np.testing.assert_allclose(cross_entropy(logits, labels), labelled, rtol=1e-6)
    gradient = jax.grad(lambda x: cross_entropy(x, labels)[0])(logits)
    assert not np.any(gradient[1::2])
    np.testing.assert_array_equal(cross_entropy(logits, jnp.full(4, -1)), (0, 0))
