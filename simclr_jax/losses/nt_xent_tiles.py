"""Contrastive losses in tiles: a softmax over all candidates without its 2B x 2B similarities.

A tile holds `chunk` anchors by `chunk` candidates. Forward, a row of tiles is folded into each
anchor's running log-sum-exp; backward, the tiles are computed again. As the similarities s are
symmetric, with every anchor's normaliser known one product gives the whole gradient,

    d loss / d z_i = 1 / (2B tau) sum over j != i of (p_ij + p_ji - 2 [j is i's partner]) z_j,
    p_ij = exp(s_ij - log_normalizer_i), s = z z^T / tau,

so forward and backward take three products of 2B x 2B x D, as many as the dense loss. NT-Xent sums
its normaliser over all j != i; DCL leaves the partner out, and then p_ij of the partner is 0.

Over a mesh a device keeps its own anchors as rows and streams all candidates: z is gathered once,
and the normalisers, one number an anchor, before the backward pass.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from simclr_jax.losses.contract import MASKED, normalize, ranks

CHUNK = 1024


class _Tiles(NamedTuple):
    """How the similarities are computed: tau, rows of a tile, and whether the normaliser counts the
    positive.
    """

    temperature: float
    chunk: int
    positive_in_sum: bool


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
      ValueError: `chunk` is odd.
    """
    return softmax_in_tiles(z, temperature, mesh=mesh, chunk=chunk)


def softmax_in_tiles(
    z,
    temperature: float,
    *,
    mesh: Mesh | None = None,
    chunk: int = CHUNK,
    positive_in_sum: bool = True,
):
    """Computes the mean over anchors of log-normaliser - positive; see `nt_xent_chunked`.

    `positive_in_sum`: the normaliser counts the positive (NT-Xent), or only the negatives (DCL).
    """
    if chunk % 2:
        raise ValueError(f"chunk={chunk}: expected an even number, as two rows are one image")
    tiles = _Tiles(float(temperature), min(chunk, len(z)), positive_in_sum)
    loss, (nearer, entropy) = _softmax(normalize(z), tiles, mesh)
    return loss, ranks(nearer) | {"contrastive_entropy": jnp.mean(entropy)}


_OWN, _EVERY = "a device's own rows", "all rows"


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _softmax(z, tiles, mesh):
    return _forward(z, tiles, mesh)[0]


def _forward(z, tiles, mesh):
    fold = functools.partial(_fold_rows, tiles=tiles)
    every, log_normalizer, positive, nearer, entropy = _on_each_device(
        fold, mesh, outputs=(_EVERY, *[_OWN] * 4)
    )(z)
    loss = jnp.mean(log_normalizer - positive)
    return (loss, (nearer, entropy)), (z, every, log_normalizer)


def _backward(tiles, mesh, saved, cotangents):
    differentiate = functools.partial(_differentiate_rows, tiles=tiles)
    gradient = _on_each_device(differentiate, mesh, inputs=(_OWN, _EVERY, _OWN), outputs=_OWN)(
        *saved
    )
    return (cotangents[0] * gradient,)


_softmax.defvjp(_forward, _backward)


def _on_each_device(function, mesh, inputs=(_OWN,), outputs=_OWN):
    """Makes a function of global arrays that runs `function(*arrays, axes)` on each device's rows."""
    if mesh is None:
        return functools.partial(function, axes=())
    axes = mesh.axis_names
    lies = {_OWN: PartitionSpec(axes), _EVERY: PartitionSpec()}
    in_specs, out_specs = jax.tree.map(lies.get, (inputs, outputs))
    return jax.shard_map(
        functools.partial(function, axes=axes),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,  # an all-gather's result is equal everywhere, which the check cannot see
    )


def _gather(x, axes):
    return lax.all_gather(x, axes, tiled=True) if axes else x


def _divide(x, size):
    """Divides x [n, ...] into tiles [k, size, ...], filled up with zeros."""
    x = jnp.pad(x, [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)])
    return x.reshape(-1, size, *x.shape[1:])


