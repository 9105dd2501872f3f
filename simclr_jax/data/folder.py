"""A folder of images as a source: every image file below it, at any depth, one file an image."""

import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from simclr_jax.console import say
from simclr_jax.data.index import SUFFIXES, list_images, most_common
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.labels import check_names, labels_below, place_of, read_labels
from simclr_jax.data.source import Classes, Example, Source, codes_of, in_order_of_classes
from simclr_jax.data.split import DataSet, Split
from simclr_jax.errors import UserError
from simclr_jax.files import check_local, expanded, no_folder


class Files(Source):
    """Image files. Of a million the names take some 50 MB.

    Attributes:
      root: the folder.
      names: pyarrow text [N], paths below it.
    """

    def __init__(
        self,
        root: str,
        names: Any,
        labels: np.ndarray,
        classes: Classes,
        sizes: np.ndarray,
    ):
        """Holds the names of N files.

        Args:
          root: the folder.
          names: text [N], UTF-8.
          labels: int32 [N], -1 where there is none.
          classes: their names.
          sizes: int64 [N], bytes, for the fingerprint.
        """
        self.root, self.names = root, pa.array(names, pa.large_string())
        self.labels, self.classes, self._sizes = labels, classes, sizes

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Example:
        return Example(pathlib.Path(self.name_of(index)).read_bytes(), int(self.labels[index]))

    def take(self, indices: np.ndarray) -> "Files":
        names = self.names.take(pa.array(indices, pa.int64()))
        sizes = self._sizes[indices]
        return Files(self.root, names, self.labels[indices], self.classes, sizes)

    def lookup(self) -> Any:
        import tensorflow as tf

        names, root = self._names_as_tensor, os.path.join(self.root, "")
        return lambda index: tf.io.read_file(tf.strings.join((root, tf.gather(names, index))))

    @functools.cached_property
    def _names_as_tensor(self) -> Any:
        # Kept: a million names take 0.3 s, and each unreadable image asks for them again.
        import tensorflow as tf

        with tf.init_scope(), tf.device("cpu"):
            return tf.constant(self.names.to_numpy(zero_copy_only=False))

    def folders(self) -> set[str]:
        """Returns the folders that hold the images, below `root`."""
        return {os.path.dirname(name) for name in self.names.to_pylist()}

    def name_of(self, index: int) -> str:
        return os.path.join(self.root, self.names[int(index)].as_py())

    def fingerprint(self) -> str:
        """Returns a digest of the labels, of the paths below their common folder and of the sizes. Contents are not
        read: that would take too long.
        """
        digest = hashlib.blake2b(self.labels.tobytes(), digest_size=16)
        ends = pc.min_max(self.names).as_py().values()  # what these share all share
        common = os.path.commonpath([os.path.dirname(name) for name in ends])
        for name, size in zip(self.names.to_pylist(), self._sizes.tolist(), strict=True):
            below = name[len(common) :] if common else f"/{name}"
            digest.update(os.fsencode(below) + f" {size}\n".encode())
        return digest.hexdigest()


def root_of(split: Split) -> pathlib.Path | None:
    """Returns the folder that the images of a split are files of, as it was named; None if they are none."""
    source = split.source if isinstance(split, IndexedSplit) else None
    return pathlib.Path(source.root) if isinstance(source, Files) else None


def open_data_set(data: Mapping[str, Any]) -> DataSet:
    """Opens the folder "path" to train on and, unless it is empty, "test_path" to test on.

    "folder_labels", "labels_file" and the errors: see `open_split`, `labels.read_labels` and `labels.check_names`.
    """
    if data["folder_labels"] and data["labels_file"]:
        raise UserError("labels come from data.folder_labels or from data.labels_file: set one")
    paths = [path for path in (data["path"], data["test_path"]) if path]
    for option in ("path", "test_path"):
        check_local(f"data.{option}", data[option])
    _check_apart(paths)
    named = read_labels(data["labels_file"]) if data["labels_file"] else None
    splits: list[IndexedSplit] = []
    for path, option in zip(paths, ("data.path", "data.test_path"), strict=False):
        labels = (
            data["folder_labels"]
            if named is None
            else labels_below(path, paths, data["labels_file"], named)
        )
        classes = splits[0].classes if splits else None
        splits.append(open_split(path, labels, classes, option))
    _check_no_folder_in_both(splits)
    if named is not None:
        names = [x.source.names.to_pylist() for x in splits if isinstance(x.source, Files)]
        check_names(data["labels_file"], named, paths, names)
        _say_how_many_are_labelled(paths, splits)
    return DataSet(splits[0], splits[1] if len(splits) > 1 else None)


