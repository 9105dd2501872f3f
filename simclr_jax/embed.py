"""--mode=embed: h, and z if asked for, of every image of a folder or split, to Parquet or .npz.

Memory does not grow with the number of images: rows go to part files beside the output as they come,
and are put together at the end. A run that was cut off goes on after its last whole part.
"""

import hashlib
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.checkpoint import saved_steps
from simclr_jax.console import Progress, say
from simclr_jax.data.broken import Broken
from simclr_jax.data.sources import BROKEN, IndexedSplit, Split, folder, open_source
from simclr_jax.errors import UserError
from simclr_jax.evals import encoders
from simclr_jax.evals.features import Extractor
from simclr_jax.mesh import make_mesh
from simclr_jax.train_step import to_float

_PART = 4096  # rows, about: 34 MB of h at D = 2048


class Input(NamedTuple):
    """What is embedded: a split, and the folder that its names are relative to, if it has one."""

    split: Split
    root: pathlib.Path | None

    def names(self, first: int, count: int) -> np.ndarray:
        """What a person calls images `first` to `first + count`: a path below the folder, or the
        index.
        """
        indices = range(first, first + count)
        if self.root is None:
            return np.asarray([str(i) for i in indices])
        return np.asarray([os.path.relpath(self.split.name_of(i), self.root) for i in indices])


def open_input(config: ConfigDict, name: str) -> Input:
    """The images that `name` stands for: "train" or "test" of the run's data, NAME:SPLIT of TFDS, or
    a folder.

    Raises:
      UserError: there is no such thing.
    """
    if name in ("train", "test"):
        split = getattr(assemble.source(config), name)
        if split is None:
            raise UserError("the run's data have no test split: expected --input=FOLDER")
        paths = isinstance(split, IndexedSplit) and split.images.dtype.kind == "U"
        where = config.data.path if name == "train" else config.data.test_path
        return Input(split, pathlib.Path(where).expanduser() if paths else None)
    root = pathlib.Path(name).expanduser()
    if root.is_dir():
        return Input(folder(name, config.data.folder_labels), root)
    data_set, colon, split_name = name.partition(":")
    if not colon:
        raise UserError(
            f"no folder {name!r}: expected --input=FOLDER, NAME:SPLIT of a TFDS data set, or train or "
            "test for the run's own data"
        )
    path = config.data.path if config.data.source == "tfds" else ""
    source = open_source("tfds", name=data_set, path=path, train_split=split_name, test_split="")
    return Input(source.train, None)


def embed(config: ConfigDict, workdir: str, input: str, output: str, with_z: bool = False) -> None:
    """Writes a row for each image: "image" (its path below the folder, or its index), "label" if
    there are labels, "h" float32 [D], and "z" if asked for, both not normalised.

    Images that cannot be read have no row; they are named in OUTPUT.broken_images.jsonl.

    Args:
      config: of the run; of its data options, how a folder is read and what is cropped.
      workdir: or a checkpoint folder.
      input: see `open_input`.
      output: a file that ends in .parquet or .npz.
      with_z: whether z is written too.

    Raises:
      UserError: no such input or output, or what lies half done is of something else.
    """
    path = pathlib.Path(output).expanduser()
    if path.suffix not in (".parquet", ".npz"):
        raise UserError(f"--output={output}: expected a file that ends in .parquet or .npz")
    source = open_input(config, input)
    config = config.copy_and_resolve_references()
    if not (isinstance(source.split, IndexedSplit) and source.split.in_memory):
        config.data.placement = "host"
    mesh = make_mesh()
    batch_size = encoders.batch_size_of(config, mesh)
    parts = Parts(path.with_name(path.name + ".parts"), batch_size)
    trained = encoders.trained(config, workdir, mesh, head=with_z, step=parts.begun_with(workdir))
    parts.begin(
        {
            "step": trained.saved["step"],
            "encoder": _digest(trained.encoder),
            "images": source.split.fingerprint(),
            "crop": [config.data.image_size, config.data.eval_crop],
            "z": with_z,
            "batch": batch_size,
            "input": str(source.root.absolute()) if source.root else input,
            "classes": source.split.classes,
        }
    )
    broken = Broken(
        source.split,
        config.data.max_broken,
        parts.folder.with_name(path.name + ".broken_images.jsonl"),
    )
    for rows in _rows(config, source, trained, broken, mesh, batch_size, parts, with_z):
        parts.add(rows)
    if jax.process_index() == 0:
        count = parts.join(path)
        say(f"{count} images, encoder of step {trained.saved['step']}: {path}")
    if broken.indices:
        say(f"skipped    {len(broken.indices)} images that cannot be read, see {broken.report}")


