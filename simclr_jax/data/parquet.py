"""Parquet files as a source: an image column, and a label column or none, read by row groups.

Columns are as Hugging Face writes them: an image is bytes, or a struct {bytes, path}; a label is a
whole number or text. What the files hold is read from their footers and kept in an index, so that a
later start opens no file that has not changed.
"""

import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from simclr_jax.data.source import Classes, ShardedSource
from simclr_jax.data.split import DataSet, StreamedSplit
from simclr_jax.errors import UserError
from simclr_jax.files import cache_folder, write_text
from simclr_jax.options import Option, text

OPTIONS = (
    Option("data.parquet.image_column", "image", text(), "column of bytes or of {bytes, path}"),
    Option(
        "data.parquet.label_column",
        "label",
        text(),
        "column of whole numbers or texts; empty, or not there: no labels",
    ),
)


class Columns(NamedTuple):
    """Names of the columns; label "": none."""

    image: str
    label: str


class _File(NamedTuple):
    """What the index keeps of a file.

    Attributes:
      path: within its file system.
      state: [bytes, time of change], to tell whether it is still the same file.
      rows: rows of each row group.
      sizes: bytes of each row group.
      labels: the distinct labels, as text; empty: no label column.
      names: names of the labels 0, 1, ..., where the file has them; else empty.
    """

    path: str
    state: list
    rows: list[int]
    sizes: list[int]
    labels: list[str]
    names: list[str]