def _check_apart(paths: list[str]) -> None:
    """Raises a UserError if one of two folders lies below the other: its images would be in both splits."""
    real = [os.path.realpath(os.path.expanduser(path)) for path in paths]
    if len(real) > 1 and real[0] != real[1] and os.path.commonpath(real) in real:
        raise UserError(
            f"one of {' and '.join(paths)} lies within the other, so that test images would be trained on: put them "
            "beside each other, or hold images out by data.test_fraction (data.path, data.test_path)"
        )


def _check_no_folder_in_both(splits: list[IndexedSplit]) -> None:
    """Raises a UserError if images of two splits are in one folder, to which a link to a folder may lead. Links to single
    files are not followed: that would ask for each of them.
    """
    files = [split.source for split in splits if isinstance(split.source, Files)]
    if len(files) < 2:
        return
    one, other = (
        {os.path.realpath(os.path.join(some.root, x)) for x in some.folders()} for some in files
    )
    if one != other and (both := sorted(one & other)):
        raise UserError(
            f"{both[0]} is below both data.path and data.test_path, by links: its test images would be trained on"
        )


def _say_how_many_are_labelled(paths: list[str], splits: list[IndexedSplit]) -> None:
    for path, split in zip(paths, splits, strict=True):
        there = int(np.sum(split.all_labels() >= 0))
        if there < split.count:
            say(f"labels      {there} of the {split.count} images below {path} have one")


def open_split(
    path: str,
    labels: bool | Mapping[str, str],
    classes: Classes = None,
    option: str = "data.path",
    loose: bool = False,
) -> IndexedSplit:
    """Opens every image file below a folder, sorted by path.

    Args:
      path: the folder.
      labels: True: the first folder below `path` is an image's class. False: there are none. A mapping:
        path below the folder -> class, of `labels.labels_below`; what it does not hold has no label.
      classes: their names, in order; None takes what is there, sorted.
      option: the one that names the folder, for messages.
      loose: with labels=True, images that lie in no class folder have no label.

    Raises:
      UserError: there is no folder, no image, an image in no class folder or in an unknown one.
    """
    if not _is_utf8(path):
        raise UserError(
            f"the name of the folder {os.fsencode(path)!r} is not UTF-8: rename it, or name a link to it"
        )
    check_local(option, path)
    root = expanded(path)
    if root.is_file():
        raise UserError(
            f"{path!r} is a file: expected a folder of images, FILE.npz or FILE.parquet ({option})"
        )
    if not root.is_dir():
        raise UserError(f"{no_folder(path)}: expected a folder of images ({option})")
    found = list_images(root)
    names, where = found.paths, str(root)
    if not names:
        raise UserError(f"no image below {path!r}: {_instead(path, found.passed_over)}")
    odd = [name for name in names if not _is_utf8(name)]
    if odd:
        raise UserError(
            f"{len(odd)} files below {path!r} have names that are not UTF-8, such as "
            f"{os.fsencode(odd[0])!r}: rename them"
        )
    if labels is False:
        nothing = np.full(len(names), -1, np.int32)
        return IndexedSplit(Files(where, names, nothing, None, found.sizes))
    if labels is True:
        owners = _first_folders(path, names, loose)
    else:
        owners = [labels.get(place_of("", name)) for name in names]
        if not any(owners):
            such = f": it has {next(iter(labels))!r}, and the folder {names[0]!r}" if labels else ""
            raise UserError(f"data.labels_file has no label of an image below {path!r}{such}")
    found_classes = {owner for owner in owners if owner is not None}
    # The names of folders as torchvision's ImageFolder sorts them, the labels of a file by value where they are numbers.
    occurring = sorted(found_classes) if labels is True else in_order_of_classes(found_classes)
    code = codes_of(occurring, classes, repr(path))
    codes = np.asarray([code[owner] for owner in owners], np.int32)
    return IndexedSplit(Files(where, names, codes, classes or tuple(occurring), found.sizes))


def _instead(path: str, passed_over: dict[str, int]) -> str:
    """Says what there is below a folder without images."""
    if parquet := passed_over.get(".parquet"):
        return f"it holds {parquet} Parquet files, which are read as {os.path.join(path, '*.parquet')!r}"
    found = f"; found {most_common(passed_over)}" if passed_over else ""
    return f"looked for {', '.join(SUFFIXES)}{found}"


def _first_folders(path: str, names: list[str], loose: bool) -> list[str | None]:
    """Returns the first folder of each name, None where there is none. Raises a UserError for these unless `loose`."""
    parts = [pathlib.PurePath(name).parts for name in names]
    without = [name for name, inside in zip(names, parts, strict=True) if len(inside) == 1]
    if without and not loose:
        raise UserError(
            f"{len(without)} images lie in no class folder, such as {os.path.join(path, without[0])}: "
            "move them, or set data.folder_labels=False"
        )
    return [inside[0] if len(inside) > 1 else None for inside in parts]


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # of a byte that Python keeps as half a character
        return False
    return True
