"""Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simclr_jax.losses import normalize
from simclr_jax.mesh import batch_sharded, laid_out, replicated

_BLOCK = 512  # queries at a time: bounds the similarities held to 512 x bank


def knn_accuracy(
    train: tuple, test: tuple, *, k: int, temperature: float, classes: int, mesh: Mesh | None = None
) -> float:
    """Share of test images whose neighbours vote for their class.

    The k training images of largest cosine similarity s vote with weight exp(s / temperature).

    Args:
      train, test: (features [n, D], labels [n]).
      k: at most the number of training images.
      temperature: of the votes.
      classes: how many there are.
      mesh: devices that the test images are divided over.
    """
    bank, bank_labels = normalize(jnp.asarray(train[0])), jnp.asarray(train[1])
    rows, vote, place = _BLOCK, _vote, jnp.asarray
    if mesh is not None and mesh.size > 1:
        everywhere = replicated(mesh)
        bank, bank_labels = (laid_out(np.asarray(x), everywhere) for x in (bank, bank_labels))
        rows = -(-_BLOCK // mesh.size) * mesh.size
        vote = jax.jit(_vote, static_argnames=("k", "classes"), out_shardings=everywhere)
        place = functools.partial(laid_out, sharding=batch_sharded(mesh))
    queries, labels = test
    correct = 0
    for start in range(0, len(queries), rows):
        block = np.zeros((rows, queries.shape[1]), np.float32)
        here = queries[start : start + rows]
        block[: len(here)] = here
        voted = vote(place(block), bank, bank_labels, temperature, k=k, classes=classes)
        correct += int(np.sum(np.asarray(voted)[: len(here)] == labels[start : start + rows]))
    return correct / len(queries)


@functools.partial(jax.jit, static_argnames=("k", "classes"))
def _vote(queries, bank, bank_labels, temperature, *, k: int, classes: int):
    similarities = jnp.matmul(normalize(queries), bank.T, precision=jax.lax.Precision.HIGHEST)
    top, nearest = jax.lax.top_k(similarities, k)
    weights = jnp.exp((top - 1) / temperature)  # - 1: in range at any temperature, same vote
    votes = jax.nn.one_hot(bank_labels[nearest], classes) * weights[..., jnp.newaxis]
    return jnp.argmax(jnp.sum(votes, axis=1), axis=-1)
