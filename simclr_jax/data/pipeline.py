"""The host pipeline: a split to batches of views, as numpy arrays, for this process."""

from collections.abc import Generator
from typing import Any

import numpy as np
import tensorflow as tf

from simclr_jax.data.host_augment import Distortion, center_crop, two_views
from simclr_jax.data.sources import Share, Split
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

    Yields:
      {"views": uint8 [B / P, 2, size, size, 3], "label": int32 [B / P], -1 where there is none}
    """

    def views_of(example):
        views = two_views(
            split.decode(example["image"]),
            seed,
            example["epoch"],
            example["index"],
            size,
            distortion,
        )
        return {"views": views, "label": example["label"]}

    return _run(
        split,
        split.training(seed, batch_size, start_step, share)
        .map(views_of, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size // share.count, drop_remainder=True),
    )


def evaluation_batches(
    split: Split, *, batch_size: int, share: Share, size: int, proportion: float
) -> Generator[dict[str, np.ndarray]]:
    """This process's share of the split, each image once, in order; the last batch may be short.

    Args:
      batch_size: of this process.
      size: height and width of an image, pixels.
      proportion: of the centred square that is kept, in (0, 1].

    Yields:
      {"image": uint8 [n, size, size, 3], "label": int32 [n]}
    """

    def image_of(example):
        image = center_crop(split.decode(example["image"]), size, proportion)
        return {"image": image, "label": example["label"]}

    return _run(
        split,
        split.once(share).map(image_of, num_parallel_calls=tf.data.AUTOTUNE).batch(batch_size),
    )


def _run(split: Split, dataset: Any) -> Generator[dict[str, np.ndarray]]:
    """Iterates a data set made of `split`, with prefetching, in order.

    Raises:
      UserError: an image cannot be read; names all such images of the split.
    """
    options = tf.data.Options()
    options.deterministic = True
    iterator = dataset.with_options(options).prefetch(_PREFETCH_BATCHES).as_numpy_iterator()
    # A local name: the generator may be closed when the interpreter has already cleared `tf`.
    unreadable = (
        tf.errors.InvalidArgumentError,
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
        tf.errors.DataLossError,
    )
    try:
        yield from iterator
    except unreadable as error:
        reason = " ".join(str(error.message).split()).rpartition("}} ")[2]
        names = split.unreadable()
        if names:
            reason = f"such as {names[0]} ({reason})"
        raise UserError(
            f"{len(names) or 'some'} of {split.count} images cannot be read, {reason}: mend or "
            "remove them"
        ) from error
