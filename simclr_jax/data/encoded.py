"""Image files that are held in memory, such as a part of a source that is streamed."""

from typing import Any

import numpy as np

from simclr_jax.data.decoding import DecodedAs, Decoding
from simclr_jax.data.source import Example, ShardedSource, Source


class Encoded(DecodedAs, Source):
    """The contents of image files, in memory."""

    def __init__(self, files: list[bytes], labels: np.ndarray, origin: ShardedSource | None = None):
        """Holds N files.

        Args:
          files: their contents.
          labels: int32 [N], -1 where there is none.
          origin: the source that they were taken from, which knows how they are decoded; None: none.
        """
        self._files, self.labels = files, labels
        self.origin = origin or Decoding()
        self.classes = origin.classes if origin else None

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        return Example(self._files[index], int(self.labels[index]))

    def lookup(self) -> Any:
        import tensorflow as tf

        with tf.device("cpu"):
            files = tf.constant(self._files)
        return lambda index: tf.gather(files, index)
