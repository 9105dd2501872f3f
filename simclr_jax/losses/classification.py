"""Cross-entropy against labels: for the online classifier, linear evaluation and fine-tuning."""

import jax
import jax.numpy as jnp


def cross_entropy(logits, labels):
    """Computes the mean cross-entropy and the accuracy, float32 scalars.

    Args:
      logits: [N, C].
      labels: int [N], each from 0 to C - 1.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    loss = -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))
    return loss, jnp.mean(jnp.argmax(logits, axis=-1) == labels, dtype=jnp.float32)
