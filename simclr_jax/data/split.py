"""A split: the order of its images, shares of processes, subsets and stand-ins, derived from a source.

It answers two questions with a tf.data.Dataset of raw examples: which come next in training, and
which are all of them for evaluation. TensorFlow is imported where it is used.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Set
from typing import Any, Protocol

import numpy as np

from simclr_jax.data.order import (
    Order,
    Share,
    batch_positions,
    next_whole,
    split_validation,
    windows,
)
from simclr_jax.data.source import Encoded, ShardedSource, Source
from simclr_jax.errors import UserError

# A subset of a stream is held encoded, in up to this share of the machine's memory: 10 % of ImageNet
# is 14 GB.
_MEMORY_FOR_SUBSETS = 0.25

_FILES_AT_ONCE = 16  # shards that are read in turns

BROKEN = -2  # stands for the label of an image that cannot be read; -1 is an image without a label

# A white pixel: stands for a broken image where images are streamed and only labels tell them apart.
_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c494441"
    "54789c63f8ffff3f0005fe02fe0def46b80000000049454e44ae426082"
)

_NONE: Set[int] = frozenset()


def memory() -> int:
    """Returns the size of this machine's memory, bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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

    def training(self, order: Order, start_step: int, broken: Set[int] = _NONE) -> Any:
        """Returns an endless tf.data.Dataset of {"image", "label", "index", "epoch"}.

        Each element is one example. They are this process's part of the global batches from
        `start_step` on, with a new shuffle each epoch; examples before it are skipped without decoding. In place of a broken image stands the next
        one that is not.
        """

    def batch_indices(self, order: Order, step: int, broken: Set[int] = _NONE) -> np.ndarray:
        """Returns the indices [B / P] of this process's images of a step."""

    def once(self, share: Share, start: int = 0, broken: Set[int] = _NONE) -> Any:
        """Returns a tf.data.Dataset of {"image", "label"}: each image once over all processes.

        Process p of P holds images p, p + P, ...; the first `start` images of this process are skipped.
        In place of a broken image stands another, with the label BROKEN.
        """

    def all_labels(self) -> np.ndarray:
        """Returns int32 [N], in the split's order; decodes no image."""

    def subset(self, indices: np.ndarray) -> "IndexedSplit":
        """Returns these images as a split. Raises a UserError if they do not fit into memory."""

    def check_subset(self, count: int) -> None:
        """Raises a UserError if `count` images are too many for `subset`."""

    def divided(self, fraction: float, seed: int) -> tuple["Split", "Split"]:
        """Divides the images at random: (about 1 - fraction of them, the remaining ones).

        Raises a UserError if there are too few to divide.
        """

    def decode(self, image: Any) -> Any:
        """Decodes "image" of an example to uint8 [H, W, C], in the tf.data graph."""

    def name_of(self, index: int) -> str:
        """Returns what a person calls an image."""

    def problems(self, indices: Iterable[int]) -> dict[int, str]:
        """Tries to read images. Returns {index: why it cannot be read} of those that cannot."""

    def fingerprint(self) -> str:
        """Returns a text that is equal for splits of equal content, wherever they lie."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set.

    Attributes:
      train: the split to train on.
      test: the split to test on; None: there is none.
    """

    train: Split
    test: Split | None


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

    def training(self, order: Order, start_step: int, broken: Set[int] = _NONE) -> Any:
        if self.source.arrays is not None:
            return self.whole_batches(order, start_step, broken).unbatch()
        return self._examples(self._positions(order, start_step, broken).unbatch())

    def whole_batches(self, order: Order, start_step: int, broken: Set[int] = _NONE) -> Any:
        """Returns the examples of `training`, this process's share of a global batch at a time.

        The images are in memory: `source.arrays` is not None.
        """
        return self._examples(self._positions(order, start_step, broken))

    def _positions(self, order: Order, start_step: int, broken: Set[int]) -> Any:
        import tensorflow as tf

        own = tf.TensorSpec([order.batch_size // order.share.count], tf.int64)
        return tf.data.Dataset.from_generator(
            lambda: self.entries(order, start_step, broken), output_signature=(own, own)
        )

    def _examples(self, positions: Any) -> Any:
        import tensorflow as tf

        lookup = self._lookup()
        return positions.map(
            lambda epoch, index: lookup(index) | {"index": index, "epoch": epoch},
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def _lookup(self) -> Any:
        """Returns index -> {"image", "label"}, in the tf.data graph; many where all are in memory."""
        import tensorflow as tf

        image = self.source.lookup()
        with tf.device("cpu"):
            labels = tf.constant(self.source.labels)
        return lambda index: {"image": image(index), "label": tf.gather(labels, index)}

    def entries(
        self, order: Order, start_step: int, broken: Set[int] = _NONE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (epochs, indices), int64 [B / P] each, of this process's batches, without end."""
        stand_in = self.stand_ins(broken)
        for epochs, indices in batch_positions(order, self.count, start_step):
            yield epochs, stand_in[indices]

    def batch_indices(self, order: Order, step: int, broken: Set[int] = _NONE) -> np.ndarray:
        return next(self.entries(order, step, broken))[1]

    def stand_ins(self, broken: Set[int]) -> np.ndarray:
        """Returns int64 [N]: i where image i is not broken, else the next image that is not, cyclically."""
        return next_whole(np.isin(np.arange(self.count), list(broken)))

    def once(self, share: Share, start: int = 0, broken: Set[int] = _NONE) -> Any:
        import tensorflow as tf

        lookup = self._lookup()
        mine = np.arange(share.index, self.count, share.count)[start:]
        entries = tf.data.Dataset.from_tensor_slices(
            (self.stand_ins(broken)[mine], np.isin(mine, list(broken)))
        )

        def example(index, is_broken):
            found = lookup(index)
            return found | {"label": tf.where(is_broken, BROKEN, found["label"])}

        return entries.map(example, num_parallel_calls=tf.data.AUTOTUNE)

    def all_labels(self) -> np.ndarray:
        return self.source.labels

    def subset(self, indices: np.ndarray) -> "IndexedSplit":
        return IndexedSplit(self.source.take(indices))

    def check_subset(self, count: int) -> None:
        """Allows any subset: the images are in memory, or files."""

    def divided(self, fraction: float, seed: int) -> tuple["IndexedSplit", "IndexedSplit"]:
        part, rest = split_validation(self.source.labels, fraction, seed)
        return self.subset(part), self.subset(rest)

    def decode(self, image: Any) -> Any:
        if self.source.arrays is not None:
            return image
        from simclr_jax.data.decode import decode

        return decode(image)

    def name_of(self, index: int) -> str:
        return self.source.name_of(index)

    def problems(self, indices: Iterable[int]) -> dict[int, str]:
        found = ((index, self._problem(index)) for index in indices)
        return {index: problem for index, problem in found if problem is not None}

    def _problem(self, index: int) -> str | None:
        if self.source.arrays is not None:
            return None
        from simclr_jax.data.decode import problem_of

        try:
            return problem_of(self.source.encoded(index))
        except OSError as error:
            return error.strerror or str(error)
        except ValueError as error:
            return str(error)

    def fingerprint(self) -> str:
        return self.source.fingerprint()


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """Images that are read a shard at a time.

    The order of an epoch is a shuffle of the shards, and a shuffle of the examples of some shards at
    a time. Each process reads its own part of each epoch's shards, so here, unlike with an
    `IndexedSplit`, the content of a global batch does depend on the number of processes.

    Attributes:
      source: the shards.
      shards: which of them, ascending; None: all.
    """

    source: ShardedSource
    shards: tuple[int, ...] | None = None

    @property
    def _shards(self) -> np.ndarray:
        if self.shards is None:
            return np.arange(len(self.source.lengths))
        return np.asarray(self.shards, np.int64)

    @property
    def _lengths(self) -> np.ndarray:
        return self.source.lengths[self._shards]

    @property
    def count(self) -> int:
        return int(self._lengths.sum())

    @property
    def classes(self) -> tuple[str, ...] | None:
        return self.source.classes

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]:
        return self.source.image_shape

    def training(self, order: Order, start_step: int, broken: Set[int] = _NONE) -> Any:
        import tensorflow as tf

        def example(record, index, epoch):
            return self._example(index, record, broken) | {"index": index, "epoch": epoch}

        examples = self._shuffled(self.source.records, order, start_step, broken)
        return examples.map(example, num_parallel_calls=tf.data.AUTOTUNE)

    def batch_indices(self, order: Order, step: int, broken: Set[int] = _NONE) -> np.ndarray:
        import tensorflow as tf

        lengths = tf.constant(self.source.lengths)

        def numbers(shard):  # as many as there are records, none of which has to be read
            return tf.data.Dataset.range(tf.gather(lengths, shard))

        own = order.batch_size // order.share.count
        indices = self._shuffled(numbers, order, step, broken).map(lambda _, index, epoch: index)
        return next(indices.batch(own).take(1).as_numpy_iterator())

    def _shuffled(self, records: Any, order: Order, start_step: int, broken: Set[int]) -> Any:
        """Returns an endless tf.data.Dataset of (record, index, epoch), in the order of training.

        `records`: shard -> a tf.data.Dataset with one element for each of its examples.
        """
        import tensorflow as tf

        shards, lengths = self._shards, self._lengths
        if len(shards) < order.share.count:
            what = f"{self.source.shard_name}s"
            raise UserError(
                f"{self.source.title} has {len(shards)} {what}, fewer than the "
                f"{order.share.count} processes that would share them: prepare it with more {what}"
            )
        first_index = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        passed = start_step * (order.batch_size // order.share.count)

        def entries() -> Iterator[tuple]:
            for epoch, members, positions in windows(order, lengths, passed):
                yield shards[members], first_index[members], positions, epoch

        def numbered(shard, first):
            return records(shard).enumerate(first)

        def standing_in(index, positions):
            bad = np.isin(index, list(broken))
            return next_whole(bad)[positions] if bad.any() else positions

        def window(shards, first_indices, positions, epoch):
            files = tf.data.Dataset.from_tensor_slices((shards, first_indices))
            whole = files.interleave(
                numbered, _FILES_AT_ONCE, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
            ).batch(tf.cast(lengths.sum(), tf.int64))

            def in_order(index, record):
                places = positions
                if broken:
                    places = tf.numpy_function(standing_in, [index, positions], tf.int64)
                    places = tf.ensure_shape(places, [None])
                picked = tf.nest.map_structure(lambda x: tf.gather(x, places), record)
                return picked, tf.gather(index, places), tf.fill(tf.shape(places), epoch)

            return whole.map(in_order)

        stream = tf.data.Dataset.from_generator(
            entries,
            output_signature=(
                tf.TensorSpec([None], tf.int64),
                tf.TensorSpec([None], tf.int64),
                tf.TensorSpec([None], tf.int64),
                tf.TensorSpec([], tf.int64),
            ),
        )
        # The next window is read while this one is used.
        return stream.flat_map(window).prefetch(1).unbatch()

    def _example(self, index: Any, record: Any, broken: Set[int]) -> dict[str, Any]:
        """Parses a record, in the tf.data graph: {"image", "label"}.

        Of a broken image it makes a white pixel with the label BROKEN. In training such an image has a
        stand-in, unless all that are read with it are broken too.
        """
        import tensorflow as tf

        found = self.source.parse(record)
        if not broken:
            return found
        is_broken = tf.reduce_any(tf.equal(tf.constant(sorted(broken), tf.int64), index))
        return {
            "image": tf.where(is_broken, _PIXEL, found["image"]),
            "label": tf.where(is_broken, BROKEN, found["label"]),
        }

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the place of an example: which of `_shards`, and which example of that shard."""
        ends = np.cumsum(self._lengths)
        place = int(np.searchsorted(ends, index, side="right"))
        return place, index - int(ends[place - 1] if place else 0)

    def _from(self, index: int) -> Any:
        """Returns a tf.data.Dataset of (index, record) of the examples from `index` on, in order. No
        shard before is read.
        """
        import tensorflow as tf

        place, passed = self._place(index)
        shards = tf.data.Dataset.from_tensor_slices(self._shards[place:])
        return shards.flat_map(self.source.records).enumerate(index - passed).skip(passed)

    def once(self, share: Share, start: int = 0, broken: Set[int] = _NONE) -> Any:
        import tensorflow as tf

        # The first of the rest is this process's own.
        mine = self._from(share.index + start * share.count).shard(share.count, 0)
        return mine.map(
            lambda index, record: self._example(index, record, broken),
            num_parallel_calls=tf.data.AUTOTUNE,
        )

    def all_labels(self) -> np.ndarray:
        return self.source.labels(self._shards)

    def subset(self, indices: np.ndarray) -> IndexedSplit:
        self.check_subset(len(indices))
        wanted, images, labels = set(map(int, indices)), [], []
        for i, example in enumerate(self.once(Share()).as_numpy_iterator()):
            if i in wanted:
                images.append(example["image"])
                labels.append(example["label"])
        return IndexedSplit(Encoded(images, np.asarray(labels, np.int32), self.classes))

    def check_subset(self, count: int) -> None:
        need = self.source.total_bytes / max(1, int(self.source.lengths.sum())) * count
        room = _MEMORY_FOR_SUBSETS * memory()
        if need > room:
            raise UserError(
                f"{count} images of {self.source.title} take {need / 1e9:.1f} GB of "
                f"memory, and on this machine there are {room / 1e9:.1f} for them: prepare them as a "
                "data set of their own (such as imagenet2012_subset/10pct) and name it in data.name"
            )

    def divided(self, fraction: float, seed: int) -> tuple["StreamedSplit", "StreamedSplit"]:
        # Whole shards, so that neither part reads the other's. TFDS shuffles a data set before it
        # divides it into files; row groups are many and small.
        shards, name = self._shards, self.source.shard_name
        if len(shards) < 2:
            raise UserError(
                f"{self.source.title} has one {name}, so none can be held out for validation: "
                f"prepare it with more {name}s"
            )
        part, rest = split_validation(shards, fraction, seed)
        return (
            dataclasses.replace(self, shards=tuple(shards[part].tolist())),
            dataclasses.replace(self, shards=tuple(shards[rest].tolist())),
        )

    def decode(self, image: Any) -> Any:
        return self.source.decode(image)

    def name_of(self, index: int) -> str:
        place, inside = self._place(index)
        first = int(self.source.lengths[: self._shards[place]].sum())
        return self.source.name_of(first + inside)

    def problems(self, indices: Iterable[int]) -> dict[int, str]:
        import tensorflow as tf

        # Each shard is read once, however many of its images are asked for.
        wanted = set(indices)
        places = sorted({self._place(index)[0] for index in wanted})
        shards = tf.data.Dataset.from_tensor_slices(self._shards[places])
        records = shards.flat_map(self.source.records).as_numpy_iterator()
        ends = np.cumsum(self._lengths)
        numbers = [i for p in places for i in range(ends[p] - self._lengths[p], ends[p])]
        found = {}
        for index, record in zip(numbers, records, strict=True):
            if index in wanted:
                image = tf.convert_to_tensor(self.source.parse(record)["image"])
                problem = self.source.problem(image.numpy())
                found |= {} if problem is None else {index: problem}
        return found

    def fingerprint(self) -> str:
        return self.source.fingerprint(self._shards)
