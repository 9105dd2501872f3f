"""Cross-entropy against labels, for classifiers, and against a teacher."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp


def label_weights(labels):
    """Returns the weight of each row in a mean over the rows that have a label, float32 [N]: N divided by the
    number of labelled rows, or 0 for a row without a label, so that a mean over all rows of weighted
    numbers is the mean over the labelled ones.

    Args:
      labels: int [N], below 0: none.
    """
    known = labels >= 0
    return jnp.where(known, len(labels) / jnp.maximum(jnp.sum(known), 1), 0)


def cross_entropy(logits, labels, weights=None):
    """Computes the mean cross-entropy and the accuracy over the rows that have a label, float32 scalars.

    Args:
      logits: [N, C].
      labels: int [N], each from 0 to C - 1, or below 0: none. Where no row has one, both results are 0.
      weights: `label_weights` of the batch that these rows are a part of, [N]: the mean of the results over
        equal parts of the batch is then the result of the batch, wherever its labels are. None: the
        rows are the whole batch.
    """
    weights = label_weights(labels) if weights is None else weights
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    of_label = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    losses = jnp.where(labels >= 0, -of_label, 0)
    right = jnp.argmax(logits, axis=-1) == labels  # false where there is no label
    return jnp.mean(weights * losses), jnp.mean(weights * right)


def cross_entropy_of_sets(logits, labels, members):
    """Computes the mean cross-entropy of one binary classifier a class, and the share of their decisions
    that are right, float32 scalars: for images that have several labels each.

    Args:
      logits: [N, K].
      labels: int [N], each a row of `members`, or below 0: none.
      members: int [C, K], whether an image with label c is in class k: 1: yes; 0: no; -1: not counted.
    """
    logits = logits.astype(jnp.float32)
    targets = jnp.asarray(members)[jnp.maximum(labels, 0)]
    counted = (targets >= 0) & (labels >= 0)[:, None]
    count = jnp.maximum(jnp.sum(counted), 1)
    wanted = targets == 1
    losses = jax.nn.softplus(jnp.where(wanted, -logits, logits))
    right = counted & ((logits > 0) == wanted)
    return jnp.sum(jnp.where(counted, losses, 0)) / count, jnp.sum(right) / count


def distillation(logits, taught, temperature: float):
    """Computes the mean cross-entropy of a student's distributions to its teacher's, a float32 scalar
    (SimCLR v2, arXiv 2006.10029, equation 2): -sum_y P_T(y | x) log P_S(y | x), with P(y) proportional to
    exp(logit_y / temperature) in both.

    Args:
      logits: the student's, [N, C].
      taught: the teacher's, [N, C]; no gradient passes.
      temperature: above 0; the loss is not multiplied by its square.
    """
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
    p = jax.nn.softmax(jax.lax.stop_gradient(taught).astype(jnp.float32) / temperature)
    return -jnp.mean(jnp.sum(p * log_p, axis=-1))


def loss_of_labels(members) -> Callable:
    """Returns (logits, labels) -> (loss, accuracy): `cross_entropy_of_sets` with `members`, or
    `cross_entropy` where that is None.
    """
    if members is None:
        return cross_entropy
    return functools.partial(cross_entropy_of_sets, members=members)
