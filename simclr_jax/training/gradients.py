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

from simclr_jax.losses.classification import label_weights


class Embedding(NamedTuple):
    """The result of an objective for b images.

    Attributes:
      z: [r b, D], the input of the loss over the whole batch; the r rows of an image are adjacent.
      loss: a scalar, mean over the b images, that is added to the loss over the whole batch. Its mean over
        equal parts of a batch must be the loss of the batch.
      metrics: {name: scalar}, each a mean over the b images.
      batch_stats: {network: its new running BatchNorm statistics}, of the networks that are trained.
    """

    z: jax.Array
    loss: jax.Array
    metrics: dict[str, jax.Array]
    batch_stats: Any


# (params, batch_stats, batch) -> Embedding. The batch is a tree of arrays [b, ...]: what the step's `fetch`
# returns, and "label_weight", the `label_weights` of the whole batch.
Objective = Callable[[Any, Any, Any], Embedding]

# (z [r B, D], labels int [B]) -> (scalar, {name: scalar}), see `losses.Loss`.
BatchLoss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Gradient(NamedTuple):
    """The gradient with respect to the parameters, and the other results of the embeddings and losses.

    Attributes:
      grads: a tree like the parameters.
      loss: the loss over the whole batch, without `Embedding.loss`.
      metrics: {name: scalar} from the loss and the embeddings together.
      batch_stats: the new running statistics.
    """

    grads: Any
    loss: jax.Array
    metrics: dict[str, jax.Array]
    batch_stats: Any


def whole_gradient(objective: Objective, loss: BatchLoss, params, batch_stats, batch) -> Gradient:
    """Computes d (loss(z) + embedding loss) / d params by backpropagation through the whole batch.

    Args:
      objective: (params, batch_stats, batch) -> `Embedding`.
      loss: (z [r B, D], labels [B]) -> (scalar, metrics).
      params: to differentiate by.
      batch_stats: running statistics before the step.
      batch: tree of arrays [B, ...], "label" among them.
    """
    batch = _with_label_weights(batch)

    def total(params):
        embedding = objective(params, batch_stats, batch)
        value, metrics = loss(embedding.z, batch["label"])
        return value + embedding.loss, (value, metrics, embedding)

    grads, (value, metrics, embedding) = jax.grad(total, has_aux=True)(params)
    return Gradient(grads, value, metrics | embedding.metrics, embedding.batch_stats)


def cached_gradient(
    objective: Objective, loss: BatchLoss, params, batch_stats, batch, microbatches: int
) -> Gradient:
    """Computes what `whole_gradient` does, one of `microbatches` equal parts of the batch at a time.

    Equal up to rounding wherever an image's embedding does not depend on the rest of its batch.
    BatchNorm in training makes it depend: its statistics then are those of a microbatch, and the
    running statistics follow the mean over the microbatches. The objective must take means over
    labelled images by "label_weight", as a microbatch may have any share of the batch's labels.

    Microbatch m holds the images m, m + k, m + 2k, ... of k microbatches: where the batch is
    divided over devices, every device finds its part of each microbatch among its own images.
    """
    batch = _with_label_weights(batch)
    parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
    z = lax.map(lambda part: objective(params, batch_stats, part).z, parts)  # [k, r b, D]
    images, width = len(batch["label"]), z.shape[-1]
    rows = z.shape[0] * z.shape[1] // images  # r
    # Every size is named, as none can be inferred where z is empty, with D = 0.
    together = z.reshape(microbatches, images // microbatches, rows, width)
    together = together.swapaxes(0, 1)  # [b, k, r, D]

    def whole(z):
        return loss(z, batch["label"])

    (value, metrics), dz = jax.value_and_grad(whole, has_aux=True)(
        together.reshape(images * rows, width)
    )
    dz = _split(dz.reshape(images, rows, width), microbatches).reshape(z.shape)

    def add(total, part_and_dz):
        part, dz = part_and_dz

        def carried_back(params):
            embedding = objective(params, batch_stats, part)
            value = jnp.sum(embedding.z * dz) + embedding.loss / microbatches
            return value, (embedding.metrics, embedding.batch_stats)

        gradient, aux = jax.grad(carried_back, has_aux=True)(params)
        return jax.tree.map(jnp.add, total, gradient), aux

    grads, aux = lax.scan(add, jax.tree.map(jnp.zeros_like, params), (parts, dz))
    embedding_metrics, seen = jax.tree.map(lambda x: jnp.mean(x, axis=0), aux)
    return Gradient(grads, value, metrics | embedding_metrics, seen)


def in_microbatches(function: Callable[[Any], jax.Array], batch, microbatches: int) -> jax.Array:
    """Computes function(batch), an array [B, ...], one of `microbatches` parts at a time, as
    `cached_gradient` divides the batch.
    """
    if microbatches == 1:
        return function(batch)
    parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
    found = lax.map(function, parts).swapaxes(0, 1)
    return found.reshape(-1, *found.shape[2:])


def _with_label_weights(batch):
    return batch | {"label_weight": label_weights(batch["label"])}


def _split(x, microbatches: int):
    """Reshapes [k b, ...] to [k, b, ...], row i going to part i mod k."""
    return x.reshape(len(x) // microbatches, microbatches, *x.shape[1:]).swapaxes(0, 1)
