"""Where views are made: on the host, on the host but for the colour, or on the device.

A `Views` owns the way from a split to the views that a step sees. The step knows no more of it than
`fetch` and `views`.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from simclr_jax.data.broken import Images
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Order
from simclr_jax.data.source import InMemory
from simclr_jax.data.split import Split
from simclr_jax.encoders.images import to_float
from simclr_jax.errors import UserError
from simclr_jax.mesh import batch_sharded, laid_out, replicated, to_global
from simclr_jax.views import device
from simclr_jax.views.crop import EvaluationView
from simclr_jax.views.distortion import Distortion


@dataclasses.dataclass(frozen=True)
class ViewSettings:
    """The settings that all ways of making views share.

    Attributes:
      order: the seed, the global batch's size and this process's part.
      distortion: how strongly views differ.
      evaluation: the view that evaluation takes; those of training are as large, of images that are read as it reads them.
      mesh: all devices.
    """

    order: Order
    distortion: Distortion
    evaluation: EvaluationView
    mesh: Mesh

    @property
    def size(self) -> int:
        """Returns the height and width of a view, pixels."""
        return self.evaluation.size


class Views(Protocol):
    """From a split to the views of a global batch."""

    @property
    def settings(self) -> ViewSettings:
        """The settings of the views."""

    def batches(self, images: Images, start_step: int) -> Generator[dict[str, np.ndarray]]:
        """Yields this process's part of the global batches from `start_step` on, without end.

        A batch holds "epoch" and "index", int64 [B / P], and what `placer` needs. Close it when done.
        """

    def placer(self, split: Split) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
        """Returns a function that turns a batch of `batches` into the global batch over the mesh.

        Copies data that all batches share, such as images that stay on the devices, to the devices now.
        """

    def fetch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turns a global batch into one whose every array is [B, ...], "label" among them. Jit-able."""

    def views(self, batch: dict[str, Any]) -> jax.Array:
        """Turns a batch from `fetch`, or a part of it, into float32 [b, V, S, S, 3] in [0, 1]. Jit-able."""

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes, dtypes and shardings of a global batch.

        Raises:
          UserError: they depend on the images.
        """

    def evaluation_batches(
        self, images: Images, batch_size: int, start: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        """Yields this process's share of the split, each image once, from the `start`-th batch on.

        Args:
          images: the split.
          batch_size: images of a batch over all processes.
          start: batches that are skipped.

        Yields:
          {"image": uint8 [n, S, S, 3], "label": int32 [n]}; image i of it is image p + i P of the
          split on process p of P.
        """

    def sample(self, image: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Makes the views that training sees of one image in one epoch, to be looked at.

        Args:
          image: uint8 [H, W, C].
          epoch: number of the epoch, from 0.
          index: the image's place in the training split.

        Returns:
          the views, uint8 [V, S, S, 3], and the numbers drawn for them, float32 [V, draws].
        """


