"""A split of a data set: what training and evaluation ask of it, whatever its source.

It gives a tf.data.Dataset of raw examples in two ways: those that come next in training, without end, and each
once for evaluation.
"""

import dataclasses
from collections.abc import Iterable, Set
from typing import Any, Protocol

import numpy as np

from simclr_jax.data.order import Order, Share
from simclr_jax.data.pixels import ReadOptions

BROKEN = -2  # stands for the label of an image that cannot be read; -1 is an image without a label

NONE: Set[int] = frozenset()  # no image is broken


class Split(Protocol):
    """One split of a data set: an `IndexedSplit` or a `StreamedSplit`."""

    @property
    def count(self) -> int:
        """N, the number of images."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes, or None where there are no labels."""

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]:
        """(height, width, channels), None where it varies or is not known."""

    def training(self, order: Order, start_step: int, broken: Set[int] = NONE) -> Any:
        """Returns an endless tf.data.Dataset of {"image", "label", "index", "epoch"}.

        Each element is one example. They are this process's part of the global batches from
        `start_step` on, with a new shuffle each epoch; examples before it are skipped without decoding.
        A broken image is replaced: in an indexed split by a readable image that is not in the batch, if there is one
        (`order.standing_in`); in a stream by the next readable image of its window.
        """

    def batch_indices(self, order: Order, step: int, broken: Set[int] = NONE) -> np.ndarray:
        """Returns the indices [B / P] of this process's images of a step."""

    def once(self, share: Share, start: int = 0, broken: Set[int] = NONE) -> Any:
        """Returns a tf.data.Dataset of {"image", "label"}: each image once over all processes.

        Process p of P holds images p, p + P, ...; the first `start` images of this process are skipped.
        In place of a broken image stands another, with the label BROKEN.
        """

    def all_labels(self) -> np.ndarray:
        """Returns int32 [N], in the split's order; decodes no image."""

    def has_labels(self) -> bool:
        """Returns whether any image has a label: a part of a split may have classes but no labels. A stream returns whether
        it has classes, since finding a label would mean reading it.
        """

    def labelled(self) -> "Split":
        """Returns the images that have a label; a stream whole, as its images without a label count in no loss and
        no accuracy.
        """

    def subset(self, indices: np.ndarray) -> "Split":
        """Returns these images as a split, those of a stream in its order. Raises a UserError if they do not fit into
        memory.
        """

    def check_subset(self, count: int) -> None:
        """Raises a UserError if `count` images are too many for `subset`."""

    def divided(self, fraction: float, seed: int) -> tuple["Split", "Split"]:
        """Divides the images at random: (about 1 - fraction of them, the remaining ones). Where two or more images have a
        label and some have none, the remaining ones are labelled ones alone, `fraction` of these; not in a stream.

        Raises a UserError if there are too few to divide.
        """

    def decode(self, image: Any, options: ReadOptions = ReadOptions()) -> Any:
        """Decodes "image" of an example to uint8 [H, W, C], in the tf.data graph."""

    def name_of(self, index: int) -> str:
        """Returns what a person calls an image."""

    def problems(self, indices: Iterable[int]) -> dict[int, str]:
        """Tries to read images. Returns {index: why it cannot be read} of those that cannot."""

    def fingerprint(self) -> str:
        """Returns a text that is equal for splits of equal content, wherever they lie.

        Other content may have the same text, too, where reading all would take too long: a folder's knows labels, names
        and sizes of the files, that of Parquet files labels and sizes, and that of TFDS the data set's name and the
        lengths of its shards.
        """


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes:
      train: the split to train on.
      test: the split to test on; None: there is none.
      members: where images have several labels each: int8 [C, K]. A class is then a set of labels, and
        members[c, k] is 1 if label k is in it, 0 if not, -1 if it does not count ("difficult" in PASCAL
        VOC). None: each image has one label.
    """

    train: Split
    test: Split | None
    members: np.ndarray | None = None
