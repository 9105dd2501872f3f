"""The features of every image of a split, each exactly once, on any number of devices."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simclr_jax.mesh import gathered, processes_of, replicated, to_global, traced_on

# Pixels: larger images are averaged down to this before they serve as raw-pixel features.
RAW_PIXELS = 32


class Extractor:
    """A compiled `forward` that walks through splits.

    Attributes:
      batch_size: images of the global batch.
      mesh: all devices.
    """

    def __init__(self, forward: Callable, *, batch_size: int, size: int, mesh: Mesh):
        """Compiles nothing yet.

        Args:
          forward: (variables, images uint8 [n, H, W, 3]) to {kind: features [n, D]}, jit-able.
          batch_size: images of the global batch, a multiple of the number of devices.
          size: height and width of an image, pixels.
          mesh: all devices.
        """
        self.batch_size, self._size, self.mesh = batch_size, size, mesh
        everywhere = replicated(mesh)

        def run(variables, batch):
            return forward(gathered(mesh)(variables), batch["image"]), batch["label"]

        self._run = jax.jit(traced_on(mesh, run), out_shardings=(everywhere, everywhere))

    def stream(
        self, variables: Any, batches: Iterable[dict], count: int
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Yields features and labels of a split, in its order, batch by batch, on every process.

        Every process must call this together. Short and missing batches are filled up with zeros,
        which are dropped again, so that one compiled program serves every batch, and all processes call it the same
        number of times.

        Args:
          variables: the first argument of `forward`, on all devices of the mesh, whole or divided.
          batches: this process's part, from `Views.evaluation_batches`.
          count: images of all batches, over all processes.

        Yields:
          {kind: features float32 [n, D]}, labels int32 [n], `split.BROKEN` for a broken image.
        """
        processes = len(processes_of(self.mesh))
        local, size = self.batch_size // processes, self._size

        def in_order(x):
            # Rows come process after process; image i of the p-th process is image p + i P of the split.
            return x.reshape(processes, local, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

        blank = np.zeros((local, size, size, 3), np.uint8)
        nothing = {"image": blank[:0], "label": np.zeros(0, np.int32)}
        steps = -(-count // self.batch_size)
        some = itertools.islice(itertools.chain(batches, itertools.repeat(nothing)), steps)
        for step, batch in enumerate(some):
            n = len(batch["label"])
            filled = {
                "image": np.concatenate([batch["image"], blank[n:]]),
                "label": np.concatenate([batch["label"], np.zeros(local - n, np.int32)]),
            }
            rows = jax.device_get(self._run(variables, to_global(self.mesh, filled)))
            left = count - step * self.batch_size
            yield jax.tree.map(lambda x, left=left: in_order(x)[:left], rows)

    def extract(
        self, variables: Any, batches: Iterable[dict], count: int
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns all that `stream` yields, less the images that are broken or have no label.

        Holds the features once, and a batch: those of ImageNet are 10 GB.
        """
        whole: Any = None
        filled = 0
        for part in self.stream(variables, batches, count):
            whole = whole or jax.tree.map(lambda x: np.empty((count, *x.shape[1:]), x.dtype), part)
            is_labelled = part[1] >= 0
            after = filled + int(np.count_nonzero(is_labelled))
            for target, rows in zip(*map(jax.tree.leaves, (whole, part)), strict=True):
                target[filled:after] = rows[is_labelled]
            filled = after
        return jax.tree.map(lambda x: x[:filled], whole)


def raw_pixels(images, channels: int):
    """Turns images uint8 [n, H, W, 3] into the baseline without any network: pixels in [0, 1], [n, D].

    `channels`: 1 or 3, the channels of the data: one channel, which became three equal ones, is kept once. Images
    above 32 px are averaged down to 32 px.
    """
    x = images[..., :channels].astype(jnp.float32) / 255.0
    if x.shape[1] > RAW_PIXELS:
        x = jax.image.resize(
            x, (len(x), RAW_PIXELS, RAW_PIXELS, channels), "linear", antialias=True
        )
    return x.reshape(len(x), -1)
