"""What a data set has to say of itself. Everything else is derived from it in `split.py`.

A source of images that can be read in any order is a `Source`; one that is read a shard at a time,
such as record files, is a `ShardedSource`. TensorFlow is imported where it is used.
"""

import abc
import functools
import hashlib
from typing import Any, NamedTuple

import numpy as np

Classes = tuple[str, ...] | None


class Example(NamedTuple):
    """One image and its label.

    Attributes:
      image: the content of an image file, or uint8 [H, W, 1 or 3].
      label: an index into the classes; -1: none.
    """

    image: bytes | np.ndarray
    label: int = -1


class Source(abc.ABC):
    """Images that can be read in any order. Only `__len__` and `__getitem__` must be written.

    Attributes:
      classes: names of the classes; None: there are no labels.
      arrays: uint8 [N, H, W, C], where all images are in memory; else None.
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
        """int32 [N], -1 where there is none. By default every image is read for it."""
        return np.asarray([self[i].label for i in range(len(self))], np.int32)

    def take(self, indices: np.ndarray) -> "Source":
        """Returns a source of these images."""
        return _Taken(self, np.asarray(indices))

    def lookup(self) -> Any:
        """Returns a function, for the tf.data graph: index int64 scalar -> "image" of an `Example`.

        By default it calls `__getitem__`. A source whose images TensorFlow itself can read overrides
        it, as Python reads one image at a time.
        """
        import tensorflow as tf

        def read(index):
            return self[int(index)].image

        def image(index):
            return tf.numpy_function(read, [index], tf.string)

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
            image = self[i].image
            digest.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).data)
        return digest.hexdigest()


class _Taken(Source):
    """Some images of another source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices, self.classes = source, indices, source.classes

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


class Encoded(Source):
    """The contents of image files, in memory."""

    def __init__(self, files: list[bytes], labels: np.ndarray, classes: Classes = None):
        """Holds N files with their labels, int32 [N], -1 where there is none."""
        self._files = files
        self.labels, self.classes = labels, classes

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        return Example(self._files[index], int(self.labels[index]))

    def lookup(self) -> Any:
        import tensorflow as tf

        with tf.device("cpu"):
            files = tf.constant(self._files)
        return lambda index: tf.gather(files, index)


class ShardedSource(abc.ABC):
    """Images that are read a shard at a time, in the shard's order.

    Attributes:
      classes: names of the classes; None: there are no labels.
      lengths: int64 [S], examples of each shard.
      title: what a person calls the source.
      total_bytes: size of all encoded images.
      image_shape: (height, width, channels), None where it varies.
    """

    classes: Classes
    lengths: np.ndarray
    title: str
    total_bytes: int
    image_shape: tuple[int | None, int | None, int] = (None, None, 3)

    @abc.abstractmethod
    def records(self, shard: Any) -> Any:
        """Returns a tf.data.Dataset of the records of a shard, in order: any structure of tensors.

        `shard`: int64 scalar tensor, from 0 to S - 1.
        """

    @abc.abstractmethod
    def parse(self, record: Any) -> dict[str, Any]:
        """Turns a record into {"image": an encoded image, "label": int32}, in the tf.data graph."""

    @abc.abstractmethod
    def fingerprint(self, shards: np.ndarray) -> str:
        """Returns a text that is equal for equal content of these shards, wherever they lie."""

    def decode(self, image: Any) -> Any:
        """Decodes an encoded image to uint8 [H, W, C], in the tf.data graph."""
        from simclr_jax.data.decode import decode

        return decode(image)

    def name_of(self, index: int) -> str:
        """Returns what a person calls example `index`, counted over all shards."""
        return f"{self.title}, example {index}"