@dataclasses.dataclass(frozen=True)
class HostViews:
    """Whole views, made on the host by tf.data.

    Attributes:
      settings: see `ViewSettings`.
    """

    settings: ViewSettings
    whole = True

    def batches(self, images: Images, start_step: int) -> Generator[dict[str, np.ndarray]]:
        # Imported here: this needs TensorFlow, which takes 10 s to import.
        from simclr_jax.views import pipeline

        settings = self.settings
        read = settings.evaluation.read
        work = pipeline.HostWork(settings.size, settings.distortion, self.whole, read)
        return pipeline.training_batches(images, settings.order, start_step, work)

    def placer(self, split: Split) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
        names = self.abstract().keys()
        return lambda batch: to_global(self.settings.mesh, {name: batch[name] for name in names})

    def fetch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return batch

    def views(self, batch: dict[str, Any]) -> jax.Array:
        return to_float(batch["views"])

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        settings = self.settings
        views = settings.order.batch_size, settings.distortion.views
        shapes = {
            "views": ((*views, settings.size, settings.size, 3), np.uint8),
            "label": (views[:1], np.int32),
        }
        return _abstract(settings, shapes)

    def evaluation_batches(
        self, images: Images, batch_size: int, start: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        from simclr_jax.views import pipeline

        share, view = self.settings.order.share, self.settings.evaluation
        return pipeline.evaluation_batches(images, batch_size // share.count, share, view, start)

    def sample(self, image: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        import tensorflow as tf

        from simclr_jax.views import host

        settings = self.settings
        seed, when, which = (tf.constant(n, tf.int64) for n in (settings.order.seed, epoch, index))
        draws = host.draw(seed, when, which, settings.distortion)
        make = host.make_views if self.whole else host.make_crops
        made = make(tf.constant(image), draws, settings.size, settings.distortion)
        return made.numpy(), draws.numpy()


@dataclasses.dataclass(frozen=True)
class HostCrops(HostViews):
    """Crops made on the host, and the numbers that decide the rest of a view, which the device does."""

    whole = False

    def views(self, batch: dict[str, Any]) -> jax.Array:
        return device.distort(batch["views"], batch["draws"], self.settings.distortion)

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        settings = self.settings
        views = settings.order.batch_size, settings.distortion.views
        draws = {"draws": ((*views, settings.distortion.draws), np.float32)}
        return super().abstract() | _abstract(settings, draws)

    def sample(self, image: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        crops, draws = super().sample(image, epoch, index)
        return _distorted(crops, draws, self.settings.distortion), draws


@dataclasses.dataclass(frozen=True)
class Resident:
    """All images lie in the devices' memory; the host sends which come next. No TensorFlow anywhere.

    The order, the epochs and what a resumed run sees are those of the host's views; the numbers drawn
    for a view are others.

    Attributes:
      settings: see `ViewSettings`.
    """

    settings: ViewSettings

    def batches(self, images: Images, start_step: int) -> Generator[dict[str, np.ndarray]]:
        split, _ = _resident(images.split)
        for epochs, indices in split.entries(self.settings.order, start_step):
            yield {"epoch": epochs, "index": indices}

    def placer(self, split: Split) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
        _, source = _resident(split)
        mesh = self.settings.mesh
        try:
            placed = {
                name: laid_out(whole, replicated(mesh))
                for name, whole in (("images", source.arrays), ("labels", source.labels))
            }
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise UserError(
                f"{source.arrays.nbytes / 1e9:.1f} GB of images do not fit into a device's memory: "
                "use data.placement=host"
            ) from error

        def put(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
            own = {name: batch[name].astype(np.int32) for name in ("epoch", "index")}
            return to_global(mesh, own) | placed

        return put

    def fetch(self, batch: dict[str, Any]) -> dict[str, Any]:
        epochs, indices = batch["epoch"], batch["index"]
        settings = self.settings
        crops, draws = device.crops_of(
            batch["images"],
            settings.order.seed,
            epochs,
            indices,
            settings.size,
            settings.distortion,
        )
        return {"views": crops, "draws": draws, "label": batch["labels"][indices]}

    def views(self, batch: dict[str, Any]) -> jax.Array:
        return device.distort(batch["views"], batch["draws"], self.settings.distortion)

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        raise UserError(
            "data.placement=device holds the images in the step, and compiling does not open them: "
            "use data.color_on=device, and add the size of the data to the memory of a device"
        )

    def evaluation_batches(
        self, images: Images, batch_size: int, start: int = 0
    ) -> Iterator[dict[str, np.ndarray]]:
        _, source = _resident(images.split)
        share, view = self.settings.order.share, self.settings.evaluation
        cropped = jax.jit(device.center_crop, static_argnums=1)
        own_size = batch_size // share.count
        stride = own_size * share.count
        for first in range(share.index + start * stride, len(source), stride):
            own = slice(first, first + stride, share.count)
            some = source.arrays[own]
            filled = np.zeros((own_size, *some.shape[1:]), np.uint8)
            filled[: len(some)] = some  # one shape, so one compilation
            crops = np.asarray(cropped(filled, view))[: len(some)]
            yield {
                "image": np.broadcast_to(crops, (*crops.shape[:-1], 3)),
                "label": source.labels[own],
            }

    def sample(self, image: np.ndarray, epoch: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        size, distortion = self.settings.size, self.settings.distortion
        draws = device.draw(self.settings.order.seed, epoch, index, distortion)
        crops = np.stack([device.crop(image, one, size, distortion) for one in draws])
        return _distorted(crops, np.asarray(draws), distortion), np.asarray(draws)


def _distorted(crops: np.ndarray, draws: np.ndarray, distortion: Distortion) -> np.ndarray:
    """Does on the device what it does to crops [V, S, S, C] in training, and returns uint8 [V, S, S, 3]."""
    views = np.asarray(device.distort(crops, draws, distortion))
    return np.round(255 * np.clip(views, 0, 1)).astype(np.uint8)


def stream(views: Views, images: Images) -> Callable[[int], Generator]:
    """Returns what `training.loop.fit` takes: start step -> generator of (global batch, {"epoch",
    "index"} of this process's images).
    """

    def batches(start: int) -> Generator:
        put = views.placer(images.split)
        with contextlib.closing(views.batches(images, start)) as own:
            for batch in own:
                yield put(batch), {name: batch[name] for name in ("epoch", "index")}

    return batches


def _abstract(settings: ViewSettings, shapes: dict[str, tuple]) -> dict[str, jax.ShapeDtypeStruct]:
    sharding = batch_sharded(settings.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def _resident(split: Split) -> tuple[IndexedSplit, InMemory]:
    """Returns the split and its source if its images are of one shape and in memory.

    Raises:
      UserError: they are not.
    """
    if isinstance(split, IndexedSplit) and isinstance(split.source, InMemory):
        return split, split.source
    raise UserError(
        "data.placement=device needs images of one shape that fit into memory (an .npz file of "
        "arrays, or a TFDS data set of up to 1 GB): use data.placement=host"
    )
