"""--mode=knn: weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv 1805.01978, 3.4)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.console import say
from simclr_jax.evals import results
from simclr_jax.evals.contract import Evaluation, Features, Options
from simclr_jax.evals.scores import score_of_classes
from simclr_jax.losses.contract import normalize
from simclr_jax.mesh import batch_sharded, laid_out, replicated

_BLOCK = 512  # queries at a time: bounds the similarities held to 512 x training images


def rows(features: Features, options: Options, kind: str) -> list[dict]:
    """Classifies with all labels: one row."""
    count = len(features.train[1])
    k = min(options["knn_k"], count)
    if k > count / 2:
        _say_once(k, count)
    voted = knn_classes(features, k=k, temperature=options["knn_temperature"])
    return [results.row(kind, None, [score_of_classes(voted, features.test[1], features.classes)])]


@functools.cache
def _say_once(k: int, count: int) -> None:
    say(
        f"{k} of the {count} training images vote on each test image: a smaller eval.knn_k tells more"
    )


def settings(options: Options, images: int, classes: int) -> dict:
    """Returns the settings used; k is at most the number of training images."""
    return {"k": min(options["knn_k"], images), "temperature": options["knn_temperature"]}


def knn_classes(features: Features, *, k: int, temperature: float) -> np.ndarray:
    """Returns int [n], the class that the neighbours of each test image vote for.

    The k training images of largest cosine similarity s vote with weight exp(s / temperature).

    Args:
      features: features of the training images, which are the neighbours, and of the test images.
      k: at most the number of training images.
      temperature: divides s in the weight of a vote.
    """
    train, test, classes, mesh = features.train, features.test, features.classes, features.mesh
    bank, bank_labels = normalize(jnp.asarray(train[0])), jnp.asarray(train[1])
    rows, vote, place = _BLOCK, _vote, jnp.asarray
    if mesh is not None and mesh.size > 1:
        everywhere = replicated(mesh)
        bank, bank_labels = (laid_out(np.asarray(x), everywhere) for x in (bank, bank_labels))
        rows = -(-_BLOCK // mesh.size) * mesh.size
        vote = jax.jit(_vote, static_argnames=("k", "classes"), out_shardings=everywhere)
        place = functools.partial(laid_out, sharding=batch_sharded(mesh))
    queries, _ = test
    found = []
    for start in range(0, len(queries), rows):
        block = np.zeros((rows, queries.shape[1]), np.float32)
        here = queries[start : start + rows]
        block[: len(here)] = here
        voted = vote(place(block), bank, bank_labels, temperature, k=k, classes=classes)
        found.append(np.asarray(voted)[: len(here)])
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnames=("k", "classes"))
def _vote(queries, bank, bank_labels, temperature, *, k: int, classes: int):
    similarities = jnp.matmul(normalize(queries), bank.T, precision=jax.lax.Precision.HIGHEST)
    # Without the barrier XLA on CPUs merges top_k with the operations after it and sorts everything: 20 times as long
    # at 60,000 images, k = 200 (JAX 0.10.2).
    top, nearest = jax.lax.optimization_barrier(jax.lax.top_k(similarities, k))
    # Subtract the largest similarity: the largest weight is 1 at any temperature, and the vote is the same.
    weights = jnp.exp((top - top[:, :1]) / temperature)
    votes = jax.nn.one_hot(bank_labels[nearest], classes) * weights[..., jnp.newaxis]
    return jnp.argmax(jnp.sum(votes, axis=1), axis=-1)


EVALUATION = Evaluation(
    text="nearest-neighbour accuracy of the newest checkpoint",
    rows=rows,
    settings=settings,
    title=lambda settings: f"Weighted kNN, k = {settings['k']}, test accuracy",
    table=results.labels_table,
    changes={},
    chooses=False,
    metric="knn_accuracy",
)
