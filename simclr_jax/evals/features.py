"""The features of every image of a split, each exactly once, on any number of devices."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simclr_jax.data.sources import BROKEN
from simclr_jax.mesh import replicated, to_global

# Pixels: larger images are averaged down to this before they serve as raw-pixel features.
RAW_PIXELS = 32


def extract(
    forward: Callable,
    variables: Any,
    batches: Iterable[dict],
    *,
    count: int,
    batch_size: int,
    size: int,
    mesh: Mesh,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Features and labels of a split, in its order, on every process.

    Every process must call this together. Short and missing batches are filled up with zeros,
    which are dropped again, so that one program serves all and every process runs it equally often.

    Args:
      forward: (variables, images uint8 [n, H, W, 3]) to {kind: features [n, D]}, jit-able.
      variables: what forward needs, on all devices of the mesh.
      batches: this process's part: {"image", "label"}, image i of it being image p + i P of the split.
      count: images of the split, over all processes.
      batch_size: of the global batch, a multiple of the number of devices.
      size: height and width of an image, pixels.
      mesh: of all devices.

    Returns:
      {kind: features float32 [count, D]}, labels int32 [count]; less the images that are broken.
    """
    processes = jax.process_count()
    local = batch_size // processes
    everywhere = replicated(mesh)
    run = jax.jit(
        lambda variables, batch: (forward(variables, batch["image"]), batch["label"]),
        out_shardings=(everywhere, everywhere),
    )

    def in_order(x):
        # Rows come process after process; image i of process p is image p + i P of the split.
        return x.reshape(processes, local, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    nothing = {
        "image": np.zeros((0, size, size, 3), np.uint8),
        "label": np.zeros(0, np.int32),
    }
    blank = np.zeros((local, size, size, 3), np.uint8)
    parts = []
    steps = -(-count // batch_size)
    for batch in itertools.islice(itertools.chain(batches, itertools.repeat(nothing)), steps):
        n = len(batch["label"])
        filled = {
            "image": np.concatenate([batch["image"], blank[n:]]),
            "label": np.concatenate([batch["label"], np.zeros(local - n, np.int32)]),
        }
        parts.append(
            jax.tree.map(in_order, jax.device_get(run(variables, to_global(mesh, filled))))
        )
    features, labels = jax.tree.map(lambda *rows: np.concatenate(rows)[:count], *parts)
    whole = labels != BROKEN
    return jax.tree.map(lambda rows: rows[whole], features), labels[whole]


def raw_pixels(images, channels: int):
    """The baseline without any network: the pixels in [0, 1], [n, H, W, 3] to [n, D].

    Images above 32 px are averaged down to 32 px; where the data have one channel, which became
    three equal ones, one is kept.
    """
    x = images[..., :channels].astype(jnp.float32) / 255.0
    if x.shape[1] > RAW_PIXELS:
        x = jax.image.resize(
            x, (len(x), RAW_PIXELS, RAW_PIXELS, channels), "linear", antialias=True
        )
    return x.reshape(len(x), -1)
