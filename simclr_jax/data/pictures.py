"""Reads a sample of a split's images, whatever its source, a few at a time."""

import concurrent.futures
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Share
from simclr_jax.data.source import Source, elements_of
from simclr_jax.data.split import Split
from simclr_jax.data.streamed import StreamedSplit
from simclr_jax.data.subsets import evenly

# Images that are read before the first of them is needed: photographs have 36 MB each.
_AT_ONCE = 16


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


def short_side(split: Split, upright: bool) -> int:
    """Returns the median image's shorter side, pixels, of up to 64 images; 224 where none can be read."""
    sides = list(pictures_of(split, 64, upright, lambda picture: min(picture.image.shape[:2])))
    return int(statistics.median(sides)) if sides else 224


def places_of(split: Split, count: int) -> list[int]:
    """Returns the indices of `count` images at most: evenly spaced over the split, or the first ones of a stream."""
    if isinstance(split, IndexedSplit):
        return evenly(split.count, count).tolist()
    return list(range(min(count, split.count)))


def pictures_of(
    split: Split, count: int, upright: bool, made: Callable[[Picture], Any] | None = None
) -> Iterator[Any]:
    """Yields `count` images, evenly spaced over the split, or the first ones of a stream, each as a `Picture` or as
    `made(picture)`; fewer where some cannot be read.

    Args:
      split: the images.
      count: at most.
      upright: turn them as their EXIF data say.
      made: turns a picture into what is kept of it; called in the threads that read.
    """
    made = made or (lambda picture: picture)
    places = places_of(split, count)
    if isinstance(split, IndexedSplit):
        found: Iterator[Any] = _read(split.source, places, upright, made)
    else:
        found = _streamed(split, len(places), upright, made)
    return (one for one in found if one is not None)


def _read(source: Source, places: list[int], upright: bool, made: Callable) -> Iterator[Any]:
    def read(place: int) -> Any:
        try:
            example = source[place]
            image = example.image
            if isinstance(image, bytes):
                image = source.pixels(image, upright)
        except (OSError, ValueError):
            return None  # training names it in broken_images.jsonl
        return made(Picture(place, image, int(example.label)))

    with concurrent.futures.ThreadPoolExecutor() as threads:
        for start in range(0, len(places), _AT_ONCE):
            yield from threads.map(read, places[start : start + _AT_ONCE])


def _streamed(split: Split, count: int, upright: bool, made: Callable) -> Iterator[Any]:
    assert isinstance(split, StreamedSplit)
    examples = elements_of(split.once(Share()).take(count), split.source.title)
    for place, example in enumerate(examples):
        image = example["image"]
        if isinstance(image, bytes):
            try:
                image = split.source.pixels(image, upright)
            except (OSError, ValueError):
                continue
        yield made(Picture(place, image, int(example["label"])))
