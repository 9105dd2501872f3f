"""Contrastive losses in tiles: a softmax over all candidates without its 2B x 2B similarities.

A tile holds `chunk` anchors by `chunk` candidates. Forward, a row of tiles is folded into each
anchor's running log-sum-exp; backward, the tiles are computed again. As the similarities s are
symmetric, with every anchor's normaliser known one product gives the whole gradient,

    d loss / d z_i = 1 / tau sum over j != i of (a_i p_ij + a_j p_ji + [j is i's partner] (b_i + b_j)) z_j,
    p_ij = exp(s_ij - log_normalizer_i), s = z z^T / tau,

where a_i and b_i are the derivatives of the loss by log_normalizer_i and by the similarity with the partner, 1 / 2B
and -1 / 2B for the mean over the anchors. So forward and backward take three products of 2B x 2B x D, as many as
the dense loss. Both exponentials of a pair come from one, as p_ji = p_ij exp(log_normalizer_i - log_normalizer_j):
8,192 pairs take 1.16 instead of 1.43 s on two cores. Candidates that a normaliser does not sum have p_ij = 0: the
anchor itself; in DCL its partner; with negatives of the other view only, the views of the anchor's kind.

Over a mesh a device keeps its own anchors as rows. z is gathered once, and the normalisers before the backward pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from simclr_jax.losses.contract import (
    MASKED,
    SoftmaxTerms,
    check_pairs,
    embedded,
    metrics_of,
)
from simclr_jax.losses.tiles import WHOLE, divide, first_row, gather, on_each_device

CHUNK = 1024


class _Tiles(NamedTuple):
    """How a loss is computed; `is_bounded`: no exponential of similarities and normalisers leaves float32's range."""

    temperature: float
    chunk: int
    positive_in_sum: bool
    other_view: bool
    is_bounded: bool


def nt_xent_chunked(z, temperature: float, *, mesh: Mesh | None = None, chunk: int = CHUNK):
    """Computes NT-Xent over all pairs of the batch in tiles.

    Args:
      z: projections [2B, D]; rows 2i and 2i + 1 are the two views of image i. Not normalised.
      temperature: tau, a Python number.
      mesh: devices over which the rows of z are divided, all axes together; None: one device.
      chunk: anchors and candidates of a tile, even. Memory beside z grows as chunk^2.

    Returns:
      loss and metrics, float32 scalars, as from `nt_xent`.

    Raises:
      ValueError: `chunk` or the number of rows is odd, or tau is not above 0.
    """
    return terms_in_tiles(z, temperature, mesh=mesh, chunk=chunk).loss()


def terms_in_tiles(
    z,
    temperature: float,
    *,
    mesh: Mesh | None = None,
    chunk: int = CHUNK,
    positive_in_sum: bool = True,
    normalized: bool = True,
    other_view: bool = False,
) -> SoftmaxTerms:
    """Computes the terms of a softmax loss; see `nt_xent_chunked`.

    Args:
      z, temperature, mesh, chunk: see `nt_xent_chunked`.
      positive_in_sum, normalized, other_view: see `softmax.dense_terms`.
    """
    if chunk % 2:
        raise ValueError(f"chunk={chunk}: expected an even number, as two rows are one image")
    check_pairs(z, temperature)
    # Similarities of normalised z lie 2 / tau apart at most, and log-normalisers of 2B < 2^24 some 17 more.
    bounded, chunk = normalized and 2 / temperature <= 60, min(chunk, len(z))
    tiles = _Tiles(float(temperature), chunk, positive_in_sum, other_view, bounded)
    log_normalizer, positive, told = _softmax(embedded(z, normalized), tiles, mesh)
    return SoftmaxTerms(log_normalizer, positive, metrics_of(*told))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _softmax(z, tiles, mesh):
    return _forward(z, tiles, mesh)[0]


