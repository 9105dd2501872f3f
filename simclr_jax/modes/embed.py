"""--mode=embed: h, and z if asked for, of every image of a folder, file or split, to Parquet or .npz.

Images stream through the devices, and their rows to `feature_file.py` as they come.
"""

import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import Progress, say
from simclr_jax.data import folder, kind_of, open_source
from simclr_jax.data.broken import Images
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.parquet_files import chosen_column, image_columns
from simclr_jax.data.source import InMemory
from simclr_jax.data.split import BROKEN, Split
from simclr_jax.errors import UserError
from simclr_jax.evals import subjects
from simclr_jax.evals.features import Extractor
from simclr_jax.files import absolute, check_local, expanded, no_folder
from simclr_jax.mesh import make_mesh
from simclr_jax.modes.feature_file import OUTPUT_SUFFIXES, Parts, alone, read_feature_file
from simclr_jax.training.state import digest_of

_EXPECTED = "--input=FOLDER, FILE.npz, FILES.parquet, NAME:SPLIT of a TFDS data set, or train or test for the run's own data"


class Input(NamedTuple):
    """The images that are embedded.

    Attributes:
      split: the images.
      root: the folder that their names are relative to, if they have one.
      name: text that `open_input` turns into the same images, from any current folder.
    """

    split: Split
    root: pathlib.Path | None
    name: str

    def names(self, first: int, count: int) -> np.ndarray:
        """Returns what a person calls images `first` to `first + count`, text [count]: a path below the
        folder, or the index.
        """
        indices = range(first, first + count)
        if self.root is None:
            return np.asarray([str(i) for i in indices])
        return np.asarray([os.path.relpath(self.split.name_of(i), self.root) for i in indices])


def open_input(config: ConfigDict, name: str) -> Input:
    """Opens the images that `name` stands for: "train" or "test" of the run's data, a folder, Parquet files, the
    training images of an .npz file, or NAME:SPLIT of TFDS.

    Raises:
      UserError: there is no such thing.
    """
    if name in ("train", "test"):
        split = getattr(assemble.data_set(config), name)
        if split is None:
            raise UserError(f"the run's data have no test split: expected {_EXPECTED}")
        return Input(split, folder.root_of(split), name)
    own = {"test_split": "", "test_path": "", "test_fraction": 0.0, "seed": config.seed}
    data = config.data.to_dict() | own  # all images, none held out
    kind = kind_of(name)
    if kind == "parquet":
        column = chosen_column(image_columns(name), config.data.parquet.image_column)
        data["parquet"] |= {"image_column": column}
    else:
        check_local("--input", name)
    if kind != "folder":
        path = absolute(name)
        return Input(open_source(data | {"source": kind, "path": path}).train, None, path)
    root = expanded(name)
    if root.is_dir():
        split = folder.open_split(name, config.data.folder_labels, loose=True)
        return Input(split, root, str(root.absolute()))
    data_set, colon, split_name = name.partition(":")
    if not colon:
        what = f"{name!r} is a file" if root.is_file() else no_folder(name)
        raise UserError(f"{what}: expected {_EXPECTED}")
    data |= {"source": "tfds", "name": data_set, "train_split": split_name}
    data["path"] = config.data.path if config.data.source == "tfds" else ""
    return Input(open_source(data).train, None, name)


