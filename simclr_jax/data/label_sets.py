"""Several labels an image, as in PASCAL VOC: each set of labels that occurs counts as one class.

Code that shuffles, samples and divides splits expects one label an image: it gets the set's number.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

# A set is kept in the bits of an int64: two for each label.
MOST_LABELS = 31

# Features of TFDS: the labels of an image, and of these the ones that are not "difficult".
_LABELS, _CERTAIN = "labels", "labels_no_difficult"


class LabelSets(NamedTuple):
    """The sets of labels that occur.

    Attributes:
      names: the names of the K labels.
      masks: int64 [C], one a set, ascending: bit k: label k is in it; bit K + k: label k is in it as
        "difficult", so that the image does not count for it (Everingham et al. 2010, section 3.3).
    """

    names: tuple[str, ...]
    masks: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the sets: "cat, dog"; a difficult label is in brackets."""
        said = {1: "{}", -1: "[{}]"}
        return tuple(
            ", ".join(said[x].format(n) for x, n in zip(row, self.names, strict=True) if x)
            for row in self.members.tolist()
        )

    @property
    def members(self) -> np.ndarray:
        """int8 [C, K]: 1: label k is in the set; -1: it is in it as "difficult"; 0: it is not."""
        bits = np.arange(len(self.names))
        certain, difficult = (self.masks[:, None] >> (bits + s) & 1 for s in (0, len(bits)))
        return (certain - difficult).astype(np.int8)

    def code(self, example: Mapping[str, Any]) -> Any:
        """Returns the number of a TFDS example's set, int32 scalar, -1 for no labels, in the tf.data graph."""
        import tensorflow as tf

        mask = mask_of(example, len(self.names))
        place = tf.searchsorted(tf.constant(self.masks), mask[None])[0]
        return tf.where(mask == 0, -1, tf.cast(place, tf.int32))


def mask_of(example: Mapping[str, Any], labels: int) -> Any:
    """Returns the mask of a TFDS example's set of labels, see `LabelSets`, in the tf.data graph.

    `labels`: K, the number of different labels.
    """
    import tensorflow as tf

    def bits(name):
        seen = tf.math.bincount(tf.cast(example[name], tf.int32), minlength=labels) > 0
        return tf.reduce_sum(tf.where(seen, tf.bitwise.left_shift(one, places), 0))

    one, places = tf.ones([labels], tf.int64), tf.range(labels, dtype=tf.int64)
    everything = bits(_LABELS)
    certain = bits(_CERTAIN) if _CERTAIN in example else everything
    difficult = tf.bitwise.bitwise_and(everything, tf.bitwise.invert(certain))
    return tf.bitwise.bitwise_or(certain, tf.bitwise.left_shift(difficult, labels))


def names_of(features: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Returns the label names of a TFDS data set whose images have several labels; None for any other."""
    if _LABELS not in features or "label" in features:
        return None
    names = getattr(getattr(features[_LABELS], "feature", None), "names", None)
    return tuple(names) if names else None