def _forward(z, tiles, mesh):
    fold = functools.partial(_fold_rows, tiles=tiles)
    every, log_normalizer, positive, *told = on_each_device(fold, mesh, (0,), (WHOLE, *[0] * 6))(z)
    return (log_normalizer, positive, told), (z, every, log_normalizer)


def _backward(tiles, mesh, saved, cotangents):
    differentiate = functools.partial(_differentiate_rows, tiles=tiles)
    by_normalizer, by_positive, _ = cotangents
    gradient = on_each_device(differentiate, mesh, (0, WHOLE, 0, 0, 0), 0)
    return (gradient(*saved, by_normalizer, by_positive),)


_softmax.defvjp(_forward, _backward)


def _row_tiles(z, axes, chunk):
    """Returns a device's rows in tiles [k, rows, D], and their row numbers in the batch [k, rows]."""
    tiles = divide(z, min(chunk, len(z)))
    rows = jnp.arange(tiles.shape[0] * tiles.shape[1]).reshape(tiles.shape[:2])
    return tiles, first_row(z, axes) + rows


def _similarities(anchors, candidates, temperature):
    return jnp.matmul(anchors, candidates.T, precision=lax.Precision.HIGHEST) / temperature


class _Masks(NamedTuple):
    """Bool [rows, columns] of a tile: whether the column is the row's partner, a candidate, a candidate of the
    other view, or summed in the row's normaliser.
    """

    is_partner: jax.Array
    is_candidate: jax.Array
    is_other: jax.Array
    in_sum: jax.Array


def _masks(row, column, count: int, tiles: _Tiles) -> _Masks:
    is_partner = column == row[:, None] ^ 1
    is_candidate = (column != row[:, None]) & (column < count)
    is_other = is_candidate & ((row[:, None] ^ column) % 2 == 1)
    in_sum = is_other if tiles.other_view else is_candidate
    return _Masks(
        is_partner,
        is_candidate,
        is_other,
        in_sum if tiles.positive_in_sum else in_sum & ~is_partner,
    )


class _Softmax(NamedTuple):
    """The softmax of n anchors over candidates that come tile by tile: the largest similarity so far and, relative
    to it, the sum of the exponentials and the sum of the exponentials times the similarities.
    """

    largest: jax.Array
    total: jax.Array
    weighted: jax.Array

    @classmethod
    def of_nothing(cls, anchors: int) -> "_Softmax":
        zeros = jnp.zeros(anchors, jnp.float32)
        return cls(zeros + MASKED, zeros, zeros)

    def add(self, s, counted) -> "_Softmax":
        """Adds the similarities s [n, columns] that are counted, bool [n, columns]."""
        s = jnp.where(counted, s, MASKED)
        largest = jnp.maximum(self.largest, jnp.max(s, axis=1))
        shrink = jnp.exp(self.largest - largest)
        w = jnp.exp(s - largest[:, None])
        return _Softmax(
            largest,
            self.total * shrink + jnp.sum(w, axis=1),
            self.weighted * shrink + jnp.sum(w * s, axis=1),
        )

    @property
    def log_normalizer(self):
        return self.largest + jnp.log(self.total)

    @property
    def entropy(self):
        """In nats."""
        return self.log_normalizer - self.weighted / self.total


