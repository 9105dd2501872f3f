"""The file of --mode=embed: a row for each image, in Parquet or .npz.

Rows are written in parts, so that memory does not grow with the number of images and a run that was
cut off goes on, and are put together at the end.
"""

import contextlib
import itertools
import json
import pathlib
import zipfile
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np

from simclr_jax import processes
from simclr_jax.errors import UserError
from simclr_jax.files import expanded, replacing, write_text, writing
from simclr_jax.training.saved import saved_steps

_PART = 4096  # rows, about: 34 MB of h at D = 2048
_BLOCK = 4096  # rows read at a time
# Entries that earlier versions did not write to about.json, with the values that held then.
_UNSAID = {"upright": True, "sample_bits": 0}
OUTPUT_SUFFIXES = ".parquet", ".npz"


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes the folder and keeps other programs from writing into it as long as this lasts; if
    nothing is in it at the end, it is removed again.

    Raises:
      UserError: another program is writing into it, or it cannot be made.
    """
    with processes.alone(folder, "wait for it, or give another --output"):
        yield folder
    if jax.process_index() == 0:
        with contextlib.suppress(OSError):  # it is not empty, or gone
            folder.rmdir()


class Parts:
    """The rows so far, in a folder beside the output. Process 0 writes; all know how many there are.

    Attributes:
      folder: where the rows lie.
      batch_size: images of a batch.
      batches: batches in a part.
      batches_done: batches in all parts that are there.
    """

    def __init__(self, folder: pathlib.Path, batch_size: int):
        self.folder, self.batch_size = folder, batch_size
        self.batches = max(1, _PART // batch_size)

    def begun_with(self, workdir: str) -> int | None:
        """Returns the step of the encoder that made the rows so far; None if there are none.

        Args:
          workdir: the folder of the run whose encoder it is, or a checkpoint folder.

        Raises:
          UserError: that encoder is gone.
        """
        about = self.folder / "about.json"
        step = json.loads(about.read_text())["step"] if about.exists() else -1
        step = processes.as_first_process_says(step)
        if step < 0:
            return None
        if step in saved_steps(workdir) or not saved_steps(workdir):
            return step
        raise UserError(
            f"{self.folder} was begun with the encoder of step {step}, which is gone: remove that "
            "folder to begin anew"
        )

    def begin(self, about: dict) -> None:
        """Begins, or goes on with the rows that are already there.

        Args:
          about: says which encoder and images the rows come from, JSON-able.

        Raises:
          UserError: the rows that are there are made of something else.
        """
        file, about = self.folder / "about.json", json.loads(json.dumps(about))
        if file.exists():
            there = _UNSAID | json.loads(file.read_text())
            other = [name for name in about if there.get(name) != about[name]]
            if other:
                raise UserError(
                    f"{self.folder} was begun with another {', another '.join(other)}: remove that "
                    "folder to begin anew"
                )
        elif jax.process_index() == 0:
            with writing(self.folder):
                for stale in self.folder.glob("*.npz"):
                    stale.unlink()
            write_text(file, json.dumps(about))
        self._about = about
        there = itertools.takewhile(lambda n: self._file(n).exists(), itertools.count())
        self._count = processes.as_first_process_says(len(list(there)))
        self.batches_done = self._count * self.batches

    def _file(self, number: int) -> pathlib.Path:
        return self.folder / f"{number:08}.npz"

    def add(self, columns: dict[str, np.ndarray]) -> None:
        """Writes a part, whole or not at all."""
        path = self._file(self._count)
        self._count += 1
        if jax.process_index() == 0:
            advice = "The same command resumes from there"
            with writing(path, advice), replacing(path) as scratch, scratch.open("wb") as file:
                np.savez(file, allow_pickle=False, **columns)

    def join(self, output: pathlib.Path) -> int:
        """Puts all parts together, removes them, and returns how many rows there are."""
        write = _write_parquet if output.suffix == ".parquet" else _write_npz
        parts = [self._file(number) for number in range(self._count)]
        advice = f"The same command resumes from the rows in {self.folder}"
        with writing(output, advice), replacing(output) as scratch:
            count = write(pathlib.Path(scratch), parts, self._about)
        with contextlib.suppress(OSError):  # the output is whole, whatever is left here
            # about.json first: without it, parts that are left count as stale and are removed by `begin`.
            (self.folder / "about.json").unlink()
            for part in self.folder.glob("*.npz*"):
                part.unlink()
        return count


def _write_parquet(output: pathlib.Path, parts: list[pathlib.Path], about: dict) -> int:
    columns = (np.load(path, allow_pickle=False) for path in parts)
    return write_columns(output, columns, {"simclr_jax": json.dumps(about)})


def write_columns(
    output: pathlib.Path, parts: Iterator[Mapping[str, np.ndarray]], metadata: dict | None = None
) -> int:
    """Writes a Parquet file part by part, and returns how many rows it has.

    Args:
      output: the file.
      parts: one or more, each {column: array [n] or [n, D], which becomes lists of D}.
      metadata: {name: text} of the file; None: none.
    """
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
        return pa.table(arrays).replace_schema_metadata(metadata)

    count = 0
    tables = map(table, parts)
    first = next(tables)
    with pq.ParquetWriter(output, first.schema) as writer:
        writer.write_table(first)
        count += len(first)
        for rest in tables:
            writer.write_table(rest)
            count += len(rest)
    return count


def _write_npz(output: pathlib.Path, parts: list[pathlib.Path], about: dict) -> int:
    """Writes an .npz array by array and part by part: numpy.savez would hold all of it."""
    with np.load(parts[0], allow_pickle=False) as first:
        names = first.files
    with zipfile.ZipFile(output, "w", allowZip64=True) as archive:
        for name in names:
            forms = [(x.shape, x.dtype) for x in (_column(path, name) for path in parts)]
            count = sum(shape[0] for shape, _ in forms)
            dtype = np.result_type(*(dtype for _, dtype in forms))  # as wide as the longest path
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


class FeatureFile(NamedTuple):
    """A file that --mode=embed wrote.

    Attributes:
      about: says which encoder and images it was made from.
      images: text [N], names of the images.
      path: the file.
    """

    about: dict
    images: np.ndarray
    path: pathlib.Path

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields h, float32 [n, D], of the images in order, some at a time."""
        if self.path.suffix == ".npz":
            yield from _npz_blocks(self.path)
            return
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(_BLOCK, columns=["h"]):
                yield batch["h"].flatten().to_numpy().reshape(len(batch), -1)