def _row_tiles(z, axes, chunk):
    """Returns a device's rows in tiles [k, rows, D], and their row numbers in the batch [k, rows]."""
    start = lax.axis_index(axes) * len(z) if axes else 0
    tiles = _divide(z, min(chunk, len(z)))
    return tiles, start + jnp.arange(tiles.shape[0] * tiles.shape[1]).reshape(tiles.shape[:2])


def _similarities(anchors, candidates, temperature):
    return jnp.matmul(anchors, candidates.T, precision=lax.Precision.HIGHEST) / temperature


def _masks(row, column, count: int, positive_in_sum: bool):
    """Returns bool [rows, columns]: the column is the row's partner; it is not in the normaliser."""
    is_partner = column == row[:, None] ^ 1
    masked = (column == row[:, None]) | (column >= count)
    return is_partner, masked if positive_in_sum else masked | is_partner


def _fold_rows(z, axes, tiles: _Tiles):
    """Returns all rows of the batch, and for each row of z [n, D] its log-normaliser, its similarity
    with its partner, the number of candidates at least as near as the partner, and the entropy of its
    softmax over all candidates.
    """
    temperature, chunk, positive_in_sum = tiles
    every = _gather(z, axes)
    columns = _divide(every, chunk)
    padded = columns.reshape(-1, z.shape[1])

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
            largest, total, weighted, nearer = carry
            candidates, first = candidates_and_first
            column = first + jnp.arange(chunk)
            s = _similarities(anchors, candidates, temperature)
            is_partner, masked = _masks(row, column, len(every), positive_in_sum)
            s = jnp.where(masked, MASKED, s)
            new_largest = jnp.maximum(largest, jnp.max(s, axis=1))
            shrink = jnp.exp(largest - new_largest)
            w = jnp.exp(s - new_largest[:, None])
            is_nearer = (s >= positive[:, None]) & ~is_partner
            return (
                new_largest,
                total * shrink + jnp.sum(w, axis=1),
                weighted * shrink + jnp.sum(w * s, axis=1),
                nearer + jnp.sum(is_nearer, axis=1),
            ), None

        zeros = jnp.zeros(len(anchors))
        start = (zeros + MASKED, zeros, zeros, jnp.zeros(len(anchors), jnp.int32))
        firsts = jnp.arange(len(columns)) * chunk
        (largest, total, weighted, nearer), _ = lax.scan(add, start, (columns, firsts))
        log_normalizer = largest + jnp.log(total)
        mean_similarity, log_all = weighted / total, log_normalizer
        if not positive_in_sum:  # the metrics are over all candidates
            log_all = jnp.logaddexp(log_normalizer, positive)
            p = jnp.exp(positive - log_all)
            mean_similarity = (1 - p) * mean_similarity + p * positive
        return log_normalizer, positive, nearer, log_all - mean_similarity

    folded = lax.map(fold, _row_tiles(z, axes, chunk))
    return every, *(x.reshape(-1)[: len(z)] for x in folded)


def _differentiate_rows(z, every, log_normalizer, axes, tiles: _Tiles):
    """Computes d loss / d z [n, D]."""
    temperature, chunk, positive_in_sum = tiles
    columns = _divide(every, chunk)
    column_normalizer = _divide(_gather(log_normalizer, axes), chunk)
    rows, row_number = _row_tiles(z, axes, chunk)
    row_normalizer = _divide(log_normalizer, rows.shape[1])

    def differentiate(tile):
        anchors, row, normalizer = tile

        def add(total, candidates_and_more):
            candidates, other_normalizer, first = candidates_and_more
            column = first + jnp.arange(chunk)
            s = _similarities(anchors, candidates, temperature)
            p = jnp.exp(s - normalizer[:, None]) + jnp.exp(s - other_normalizer)
            is_partner, masked = _masks(row, column, len(every), positive_in_sum)
            p = jnp.where(masked, 0.0, p) - jnp.where(is_partner, 2.0, 0.0)
            return total + jnp.matmul(p, candidates, precision=lax.Precision.HIGHEST), None

        firsts = jnp.arange(len(columns)) * chunk
        return lax.scan(add, jnp.zeros_like(anchors), (columns, column_normalizer, firsts))[0]

    gradient = lax.map(differentiate, (rows, row_number, row_normalizer))
    gradient = gradient.reshape(-1, z.shape[1])[: len(z)]
    return gradient / (len(every) * temperature)
