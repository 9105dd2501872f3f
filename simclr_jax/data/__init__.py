"""Where images come from. To add a source, write its file and a row in `SOURCES`."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

from simclr_jax.console import say
from simclr_jax.data import arrays, folder, parquet, pictures, pixels, summary, synthetic, tfds
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Share
from simclr_jax.data.source import elements_of
from simclr_jax.data.split import DataSet, Split
from simclr_jax.data.subsets import evenly
from simclr_jax.errors import UserError
from simclr_jax.files import expanded
from simclr_jax.options import Option, flag, name_in, number, one_of, path, text

# name: ({option of the group "data", without the group: value}, and "seed") -> DataSet
SOURCES: dict[str, Callable[[Mapping[str, Any]], DataSet]] = {
    "tfds": tfds.open_data_set,
    "folder": folder.open_data_set,
    "arrays": arrays.open_data_set,
    "parquet": parquet.open_data_set,
    "synthetic": synthetic.open_data_set,
}

_COME_WITH_THE_PACKAGE = frozenset(SOURCES)


# Sources of one's own files, which are at data.path: the ending by which each is known; "": any other path.
FILES = {"folder": "", "arrays": ".npz", "parquet": ".parquet"}

# Options of the group "data" that not every source of this package reads, and the sources that do.
_READERS = {
    "test_path": ("folder", "parquet"),
    "labels_file": ("folder",),
    "folder_labels": ("folder",),
    "train_split": ("tfds",),
    "test_split": ("tfds",),
}

OPTIONS = (
    Option("data.source", "tfds", name_in(SOURCES), "where the images come from"),
    Option(
        "data.name",
        "",
        text(),
        "name of the data set in the catalogue of TFDS, for data.source=tfds",
    ),
    Option(
        "data.path",
        "",
        path(),
        "where the images are: the folder where TFDS keeps its data (empty: TFDS's default), a folder "
        "of images, an .npz file or Parquet files",
        resumable=True,
    ),
    Option(
        "data.test_path",
        "",
        path(),
        "folder or Parquet files of the test images; empty: no test images from here; see data.test_fraction",
        resumable=True,
    ),
    Option(
        "data.train_split",
        "train",
        text(),
        "split of the TFDS data set that is trained on; several are joined by +, such as train+validation",
    ),
    Option(
        "data.test_split",
        "test",
        text(),
        "split of the TFDS data set that every evaluation tests on; empty: none",
        resumable=True,
    ),
    Option(
        "data.test_fraction",
        0.0,
        number(0, 0.9),
        "share of the images that is held out for every evaluation where there is no test split; 0: none. Where only "
        "some images have a label, it is a share of the labelled ones; of Parquet files and streamed TFDS always of all",
    ),
    Option(
        "data.upright",
        True,
        flag(),
        "turn images as the orientation in their EXIF data says; images of TFDS stay as they are",
    ),
    Option(
        "data.sample_bits",
        0,
        one_of(0, *pixels.SAMPLE_BITS),
        "bits that make the range from black to white in files of 16 bits a sample, the same in all images; brighter "
        "samples are white; 0: in each image as many as its brightest samples need. A folder's is chosen from some of its "
        "images; images of TFDS stay as they are",
    ),
    Option(
        "data.folder_labels",
        False,
        flag(),
        "take the first folder below data.path as the class of an image",
    ),
    Option(
        "data.labels_file",
        "",
        path(),
        "CSV file with two columns: image, a path below data.path (or below the folder that holds "
        "both data.path and data.test_path), and label. Images that are not in it have no label. A "
        "run that is resumed must find the labels that it began with; evaluations may use other files",
        resumable=True,
    ),
    *parquet.OPTIONS,
)


def open_source(data: Mapping[str, Any]) -> DataSet:
    """Opens a data set: what to train on and, where there is one, what to test on.

    The most recent data set is kept, so that the probe uses the one that training opened.

    Args:
      data: {option of the group "data", without the group: value}, and "seed". A source gets those in `OPTIONS`.

    Raises:
      UserError: the data set is not there or not usable.
    """
    return _open(json.dumps(_of_sources(data), sort_keys=True))


def _of_sources(data: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options that sources read: not the size of a view or of a batch, which change no image."""
    names = {option.name.split(".")[1] for option in OPTIONS} | {"seed"}
    return {name: value for name, value in data.items() if name in names}


def read_options(data: Mapping[str, Any]) -> pixels.ReadOptions:
    """Returns how images become pixels, of the options of the group "data"."""
    return pixels.ReadOptions(data["upright"], data["sample_bits"])


def kind_of(path: str) -> str:
    """Returns which of `SOURCES` opens a path of images: one that ends in .npz or .parquet its own, any other "folder"."""
    ends = [kind for kind, ending in FILES.items() if path.lower().endswith(ending)]
    return max(ends, key=lambda kind: len(FILES[kind]))


class Measured(NamedTuple):
    """Holds what `suggest` chooses settings from.

    Attributes:
      images: how many there are to train on.
      short_side: the median image's shorter side, pixels.
      sample_bits: bits that the brightest of some grey images of 16 bits needs; 0: none was seen.
    """

    images: int
    short_side: int
    sample_bits: int = 0


