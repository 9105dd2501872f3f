"""The host pipeline: a split to batches of views, as numpy arrays, for this process."""

import dataclasses
import re
import time
from collections.abc import Callable, Generator

import numpy as np
import tensorflow as tf

from simclr_jax.data.broken import Images
from simclr_jax.data.decode import reason_of
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Order, Share
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.source import CORES, in_order
from simclr_jax.errors import Unavailable, UserError
from simclr_jax.files import raise_if_away
from simclr_jax.views.crop import EvaluationView
from simclr_jax.views.distortion import Distortion
from simclr_jax.views.host import SMALL, center_crop, draw, make_crops, make_views, of_each

tf.config.set_visible_devices([], "GPU")  # the accelerators belong to JAX

_PREFETCH_BATCHES = 2

# How often a batch is read whose reading fails although each of its images can be read, and the pause before each: a
# network's file system may lose a file for a moment.
_TRIES, _PAUSE_SECONDS = 5, 2.0

# AutoGraph would read the source of these functions again, long after the program has started.
_as_written = tf.autograph.experimental.do_not_convert


@dataclasses.dataclass(frozen=True)
class HostWork:
    """The work that the host does on an image.

    Attributes:
      size: height and width of a view, pixels.
      distortion: how strongly the views of an image differ.
      whole: make whole views; else only their crops, of as many channels as the images have.
      read: how images become pixels.
    """

    size: int
    distortion: Distortion
    whole: bool = True
    read: ReadOptions = ReadOptions()


