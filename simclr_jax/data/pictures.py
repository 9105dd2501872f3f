"""Reads a sample of a split's images, whatever its source, a few at a time."""

import concurrent.futures
import itertools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Share
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.source import Source, elements_of
from simclr_jax.data.split import Split
from simclr_jax.data.streamed import StreamedSplit
from simclr_jax.data.subsets import evenly

# Images that are read before the first of them is needed: photographs have 36 MB each.
_AT_ONCE = 16
_RUNS = 8  # of a stream


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


def short_side(split: Split, options: ReadOptions) -> int:
    """Returns the median image's shorter side, pixels, of up to 64 images; 224 where none can be read."""
    sides = list(pictures_of(split, 64, options, lambda picture: min(picture.image.shape[:2])))
    return int(statistics.median(sides)) if sides else 224


def places_of(split: Split, count: int) -> list[int]:
    """Returns the indices of `count` images at most: evenly spaced over the split, of a stream in up to eight runs of
    adjacent images, as what lies between has to be read.
    """
    if isinstance(split, IndexedSplit):
        return evenly(split.count, count).tolist()
    return list(itertools.chain.from_iterable(_runs(split.count, count)))


def _runs(total: int, count: int) -> list[range]:
    """Returns up to eight runs of the indices 0 to total - 1, evenly spaced: `count` indices in all, or all there are."""
    count = min(count, total)
    parts = max(1, min(_RUNS, count))
    (length, longer), (apart, further) = divmod(count, parts), divmod(total, parts)
    starts = [i * apart + min(i, further) for i in range(parts)]
    return [range(start, start + length + (i < longer)) for i, start in enumerate(starts)]


def pictures_of(
    split: Split, count: int, options: ReadOptions, made: Callable[[Picture], Any] | None = None
) -> Iterator[Any]:
    """Yields `count` images, see `places_of`, each as a `Picture` or as `made(picture)`; fewer where some cannot be read.

    Args:
      split: the images.
      count: at most.
      options: how to read them.
      made: turns a picture into what is kept of it; called in the threads that read.
    """
    made = made or (lambda picture: picture)
    places = places_of(split, count)
    if isinstance(split, IndexedSplit):
        found: Iterator[Any] = _read(split.source, places, options, made)
    else:
        found = _streamed(split, places, options, made)
    return (one for one in found if one is not None)


def _read(source: Source, places: list[int], options: ReadOptions, made: Callable) -> Iterator[Any]:
    def read(place: int) -> Any:
        try:
            example = source[place]
            image = example.image
            if isinstance(image, bytes):
                image = source.pixels(image, options)
        except (OSError, ValueError):
            return None  # training names it in broken_images.jsonl
        return made(Picture(place, image, int(example.label)))

    with concurrent.futures.ThreadPoolExecutor() as threads:
        for start in range(0, len(places), _AT_ONCE):
            yield from threads.map(read, places[start : start + _AT_ONCE])


def _streamed(
    split: Split, places: list[int], options: ReadOptions, made: Callable
) -> Iterator[Any]:
    assert isinstance(split, StreamedSplit)
    shards = split.shards_of(places)
    for _, group in itertools.groupby(zip(places, shards, strict=True), key=lambda pair: pair[1]):
        wanted = {place for place, _ in group}  # of one shard, which is read once
        first, last = min(wanted), max(wanted)
        some = split.once(Share(), first).take(last - first + 1)
        for place, example in enumerate(elements_of(some, split.source.title), first):
            if place not in wanted:
                continue
            image = example["image"]
            if isinstance(image, bytes):
                try:
                    image = split.source.pixels(image, options)
                except (OSError, ValueError):
                    continue
            yield made(Picture(place, image, int(example["label"])))
