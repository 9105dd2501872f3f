"""Sources of images: what each kind of data set must implement. `indexed.py` and `streamed.py` derive the rest.

A source of images that can be read in any order is a `Source`; one that is read a shard at a time,
such as record files, is a `ShardedSource`. TensorFlow is imported where it is used.
"""

import abc
import functools
import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from simclr_jax.data.decoding import DecodedAs, Decoding
from simclr_jax.errors import UserError
from simclr_jax.files import raise_if_away

Classes = tuple[str, ...] | None

_LABELS_AT_ONCE = 8192

# Calls of a tf.data map at a time: one a core. AUTOTUNE makes at most 16 where autotuning is off, see `in_order`.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(dataset: Any) -> Any:
    """Returns the tf.data.Dataset with its elements in order and without autotuning.

    Autotuning has a thread that sleeps up to a minute, and the end of an iterator waits for it
    (TensorFlow 2.21: 16 to 37 s, seen at the end of trainings).
    """
    import tensorflow as tf

    options = tf.data.Options()
    options.deterministic = True
    options.autotune.enabled = False
    return dataset.with_options(options)


def elements_of(dataset: Any, title: str) -> Iterator[Any]:
    """Yields the elements of a tf.data.Dataset, as numpy arrays, in order; `title` names its source.

    Raises:
      UserError: a file of the source is damaged or not there.
      Unavailable: a bucket does not answer.
    """
    import tensorflow as tf

    from simclr_jax.data.decode import reason_of

    try:
        yield from in_order(dataset).as_numpy_iterator()
    except tf.errors.OpError as error:
        raise_if_away(error)
        raise UserError(
            f"the files of {title} cannot be read ({reason_of(error)[:200]}): prepare or copy them anew"
        ) from error


def class_of(label: Any) -> str | None:
    """Returns the class that a label, a number or a text, names; None for no label: None, -1 or an empty text."""
    name = "" if label is None else str(label).strip()
    return None if name in ("", "-1") else name


def in_order_of_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of classes sorted: numbers by their value, before texts."""

    def key(name: str) -> tuple:
        return (0, int(name), name) if name.removeprefix("-").isdecimal() else (1, 0, name)

    return tuple(sorted(names, key=key))


def codes_of(occurring: Sequence[str], classes: Classes, where: str) -> dict[str | None, int]:
    """Numbers classes: {name: number from 0 on}, and -1 for None, which is no label.

    Args:
      occurring: the classes of a split, in the order in which they are numbered where `classes` is None.
      classes: those of the training split, in order; None: this is the training split.
      where: names the split's labels in an error.

    Raises:
      UserError: a class occurs that is not among `classes`.
    """
    code: dict[str | None, int] = {
        name: i for i, name in enumerate(occurring if classes is None else classes)
    }
    unknown = [name for name in occurring if name not in code]
    if unknown:
        more = ", ..." if len(unknown) > 5 else ""
        raise UserError(
            f"{where} has the classes {', '.join(unknown[:5])}{more}, which the training images do not have"
        )
    return code | {None: -1}


class Example(NamedTuple):
    """One image and its label.

    Attributes:
      image: the content of an image file, or uint8 [H, W, 1 or 3].
      label: an index into the classes; -1: none.
    """

    image: bytes | np.ndarray
    label: int = -1


class Source(Decoding, abc.ABC):
    """Images that can be read in any order. Only `__len__` and `__getitem__` must be written.

    Several threads may read at once.

    Attributes:
      classes: names of the classes; None: there are no labels.
      arrays: uint8 [N, H, W, C], all images of an `InMemory`; None in every other source.
    """

    classes: Classes = None
    arrays: np.ndarray | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Returns N, the number of images."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Reads image `index`, from 0 to N - 1. Raises an OSError if it cannot."""

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Returns the labels, int32 [N], -1 where there is none. By default every image is read for it, if there
        are classes.
        """
        if self.classes is None:
            return np.full(len(self), -1, np.int32)
        return np.asarray([self._read(i).label for i in range(len(self))], np.int32)

    def encoded(self, index: int) -> bytes:
        """Reads image `index` as the content of an image file, which is PNG for pixels.

        Raises:
          OSError: it cannot be read.
          ValueError: it is neither bytes nor uint8 [H, W, 1 or 3].
        """
        image = self[index].image
        return image if isinstance(image, bytes) else _as_png(image)

    def _read(self, index: int) -> Example:
        """Reads image `index`; one that cannot be read is empty and has no label."""
        try:
            return self[index]
        except OSError:
            return Example(b"")

    def take(self, indices: np.ndarray) -> "Source":
        """Returns a source of these images."""
        return _Taken(self, np.asarray(indices))

    def lookup(self) -> Any:
        """Returns a function for the tf.data graph: index, an int64 scalar -> that image, the content of a
        file or uint8 [H, W, C].

        By default it calls `encoded`, and an image that cannot be read is empty, which nothing can
        decode. A source whose images TensorFlow itself can read overrides it, as Python reads one image
        at a time.
        """
        import tensorflow as tf

        def read(index):
            try:
                return self.encoded(int(index))
            except (OSError, ValueError):
                return b""

        def image(index):
            return tf.ensure_shape(tf.numpy_function(read, [index], tf.string), [])

        return image

    def name_of(self, index: int) -> str:
        """Returns what a person calls image `index`, such as its path."""
        return f"image {index}"

    def fingerprint(self) -> str:
        """Returns a text that is equal for sources of equal content, wherever they lie.

        By default a digest of all labels and images.
        """
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        for i in range(len(self)):
            image = self._read(i).image
            if isinstance(image, bytes):
                digest.update(f"{len(image)} ".encode() + image)
            else:
                digest.update(f"{image.shape} ".encode() + image.tobytes())
        return digest.hexdigest()


def _as_png(image: np.ndarray) -> bytes:
    """Writes uint8 [H, W, 1 or 3] as PNG, not compressed. Raises a ValueError if it is something else."""
    shape = np.shape(image)
    if getattr(image, "dtype", None) != np.uint8 or len(shape) != 3 or shape[-1] not in (1, 3):
        raise ValueError(
            f"{np.asarray(image).dtype} {list(shape)}: expected bytes, or uint8 [H, W, 1 or 3]"
        )
    file = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(file, "png", compress_level=0)
    return file.getvalue()


class _Taken(DecodedAs, Source):
    """Some images of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices, self.classes = source, indices, source.classes
        self.origin = source

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Example:
        return self._source[int(self._indices[index])]

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self._source.labels[self._indices]

    def lookup(self) -> Any:
        import tensorflow as tf

        image, indices = self._source.lookup(), tf.constant(self._indices)
        return lambda index: image(tf.gather(indices, index))

    def name_of(self, index: int) -> str:
        return self._source.name_of(int(self._indices[index]))