def _fold_rows(z, axes, tiles: _Tiles):
    """Returns all rows of the batch and, for each row of z [n, D]: its log-normaliser; its similarity with its
    partner; then, for all candidates and again for those of the other view only, the number that are at least as
    near as the partner, and the entropy of the softmax.
    """
    temperature, chunk = tiles.temperature, tiles.chunk
    every = gather(z, axes)
    columns = divide(every, chunk)
    padded = columns.reshape(-1, z.shape[1])
    # NT-Xent's normaliser is that of all candidates: one softmax serves both.
    is_usual = tiles.positive_in_sum and not tiles.other_view

    def fold(tile):
        anchors, row = tile
        # The partner's similarity is taken from a product of the same shape as all others: equal
        # similarities then are equal to the last bit, and count as ties.
        first = jnp.minimum(row[0], len(padded) - chunk)
        near = lax.dynamic_slice_in_dim(padded, first, chunk)
        is_partner = first + jnp.arange(chunk) == row[:, None] ^ 1
        s = _similarities(anchors, near, temperature)
        positive = jnp.sum(jnp.where(is_partner, s, 0.0), axis=1)

        def add(carry, candidates_and_first):
            (of_all, of_other, of_loss), nearer, other_nearer = carry
            candidates, first = candidates_and_first
            s = _similarities(anchors, candidates, temperature)
            masks = _masks(row, first + jnp.arange(chunk), len(every), tiles)
            is_nearer = (s >= positive[:, None]) & ~masks.is_partner
            softmaxes = (
                of_all.add(s, masks.is_candidate),
                of_other.add(s, masks.is_other),
                of_loss if is_usual else of_loss.add(s, masks.in_sum),
            )
            return (
                softmaxes,
                nearer + jnp.sum(is_nearer & masks.is_candidate, axis=1, dtype=jnp.int32),
                other_nearer + jnp.sum(is_nearer & masks.is_other, axis=1, dtype=jnp.int32),
            ), None

        empty, none = _Softmax.of_nothing(len(anchors)), jnp.zeros(len(anchors), jnp.int32)
        start = (empty, empty, empty), none, none
        firsts = jnp.arange(len(columns)) * chunk
        carry, _ = lax.scan(add, start, (columns, firsts))
        (of_all, of_other, of_loss), nearer, other_nearer = carry
        log_normalizer = (of_all if is_usual else of_loss).log_normalizer
        told = nearer, of_all.entropy, other_nearer, of_other.entropy
        return log_normalizer, positive, *told

    folded = lax.map(fold, _row_tiles(z, axes, chunk))
    return every, *(x.reshape(-1)[: len(z)] for x in folded)


def _differentiate_rows(z, every, log_normalizer, by_normalizer, by_positive, axes, tiles: _Tiles):
    """Computes d loss / d z [n, D].

    Args:
      z: a device's own rows [n, D].
      every: all rows of the batch.
      log_normalizer: that of each own row, [n].
      by_normalizer, by_positive: derivatives of the loss by the log-normaliser and by the similarity with the
        partner, of the own rows, [n] each.
      axes, tiles: see `_fold_rows`.
    """
    temperature, chunk = tiles.temperature, tiles.chunk
    about = jnp.stack([log_normalizer, by_normalizer, by_positive], axis=1)
    rows, row_number = _row_tiles(z, axes, chunk)
    columns, about_columns = (divide(x, chunk) for x in (every, gather(about, axes)))

    def differentiate(tile):
        anchors, row, about_row = tile
        normalizer, a, b = (x[:, None] for x in about_row.T)

        def add(total, column_tile):
            candidates, about_column, first = column_tile
            other_normalizer, other_a, other_b = about_column.T
            s = _similarities(anchors, candidates, temperature)
            p = jnp.exp(s - normalizer)
            if tiles.is_bounded:
                ratio = jnp.exp(normalizer - normalizer[0])
                p *= a + other_a * (ratio * jnp.exp(normalizer[0] - other_normalizer))
            else:
                p = a * p + other_a * jnp.exp(s - other_normalizer)
            masks = _masks(row, first + jnp.arange(chunk), len(every), tiles)
            p = jnp.where(masks.in_sum, p, 0.0) + jnp.where(masks.is_partner, b + other_b, 0.0)
            return total + jnp.matmul(p, candidates, precision=lax.Precision.HIGHEST), None

        firsts = jnp.arange(len(columns)) * chunk
        return lax.scan(add, jnp.zeros_like(anchors), (columns, about_columns, firsts))[0]

    gradient = lax.map(differentiate, (rows, row_number, divide(about, rows.shape[1])))
    return gradient.reshape(-1, z.shape[1])[: len(z)] / temperature
