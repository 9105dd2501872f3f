"""A sample of a split's images as pixels, whatever its source."""

import concurrent.futures
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from simclr_jax.data import pixels
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Share
from simclr_jax.data.source import Source
from simclr_jax.data.split import Split

_AT_ONCE = 64  # images that are read before the first of them is needed


class Picture(NamedTuple):
    """An image.

    Attributes:
      place: its index in the split.
      image: uint8 [H, W, 1 or 3].
      label: index into the classes; -1: none.
    """

    place: int
    image: np.ndarray
    label: int


def pictures_of(split: Split, count: int, upright: bool) -> Iterator[Picture]:
    """Yields `count` images, evenly spaced over the split, or the first ones of a stream; fewer where some
    cannot be read.

    Args:
      split: the images.
      count: at most.
      upright: turn them as their EXIF data say.
    """
    count = min(count, split.count)
    if isinstance(split, IndexedSplit):
        places = np.unique(np.linspace(0, split.count - 1, count).round().astype(int))
        yield from _read(split.source, places.tolist(), upright)
        return
    decoded = split.once(Share()).take(count)
    decoded = decoded.map(lambda e: (split.decode(e["image"], upright), e["label"]))
    for index, (image, label) in enumerate(decoded.as_numpy_iterator()):
        yield Picture(index, image, int(label))


def _read(source: Source, places: list[int], upright: bool) -> Iterator[Picture]:
    def read(index: int) -> Picture | None:
        try:
            example = source[index]
            image = example.image
            if isinstance(image, bytes):
                image = pixels.read(image, upright)
        except (OSError, ValueError):
            return None  # training names it in broken_images.jsonl
        return Picture(index, image, int(example.label))

    with concurrent.futures.ThreadPoolExecutor() as threads:
        for start in range(0, len(places), _AT_ONCE):
            found = threads.map(read, places[start : start + _AT_ONCE])
            yield from (picture for picture in found if picture is not None)
