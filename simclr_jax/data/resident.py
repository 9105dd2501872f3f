"""Images that lie in the device's memory, all of them: what the host sends is which come next.

No TensorFlow anywhere. The order, the epochs and what a resumed run sees are those of the host
pipeline; the numbers drawn for a view are others.
"""

from collections.abc import Generator, Iterator

import jax
import numpy as np
from jax.sharding import NamedSharding

from simclr_jax.data import device_augment
from simclr_jax.data.sources import IndexedSplit, Share, Split
from simclr_jax.errors import UserError
from simclr_jax.mesh import laid_out


def in_memory(split: Split) -> IndexedSplit:
    """The split, if its images are of one shape and in memory. Raises a UserError otherwise."""
    if isinstance(split, IndexedSplit) and split.in_memory:
        return split
    raise UserError(
        "data.placement=device needs images of one shape that fit into memory (an .npz file of "
        "arrays, or a TFDS data set of up to 1 GB): use data.placement=host"
    )


def place(split: Split, sharding: NamedSharding) -> dict[str, jax.Array]:
    """{"images", "labels"} of the split, laid out over devices."""
    split = in_memory(split)
    try:
        return {
            name: laid_out(whole, sharding)
            for name, whole in (("images", split.images), ("labels", split.labels))
        }
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            f"{split.images.nbytes / 1e9:.1f} GB of images do not fit into a device's memory: use "
            "data.placement=host"
        ) from error


def training_batches(
    split: Split, *, seed: int, batch_size: int, start_step: int, share: Share
) -> Generator[dict[str, np.ndarray]]:
    """{"epoch", "index"}: int64 [B / P], this process's part of the global batches from
    `start_step` on, without end.
    """
    for epochs, indices in in_memory(split).entries(seed, batch_size, start_step, share):
        yield {"epoch": epochs, "index": indices}


def evaluation_batches(
    split: Split, *, batch_size: int, share: Share, size: int, proportion: float, start: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `pipeline.evaluation_batches`."""
    split = in_memory(split)
    cropped = jax.jit(device_augment.center_crop, static_argnums=(1, 2))
    stride = batch_size * share.count
    for first in range(share.index + start * stride, split.count, stride):
        own = slice(first, first + stride, share.count)
        images = split.images[own]
        filled = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        filled[: len(images)] = images  # one shape, so one compilation
        crops = np.asarray(cropped(filled, size, proportion))[: len(images)]
        yield {
            "image": np.broadcast_to(crops, (*crops.shape[:-1], 3)),
            "label": split.labels[own],
        }
