"""Cross-entropy against labels: for the online classifier, linear evaluation and fine-tuning."""

import jax
import jax.numpy as jnp


def cross_entropy(logits, labels):
    """Computes the mean cross-entropy and the accuracy over the rows that have a label, float32 scalars.

    Args:
      logits: [N, C].
      labels: int [N], each from 0 to C - 1, or below 0: none. Where no row has one, both results are 0.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    known = labels >= 0
    count = jnp.maximum(jnp.sum(known), 1)
    of_label = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    right = known & (jnp.argmax(logits, axis=-1) == labels)
    return -jnp.sum(jnp.where(known, of_label, 0)) / count, jnp.sum(right) / count