def training_batches(
    images: Images, order: Order, start_step: int, work: HostWork
) -> Generator[dict[str, np.ndarray]]:
    """Yields this process's part of the global batches from `start_step` on, without end.

    Args:
      images: the split to draw from. The next readable image stands in for one that cannot be read, so the
        batches are still a function of the seed. Further unreadable images are noted when they are met.
      order: which image comes when; with the epoch and the image's index its seed decides every view.
      start_step: the first step to yield.
      work: how the host turns an image into views.

    Yields:
      {"views": uint8 [B / P, views, size, size, 3], "label": int32 [B / P], -1 where there is none,
       "epoch", "index": int64 [B / P], which images they are}; without `work.whole` also
       {"draws": float32 [B / P, views, distortion.draws]}, which decide the rest

    Raises:
      UserError: too many images cannot be read.
    """
    split, broken = images
    make = make_views if work.whole else make_crops
    size, distortion, seed = work.size, work.distortion, order.seed

    def dataset(passed):
        if isinstance(split, IndexedSplit) and _are_small(split):
            batches = split.whole_batches(order, start_step + passed, broken.indices)
            return batches.map(views_of_each, CORES)
        return (
            split.training(order, start_step + passed, broken.indices)
            .map(views_of, num_parallel_calls=CORES)
            .batch(order.batch_size // order.share.count, drop_remainder=True)
        )

    def indices(passed):
        return split.batch_indices(order, start_step + passed, broken.indices)

    @_as_written
    def views_of(example):
        draws = draw(seed, example["epoch"], example["index"], distortion)
        image = split.decode(example["image"], work.read)
        views = make(image, draws, size, distortion)
        return finished(example, views, draws)

    @_as_written
    def views_of_each(examples):
        views, draws = of_each(
            examples["image"], seed, examples["epoch"], examples["index"], make, size, distortion
        )
        return finished(examples, views, draws)

    def finished(example, views, draws):
        kept = {name: example[name] for name in ("label", "epoch", "index")}
        return {"views": views} | kept | ({} if work.whole else {"draws": draws})

    return _run(images, dataset, indices)


def _are_small(split: IndexedSplit) -> bool:
    arrays = split.source.arrays
    return arrays is not None and max(arrays.shape[1:3]) <= SMALL


def evaluation_batches(
    images: Images, batch_size: int, share: Share, view: EvaluationView, start: int = 0
) -> Generator[dict[str, np.ndarray]]:
    """Yields this process's share of the split, each image once, in order; the last batch may be short.

    Args:
      images: the split. Another image, labelled `split.BROKEN`, stands in for one that cannot be read. Further
        unreadable images are noted when they are met.
      batch_size: images of a batch of this process alone, unlike in `Views.evaluation_batches`.
      share: this process's part.
      view: how an image is cropped and resized.
      start: batches that are skipped.

    Yields:
      {"image": uint8 [n, size, size, 3], "label": int32 [n]}
    """
    split, broken = images

    def dataset(passed):
        return (
            split.once(share, passed * batch_size, broken.indices)
            .map(image_of, num_parallel_calls=CORES)
            .batch(batch_size)
        )

    def indices(passed):
        first = share.index + passed * batch_size * share.count
        own = range(first, split.count, share.count)[:batch_size]
        if not isinstance(split, IndexedSplit):
            return own
        return [*own, *split.stand_ins(broken.indices)[own]]  # what is read for them

    @_as_written
    def image_of(example):
        decoded = split.decode(example["image"], view.read)
        image = center_crop(decoded, view)
        return {"image": image, "label": example["label"]}

    return _run(images, dataset, indices, start)


def _run(
    images: Images, dataset: Callable, indices: Callable, passed: int = 0
) -> Generator[dict[str, np.ndarray]]:
    """Iterates `dataset(passed)`, with prefetching, in order. Where an image cannot be read, notes the
    broken images of that batch and goes on with `dataset(batches so far)`, made anew without them.

    Args:
      images: the split, and where its broken images are noted.
      dataset: number of batches passed -> a tf.data.Dataset of those that follow.
      indices: number of batches passed -> the images of the next batch.
      passed: batches to begin after.

    Raises:
      UserError: too many images cannot be read, or something else than an image.
      Unavailable: a storage does not answer; or reading a file fails time and again, and no image is found broken.
    """
    failures = 0  # in succession, of images that could be read when they were tried again
    unknown = tf.errors.UnknownError
    # Local names, because the generator may be closed after the interpreter has cleared `tf`. These are the errors
    # of decoding, and those into which TensorFlow turns errno (tsl/platform/errno.cc).
    of_a_storage = (
        tf.errors.NotFoundError,
        tf.errors.PermissionDeniedError,
        tf.errors.AbortedError,  # ESTALE
        tf.errors.UnavailableError,
        tf.errors.DeadlineExceededError,
        unknown,  # ELOOP, EIO
    )
    unreadable = (
        *of_a_storage,
        tf.errors.InvalidArgumentError,
        tf.errors.DataLossError,
        tf.errors.ResourceExhaustedError,
        tf.errors.FailedPreconditionError,  # ENOTDIR, EISDIR
    )
    while True:
        batches = in_order(dataset(passed)).prefetch(_PREFETCH_BATCHES)
        try:
            for batch in batches.as_numpy_iterator():
                yield batch
                passed += 1
                failures = 0
            return
        except unreadable as error:
            raise_if_away(error)
            if isinstance(error, unknown) and "Traceback" in str(error.message):
                raise _error_in_python(str(error.message)) from error  # no image is to blame
            if images.broken.find(indices(passed)):
                continue
            failures += 1
            if not isinstance(error, of_a_storage):
                raise UserError(f"the images cannot be read: {reason_of(error)}") from error
            if failures == _TRIES:
                raise Unavailable(f"the images cannot be read: {reason_of(error)}") from error
            time.sleep(_PAUSE_SECONDS)


def _error_in_python(message: str) -> UserError:
    """Makes the error that a source's Python code raised, from TensorFlow's message: "WHERE: NAME: message", then the
    traceback.
    """
    first = message.partition("\n")[0]
    where = r"(?:.*Iterator::\S+: |\{\{.*?\}\}\s*)?"
    found = re.match(where + r"(?:[\w.]*\.)?(\w+): (.*)", first)
    name, reason = found.groups() if found else ("", first)
    kind = Unavailable if name == Unavailable.__name__ else UserError
    return kind(f"the images cannot be read: {reason}")
