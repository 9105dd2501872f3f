"""The host pipeline: a split to batches of views, as numpy arrays, for this process."""

from collections.abc import Callable, Generator

import numpy as np
import tensorflow as tf

from simclr_jax.data.broken import Broken
from simclr_jax.data.distortion import Distortion
from simclr_jax.data.host_augment import SMALL, center_crop, draw, of_each, two_crops, two_views
from simclr_jax.data.sources import IndexedSplit, Share, Split, reason_of
from simclr_jax.errors import UserError

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX

_PREFETCH_BATCHES = 2


def training_batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    share: Share,
    size: int,
    distortion: Distortion,
    broken: Broken,
    color: bool = True,
) -> Generator[dict[str, np.ndarray]]:
    """This process's part of the global batches from `start_step` on, without end.

    Args:
      split: to draw from.
      seed: of the run; with the epoch and the image's index it decides every view.
      batch_size: B, of the global batch.
      start_step: the first step to yield.
      share: this process's part.
      size: height and width of a view, pixels.
      distortion: how strongly the two views of an image differ.
      broken: the images that cannot be read; more are noted there when they are met. In the place
        of each stands the next whole one, so what comes is still a function of the seed.
      color: make whole views; else only their crops, of as many channels as the images have.

    Yields:
      {"views": uint8 [B / P, 2, size, size, 3], "label": int32 [B / P], -1 where there is none,
       "epoch", "index": int64 [B / P], which images they are}; without color also
       {"draws": float32 [B / P, 2, DRAWS_OF_A_VIEW]}, which decide the rest
    """
    make = two_views if color else two_crops

    def dataset(passed):
        where = seed, batch_size, start_step + passed, share, broken.indices
        if (
            isinstance(split, IndexedSplit)
            and split.in_memory
            and max(split.images.shape[1:3]) <= SMALL
        ):
            return split.whole_batches(*where).map(views_of_each, tf.data.AUTOTUNE)
        return (
            split.training(*where)
            .map(views_of, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(batch_size // share.count, drop_remainder=True)
        )

    def indices(passed):
        entries = split.entries(seed, batch_size, start_step + passed, share, broken.indices)
        return next(entries)[1]

    def views_of(example):
        draws = draw(seed, example["epoch"], example["index"])
        return finished(
            example, make(split.decode(example["image"]), draws, size, distortion), draws
        )

    def views_of_each(examples):
        views, draws = of_each(
            examples["image"], seed, examples["epoch"], examples["index"], make, size, distortion
        )
        return finished(examples, views, draws)

    def finished(example, views, draws):
        kept = {name: example[name] for name in ("label", "epoch", "index")}
        return {"views": views} | kept | ({} if color else {"draws": draws})

    return _run(split, dataset, indices, broken)


def evaluation_batches(
    split: Split,
    *,
    batch_size: int,
    share: Share,
    size: int,
    proportion: float,
    broken: Broken,
    start: int = 0,
) -> Generator[dict[str, np.ndarray]]:
    """This process's share of the split, each image once, in order; the last batch may be short.

    Args:
      batch_size: of this process.
      size: height and width of an image, pixels.
      proportion: of the centred square that is kept, in (0, 1].
      broken: the images that cannot be read; more are noted there when they are met. Another image
        stands in the place of each, labelled `sources.BROKEN`.
      start: batches that are passed over.

    Yields:
      {"image": uint8 [n, size, size, 3], "label": int32 [n]}
    """

    def dataset(passed):
        return (
            split.once(share, passed * batch_size, broken.indices)
            .map(image_of, num_parallel_calls=tf.data.AUTOTUNE)
            .batch(batch_size)
        )

    def indices(passed):
        first = share.index + passed * batch_size * share.count
        own = range(first, split.count, share.count)[:batch_size]
        return [*own, *split.stand_ins(broken.indices)[own]]  # what is read for them

    def image_of(example):
        image = center_crop(split.decode(example["image"]), size, proportion)
        return {"image": image, "label": example["label"]}

    return _run(split, dataset, indices, broken, start)


def _run(
    split: Split, dataset: Callable, indices: Callable, broken: Broken, passed: int = 0
) -> Generator[dict[str, np.ndarray]]:
    """Iterates `dataset(passed)`, with prefetching, in order. Where an image cannot be read, notes those
    of that batch and goes on with `dataset(batches so far)`, made anew without them.

    Args:
      split: of the images.
      dataset: batches passed to a tf.data.Dataset of those that follow.
      indices: batches passed to the images of the next batch.
      broken: where they are noted.
      passed: batches to begin after.

    Raises:
      UserError: too many images cannot be read, or something else than an image.
    """
    options = tf.data.Options()
    options.deterministic = True
    # A local name: the generator may be closed when the interpreter has already cleared `tf`.
    unreadable = (
        tf.errors.InvalidArgumentError,
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
        tf.errors.DataLossError,
        tf.errors.ResourceExhaustedError,
    )
    while True:
        batches = dataset(passed).with_options(options).prefetch(_PREFETCH_BATCHES)
        try:
            for batch in batches.as_numpy_iterator():
                yield batch
                passed += 1
            return
        except unreadable as error:
            if not broken.find(indices(passed)):
                raise UserError(f"the images cannot be read: {reason_of(error)}") from error
