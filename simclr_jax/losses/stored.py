"""Negatives of earlier batches, beside those of the batch itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from simclr_jax.losses.contract import MASKED, embedded
from simclr_jax.losses.tiles import WHOLE, divide, gather, on_each_device

_CHUNK = 1024


class Stored(NamedTuple):
    """Projections of earlier batches. They pass no gradient.

    Attributes:
      keys: float32 [S, n, D], n projections of each of S batches, not normalised. Over a mesh, n is divided.
      filled: int32 scalar: the first `filled` of the S hold projections, the rest is counted as absent.
    """

    keys: jax.Array
    filled: jax.Array


def log_sum_of(
    stored: Stored,
    z,
    temperature: float,
    so_far=None,
    *,
    normalized: bool = True,
    mesh: Mesh | None = None,
):
    """Computes log sum over stored k of exp(s(i, k) / tau) for each anchor i, in tiles of memory 2B x 1024.

    Args:
      stored: the negatives.
      z: projections [2B, D] of the anchors, not normalised.
      temperature: tau.
      so_far: float32 [2B], the log of a sum to which those of the stored ones are added; None: of no sum.
      normalized: s is the cosine; else the dot product.
      mesh: devices over which the rows of z are divided, all axes together; None: one device.

    Returns:
      float32 [2B]; `so_far`, or `contract.MASKED`, where nothing is stored.
    """
    z = embedded(z, normalized)
    so_far = jnp.full(len(z), MASKED, jnp.float32) if so_far is None else so_far

    # Begins with the sum so far, not with nothing: so its all-gathers wait for those that made that sum. XLA on CPUs
    # may run collectives that do not depend on each other at once, and takes them for one (both have channel 1).
    def of_rows(z, so_far, keys, filled, axes):
        @jax.checkpoint
        def add_tile(total, tile_and_its_rows):
            tile, is_key = tile_and_its_rows
            s = jnp.matmul(z, tile.T, precision=lax.Precision.HIGHEST) / temperature
            of_tile = jax.nn.logsumexp(jnp.where(is_key, s, MASKED), axis=1)
            return jnp.logaddexp(total, of_tile), None

        @jax.checkpoint  # else every device keeps all of the keys for the gradient
        def add_batch(total, keys_and_number):
            keys, number = keys_and_number
            keys = embedded(lax.stop_gradient(keys), normalized)
            every = gather(keys, axes)
            chunk = min(_CHUNK, len(every))
            is_key = divide(jnp.ones(len(every), bool), chunk) & (number < filled)
            return lax.scan(add_tile, total, (divide(every, chunk), is_key))

        return lax.scan(add_batch, so_far, (keys, jnp.arange(len(keys))))[0]

    of_own = on_each_device(of_rows, mesh, (0, 0, 1, WHOLE), 0)
    return of_own(z, so_far, stored.keys, stored.filled)
