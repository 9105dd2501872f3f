"""A split of images that can be read in any order: order, subsets and stand-ins, derived from a source.

TensorFlow is imported where it is used.
"""

import concurrent.futures
import functools
from collections.abc import Iterable, Iterator, Set
from dataclasses import replace
from typing import Any

import numpy as np

from simclr_jax.data.order import Order, Share, batch_positions, next_whole, standing_in
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.source import CORES, Source
from simclr_jax.data.split import BROKEN, NONE, Split
from simclr_jax.data.subsets import split_validation
from simclr_jax.errors import reason
from simclr_jax.files import raise_if_passing


def is_partly_labelled(split: Split) -> bool:
    """Returns whether `divided` holds out labelled images alone: two or more images have a label, and some have none. A
    stream holds out any of its images.
    """
    if not isinstance(split, IndexedSplit):
        return False
    return 2 <= int(np.sum(split.source.labels >= 0)) < split.count


class IndexedSplit:
    """Images that can be read in any order.

    The order is global: the content of a global batch does not depend on the number of processes.
    """

    def __init__(self, source: Source):
        """Makes a split of all images of the source."""
        self.source = source

    @property
    def count(self) -> int:
        return len(self.source)

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.source.classes

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]:
        return (None, None, 3) if self.source.arrays is None else self.source.arrays.shape[1:]

    def training(self, order: Order, start_step: int, broken: Set[int] = NONE) -> Any:
        if self.source.arrays is not None:
            return self.whole_batches(order, start_step, broken).unbatch()
        return self._examples(self._positions(order, start_step, broken).unbatch())

    def whole_batches(self, order: Order, start_step: int, broken: Set[int] = NONE) -> Any:
        """Returns the examples of `training`, this process's share of a global batch at a time.

        Only for images in memory: `source.arrays` must not be None.
        """
        return self._examples(self._positions(order, start_step, broken))

    def _positions(self, order: Order, start_step: int, broken: Set[int]) -> Any:
        import tensorflow as tf

        own = tf.TensorSpec([order.batch_size // order.share.count], tf.int64)
        return tf.data.Dataset.from_generator(
            lambda: self.entries(order, start_step, broken), output_signature=(own, own)
        )

    def _examples(self, positions: Any) -> Any:
        lookup = self._lookup()
        return positions.map(
            lambda epoch, index: lookup(index) | {"index": index, "epoch": epoch},
            num_parallel_calls=CORES,
        )

    def _lookup(self) -> Any:
        """Returns index -> {"image", "label"}, in the tf.data graph; of many indices if all images are in memory."""
        import tensorflow as tf

        image = self.source.lookup()
        with tf.device("cpu"):
            labels = tf.constant(self.source.labels)
        return lambda index: {"image": image(index), "label": tf.gather(labels, index)}

    def entries(
        self, order: Order, start_step: int, broken: Set[int] = NONE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (epochs, indices), int64 [B / P] each, of this process's batches, without end."""
        if not broken:
            yield from batch_positions(order, self.count, start_step)
        rows, whole = order.share.rows(order.batch_size), replace(order, share=Share())
        for epochs, indices in batch_positions(whole, self.count, start_step):
            yield epochs[rows], standing_in(broken, indices, rows, self.count)

    def batch_indices(self, order: Order, step: int, broken: Set[int] = NONE) -> np.ndarray:
        return next(self.entries(order, step, broken))[1]

    def stand_ins(self, broken: Set[int]) -> np.ndarray:
        """Returns int64 [N]: i where image i is not broken, else the next image that is not, cyclically."""
        return next_whole(np.isin(np.arange(self.count), list(broken)))

    def once(self, share: Share, start: int = 0, broken: Set[int] = NONE) -> Any:
        import tensorflow as tf

        lookup = self._lookup()
        mine = np.arange(share.index, self.count, share.count)[start:]
        entries = tf.data.Dataset.from_tensor_slices(
            (self.stand_ins(broken)[mine], np.isin(mine, list(broken)))
        )

        def example(index, is_broken):
            found = lookup(index)
            return found | {"label": tf.where(is_broken, BROKEN, found["label"])}

        return entries.map(example, num_parallel_calls=CORES)

    def all_labels(self) -> np.ndarray:
        return self.source.labels

    def has_labels(self) -> bool:
        return bool(self.classes) and bool(np.any(self.all_labels() >= 0))

    def labelled(self) -> "IndexedSplit":
        labelled = self.all_labels() >= 0
        return self if labelled.all() else self.subset(np.flatnonzero(labelled))

    def subset(self, indices: np.ndarray) -> "IndexedSplit":
        return IndexedSplit(self.source.take(indices))

    def check_subset(self, count: int) -> None:
        """Allows any subset: the images are in memory, or files."""

    def divided(self, fraction: float, seed: int) -> tuple["IndexedSplit", "IndexedSplit"]:
        name, among = "image", None
        if is_partly_labelled(self):
            name, among = "labelled image", self.source.labels >= 0
        part, rest = split_validation(self.count, fraction, seed, name, among)
        return self.subset(part), self.subset(rest)

    def decode(self, image: Any, options: ReadOptions = ReadOptions()) -> Any:
        if self.source.arrays is not None:
            return image
        return self.source.decode(image, options)

    def name_of(self, index: int) -> str:
        return self.source.name_of(index)

    def problems(self, indices: Iterable[int]) -> dict[int, str]:
        several = list(indices)
        with concurrent.futures.ThreadPoolExecutor(CORES) as threads:
            found = zip(several, threads.map(self._problem, several), strict=True)
            return {index: problem for index, problem in found if problem is not None}

    def _problem(self, index: int) -> str | None:
        if self.source.arrays is not None:
            return None
        try:
            return self.source.problem(self.source.encoded(index))
        except OSError as error:
            raise_if_passing(error)
            return reason(error)
        except ValueError as error:
            return str(error)

    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self.source.fingerprint()
