"""Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.losses import normalize

_BLOCK = 512  # queries at a time: bounds the similarities held to 512 x bank


def knn_accuracy(train: tuple, test: tuple, *, k: int, temperature: float, classes: int) -> float:
    """Share of test images whose neighbours vote for their class.

    The k training images of largest cosine similarity s vote with weight exp(s / temperature).

    Args:
      train, test: (features [n, D], labels [n]).
      k: at most the number of training images.
    """
    bank, bank_labels = normalize(jnp.asarray(train[0])), jnp.asarray(train[1])
    queries, labels = test
    correct = 0
    for start in range(0, len(queries), _BLOCK):
        block = np.zeros((_BLOCK, queries.shape[1]), np.float32)
        here = queries[start : start + _BLOCK]
        block[: len(here)] = here
        voted = _vote(block, bank, bank_labels, k, temperature, classes)[: len(here)]
        correct += int(np.sum(np.asarray(voted) == labels[start : start + _BLOCK]))
    return correct / len(queries)


@functools.partial(jax.jit, static_argnames=("k", "classes"))
def _vote(queries, bank, bank_labels, k: int, temperature, classes: int):
    similarities = jnp.matmul(normalize(queries), bank.T, precision=jax.lax.Precision.HIGHEST)
    top, nearest = jax.lax.top_k(similarities, k)
    weights = jnp.exp((top - 1) / temperature)  # - 1: in range at any temperature, same vote
    votes = jax.nn.one_hot(bank_labels[nearest], classes) * weights[..., jnp.newaxis]
    return jnp.argmax(jnp.sum(votes, axis=1), axis=-1)
