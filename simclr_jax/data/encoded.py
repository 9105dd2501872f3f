"""Image files that are held in memory, such as a part of a source that is streamed."""

from typing import Any

import numpy as np

from simclr_jax.data.source import Example, ShardedSource, Source


class Encoded(Source):
    """The contents of image files, in memory."""

    def __init__(self, files: list[bytes], labels: np.ndarray, origin: ShardedSource | None = None):
        """Holds N files.

        Args:
          files: their contents.
          labels: int32 [N], -1 where there is none.
          origin: the source that they were taken from, which knows how they are decoded; None: none.
        """
        self._files, self.labels, self._origin = files, labels, origin
        if origin is not None:
            self.classes, self.may_turn = origin.classes, origin.may_turn

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Example:
        return Example(self._files[index], int(self.labels[index]))

    def decode(self, image: Any, upright: bool = True) -> Any:
        if self._origin is None:
            return super().decode(image, upright)
        return self._origin.decode(image, upright)

    def lookup(self) -> Any:
        import tensorflow as tf

        with tf.device("cpu"):
            files = tf.constant(self._files)
        return lambda index: tf.gather(files, index)
