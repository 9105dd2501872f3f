"""The contract of a loss, and what losses share: unit vectors, similarities and their metrics."""

from collections.abc import Callable, Mapping
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
        2i + 1 of z are the two views of image i. Labels are -1 where there are none. With `takes_stored`, a
        third argument may be negatives of earlier batches, a `stored.Stored`.
      text: the loss in words, for the summary before a run.
      needs_labels: whether the labels must be there.
      takes_stored: whether it can count negatives of earlier batches.
    """

    apply: Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
    text: str
    needs_labels: bool = False
    takes_stored: bool = False


class SoftmaxTerms(NamedTuple):
    """Holds the terms of a softmax loss, which is the mean over the anchors of log_normalizer - positive.

    Attributes:
      log_normalizer: float32 [2B], log of the sum over an anchor's candidates of exp(s / tau).
      positive: float32 [2B], the anchor's similarity with its partner / tau.
      metrics: see `contrastive_metrics`.
    """

    log_normalizer: jax.Array
    positive: jax.Array
    metrics: dict[str, jax.Array]

    def loss(self) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss, a float32 scalar, and the metrics."""
        return jnp.mean(self.log_normalizer - self.positive), self.metrics


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


def described(name: str, implementation: str, options: Mapping[str, Any], *more: str) -> str:
    """Says which loss a run has: its name, how it is computed, and the options that are not usual."""
    chosen = " for this size" if options["implementation"] == "auto" else ""
    unusual = [
        *(["negatives of the other view only"] if options["negatives"] == "other_view" else []),
        *([] if options["normalize"] else ["z not normalised"]),
    ]
    return ", ".join([name, f"{implementation}{chosen}", *more, *unusual])


def normalize(z):
    """Scales the rows of z [N, D] to unit length, in float32; z / max(|z|, 1e-6).

    A zero row stays zero, and its gradient is that of z / 1e-6: large, but finite.
    """
    z = z.astype(jnp.float32)
    return z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))


def embedded(z, normalized: bool):
    """Returns z [N, D] in float32, its rows scaled to unit length if `normalized`."""
    return normalize(z) if normalized else z.astype(jnp.float32)


def check_pairs(z, temperature: float) -> None:
    """Raises a ValueError unless z [2B, D] may hold two views of each image, and tau, if it is known, is above 0."""
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a number above 0")
    if len(z) % 2 or len(z) == 0:
        raise ValueError(f"z has {len(z)} rows: expected an even number, two views of each image")


def similarities(z, temperature: float, normalized: bool = True):
    """Computes the similarities of all pairs, from which dense losses start.

    Args:
      z: projections [2B, D], not normalised.
      temperature: tau.
      normalized: compare directions, by their cosine; else z themselves, by their dot product.

    Returns:
      logits: float32 [2B, 2B], similarities / tau, MASKED on the diagonal;
      is_partner: bool [2B, 2B], True where the column is the other view of the row's image.

    Raises:
      ValueError: the number of rows is odd, or 0; or tau is not above 0.
    """
    check_pairs(z, temperature)
    z = embedded(z, normalized)
    # HIGHEST: a float32 product; the TPU's default would round z to bfloat16.
    logits = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature
    row, column = rows_and_columns(logits.shape)
    return jnp.where(row == column, MASKED, logits), column == row ^ 1


def rows_and_columns(shape: tuple[int, ...]):
    """Returns the row number and the column number of each place of a matrix, int32 [rows, columns]."""
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))


def only_other_view(logits):
    """Masks the logits [2B, 2B] whose row and column are both the first, or both the second, view of an image, so
    that only candidates of the other view count.
    """
    row, column = rows_and_columns(logits.shape)
    return jnp.where((row ^ column) % 2 == 0, MASKED, logits)


def positives(logits, is_partner):
    """Returns each row's similarity with its partner / tau, [2B]. A masked sum, not a gather, is local to
    every shard.
    """
    return jnp.sum(jnp.where(is_partner, logits, 0.0), axis=1)


def contrastive_metrics(logits, positive) -> dict[str, jax.Array]:
    """Computes how well each anchor tells its positive from the candidates. No gradient.

    Args:
      logits: [2B, 2B], see `similarities`.
      positive: [2B], see `positives`.

    Returns:
      float32 scalars, over all 2B - 1 candidates:
        contrastive_top1, contrastive_top5: share of anchors whose positive is among the 1 or 5
          nearest (a tie counts against it, so that collapsed projections score 0);
        contrastive_entropy: mean entropy of the softmax over the candidates, in nats;
      and over the B candidates of the other view, as the published code and the paper's Table 5 have it:
        other_view_top1, other_view_top5, other_view_entropy.
    """
    logits, positive = jax.lax.stop_gradient((logits, positive))
    every, other = (_told(x, positive) for x in (logits, only_other_view(logits)))
    return metrics_of(*every, *other)


def _told(logits, positive):
    """Returns how many candidates are at least as near as the positive, and the entropy, [2B] each."""
    nearer = jnp.sum(logits >= positive[:, None], axis=1) - 1  # the positive itself is one of them
    log_p = logits - jax.nn.logsumexp(logits, axis=1)[:, None]
    return nearer, -jnp.sum(jnp.exp(log_p) * log_p, axis=1)


def metrics_of(nearer, entropy, other_nearer, other_entropy) -> dict[str, jax.Array]:
    """Returns the metrics of `contrastive_metrics`.

    Args:
      nearer: int [2B], candidates, without the positive, at least as similar as the positive.
      entropy: [2B], of the softmax over the candidates, nats.
      other_nearer, other_entropy: [2B], with the candidates of the other view only.
    """
    found = {}
    for name, near, spread in (
        ("contrastive", nearer, entropy),
        ("other_view", other_nearer, other_entropy),
    ):
        found[f"{name}_top1"] = jnp.mean(near < 1, dtype=jnp.float32)
        found[f"{name}_top5"] = jnp.mean(near < 5, dtype=jnp.float32)
        found[f"{name}_entropy"] = jnp.mean(spread)
    return found
