"""The contract of a loss, and what losses share: unit vectors, similarities and their metrics."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

# Stands for minus infinity on the diagonal: its exponential is 0 in float32 at any temperature,
# and unlike infinity it leaves 0 * x = 0 in the entropy.
MASKED = -1e9

# A device's share of the 2B x 2B similarities, bytes, above which they are computed in tiles. On
# 2 CPU cores the two take the same time at 1 MB, and the tiles half of it from 4 MB on; on
# accelerators this is where the tiles stop to matter beside a step of the encoder.
_DENSE_BYTES = 2**24


class Loss(NamedTuple):
    """A loss with its hyper-parameters bound.

    Attributes:
      apply: (z [2B, D], labels int [B]) -> (float32 scalar, {name: float32 scalar}). Rows 2i and
        2i + 1 of z are the two views of image i. Labels are -1 where there are none.
      text: the loss in words, for the summary before a run.
      needs_labels: whether the labels must be there.
    """

    apply: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
    text: str
    needs_labels: bool = False


def implementation_of(asked: str, batch_size: int, mesh: Mesh) -> str:
    """Returns "dense" or "chunked": what was asked for, or for "auto" what suits the size.

    Args:
      asked: the option loss.implementation.
      batch_size: B, images of the global batch.
      mesh: devices that divide the rows of the similarities.
    """
    if asked != "auto":
        return asked
    share = 4 * (2 * batch_size) ** 2 // mesh.size
    return "chunked" if share > _DENSE_BYTES else "dense"


def normalize(z):
    """Scales the rows of z [N, D] to unit length, in float32; z / max(|z|, 1e-6).

    A zero row stays zero, and its gradient is that of z / 1e-6: large, but finite.
    """
    z = z.astype(jnp.float32)
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))


def similarities(z, temperature: float):
    """Computes what dense losses start from.

    Args:
      z: projections [2B, D], not normalised.
      temperature: tau.

    Returns:
      logits: float32 [2B, 2B], cosine similarities / tau, MASKED on the diagonal;
      is_partner: bool [2B, 2B], True where the column is the other view of the row's image.
    """
    z = normalize(z)
    # HIGHEST: a float32 product; the TPU's default would round z to bfloat16.
    logits = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature
    row = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    return jnp.where(row == column, MASKED, logits), column == row ^ 1


def positives(logits, is_partner):
    """Returns each row's similarity with its partner / tau, [2B]. A masked sum, not a gather, is local to
    every shard.
    """
    return jnp.sum(jnp.where(is_partner, logits, 0.0), axis=1)


def contrastive_metrics(logits, positive) -> dict[str, jax.Array]:
    """Computes how well each anchor tells its positive from all 2B - 1 candidates. No gradient.

    Args:
      logits: [2B, 2B], see `similarities`.
      positive: [2B], see `positives`.

    Returns:
      float32 scalars:
        contrastive_top1, contrastive_top5: share of anchors whose positive is among the 1 or 5
          nearest (a tie counts against it, so that collapsed projections score 0);
        contrastive_entropy: mean entropy of the softmax over the candidates, in nats.
    """
    logits, positive = jax.lax.stop_gradient((logits, positive))
    nearer = jnp.sum(logits >= positive[:, None], axis=1) - 1  # the positive itself is one of them
    log_p = logits - jax.nn.logsumexp(logits, axis=1)[:, None]
    return ranks(nearer) | {
        "contrastive_entropy": jnp.mean(-jnp.sum(jnp.exp(log_p) * log_p, axis=1))
    }


def ranks(nearer) -> dict[str, jax.Array]:
    """Returns contrastive_top1 and contrastive_top5.

    `nearer`: int [2B], number of candidates, without the positive, at least as similar as the positive.
    """
    return {
        "contrastive_top1": jnp.mean(nearer < 1, dtype=jnp.float32),
        "contrastive_top5": jnp.mean(nearer < 5, dtype=jnp.float32),
    }