def embed(config: ConfigDict, workdir: str, input: str, output: str, with_z: bool = False) -> None:
    """Writes a row for each image: "image" (its path below the folder, or its index), "label" if
    there are labels, "h" float32 [D], and "z" if asked for, both not normalised.

    A label is an index into the classes of the run, followed by those that only the input has; -1 means no
    label. The names of the classes are in the file's metadata.

    Images that cannot be read have no row; they are named in OUTPUT.broken_images.jsonl.

    Args:
      config: the run's configuration; of its data options, those for reading folders and for cropping.
      workdir: a run's folder, or a checkpoint folder.
      input: see `open_input`.
      output: a file that ends in .parquet or .npz.
      with_z: whether z is written too.

    Raises:
      UserError: there is no such input or no checkpoint, the output cannot be written, or an unfinished
        output was made from another input or encoder.
    """
    check_local("--output", output)
    path = expanded(output)
    if path.suffix not in OUTPUT_SUFFIXES:
        raise UserError(
            f"--output={output}: expected a file that ends in {' or '.join(OUTPUT_SUFFIXES)}"
        )
    source = open_input(config, input)
    config = config.copy_and_resolve_references()
    if not (isinstance(source.split, IndexedSplit) and isinstance(source.split.source, InMemory)):
        config.data.placement = "host"
    mesh, view = make_mesh(), assemble.evaluation_view(config)
    report = path.with_name(path.name + ".broken_images.jsonl")
    images = assemble.images_of(config, source.split, report)
    there = _what_is_replaced(path)
    with alone(path.with_name(path.name + ".parts")) as scratch:
        parts = Parts(scratch, subjects.batch_size_of(config, mesh))
        step = parts.begun_with(workdir)
        trained = subjects.trained(config, workdir, mesh, head=with_z, step=step)
        trained_on = trained.record["data_fingerprint"]  # None: the weights were imported
        if input == "train" and trained_on not in (None, source.split.fingerprint()):
            then = trained.record["training_images"]
            now = source.split.count
            why = (
                f"{then} then, {now} now" if then != now else "other images or other labels of them"
            )
            say(f"images      not those that the run was trained on: {why}")
        classes = _classes(source, trained)
        _say_how_labels_are_numbered(source, classes)
        about = {
            "step": trained.record["step"],
            "encoder": digest_of(trained.encoder),
            "images": source.split.fingerprint(),
            "crop": [view.size, view.proportion, view.antialias],
            **view.read._asdict(),
            "z": with_z,
            "batch": parts.batch_size,
            "input": source.name,
            "classes": classes,
        }
        if differ := [
            x for name, x in _TOLD.items() if there and there.get(name, about[name]) != about[name]
        ]:
            say(f"replaces    {path}, made {', '.join(differ)}")
        parts.begin(about)
        extractor = subjects.extractor(config, mesh, subjects.representations(config, with_z))
        for rows in _rows(config, source, trained, images, parts, extractor, classes):
            parts.add(rows)
        if jax.process_index() == 0:
            count = parts.join(path)
            say(f"features of {count} images, encoder of step {trained.record['step']}: {path}")
    images.broken.say_how_many()


# Entries of a feature file, and what is said where another file replaces it that differs in them.
_TOLD = {
    "images": "of other images",
    "encoder": "by another encoder",
    "crop": "with another crop",
    "upright": "with another data.upright",
    "sample_bits": "with another data.sample_bits",
    "z": "with another --with_z",
}


def _what_is_replaced(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns what the feature file at `path` says of itself; None: there is none.

    Raises:
      UserError: there is another kind of file, such as the images themselves.
    """
    if not path.exists() or (path.is_file() and not path.stat().st_size):
        return None
    try:
        return read_feature_file(str(path)).about
    except UserError as error:
        raise UserError(
            f"--output={path} would replace what --mode=embed did not write ({error}): expected another name"
        ) from error


def _say_how_labels_are_numbered(source: Input, classes: list[str]) -> None:
    """Says what the numbers of labels stand for, where they are not the places in the input's own list of classes."""
    own = list(source.split.classes or ())
    if own != classes[: len(own)]:
        some = ", ".join(f"{classes.index(name)} is {name!r}" for name in own[:3])
        more = ", ..." if len(own) > 3 else ""
        say(
            f"labels      are numbered by the run's classes, followed by those that only the input has: {some}{more}"
        )


def _classes(source: Input, trained: subjects.Trained) -> list[str]:
    """Returns the classes of the run, if it has any, and then those that only the input has."""
    own = trained.record.get("classes") or ()
    return [*own, *(name for name in source.split.classes or () if name not in own)]


def _rows(
    config: ConfigDict,
    source: Input,
    trained: subjects.Trained,
    images: Images,
    parts: Parts,
    extractor: Extractor,
    classes: list[str],
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the columns of each part in turn, from the first part that is not written yet."""
    count, batch_size = source.split.count, parts.batch_size
    total = -(-count // batch_size)
    passed = min(parts.batches_done, total)  # the last part is a shorter one
    first = min(passed * batch_size, count)
    if passed:
        say(f"resuming after {first} of {count} images")
    began = time.monotonic()
    batches = assemble.views(config, extractor.mesh).evaluation_batches(images, batch_size, passed)
    # The last entry is for the label -1, which picks it by index.
    codes = np.asarray([*(classes.index(c) for c in source.split.classes or ()), -1], np.int32)
    held: list[dict[str, np.ndarray]] = []
    with Progress(total, passed) as progress:
        variables = (trained.encoder, trained.head)
        stream = extractor.stream(variables, batches, count - first)
        for number, (features, labels) in enumerate(stream, passed + 1):
            progress.advance(number)
            whole = labels != BROKEN
            start = (number - 1) * batch_size
            row = {"image": source.names(start, len(labels))[whole]}
            if source.split.classes:
                row["label"] = codes[labels[whole]]
            held.append(row | {name: x[whole] for name, x in features.items()})
            if len(held) == parts.batches or number == total:
                done = min(count, number * batch_size)
                rate = (done - first) / (time.monotonic() - began)
                yield {name: np.concatenate([r[name] for r in held]) for name in held[0]}
                held = []
                say(f"passed {done} of {count} images, {rate:.0f} images/s")