def _rows(
    config: ConfigDict,
    source: Input,
    trained: encoders.Trained,
    broken: Broken,
    mesh: Any,
    batch_size: int,
    parts: "Parts",
    with_z: bool,
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of one part after the other, from the first that is not there yet."""
    network, head = assemble.encoder(config, parts=mesh.size), assemble.head(config)

    def forward(variables, images):
        h = network.apply(variables[0], to_float(images), train=False)
        return {"h": h} | ({"z": head.apply(variables[1], h, train=False)[-1]} if with_z else {})

    size, count = config.data.image_size, source.split.count
    extractor = Extractor(forward, batch_size=batch_size, size=size, mesh=mesh)
    passed, total = parts.batches_done, -(-count // batch_size)
    if passed:
        say(f"goes on after {min(count, passed * batch_size)} of {count} images")
    began, first = time.monotonic(), passed * batch_size
    batches = assemble.evaluation_batches(config, source.split, batch_size, broken, passed)
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
                row["label"] = labels[whole]
            held.append(row | {name: x[whole] for name, x in features.items()})
            if len(held) == parts.batches or number == total:
                done = min(count, number * batch_size)
                rate = (done - first) / (time.monotonic() - began)
                yield {name: np.concatenate([r[name] for r in held]) for name in held[0]}
                held = []
                say(f"embedded {done} of {count} images, {rate:.0f} images/s")


def _digest(variables: dict) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in jax.tree.leaves(jax.device_get(variables)):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


class Parts:
    """The rows so far, in a folder beside the output. Process 0 writes, all know how many there are.

    Attributes:
      batches: in a part.
      batches_done: in all parts that are there.
    """

    def __init__(self, folder: pathlib.Path, batch_size: int):
        self.folder, self.batches = folder, max(1, _PART // batch_size)
        self.batches_done = 0

    def begun_with(self, workdir: str) -> int | None:
        """The step of the encoder that the rows so far are of, None if there are none."""
        about = self.folder / "about.json"
        step = json.loads(about.read_text())["step"] if about.exists() else -1
        step = _as_first_process_says(step)
        if step < 0:
            return None
        if step in saved_steps(workdir) or not saved_steps(workdir):
            return step
        raise UserError(
            f"{self.folder} was begun with the encoder of step {step}, which is gone: remove that "
            "folder to begin anew"
        )

    def begin(self, about: dict) -> None:
        """Takes what is there, if it is `about` the same. Raises a UserError if it is not."""
        file, about = self.folder / "about.json", json.loads(json.dumps(about))
        if file.exists():
            there = json.loads(file.read_text())
            other = [name for name in about if there.get(name) != about[name]]
            if other:
                raise UserError(
                    f"{self.folder} was begun with another {', another '.join(other)}: remove that "
                    "folder to begin anew"
                )
        elif jax.process_index() == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in self.folder.glob("*.npz"):
                    stale.unlink()
                _replace(file, json.dumps(about).encode())
            except OSError as error:
                raise UserError(f"cannot write {self.folder}: {error.strerror}") from error
        self._about = about
        self.batches_done = _as_first_process_says(len(self._files())) * self.batches

    def _files(self) -> list[pathlib.Path]:
        return sorted(self.folder.glob("*.npz"))

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Writes a part, whole or not at all."""
        if jax.process_index() == 0:
            path = self.folder / f"{len(self._files()):08}.npz"
            scratch = path.with_suffix(".new")
            try:
                with scratch.open("wb") as file:
                    np.savez(file, allow_pickle=False, **columns)
                scratch.replace(path)
            except OSError as error:
                raise UserError(
                    f"cannot write {path}: {error.strerror}; the same command goes on from there"
                ) from error

    def join(self, output: pathlib.Path) -> int:
        """Puts all parts together, removes them, and returns how many rows there are."""
        scratch = output.with_name(output.name + ".new")
        write = _write_parquet if output.suffix == ".parquet" else _write_npz
        try:
            count = write(scratch, self._files(), self._about)
            scratch.replace(output)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror or error}") from error
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()
        return count


def _as_first_process_says(number: int) -> int:
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _replace(path: pathlib.Path, content: bytes) -> None:
    scratch = path.with_suffix(".new")
    scratch.write_bytes(content)
    scratch.replace(path)


def _write_parquet(output: pathlib.Path, parts: list[pathlib.Path], about: dict) -> int:
    # Imported here: only this needs it.
    import pyarrow as pa
    import pyarrow.parquet as pq

    def table(columns):
        arrays = {
            name: pa.array(x)
            if x.ndim == 1
            else pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
            for name, x in columns.items()
        }
        return pa.table(arrays).replace_schema_metadata({"simclr_jax": json.dumps(about)})

    count = 0
    tables = (table(np.load(path, allow_pickle=False)) for path in parts)
    first = next(tables)
    with pq.ParquetWriter(output, first.schema) as writer:
        writer.write_table(first)
        count += len(first)
        for rest in tables:
            writer.write_table(rest)
            count += len(rest)
    return count


def _write_npz(output: pathlib.Path, parts: list[pathlib.Path], about: dict) -> int:
    """An .npz of the same columns, array by array and part by part: numpy.savez would hold all."""
    with np.load(parts[0], allow_pickle=False) as first:
        names = first.files
    with zipfile.ZipFile(output, "w", allowZip64=True) as archive:
        for name in names:
            forms = [(x.shape, x.dtype) for x in (_column(path, name) for path in parts)]
            count = sum(shape[0] for shape, _ in forms)
            dtype = np.result_type(*(dtype for _, dtype in forms))  # the longest of the paths
            header = {
                "descr": np.lib.format.dtype_to_descr(dtype),
                "fortran_order": False,
                "shape": (count, *forms[0][0][1:]),
            }
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array_header_2_0(file, header)
                for path in parts:
                    file.write(np.ascontiguousarray(_column(path, name), dtype).tobytes())
        with archive.open("about.npy", "w") as file:
            np.lib.format.write_array(file, np.asarray(json.dumps(about)))
    return count


def _column(path: pathlib.Path, name: str) -> np.ndarray:
    with np.load(path, allow_pickle=False) as part:
        return part[name]