def measure(data: Mapping[str, Any]) -> Measured:
    """Measures the training images. Those that "test_fraction" will hold out are among them.

    Args:
      data: see `open_source`.

    Raises:
      UserError: see `open_source`.
    """
    if data["source"] == "folder":  # from file headers, and some grey images of 16 bits
        return measured(summary.summarize(expanded(data["path"])))
    # Before any are held out; the data set that is kept stays the one that is trained on.
    opened = (
        SOURCES[data["source"]](_of_sources(data)) if data["test_fraction"] else open_source(data)
    )
    train = opened.train
    return Measured(train.count, pictures.short_side(train, read_options(data)))


def measured(found: summary.Summary) -> Measured:
    """Returns what the summary of a folder says to `suggest`."""
    return Measured(found.images, found.short_side, found.sample_bits)


@functools.lru_cache(maxsize=1)
def _open(data: str) -> DataSet:
    """Opens the data set of options in JSON; see `open_source`."""
    options = json.loads(data)
    found = SOURCES[options["source"]](options)
    if options["test_fraction"] > 0:
        found = _held_out(found, options["test_fraction"])
    if found.test is not None and _are_the_same(found.train, found.test):
        raise UserError(
            "the test images are the training images: an accuracy on them would say nothing; see "
            "data.test_path and data.test_split"
        )
    return found


def forget_opened() -> None:
    """Forgets the data sets that were opened, as their files may have changed since."""
    _open.cache_clear()


def name_of(data: Mapping[str, Any]) -> str:
    """Returns a readable name of a data set: its name in TFDS, or that of its folder or file. For .../emoji/train
    this is emoji.
    """
    source = data["source"]
    if source == "tfds":
        return data["name"] or source
    path = pathlib.PurePath(data["path"])
    if kind_of(path.name) != "folder":
        path = path.parent if "*" in path.name else path.with_suffix("")
        while "*" in path.name:  # DATA/**/*.parquet
            path = path.parent
    if path.name in ("train", "training"):
        path = path.parent
    return path.name or source


def _held_out(data: DataSet, fraction: float) -> DataSet:
    """Makes a test split of some of the training images, the same ones whatever the run's seed is."""
    if data.test is not None:
        raise UserError(
            f"data.test_fraction={fraction:g} holds out test images, and there is a test split: set "
            "data.test_fraction=0, or data.test_path='' and data.test_split=''; of an .npz file leave out test_images"
        )
    train, test = data.train.divided(fraction, seed=0)
    return dataclasses.replace(data, train=train, test=test)


def _are_the_same(train: Split, test: Split) -> bool:
    """Returns whether two splits hold the same images, by their fingerprints and the content of up to 8 images: a
    fingerprint knows sizes, and of a folder names, but no content.
    """
    if train.count != test.count or train.fingerprint() != test.fingerprint():
        return False
    return all(a == b for a, b in zip(_some_of(train), _some_of(test), strict=True))


def _some_of(split: Split) -> list[bytes]:
    """Reads 8 images, evenly spaced, or the first ones of a stream."""
    if isinstance(split, IndexedSplit):
        return [_content(split, i) for i in evenly(split.count, 8)]
    some = split.once(Share()).take(8)
    return [bytes(example["image"]) for example in elements_of(some, "the data set")]


def _content(split: IndexedSplit, index: int) -> bytes:
    """Reads an image's content; what cannot be read, such as a dead link, has none."""
    try:
        return split.source.encoded(index)
    except OSError:
        return b""


def check_given(data: Mapping[str, Any], given: Container[str]) -> None:
    """Raises a UserError if an option was set that a source of this package does not read.

    `given`: names of the options that were set, with their groups.
    """
    for name in _not_read(data):
        if f"data.{name}" in given and data[name]:
            readers = " or ".join(_READERS[name])
            raise UserError(
                f"data.source={data['source']} does not read data.{name}: it belongs to data.source={readers}"
            )


def say_not_read(data: Mapping[str, Any]) -> None:
    """Prints the options that a configuration sets and its source does not read."""
    usual = {option.name.split(".")[1]: option.default for option in OPTIONS}
    for name in _not_read(data):
        if data[name] and data[name] != usual[name]:
            say(
                f"ignored     data.{name}={data[name]}: data.source={data['source']} does not read it"
            )


def _not_read(data: Mapping[str, Any]) -> list[str]:
    """Returns which of `_READERS` the source does not read, without the group."""
    source = data["source"]
    if source not in _COME_WITH_THE_PACKAGE:
        return []
    return [name for name, readers in _READERS.items() if source not in readers]


def check(data: Mapping[str, Any]) -> None:
    """Raises a UserError if an option that the kind of source needs is empty."""
    if data["source"] == "tfds" and not data["name"]:
        raise UserError("data.name is empty: expected the name of a TFDS data set")
    if data["source"] in FILES and not data["path"]:
        raise UserError(f"data.path is empty: expected where the {data['source']} data are")
