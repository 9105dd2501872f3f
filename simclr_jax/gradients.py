"""The gradient of a loss over the embeddings of the whole batch: at once, or in microbatches.

In microbatches it is cached (Gao et al. 2021, arXiv 2101.06983): all microbatches are embedded
without gradient, the loss and its gradient by every embedding are computed over the whole batch,
and each microbatch is embedded again to carry its part of that gradient back. Memory for
activations is one microbatch's; the price is a second forward pass. The gradient is that of the
whole batch, not a mean over smaller losses: every anchor sees all negatives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Embedding(NamedTuple):
    """What `embed(params, batch)` makes of a batch of b images.

    Attributes:
      z: [r b, D], the r rows of an image adjacent.
      loss: a scalar that is added to the loss over all embeddings, a mean over the batch.
      aux: anything whose mean over microbatches is its value for the batch.
    """

    z: jax.Array
    loss: jax.Array
    aux: Any


def whole_gradient(embed: Callable, loss: Callable, params, batch):
    """d (loss(z) + embedding loss) / d params, by backpropagation through the whole batch.

    Args:
      embed: (params, batch) to `Embedding`.
      loss: z to (scalar, metrics).
      params: to differentiate by.
      batch: tree of arrays [B, ...].

    Returns:
      gradient; (loss, metrics of the loss, aux).
    """

    def objective(params):
        embedding = embed(params, batch)
        value, metrics = loss(embedding.z)
        return value + embedding.loss, (value, metrics, embedding.aux)

    return jax.grad(objective, has_aux=True)(params)


def cached_gradient(embed: Callable, loss: Callable, params, batch, microbatches: int):
    """The same as `whole_gradient`, one of `microbatches` equal parts of the batch at a time.

    Equal up to rounding wherever an image's embedding does not depend on the rest of its batch.
    BatchNorm in training makes it depend: its statistics then are those of a microbatch.

    Microbatch m holds the images m, m + k, m + 2k, ... of k microbatches: where the batch is
    divided over devices, every device finds its part of each microbatch among its own images.
    """
    parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
    z = lax.map(lambda part: embed(params, part).z, parts)  # [k, r b, D]
    images = len(jax.tree.leaves(batch)[0])
    rows = z.shape[0] * z.shape[1] // images  # r
    together = z.reshape(microbatches, -1, rows, z.shape[-1]).swapaxes(0, 1)  # [b, k, r, D]
    (value, metrics), dz = jax.value_and_grad(loss, has_aux=True)(together.reshape(-1, z.shape[-1]))
    dz = _split(dz.reshape(images, rows, -1), microbatches).reshape(z.shape)

    def add(total, part_and_dz):
        part, dz = part_and_dz

        def carried_back(params):
            embedding = embed(params, part)
            return jnp.sum(embedding.z * dz) + embedding.loss / microbatches, embedding.aux

        gradient, aux = jax.grad(carried_back, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, gradient), aux

    total, aux = lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, dz))
    return total, (value, metrics, jax.tree.map(lambda x: jnp.mean(x, axis=0), aux))


def _split(x, microbatches: int):
    """[k b, ...] to [k, b, ...], row i going to part i mod k."""
    return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
