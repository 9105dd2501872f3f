"""Computes losses that are a function of one anchor's similarities with all views of the batch.

Such a loss takes the `Rows` of some anchors and returns one number an anchor. Dense: one call for all anchors. In
tiles: a device takes `chunk` of its anchors at a time (memory for 2B x chunk numbers) and computes each tile again
for the gradient.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from simclr_jax.losses.contract import (
    MASKED,
    embedded,
    metrics_of,
    rows_and_columns,
)
from simclr_jax.losses.tiles import divide, first_row, gather, on_each_device

CHUNK = 128


class Candidates(NamedTuple):
    """Says which views anchors are compared with, and how.

    Attributes:
      normalized: compare views by their cosine; else by their dot product.
      other_view: only second views are negatives of a first view, and only first views of a second.
      temperature: tau, of the softmax whose entropy is a metric.
    """

    normalized: bool = True
    other_view: bool = False
    temperature: float = 1.0


class Rows(NamedTuple):
    """Some anchors beside all 2B views of the batch; every array is [n, 2B].

    Attributes:
      similarity: float32, cosines (or dot products), not divided by tau.
      is_partner: bool, the column is the other view of the anchor's image.
      is_candidate: bool, the column is the partner, or may be a negative.
      same_label: bool, the column is a candidate, not the anchor, and has the same known label.
    """

    similarity: jax.Array
    is_partner: jax.Array
    is_candidate: jax.Array
    same_label: jax.Array

    @property
    def positive(self) -> jax.Array:
        """[n, 1], the similarity with the partner."""
        return jnp.sum(jnp.where(self.is_partner, self.similarity, 0.0), axis=1, keepdims=True)


# Rows -> the loss of each anchor, float32 [n].
RowLoss = Callable[[Rows], jax.Array]


def over_rows(
    z,
    labels,
    loss: RowLoss,
    candidates: Candidates,
    *,
    mesh: Mesh | None = None,
    chunk: int | None = None,
):
    """Computes the mean of a loss over all 2B anchors.

    Args:
      z: projections [2B, D]; rows 2i and 2i + 1 are the two views of image i. Not normalised.
      labels: int [B], -1 where there is none.
      loss: computes the loss of each anchor.
      candidates: which rows an anchor is compared with, and how.
      mesh: in tiles, the devices over which the rows of z are divided; None: one device.
      chunk: anchors that are computed at once; None: all.

    Returns:
      the loss, a float32 scalar, and the metrics of `contrastive_metrics`.
    """
    z, labels = embedded(z, candidates.normalized), jnp.repeat(labels, 2)
    if chunk is None:
        losses, *told = _of_anchors(z, labels, 0, z, labels, loss=loss, candidates=candidates)
    else:
        of_own = functools.partial(_in_tiles, chunk=chunk, loss=loss, candidates=candidates)
        losses, *told = on_each_device(of_own, mesh, (0, 0), 0)(z, labels)
    return jnp.mean(losses), metrics_of(*told)


def _in_tiles(z, labels, axes, chunk: int, loss: RowLoss, candidates: Candidates):
    """Computes `_of_anchors` for a device's own rows, `chunk` of them at a time."""
    every, every_label = gather(z, axes), gather(labels, axes)
    chunk = min(chunk, len(z))
    anchors, label = divide(z, chunk), divide(labels, chunk, fill=-1)

    @jax.checkpoint
    def of_tile(tile):
        anchors, label, first = tile
        about = anchors, label, first, every, every_label
        return _of_anchors(*about, loss=loss, candidates=candidates)

    firsts = first_row(z, axes) + jnp.arange(len(anchors)) * chunk
    found = lax.map(of_tile, (anchors, label, firsts))
    return tuple(x.reshape(-1)[: len(z)] for x in found)


def _of_anchors(anchors, label, first, every, every_label, *, loss, candidates: Candidates):
    """Computes the loss of some anchors, and the arguments of `metrics_of`, [n] each.

    Args:
      anchors, label: z [n, D] and labels [n] of the anchors.
      first: row number of the first anchor in the batch.
      every, every_label: z [2B, D] and labels [2B] of the whole batch.
      loss, candidates: see `over_rows`.
    """
    similarity = jnp.matmul(anchors, every.T, precision=lax.Precision.HIGHEST)
    row, column = rows_and_columns(similarity.shape)
    row = row + first
    is_partner, is_self = column == row ^ 1, column == row
    is_other = (row ^ column) % 2 == 1
    same_label = (label[:, None] == every_label) & (label[:, None] >= 0) & ~is_self
    is_candidate = is_other if candidates.other_view else ~is_self
    rows = Rows(similarity, is_partner, is_candidate, same_label & is_candidate)
    logits, positive = lax.stop_gradient((similarity, rows.positive))
    told = []
    for counted in (~is_self, is_other):
        told.append(jnp.sum((logits >= positive) & counted & ~is_partner, axis=1))
        scaled = jnp.where(counted, logits / candidates.temperature, MASKED)
        log_p = jax.nn.log_softmax(scaled, axis=1)
        told.append(-jnp.sum(jnp.exp(log_p) * log_p, axis=1))
    return loss(rows), *told
