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
    [N], test_images, test_labels.

    Labels are whole numbers, of which -1 means none, or texts, of which "" means none. The classes are
    those that occur in train_labels.

    Raises:
      UserError: there is no such file, or it holds something else.
    """
    path = os.path.expanduser(data["path"])
    if not pathlib.Path(path).is_file():
        raise UserError(f"no file {path!r}: expected an .npz file (data.path)")
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read as an .npz file: expected what numpy.savez(path, "
            "train_images=...) writes of arrays of numbers"
        ) from error
    if "train_images" not in stored or stored.keys() - _KNOWN:
        raise UserError(
            f"{path} holds {sorted(stored)}: expected train_images and any of {sorted(_KNOWN)}"
        )
    classes = _classes_of(stored.get("train_labels"), f"{path}: train_labels")
    codes = {part: _codes(stored, part, classes, path) for part in ("train", "test")}
    train = in_memory(stored["train_images"], codes["train"], classes)
    test = None
    if "test_images" in stored:
        test = in_memory(stored["test_images"], codes["test"], classes)
        if test.image_shape[-1] != train.image_shape[-1]:
            raise UserError(
                f"{path}: test images have {test.image_shape[-1]} channels and training ones "
                f"{train.image_shape[-1]}: expected the same number"
            )
    return DataSet(train, test)


def _classes_of(labels: np.ndarray | None, name: str) -> Classes:
    """Returns the names of the labels that occur, in their order; None if there are none."""
    if labels is None:
        return None
    if labels.dtype.kind not in "iuU":
        raise UserError(
            f"{name} are {labels.dtype}: expected whole numbers, of which -1 means no label, or texts"
        )
    return tuple(str(label) for label in np.unique(labels[_is_label(labels)])) or None


def _is_label(labels: np.ndarray) -> np.ndarray:
    return labels != "" if labels.dtype.kind == "U" else labels != -1


def _codes(stored: dict, part: str, classes: Classes, path: str) -> np.ndarray | None:
    """Returns int32 [N], the places of a part's labels in `classes`, -1 for none."""
    labels = stored.get(f"{part}_labels")
    here = _classes_of(labels, f"{path}: {part}_labels")
    if labels is None or classes is None or here is None:
        return None
    unknown = [name for name in here if name not in classes]
    if unknown:
        raise UserError(
            f"{path}: {part}_labels hold the classes {', '.join(unknown[:5])}, which train_labels have not"
        )
    code = {name: i for i, name in enumerate(classes)}
    codes = [
        code[str(x)] if known else -1 for x, known in zip(labels, _is_label(labels), strict=True)
    ]
    return np.asarray(codes, np.int32)


def in_memory(images: Any, labels: Any = None, classes: Classes = None) -> IndexedSplit:
    """Makes a split of arrays.

    Args:
      images: uint8 [N, H, W, 1 or 3].
      labels: int [N], -1 where there is none; or None.
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
    if np.all(labels == -1):
        classes = None
    elif classes is not None and not -1 <= labels.min() <= labels.max() < len(classes):
        raise UserError(
            f"labels are {labels.min()} to {labels.max()}: expected 0 to {len(classes) - 1}, or -1 for "
            "none"
        )
    return IndexedSplit(InMemory(images, np.asarray(labels, np.int32), classes))
