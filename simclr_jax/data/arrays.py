"""Arrays in memory as a source: an .npz file, or anybody's arrays. Needs no TensorFlow."""

import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.source import Classes, InMemory
from simclr_jax.data.split import DataSet
from simclr_jax.errors import UserError

_KNOWN = {"train_images", "train_labels", "test_images", "test_labels"}


def open_data_set(data: Mapping[str, Any]) -> DataSet:
    """Opens the .npz file "path": train_images uint8 [N, H, W, 1 or 3] and, if there, train_labels
    int [N], test_images, test_labels.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    path = os.path.expanduser(data["path"])
    if not pathlib.Path(path).is_file():
        raise UserError(f"no file {path!r}: expected an .npz file (data.path)")
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}; expected an .npz file of arrays"
        ) from error
    if "train_images" not in stored or stored.keys() - _KNOWN:
        raise UserError(
            f"{path} holds {sorted(stored)}: expected train_images and any of {sorted(_KNOWN)}"
        )
    classes = None
    if "train_labels" in stored:
        classes = tuple(str(c) for c in range(int(stored["train_labels"].max(initial=0)) + 1))
    train = in_memory(stored["train_images"], stored.get("train_labels"), classes)
    test = None
    if "test_images" in stored:
        test = in_memory(stored["test_images"], stored.get("test_labels"), classes)
        if test.image_shape[-1] != train.image_shape[-1]:
            raise UserError(
                f"{path}: test images have {test.image_shape[-1]} channels and training ones "
                f"{train.image_shape[-1]}: expected the same number"
            )
    return DataSet(train, test)


def in_memory(images: Any, labels: Any = None, classes: Classes = None) -> IndexedSplit:
    """Makes a split of arrays.

    Args:
      images: uint8 [N, H, W, 1 or 3].
      labels: int [N], or None.
      classes: names of the labels 0, 1, ...

    Raises:
      UserError: the arrays have other shapes or types.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"images are {images.dtype} {list(images.shape)}: expected uint8 [N, H, W, 1 or 3]"
        )
    if len(images) == 0:
        raise UserError("there are no images: expected at least one")
    if labels is None:
        labels, classes = np.full(len(images), -1), None
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"labels are {labels.dtype} {list(labels.shape)} for {len(images)} images: expected one "
            "integer each"
        )
    if np.all(labels == -1):  # TFDS's mark of an image without a label
        classes = None
    elif classes is not None and not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(
            f"labels are {labels.min()} to {labels.max()}: expected 0 to {len(classes) - 1}"
        )
    return IndexedSplit(InMemory(images, np.asarray(labels, np.int32), classes))
