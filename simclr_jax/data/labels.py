"""Labels of images from a CSV file (data.labels_file)."""

import csv
import os
import re
import unicodedata
from collections.abc import Mapping

from simclr_jax.console import say
from simclr_jax.data.source import class_of
from simclr_jax.errors import UserError, reason
from simclr_jax.files import absolute, expanded

# Names that have another form: absolute ones, and those with "//", "." or "..".
_ODD = re.compile(r"(^|/)\.{0,2}(/|$)")


def read_labels(path: str) -> dict[str, str]:
    """Reads the columns "image" and "label" of a CSV file: {path of an image: label}.

    A row without an image or a label is left out; -1 is no label.

    Raises:
      UserError: the file cannot be read, lacks a column, or labels an image twice.
    """
    try:
        # Excel begins UTF-8 with a byte order mark.
        with expanded(path).open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            # Where the comma is a decimal point, table programs write semicolons.
            delimiter = next((mark for mark in (",", ";", "\t") if mark in first), ",")
            rows = csv.DictReader(file, delimiter=delimiter, skipinitialspace=True)
            columns = list(rows.fieldnames or ())
            if not {"image", "label"} <= set(columns):
                rows.fieldnames = [name.strip().lower() for name in columns]  # Image, Label
            found = set(rows.fieldnames or ())
            lines = list(rows) if {"image", "label"} <= found else []
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path!r} is not in UTF-8 (byte {error.start}): save it as UTF-8, in a table program as CSV UTF-8 "
            "(data.labels_file)"
        ) from error
    except (OSError, csv.Error) as error:
        raise UserError(
            f"{path!r} cannot be read as a CSV file of labels: {reason(error)} (data.labels_file)"
        ) from error
    if not {"image", "label"} <= found:
        what = f"has the columns {', '.join(map(repr, columns))}" if columns else "is empty"
        raise UserError(
            f"{path!r} {what}: expected image,label in the first line, with a comma, semicolon or tab: rename the columns "
            "of the paths and of the labels so (data.labels_file)"
        )
    labels: dict[str, str] = {}
    for line in lines:
        name, label = (line["image"] or "").strip(), class_of(line["label"])
        if name and label and labels.setdefault(name, label) != label:
            raise UserError(_labelled_twice(path, name, labels[name], label))
    return labels


def _labelled_twice(file: str, name: str, one: str, other: str) -> str:
    return (
        f"{file!r} labels {name!r} twice, {one} and {other}: expected each image once, by its path below the folder "
        "(data.labels_file)"
    )


def labels_below(
    path: str, paths: list[str], file: str, named: Mapping[str, str]
) -> dict[str, str]:
    """Returns {path of an image below the folder `path`, as `place_of` writes it: label}.

    Args:
      path: a folder.
      paths: all folders of the data set.
      file: the file of labels.
      named: {path below the folder of images, or below the one that holds all `paths`, or absolute path: label}.

    Raises:
      UserError: two names are of one image, and have different labels.
    """
    folder, top = absolute(path), _above(paths)
    start = place_of(folder, "") + os.sep
    found: dict[str, str] = {}
    for name, label in named.items():
        for place in {place_of(base, name) for base in {folder, top}}:
            if not place.startswith(start):
                continue
            below = place.removeprefix(start)
            if found.setdefault(below, label) != label:
                raise UserError(_labelled_twice(file, below, found[below], label))
    return found


def _above(paths: list[str]) -> str:
    """Returns the folder that holds all folders `paths`, absolute."""
    return os.path.commonpath([absolute(path) for path in paths])


def place_of(folder: str, name: str) -> str:
    """Returns the path of `name` below a folder, in Unicode's form NFC, because file systems and table programs differ in
    how they write accented letters. `name` may be absolute.
    """
    if name.isascii() and folder.isascii() and not _ODD.search(name):
        return (
            f"{folder}/{name}" if folder else name
        )  # without what follows, which takes most of the time
    return unicodedata.normalize("NFC", os.path.normpath(os.path.join(folder, name)))


def check_names(
    file: str, named: Mapping[str, str], paths: list[str], images: list[list[str]]
) -> None:
    """Says how many of the images that a file of labels names are not there.

    Args:
      file, named, paths: see `labels_below`.
      images: the paths of the images below each of `paths`.

    Raises:
      UserError: one name is that of an image in each of two folders.
    """
    folders = [absolute(path) for path in paths]
    there = [
        {place_of(folder, name) for name in names}
        for folder, names in zip(folders, images, strict=True)
    ]

    def is_in_each(name: str) -> bool:
        places = zip(folders, there, strict=True)
        return all(place_of(folder, name) in some for folder, some in places)

    twice = [name for name in named if len(there) > 1 and is_in_each(name)]
    if twice:
        better = os.path.join(os.path.relpath(folders[0], _above(paths)), twice[0])
        raise UserError(
            f"{file!r} names {len(twice)} images that are in {' and in '.join(paths)}, such as {twice[0]!r}: name "
            f"them by the path below the folder that holds both, such as {better} (data.labels_file)"
        )
    bases, everything = {*folders, _above(paths)}, set().union(*there)
    lost = [x for x in named if not any(place_of(base, x) in everything for base in bases)]
    if lost:
        say(
            f"labels      {len(lost)} of {len(named)} images in {file} are not there, such as {lost[0]}"
        )
