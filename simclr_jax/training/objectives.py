"""Objectives: an objective embeds a batch, and the step minimises a loss over all embeddings of the batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax.encoders import apply_network
from simclr_jax.losses.classification import cross_entropy, distillation
from simclr_jax.training.gradients import Embedding, Objective
from simclr_jax.training.state import Networks


def contrastive(
    networks: Networks, views: Callable[[Any], jax.Array], by_labels: bool = False
) -> Objective:
    """Returns the objective of SimCLR: both views of each image to projections z [2b, D].

    With a classifier the metrics hold classifier_loss and classifier_accuracy, over all training views of the images
    that have a label, and labelled_share, the share of these images.

    Args:
      networks: f, g and the online classifier, or None in its place.
      views: a batch -> float views [b, 2, H, W, 3] in [0, 1].
      by_labels: train f by the classifier's loss and not by z: supervised training on the same views, in which
        the loss of z is only reported.
    """

    def embed(params, batch_stats, batch) -> Embedding:
        x = views(batch)
        # [b, 2, ...] -> [2b, ...] with partners adjacent: a reshape, local on every device, where
        # stacking view 0 on view 1 would move half the images between devices.
        h, z, seen = _projected(networks, params, batch_stats, x.reshape(-1, *x.shape[2:]))
        if networks.classifier is None:
            return Embedding(z, jnp.zeros(()), {}, seen)
        if by_labels:
            z = jax.lax.stop_gradient(z)
        else:  # a probe that trains along: no gradient of it reaches the encoder
            h = jax.lax.stop_gradient(h)
        logits = networks.classifier.apply({"params": params["classifier"]}, h)
        loss, accuracy = _of_labels(logits, batch)
        metrics = {"classifier_loss": loss, "classifier_accuracy": accuracy}
        return Embedding(z, loss, metrics | _labelled_share(batch), seen)

    return embed


def projection_of_second_views(
    networks: Networks, views: Callable[[Any], jax.Array]
) -> Callable[[Any, Any, Any], jax.Array]:
    """Returns (params, batch_stats, batch) -> z [b, D] of the second view of each image, in training mode.

    Args:
      networks: f and g, whose BatchNorm groups are of single views.
      views: see `contrastive`.
    """
    return lambda params, batch_stats, batch: _projected(
        networks, params, batch_stats, views(batch)[:, 1]
    )[1]


def _projected(networks: Networks, params, batch_stats, x) -> tuple[jax.Array, jax.Array, dict]:
    """Returns h and z of images x [n, H, W, 3], and the new running statistics of f and g."""
    seen = {}
    h, seen["encoder"] = apply_network(
        networks.encoder, _of(params, batch_stats, "encoder"), x, True
    )
    outputs, seen["head"] = apply_network(networks.head, _of(params, batch_stats, "head"), h, True)
    return h, outputs[-1], seen


def supervised(
    classify: Callable[[Any, Any, Any], tuple[jax.Array, Any]],
    views: Callable[[Any], jax.Array],
    loss_of: Callable[[Any, Any], tuple[jax.Array, jax.Array]] = cross_entropy,
) -> Objective:
    """Returns the objective of training with labels: the cross-entropy of the logits of all views.

    Every image has as many views as `views` makes, one for the classifiers of the paper. The metrics
    hold loss, classifier_accuracy and labelled_share; z is empty, so use it with `no_loss`. Do not use microbatches if
    some images have no label: `loss_of` takes its mean over the labels of one microbatch alone.

    Args:
      classify: (params, batch_stats, images [n, H, W, 3]) -> (logits [n, C], new batch_stats).
      views: a batch -> float views [b, V, H, W, 3] in [0, 1].
      loss_of: (logits [n, C], labels [n]) -> (loss, accuracy).
    """

    def embed(params, batch_stats, batch) -> Embedding:
        x = views(batch)
        labels = jnp.repeat(batch["label"], x.shape[1])
        logits, seen = classify(params, batch_stats, x.reshape(-1, *x.shape[2:]))
        loss, accuracy = loss_of(logits, labels)
        metrics = {"loss": loss, "classifier_accuracy": accuracy} | _labelled_share(batch)
        return Embedding(jnp.zeros((len(x), 0)), loss, metrics, seen)

    return embed


def distilled(
    student: Callable[[Any, Any, Any], tuple[jax.Array, Any]],
    teacher: Callable[[Any, Any], jax.Array],
    views: Callable[[Any], jax.Array],
    temperature: float,
    alpha: float,
) -> Objective:
    """Returns the objective of distillation: alpha times `losses.classification.distillation` of all views, plus
    1 - alpha times the cross-entropy of those with a label (SimCLR v2, arXiv 2006.10029, section 2).

    The metrics hold loss, teacher_agreement, the share of views that both put into one class, and, with alpha
    below 1, classifier_accuracy and labelled_share. z is empty, so use it with `no_loss`.

    Args:
      student: (params, batch_stats, images [n, H, W, 3]) -> (logits [n, C], new batch_stats).
      teacher: ({"params", "batch_stats"}, images) -> logits [n, C]. Its arrays are params["teacher"] and
        batch_stats["teacher"]; they pass no gradient.
      views: a batch -> float views [b, V, H, W, 3] in [0, 1].
      temperature: divides the logits of both.
      alpha: weight of the teacher, in [0, 1]. With 1 no label is looked at, so that they may be of other
        classes than the teacher's.
    """

    def embed(params, batch_stats, batch) -> Embedding:
        x = views(batch)
        count = x.shape[1]
        x = x.reshape(-1, *x.shape[2:])
        frozen = jax.lax.stop_gradient(_of(params, batch_stats, "teacher"))
        taught = teacher(frozen, x)
        logits, seen = student(params, batch_stats, x)
        loss = alpha * distillation(logits, taught, temperature)
        agree = jnp.mean(jnp.argmax(logits, -1) == jnp.argmax(taught, -1))
        metrics = {"teacher_agreement": agree}
        if alpha < 1:
            of_labels, accuracy = _of_labels(logits, batch)
            loss += (1 - alpha) * of_labels
            metrics |= {"classifier_accuracy": accuracy} | _labelled_share(batch)
        metrics["loss"] = loss
        return Embedding(jnp.zeros((len(x) // count, 0)), loss, metrics, seen)

    return embed


def no_loss(z, labels) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns a zero loss and no metrics: for objectives that already hold their whole loss."""
    del z, labels
    return jnp.zeros(()), {}


def _labelled_share(batch: Any) -> dict[str, jax.Array]:
    return {"labelled_share": jnp.mean(batch["label"] >= 0, dtype=jnp.float32)}


def _of_labels(logits: Any, batch: Any) -> tuple[jax.Array, jax.Array]:
    """Returns cross-entropy and accuracy of logits [V b, C], V adjacent rows an image, as `cross_entropy` does
    for a part of a batch.
    """
    views = len(logits) // len(batch["label"])
    labels, weights = (jnp.repeat(batch[name], views) for name in ("label", "label_weight"))
    return cross_entropy(logits, labels, weights)


def _of(params: Any, batch_stats: Any, name: str) -> dict:
    return {"params": params[name], "batch_stats": batch_stats[name]}
