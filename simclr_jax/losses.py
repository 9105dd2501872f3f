"""NT-Xent, the normalised temperature-scaled cross-entropy (SimCLR paper, equation 1, Algorithm 1).

Pure and written for the whole batch: under `jit` over a sharded batch the compiler gathers the
projections, and the result does not depend on the number of devices.
"""

import jax
import jax.numpy as jnp

# Stands for minus infinity on the diagonal: its exponential is 0 in float32 at any temperature,
# and unlike infinity it leaves 0 * x = 0 in the entropy.
MASKED = -1e9


def normalize(z):
    """Rows of z [N, D] scaled to unit length, in float32. A zero row stays zero, with gradient 0."""
    z = z.astype(jnp.float32)
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))


def nt_xent(z, temperature):
    """NT-Xent over all pairs of the batch.

    Args:
      z: projections [2B, D]; rows 2i and 2i + 1 are the two views of image i. Not normalised.
      temperature: tau, the divisor of the cosine similarities, above 0.

    Returns:
      loss, a float32 scalar: the mean over all 2B anchors of
        -log( exp(s(i, j) / tau) / sum over k != i of exp(s(i, k) / tau) ), j the partner of i;
      metrics, float32 scalars over the 2B - 1 candidates of every anchor:
        contrastive_top1, contrastive_top5: share of anchors whose positive is among the 1 or 5
          nearest (a tie counts against it, so that collapsed projections score 0);
        contrastive_entropy: mean entropy of the softmax, in nats.
    """
    z = normalize(z)
    # HIGHEST: a float32 product; the TPU's default would round z to bfloat16.
    logits = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature
    row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    logits = jnp.where(row == column, MASKED, logits)
    log_normalizer = jax.nn.logsumexp(logits, axis=1)
    # A masked sum rather than a gather: element-wise, so local to every shard.
    positive = jnp.sum(jnp.where(column == row ^ 1, logits, 0.0), axis=1)
    loss = jnp.mean(log_normalizer - positive)
    return loss, _contrastive_metrics(*jax.lax.stop_gradient((logits, log_normalizer, positive)))


def _contrastive_metrics(logits, log_normalizer, positive):
    nearer = jnp.sum(logits >= positive[:, None], axis=1) - 1  # the positive itself is one of them
    log_p = logits - log_normalizer[:, None]
    return {
        "contrastive_top1": jnp.mean(nearer < 1, dtype=jnp.float32),
        "contrastive_top5": jnp.mean(nearer < 5, dtype=jnp.float32),
        "contrastive_entropy": jnp.mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=1)),
    }


def cross_entropy(logits, labels):
    """Mean cross-entropy and accuracy of logits [N, C] against integer labels [N], float32."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