class RowGroups(ShardedSource):
    """The row groups of Parquet files, each a shard."""

    def __init__(self, path: str, columns: Columns, classes: Classes = None):
        """Opens all Parquet files of a path.

        Args:
          path: a file, a folder (every *.parquet below it), a glob, or with fsspec an address of one.
          columns: which to read.
          classes: names of the classes; None: those that the files have.

        Raises:
          UserError: there is no such file or column, or a label is none of `classes`.
        """
        self._system, paths = _list_files(path)
        self._files = _index(self._system, paths, columns)
        self._columns = columns
        self._groups = [(f, g) for f, file in enumerate(self._files) for g in range(len(file.rows))]
        self.lengths = np.asarray([n for file in self._files for n in file.rows], np.int64)
        self.total_bytes = sum(sum(file.sizes) for file in self._files)
        self.title = path
        found = _classes_of(self._files)
        self.classes = classes if classes is not None and found else found
        names = self._files[0].names
        codes = {str(i): name for i, name in enumerate(names)}
        self._code = {name: i for i, name in enumerate(self.classes or ())}
        self._code |= {c: self._code[name] for c, name in codes.items() if name in self._code}
        unknown = sorted(
            {x for file in self._files for x in file.labels} - self._code.keys() - {"-1"}
        )
        if self.classes and unknown:
            raise UserError(
                f"{path!r} has the classes {', '.join(unknown)}, which training has not"
            )

    def records(self, shard: Any) -> Any:
        import tensorflow as tf

        def rows(shard):
            images, labels = tf.numpy_function(self.read, [shard], [tf.string, tf.int32])
            images.set_shape([None])
            labels.set_shape([None])
            return tf.data.Dataset.from_tensor_slices((images, labels))

        return tf.data.Dataset.from_tensors(shard).flat_map(rows)

    def parse(self, record: Any) -> dict[str, Any]:
        image, label = record
        return {"image": image, "label": label}

    def read(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        """Reads a row group: the contents of its image files, and labels int32, -1 for none.

        Raises:
          UserError: it cannot be read.
        """
        import pyarrow as pa

        file, group = self._groups[int(shard)]
        path = self._files[file].path
        wanted = [self._columns.image, *([self._columns.label] if self.classes else [])]
        try:
            with _open(self._system, path) as opened:
                table = opened.read_row_group(group, columns=wanted)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from error
        images = table[self._columns.image].combine_chunks()
        if pa.types.is_struct(images.type):
            images = images.field("bytes")
        contents = np.asarray([x or b"" for x in images.to_pylist()] + [None], object)[:-1]
        if not self.classes:
            return contents, np.full(len(contents), -1, np.int32)
        found = [
            -1 if x is None else self._code.get(str(x), -1)
            for x in table[self._columns.label].to_pylist()
        ]
        return contents, np.asarray(found, np.int32)

    def fingerprint(self, shards: np.ndarray) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for shard in shards:
            file, group = self._groups[shard]
            about = self._files[file]
            digest.update(f"{about.rows[group]} {about.sizes[group]} {about.labels}\n".encode())
        return digest.hexdigest()


def open_data_set(data: Mapping[str, Any]) -> DataSet:
    """Opens the Parquet files "path" and, unless it is empty, "test_path".

    "parquet" names their columns.

    Raises:
      UserError: there is no such file or column.
    """
    columns = Columns(data["parquet"]["image_column"], data["parquet"]["label_column"])
    train = RowGroups(data["path"], columns)
    test = None
    if data["test_path"]:
        test = StreamedSplit(RowGroups(data["test_path"], columns, train.classes))
    return DataSet(StreamedSplit(train), test)


def _list_files(path: str) -> tuple[Any, list[str]]:
    """Returns the file system (None: this machine's) and the paths of the files, sorted."""
    if "://" in path:
        try:
            import fsspec
        except ImportError as error:
            raise UserError(f"reading {path} needs fsspec: pip install fsspec") from error
        try:
            system, inner = fsspec.core.url_to_fs(path)
            below = system.glob(f"{inner}/**.parquet") if system.isdir(inner) else []
            paths = below or (system.glob(inner) if glob.has_magic(inner) else [inner])
        except (ImportError, ValueError, OSError) as error:
            raise UserError(f"cannot open {path}: {' '.join(str(error).split())}") from error
    else:
        system, inner = None, os.path.abspath(os.path.expanduser(path))
        below = glob.glob(os.path.join(glob.escape(inner), "**", "*.parquet"), recursive=True)
        paths = below or [p for p in glob.glob(inner) or [inner] if os.path.isfile(p)]
    if not paths:
        raise UserError(
            f"no Parquet file {path!r}: expected a file, a folder with *.parquet files, or a glob"
        )
    return system, sorted(paths)


def _open(system: Any, path: str) -> Any:
    """Opens a Parquet file, a context manager."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path if system is None else system.open(path, "rb"))


def _state(system: Any, path: str) -> list:
    if system is None:
        status = os.stat(path)
        return [status.st_size, str(status.st_mtime_ns)]
    about = system.info(path)
    changed = about.get("mtime") or about.get("last_modified") or about.get("etag") or ""
    return [about.get("size"), str(changed)]


def _index(system: Any, paths: list[str], columns: Columns) -> list[_File]:
    """Returns what each file holds, from the index where the file has not changed since."""
    name = hashlib.blake2b(json.dumps([paths, columns]).encode(), digest_size=16).hexdigest()
    cache = cache_folder() / "parquet" / f"{name}.json"
    known: dict[str, _File] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):  # none, or of another version
        known = {row[0]: _File(*row) for row in json.loads(cache.read_text())}
    files = []
    for path in paths:
        try:
            state = _state(system, path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        same = path in known and known[path].state == state
        files.append(known[path] if same else _look(system, path, state, columns))
    if files != list(known.values()):
        with contextlib.suppress(UserError):  # no room for it: the next start looks again
            write_text(cache, json.dumps(files))
    return files


def _look(system: Any, path: str, state: list, columns: Columns) -> _File:
    """Reads the footer of a file, and its labels."""
    import pyarrow as pa

    try:
        with _open(system, path) as file:
            schema, footer = file.schema_arrow, file.metadata
            _check_image_column(path, schema, columns.image)
            rows = [footer.row_group(g).num_rows for g in range(footer.num_row_groups)]
            sizes = [footer.row_group(g).total_byte_size for g in range(footer.num_row_groups)]
            labels: set[str] = set()
            if columns.label and columns.label in schema.names:
                for values in _column(file, columns.label):
                    labels.update(str(x) for x in values if x is not None)
            names = _names_of(schema, columns.label) if labels else []
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"cannot read {path}: {' '.join(str(error).split())}; expected a Parquet file"
        ) from error
    return _File(path, state, rows, sizes, sorted(labels), names)


def _column(file: Any, name: str) -> Iterator[list]:
    for batch in file.iter_batches(columns=[name]):
        yield batch[name].unique().to_pylist()


def _check_image_column(path: str, schema: Any, name: str) -> None:
    """Raises a UserError unless the column is there and holds bytes, or {bytes, ...}."""
    import pyarrow as pa

    if name not in schema.names:
        raise UserError(
            f"{path} has no column {name!r}: it has {', '.join(schema.names)}; set "
            "data.parquet.image_column"
        )
    kind = schema.field(name).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise UserError(f"column {name!r} of {path} is {kind}: expected bytes, or {{bytes, path}}")


def _names_of(schema: Any, label: str) -> list[str]:
    """Returns the class names that Hugging Face's datasets writes into a schema, or []."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return list(about["info"]["features"][label]["names"])
    except (KeyError, ValueError, TypeError):
        return []


def _classes_of(files: list[_File]) -> Classes:
    """Returns the classes of all files together; numbers are sorted as numbers."""
    if files[0].names:
        return tuple(files[0].names)
    labels = {label for file in files for label in file.labels} - {"-1"}
    return tuple(sorted(labels, key=_number_or_text)) or None


def _number_or_text(label: str) -> tuple:
    return (0, int(label), "") if label.lstrip("-").isdigit() else (1, 0, label)