def _npz_blocks(path: pathlib.Path) -> Iterator[np.ndarray]:
    with zipfile.ZipFile(path) as archive, archive.open("h.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        (count, width), _, dtype = read_header(file)
        for start in range(0, count, _BLOCK):
            rows = min(_BLOCK, count - start)
            content = file.read(rows * width * dtype.itemsize)
            yield np.frombuffer(content, dtype).reshape(rows, width)


def read_feature_file(path: str) -> FeatureFile:
    """Opens a file that --mode=embed wrote. Raises a UserError if it is none."""
    file = expanded(path)
    if file.is_dir():
        raise UserError(
            f"{path} is a folder: expected what --mode=embed --input={path} --output=FILE.parquet writes"
        )
    if not file.is_file():
        raise UserError(f"no file {path!r}: expected what --mode=embed wrote")
    try:
        about, images = (_npz_about if file.suffix == ".npz" else _parquet_about)(file)
    except (TypeError, ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not what --mode=embed wrote: {error}") from error
    return FeatureFile(about, images, file)


_NOT_OURS = "it does not say by which encoder"


def _npz_about(file: pathlib.Path) -> tuple[dict, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        if not {"about", "image"} <= set(arrays.files):
            raise ValueError(_NOT_OURS)
        return json.loads(str(arrays["about"])), arrays["image"]


def _parquet_about(file: pathlib.Path) -> tuple[dict, np.ndarray]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = (pq.read_schema(file).metadata or {}).get(b"simclr_jax")
        if about is None:
            raise ValueError(_NOT_OURS)
        table = pq.read_table(file, columns=["image"])
    except pa.ArrowException as error:
        raise ValueError(error) from error
    return json.loads(about), np.asarray(table["image"].to_pylist())
