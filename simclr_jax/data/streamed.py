"""A split of images that are read a shard at a time: order, shares and subsets, derived from a source.

TensorFlow is imported where it is used.
"""

import dataclasses
import functools
import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence, Set
from typing import Any

import numpy as np
from PIL import Image

from simclr_jax.data.encoded import Encoded
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Lane, Order, Share, lanes, next_whole, windows
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.source import CORES, ShardedSource, elements_of, in_order
from simclr_jax.data.split import BROKEN, NONE
from simclr_jax.data.subsets import split_validation
from simclr_jax.errors import UserError

# A subset of a stream is held encoded, in up to this share of the machine's memory: 10 % of ImageNet
# is 14 GB.
_MEMORY_FOR_SUBSETS = 0.25

_FILES_AT_ONCE = 16  # shards that are read in turns

# A part of a stream may lack classes by chance. Where a random choice of images would lack as many with a chance below
# this, the stream counts as sorted.
_BY_CHANCE = 1e-3


def memory() -> int:
    """Returns the size of this machine's memory, bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _log_chance_of(count: int, expected: float) -> float:
    """Returns an upper bound of the log of the chance that at least `count` events occur where `expected` occur on
    average (Chernoff); 0 where `count` is no more than that.
    """
    if count <= expected:
        return 0.0
    return count - expected + count * math.log(max(expected, 1e-300) / count)


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """Images that are read a shard at a time.

    The order of an epoch is a shuffle of the shards, dealt out to lanes, and in each lane a shuffle of the
    examples of some shards at a time; see `order.Lane`.

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

    def training(self, order: Order, start_step: int, broken: Set[int] = NONE) -> Any:
        def example(record, index, epoch):
            return self._example(index, record, broken) | {"index": index, "epoch": epoch}

        examples = self._shuffled(self.source.records, order, start_step, broken)
        return examples.map(example, num_parallel_calls=CORES)

    def batch_indices(self, order: Order, step: int, broken: Set[int] = NONE) -> np.ndarray:
        import tensorflow as tf

        lengths = tf.constant(self.source.lengths)

        def numbers(shard):  # as many as there are records, none of which has to be read
            return tf.data.Dataset.range(tf.gather(lengths, shard))

        own = order.batch_size // order.share.count
        indices = self._shuffled(numbers, order, step, broken).map(lambda _, index, epoch: index)
        return next(in_order(indices.batch(own).take(1)).as_numpy_iterator())

    def _shuffled(self, records: Any, order: Order, start_step: int, broken: Set[int]) -> Any:
        """Returns an endless tf.data.Dataset of (record, index, epoch), in the order of training.

        `records`: shard -> a tf.data.Dataset with one element for each of its examples.
        """
        import tensorflow as tf

        parts = lanes(order, len(self._shards))
        streams = [self._lane(records, order, lane, start_step, broken) for lane in parts]
        if len(streams) == 1:
            return streams[0]
        rows = tuple(
            stream.batch(lane.stop - lane.start)
            for lane, stream in zip(parts, streams, strict=True)
        )

        def together(*blocks):
            return tf.nest.map_structure(lambda *values: tf.concat(values, 0), *blocks)

        return tf.data.Dataset.zip(rows).map(together).unbatch()

    def _lane(
        self, records: Any, order: Order, lane: Lane, start_step: int, broken: Set[int]
    ) -> Any:
        """Returns the tf.data.Dataset of one lane, see `_shuffled`."""
        import tensorflow as tf

        shards, lengths = self._shards, self._lengths
        first_index = np.concatenate([[0], np.cumsum(lengths)[:-1]])

        def entries() -> Iterator[tuple]:
            about = order, lengths, lane, start_step, self._example_bytes
            for epoch, members, positions in windows(*about):
                yield shards[members], first_index[members], positions, epoch

        def numbered(shard, first):
            return records(shard).enumerate(first)

        def standing_in(index, positions):
            bad = np.isin(index, list(broken))
            return next_whole(bad)[positions] if bad.any() else positions

        def window(shards, first_indices, positions, epoch):
            files = tf.data.Dataset.from_tensor_slices((shards, first_indices))
            whole = files.interleave(
                numbered,
                _FILES_AT_ONCE,
                num_parallel_calls=min(CORES, _FILES_AT_ONCE),  # TensorFlow refuses more
                deterministic=True,
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

    @functools.cached_property
    def _stand_in(self) -> bytes:
        """A white PNG of the images' shape; of one pixel where that varies."""
        height, width, _ = self.image_shape
        content = io.BytesIO()
        Image.new("RGB", (width or 1, height or 1), "white").save(content, "PNG")
        return content.getvalue()

    def _example(self, index: Any, record: Any, broken: Set[int]) -> dict[str, Any]:
        """Parses a record, in the tf.data graph: {"image", "label"}.

        A broken image becomes a white one with the label BROKEN. In training it has a stand-in, unless all
        images of its window are broken.
        """
        import tensorflow as tf

        found = self.source.parse(record)
        if not broken:
            return found
        is_broken = tf.reduce_any(tf.equal(tf.constant(sorted(broken), tf.int64), index))
        return {
            "image": tf.where(is_broken, self._stand_in, found["image"]),
            "label": tf.where(is_broken, BROKEN, found["label"]),
        }

    def shards_of(self, indices: Sequence[int]) -> list[int]:
        """Returns the place among the split's shards of that which holds each of the examples."""
        return np.searchsorted(np.cumsum(self._lengths), indices, side="right").tolist()

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the place of an example: which of `_shards`, and which example of that shard."""
        (place,) = self.shards_of([index])
        return place, index - int(self._lengths[:place].sum())

    def _from(self, index: int) -> Any:
        """Returns a tf.data.Dataset of (index, record) of the examples from `index` on, in order. No
        shard before is read.
        """
        import tensorflow as tf

        place, passed = self._place(index)
        shards = tf.data.Dataset.from_tensor_slices(self._shards[place:])
        return shards.flat_map(self.source.records).enumerate(index - passed).skip(passed)

    def once(self, share: Share, start: int = 0, broken: Set[int] = NONE) -> Any:
        # The first of the remaining examples is this process's own, and then every P-th one.
        mine = self._from(share.index + start * share.count).shard(share.count, 0)
        return mine.map(
            lambda index, record: self._example(index, record, broken),
            num_parallel_calls=CORES,
        )

    def all_labels(self) -> np.ndarray:
        return self.source.labels(self._shards)

    def has_labels(self) -> bool:
        return bool(self.classes)

    def labelled(self) -> "StreamedSplit":
        return self

    def subset(self, indices: np.ndarray) -> IndexedSplit:
        self.check_subset(len(indices))
        wanted, images, labels = set(map(int, indices)), [], []
        for i, example in enumerate(elements_of(self.once(Share()), self.source.title)):
            if i in wanted:
                images.append(example["image"])
                labels.append(example["label"])
        return IndexedSplit(Encoded(images, np.asarray(labels, np.int32), self.source))

    @property
    def _example_bytes(self) -> float:
        return self.source.total_bytes / max(1, int(self.source.lengths.sum()))

    def check_subset(self, count: int) -> None:
        need = self._example_bytes * count
        room = _MEMORY_FOR_SUBSETS * memory()
        if need > room:
            raise UserError(
                f"{count} images of {self.source.title} take {need / 1e9:.1f} GB of "
                f"memory, and on this machine {room / 1e9:.1f} GB may be used for them: prepare them as a "
                "data set of their own (such as imagenet2012_subset/10pct) and name it in data.name"
            )

    def divided(self, fraction: float, seed: int) -> tuple["StreamedSplit", "StreamedSplit"]:
        # Whole shards, so that neither part reads the other's.
        shards, name = self._shards, self.source.shard_name
        if len(shards) < 2:
            raise UserError(
                f"{self.source.title} has one {name}, so none can be held out for validation: "
                f"prepare it with more {name}s"
            )
        part, rest = (
            dataclasses.replace(self, shards=tuple(shards[places].tolist()))
            for places in split_validation(len(shards), fraction, seed, name)
        )
        if self.classes and not self.source.is_shuffled:
            self._check_mixed({"to train on": part, "held out": rest})
        return part, rest

    def _check_mixed(self, parts: dict[str, "StreamedSplit"]) -> None:
        """Raises a UserError if one of `parts`, {its use: part}, lacks more classes than a random choice of images
        would: then the examples are sorted by class, or the labelled ones lie together.
        """
        assert self.classes
        counts = {}
        for use, part in parts.items():
            labels = part.all_labels()
            counts[use] = np.bincount(labels[labels >= 0], minlength=len(self.classes))
        whole = np.sum(list(counts.values()), axis=0)
        for use, part in parts.items():
            lacking = np.flatnonzero((counts[use] == 0) & (whole > 0))
            # For each class, the probability that a random choice of images has none of it.
            chances = (1 - part.count / self.count) ** whole[whole > 0]
            if _log_chance_of(len(lacking), float(chances.sum())) < math.log(_BY_CHANCE):
                name = self.source.shard_name
                raise UserError(
                    f"{self.source.title} seems to be sorted by class: of its {len(self._shards)} {name}s, which are "
                    f"held out whole, the {len(part._shards)} {use} hold no image of {len(lacking)} of {len(whole)} classes, such as "
                    f"{self.classes[lacking[0]]!r}: shuffle the images, or write smaller {name}s; or name test "
                    "images (data.test_path) and set eval.validation_fraction=0"
                )

    def decode(self, image: Any, options: ReadOptions = ReadOptions()) -> Any:
        return self.source.decode(image, options)

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
        records = elements_of(shards.flat_map(self.source.records), self.source.title)
        ends = np.cumsum(self._lengths)
        numbers = [i for p in places for i in range(ends[p] - self._lengths[p], ends[p])]
        found: dict[int, str] = {}
        for index, record in zip(numbers, records, strict=True):
            if index in wanted:
                image = tf.convert_to_tensor(self.source.parse(record)["image"])
                problem = self.source.problem(image.numpy())
                found |= {} if problem is None else {index: problem}
        return found

    def fingerprint(self) -> str:
        return self.source.fingerprint(self._shards)
