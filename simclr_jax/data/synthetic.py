"""Random images as a source, for trying out speed and memory."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from simclr_jax.data.arrays import in_memory
from simclr_jax.data.split import DataSet


def open_data_set(data: Mapping[str, Any]) -> DataSet:
    """Makes the images of "seed"."""
    return synthetic(data["seed"])


def synthetic(seed: int, count: int = 1024, size: int = 64, classes: int = 10) -> DataSet:
    """Makes random images, each a noisy copy of its class's random pattern, as arrays in memory.

    Args:
      seed: decides everything.
      count: training images; a quarter as many test images.
      size: height and width, pixels.
      classes: number of patterns.
    """
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 256, (classes, size, size, 3))

    def split(n):
        labels = np.arange(n) % classes
        noise = rng.integers(-64, 65, (n, size, size, 3))
        images = np.clip(patterns[labels] + noise, 0, 255).astype(np.uint8)
        return in_memory(images, labels, tuple(str(c) for c in range(classes)))

    return DataSet(split(count), split(count // 4))