class InMemory(Source):
    """Images of one shape, as an array."""

    def __init__(self, arrays: np.ndarray, labels: np.ndarray, classes: Classes = None):
        """Holds them.

        Args:
          arrays: uint8 [N, H, W, 1 or 3].
          labels: int32 [N], -1 where there is none.
          classes: their names.
        """
        self.arrays: np.ndarray = arrays
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> Example:
        return Example(self.arrays[index], int(self.labels[index]))

    def take(self, indices: np.ndarray) -> "InMemory":
        return InMemory(self.arrays[indices], self.labels[indices], self.classes)

    def lookup(self) -> Any:
        import tensorflow as tf

        # Captured once, not copied into the graph's definition for each use.
        with tf.device("cpu"):
            arrays = tf.constant(self.arrays)
        return lambda index: tf.gather(arrays, index)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        digest.update(str(self.arrays.shape).encode())
        digest.update(np.ascontiguousarray(self.arrays).data)
        return digest.hexdigest()


class ShardedSource(Decoding, abc.ABC):
    """Images that are read a shard at a time, in the shard's order.

    Attributes:
      classes: names of the classes; None: there are no labels.
      lengths: int64 [S], examples of each shard.
      title: the source's name, as a person knows it.
      total_bytes: size of all encoded images.
      image_shape: (height, width, channels), None where it varies.
      shard_name: the word for one of its shards, such as "row group".
      is_shuffled: the examples were shuffled before they were divided into shards.
    """

    classes: Classes
    lengths: np.ndarray
    title: str
    total_bytes: int
    image_shape: tuple[int | None, int | None, int] = (None, None, 3)
    shard_name: str = "shard"
    is_shuffled: bool = False

    @abc.abstractmethod
    def records(self, shard: Any) -> Any:
        """Returns a tf.data.Dataset of the records of a shard, in order: any structure of tensors.

        `shard`: int64 scalar tensor, from 0 to S - 1.
        """

    @abc.abstractmethod
    def parse(self, record: Any) -> dict[str, Any]:
        """Turns a record into {"image": an encoded image, "label": int32}, in the tf.data graph."""

    def labels(self, shards: np.ndarray) -> np.ndarray:
        """Returns int32 [n], the labels of these shards' examples, in order; decodes no image.

        By default all records are read for it, if there are classes.
        """
        if self.classes is None:
            return np.full(self.lengths[shards].sum(), -1, np.int32)
        import tensorflow as tf

        # `enumerate` makes pairs: `map` would unpack a record that is a tuple into several arguments.
        records = tf.data.Dataset.from_tensor_slices(shards).flat_map(self.records).enumerate()
        found = records.map(lambda _, record: self.parse(record)["label"], CORES)
        return np.concatenate(list(elements_of(found.batch(_LABELS_AT_ONCE), self.title)))

    @abc.abstractmethod
    def fingerprint(self, shards: np.ndarray) -> str:
        """Returns a text that is equal for equal content of these shards, wherever they lie. Other content may have the
        same text, too: see `Split.fingerprint`.
        """

    def name_of(self, index: int) -> str:
        """Returns what a person calls example `index`, counted over all shards."""
        return f"{self.title}, example {index}"
