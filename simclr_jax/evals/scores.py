"""Measures of a classifier on test images, and which of them the paper reports for which data set."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from simclr_jax.errors import UserError

# Data sets of TFDS for which the paper reports the mean over the classes (appendix B.8.1).
_MEAN_PER_CLASS = ("caltech101", "fgvc_aircraft", "oxford_flowers102", "oxford_iiit_pet")

_RECALLS = np.linspace(0, 1, 11)

# With so many classes results say the top-5 accuracy too, as the paper's tables 6 and 7 do for ImageNet.
TOP_5_FROM = 100


class Score(NamedTuple):
    """Scores of a classifier on test images, each in [0, 1].

    Attributes:
      value: by the metric that is asked for, most often the accuracy.
      top_5: the share of images whose label is among the five classes of largest logits; None: there are fewer than
        `TOP_5_FROM` classes, or another metric is asked for.
      mean_per_class: the accuracy on the images of a class, its mean over the classes; None: the classes are balanced
        (`is_unbalanced`), or another metric is asked for.
    """

    value: float
    top_5: float | None = None
    mean_per_class: float | None = None


# What a table calls the fields of a Score beside its value.
BESIDE = {"top_5": "top-5", "mean_per_class": "mean of classes"}


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of images whose largest logit is their label's.

    Args:
      logits: [n, C].
      labels: int [n], from 0 to C - 1.
    """
    return float(np.mean(np.argmax(logits, axis=1) == labels))


def top_5_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the share of images whose label is among the five classes of largest logits; of equal logits the first
    come first, as in `accuracy`. The arguments are those of `accuracy`.
    """
    five = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    return float(np.mean(np.any(five == labels[:, np.newaxis], axis=1)))


def mean_per_class(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean, over the classes that occur, of the accuracy on a class's images.

    The arguments are those of `accuracy`.
    """
    return mean_of_classes(np.argmax(logits, axis=1) == labels, labels)


def mean_of_classes(right: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean, over the classes that occur, of the share of a class's images that are classified rightly.

    Args:
      right: bool [n], whether each image is.
      labels: int [n].
    """
    return float(np.mean([right[labels == c].mean() for c in np.unique(labels)]))


def is_unbalanced(labels: np.ndarray, classes: int) -> bool:
    """Returns whether always answering the largest class would reach an accuracy of twice chance, or of three quarters.

    Args:
      labels: int [n], from 0 to C - 1.
      classes: C.
    """
    largest = np.bincount(labels, minlength=classes).max() / len(labels)
    return bool(largest >= min(2 / classes, 0.75))


def eleven_point_map(logits: np.ndarray, members: np.ndarray) -> float:
    """Returns the mean over the classes of the 11-point average precision of PASCAL VOC 2007 (Everingham et
    al. 2010, section 4.2): the mean, over the recalls 0, 0.1, ..., 1, of the largest precision at that
    recall or a larger one.

    Args:
      logits: [n, K].
      members: int [n, K]: 1: the image is of the class; 0: it is not; -1: it does not count for the class
        ("difficult"). Classes without any image of theirs are left out.

    Raises:
      UserError: no class has an image.
    """
    found = [
        _average_precision(logits[:, k], members[:, k])
        for k in range(members.shape[1])
        if np.any(members[:, k] == 1)
    ]
    if not found:
        raise UserError(
            f"none of {len(members)} images that are judged by is of any class: expected another "
            "eval.validation_fraction, or other test images"
        )
    return float(np.mean(found))


def _average_precision(scores: np.ndarray, members: np.ndarray) -> float:
    counted = members >= 0
    # Among equal scores the wrong images come first, so that no order of the images is of advantage.
    order = np.lexsort((members[counted], -scores[counted]))
    right = members[counted][order] == 1
    hits = np.cumsum(right)
    recall, precision = hits / hits[-1], hits / np.arange(1, len(hits) + 1)
    # 1e-9: 3 / 10 recalled are the recall 0.3, whatever the rounding.
    best = [precision[recall >= r - 1e-9].max() for r in _RECALLS]
    return float(np.mean(best))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy,
    "mean_per_class": mean_per_class,
    "11_point_map": eleven_point_map,
}

METRIC_NAMES = {
    "accuracy": "accuracy",
    "mean_per_class": "accuracy, mean of the classes",
    "11_point_map": "11-point mAP",
}


def score(metric: str, logits: np.ndarray, targets: np.ndarray) -> Score:
    """Scores logits [n, C] by a row of `METRICS`; `targets`: labels int [n], or members int [n, K]."""
    if metric != "accuracy":
        return Score(METRICS[metric](logits, targets))
    classes = logits.shape[1]
    top_5 = top_5_accuracy(logits, targets) if classes >= TOP_5_FROM else None
    return score_of_classes(np.argmax(logits, axis=1), targets, classes)._replace(top_5=top_5)


def score_of_classes(found: np.ndarray, labels: np.ndarray, classes: int) -> Score:
    """Scores the classes int [n] that were found for images of labels int [n], of C = `classes`."""
    right = found == labels
    by_class = mean_of_classes(right, labels) if is_unbalanced(labels, classes) else None
    return Score(float(np.mean(right)), mean_per_class=by_class)


def published_metric(asked: str, source: str, name: str) -> str:
    """Returns the name of the metric for data with one label an image: what is asked, or the paper's.

    Args:
      asked: "auto", for the one that the paper reports, or a metric.
      source: kind of the data set.
      name: the data set's name in TFDS, perhaps with a configuration and a version.
    """
    if asked != "auto":
        return asked
    known = source == "tfds" and name.partition("/")[0].partition(":")[0] in _MEAN_PER_CLASS
    return "mean_per_class" if known else "accuracy"
