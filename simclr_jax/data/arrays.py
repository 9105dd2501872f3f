"""Arrays in memory as a source: an .npz file, or anybody's arrays. Needs no TensorFlow."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.source import Classes, InMemory, class_of, codes_of, in_order_of_classes
from simclr_jax.data.split import DataSet
from simclr_jax.errors import UserError, one_line

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
            stored = {key: _read(file, key, path) for key in file.files}
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file may lead to, such as zlib.error
        raise UserError(
            f"{path} cannot be read as an .npz file: expected what numpy.savez(path, train_images=...) writes of arrays "
            f"of numbers ({one_line(error)})"
        ) from error
    if "test_labels" in stored and "test_images" not in stored:
        raise UserError(f"{path} holds test_labels and no test_images: expected test_images too")
    if "train_images" not in stored or stored.keys() - _KNOWN:
        raise UserError(
            f"{path} holds {sorted(stored)}: expected train_images and any of {sorted(_KNOWN)}"
        )
    codes, classes = _coded(stored.get("train_labels"), f"{path}: train_labels")
    train = in_memory(stored["train_images"], codes, classes, f"{path}: train_")
    test = None
    if "test_images" in stored:
        codes, found = _coded(stored.get("test_labels"), f"{path}: test_labels", classes)
        codes = codes if classes else None
        test = in_memory(stored["test_images"], codes, found, f"{path}: test_")
        if test.image_shape[-1] != train.image_shape[-1]:
            raise UserError(
                f"{path}: test images have {test.image_shape[-1]} channels and training ones "
                f"{train.image_shape[-1]}: expected the same number"
            )
    return DataSet(train, test)


def _read(file: Any, key: str, path: str) -> np.ndarray:
    """Reads an array of an .npz file. Raises a UserError if its elements are Python objects."""
    try:
        return file[key]
    except ValueError as error:
        if "allow_pickle" not in str(error):
            raise
        raise UserError(
            f"{path} cannot be read as an .npz file: {key} is an array of Python objects; expected images of one shape as "
            "uint8, labels as whole numbers or texts: .astype(int) or .astype(str) before numpy.savez"
        ) from error


def _coded(
    labels: np.ndarray | None, name: str, classes: Classes = None
) -> tuple[np.ndarray | None, Classes]:
    """Turns labels [N] into places in `classes`, or, where that is None, among the labels that occur, sorted.

    Returns:
      int32 [N], -1 for none, and the names of the classes; (None, None) where there are no labels.

    Raises:
      UserError: the labels are neither whole numbers nor texts, or one is not among the classes.
    """
    if labels is None:
        return None, None
    if labels.dtype.kind not in "iuU":
        raise UserError(
            f"{name} are {labels.dtype}: expected whole numbers, of which -1 means no label, or texts"
        )
    values, places = np.unique(labels, return_inverse=True)
    names = [class_of(value) for value in values.tolist()]
    occurring = in_order_of_classes({x for x in names if x is not None})
    code = codes_of(occurring, classes, name)
    codes = np.asarray([code[x] for x in names], np.int32)
    return codes[places], (classes or occurring) or None


def in_memory(
    images: Any, labels: Any = None, classes: Classes = None, where: str = ""
) -> IndexedSplit:
    """Makes a split of arrays.

    Args:
      images: uint8 [N, H, W, 1 or 3].
      labels: int [N], -1 where there is none; or None.
      classes: names of the labels 0, 1, ...
      where: begins each error, before "images" and "labels".

    Raises:
      UserError: the arrays have other shapes or types.
    """
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{where}images are {images.dtype} {list(images.shape)}: expected uint8 [N, H, W, 1 or 3]"
        )
    if len(images) == 0:
        raise UserError(f"{where}images: there are no images, expected at least one")
    if labels is None:
        labels, classes = np.full(len(images), -1), None
    labels = np.asarray(labels)
    if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(
            f"{where}labels are {labels.dtype} {list(labels.shape)} for {len(images)} images: expected one "
            "integer each"
        )
    if np.all(labels == -1):
        classes = None
    elif classes is not None and not -1 <= labels.min() <= labels.max() < len(classes):
        raise UserError(
            f"{where}labels are {labels.min()} to {labels.max()}: expected 0 to {len(classes) - 1}, or -1 for "
            "none"
        )
    return IndexedSplit(InMemory(images, np.asarray(labels, np.int32), classes))
