"""Parquet files as a source: an image column, and a label column or none, read by row groups.

Columns are as Hugging Face writes them: an image is bytes, or a struct {bytes, path}; a label is a
whole number or text. What the files hold is read from their footers and label columns and kept in an
index, so that a later start opens no file that has not changed.
"""

import concurrent.futures
import contextlib
import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from simclr_jax.data.source import Classes, ShardedSource
from simclr_jax.data.split import DataSet, StreamedSplit, memory
from simclr_jax.errors import UserError
from simclr_jax.files import cache_folder, write_text
from simclr_jax.options import Option, text

OPTIONS = (
    Option("data.parquet.image_column", "image", text(), "column of bytes or of {bytes, path}"),
    Option(
        "data.parquet.label_column",
        "label",
        text(),
        "column of whole numbers or texts; empty: no labels, as where there is no column 'label'",
    ),
)

_THREADS = 16  # files that are looked at, or read for their labels, at once
# A row group is read at once, in up to this share of the machine's memory.
_MEMORY_FOR_A_ROW_GROUP = 0.1


class Columns(NamedTuple):
    """Names of the image column and the label column; "" means that there is no label column."""

    image: str
    label: str


class _File(NamedTuple):
    """The index's entry for a file.

    Attributes:
      path: within its file system.
      state: a text that changes when the file does.
      rows: rows of each row group.
      sizes: bytes of each row group, not compressed.
      labels: the classes that occur in the file; empty: it has no labels.
      names: names of the labels 0, 1, ..., where the file has them; else empty.
    """

    path: str
    state: str
    rows: list[int]
    sizes: list[int]
    labels: list[str]
    names: list[str]


class RowGroups(ShardedSource):
    """The row groups of Parquet files, each a shard."""

    shard_name = "row group"

    def __init__(self, path: str, columns: Columns, classes: Classes = None):
        """Opens all Parquet files of a path.

        Args:
          path: a file, a folder (every *.parquet below it), a glob, or with fsspec an address of one.
          columns: which to read.
          classes: names of the classes, (): none; None: those that the files have.

        Raises:
          UserError: there is no such file or column, no image, or a label is none of `classes`.
        """
        self._system, paths = _list_files(path)
        self._columns, self.title = columns, path
        files = _index(self._system, path, paths, columns)
        self._groups = [(file, g) for file in files for g, rows in enumerate(file.rows) if rows]
        if not self._groups:
            raise UserError(f"no image in {path!r}: the Parquet files have no rows")
        self.lengths = np.asarray([file.rows[g] for file, g in self._groups], np.int64)
        self.total_bytes = sum(file.sizes[g] for file, g in self._groups)
        _check_sizes(self._groups)
        self.classes = _classes_of(files) if classes is None else classes or None
        self._code = {name: i for i, name in enumerate(self.classes or ())}
        unknown = sorted({name for file in files for name in file.labels} - self._code.keys())
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
        """Reads a row group: image files, object [n] of bytes, and labels, int32 [n], -1 for none.

        A row without an image has the content b"", which nothing can decode.

        Raises:
          UserError: it cannot be read.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        table = self._table(shard, [self._columns.image, self._columns.label])
        images = table[self._columns.image]
        if pa.types.is_struct(images.type):
            images = pc.struct_field(images, "bytes")
        contents = np.asarray([content or b"" for content in images.to_pylist()], object)
        return contents, self._labels_of(shard, table)

    def labels(self, shards: np.ndarray) -> np.ndarray:
        def labels_of(shard):
            return self._labels_of(shard, self._table(shard, [self._columns.label]))

        if self.classes is None:
            return super().labels(shards)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
            return np.concatenate(list(threads.map(labels_of, shards)))

    def _table(self, shard: int, columns: list[str]) -> Any:
        file, group = self._groups[int(shard)]
        with _opened(self._system, file.path) as opened:
            there = [name for name in columns if name in opened.schema_arrow.names]
            return opened.read_row_group(group, columns=there)

    def _labels_of(self, shard: int, table: Any) -> np.ndarray:
        """Returns int32 [n], the labels of the rows of a shard."""
        file, _ = self._groups[int(shard)]
        if not self.classes or self._columns.label not in table.column_names:
            return np.full(self.lengths[shard], -1, np.int32)
        found = [_class_of(x, file.names) for x in table[self._columns.label].to_pylist()]
        return np.asarray([-1 if name is None else self._code[name] for name in found], np.int32)

    def name_of(self, index: int) -> str:
        """Returns the path of the file and the row in it, from 0."""
        shard = int(np.searchsorted(np.cumsum(self.lengths), index, side="right"))
        file, group = self._groups[shard]
        row = sum(file.rows[:group]) + index - int(self.lengths[:shard].sum())
        return f"{file.path}, row {row}"

    def fingerprint(self, shards: np.ndarray) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for shard in shards:
            file, group = self._groups[shard]
            digest.update(f"{file.rows[group]} {file.sizes[group]} {file.labels}\n".encode())
        return digest.hexdigest()


def open_data_set(data: Mapping[str, Any]) -> DataSet:
    """Opens the Parquet files "path" and, unless it is empty, "test_path".

    The options "parquet" name their columns. Where training has no labels, the test split has none either.

    Raises:
      UserError: there is no such file or column.
    """
    columns = Columns(data["parquet"]["image_column"], data["parquet"]["label_column"])
    train = RowGroups(data["path"], columns)
    test = None
    if data["test_path"]:
        test = StreamedSplit(RowGroups(data["test_path"], columns, train.classes or ()))
    return DataSet(StreamedSplit(train), test)


def _list_files(path: str) -> tuple[Any, list[str]]:
    """Returns the file system (None: this machine's) and the paths of the files, sorted."""
    if "://" in path:
        system, paths = _list_remote(path)
    else:
        system, inner = None, _local(path)
        below = glob.glob(os.path.join(glob.escape(inner), "**", "*.parquet"), recursive=True)
        found = below or glob.glob(inner, recursive=True) or [inner]
        paths = [path for path in found if os.path.isfile(path)]
    if not paths:
        raise UserError(
            f"no Parquet file {path!r}: expected a file, a folder with *.parquet files, or a glob"
        )
    return system, sorted(paths)


def _list_remote(path: str) -> tuple[Any, list[str]]:
    try:
        import fsspec
    except ImportError as error:
        raise UserError(f"reading {path} needs fsspec: pip install fsspec") from error
    try:
        system, inner = fsspec.core.url_to_fs(path)
        if system.isdir(inner):
            return system, system.glob(f"{inner.rstrip('/')}/**/*.parquet")
        return system, system.glob(inner) if glob.has_magic(inner) else [inner]
    except Exception as error:  # any of many systems' network and permission errors
        raise UserError(f"cannot open {path}: {_reason(error)}") from error


def _local(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _reason(error: Exception) -> str:
    """Returns what an error says, in one line."""
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)


@contextlib.contextmanager
def _opened(system: Any, path: str) -> Iterator[Any]:
    """Opens a Parquet file for the block. Raises a UserError if it cannot be read, then or in the block."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # Errors of networks derive from nothing narrower.
    unreadable = (OSError, pa.ArrowException) if system is None else (Exception,)
    try:
        with contextlib.ExitStack() as stack:
            source = path if system is None else stack.enter_context(system.open(path, "rb"))
            yield stack.enter_context(pq.ParquetFile(source))
    except UserError:
        raise
    except unreadable as error:
        expected = "; expected a Parquet file" if isinstance(error, pa.ArrowException) else ""
        raise UserError(f"cannot read {path}: {_reason(error)}{expected}") from error


def _state(system: Any, path: str) -> str:
    """Returns a text that changes when the file does."""
    try:
        if system is not None:
            return system.ukey(path)
        status = os.stat(path)
    except Exception as error:  # any of many systems' network and permission errors
        raise UserError(f"cannot read {path}: {_reason(error)}") from error
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _index(system: Any, where: str, paths: list[str], columns: Columns) -> list[_File]:
    """Returns what each file holds, from the index where the file has not changed since.

    Args:
      system: the file system, None: this machine's.
      where: what the user calls the files; the index is named by it.
      paths: the files.
      columns: which to look at.
    """
    key = json.dumps([where if system else _local(where), columns])
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    cache = cache_folder() / "parquet" / f"{name}.json"
    known: dict[str, _File] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # none, or damaged
        known = {row[0]: _File(*row) for row in json.loads(cache.read_text())}

    def entry(path):
        state = _state(system, path)
        same = path in known and known[path].state == state
        return known[path] if same else _look(system, path, state, columns)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        files = list(threads.map(entry, paths))
    if files != list(known.values()):
        with contextlib.suppress(UserError):  # no room for it: the next start looks again
            write_text(cache, json.dumps(files))
    return files


def _look(system: Any, path: str, state: str, columns: Columns) -> _File:
    """Reads the footer of a file, and its labels."""
    with _opened(system, path) as file:
        schema, footer = file.schema_arrow, file.metadata
        _check_columns(path, schema, columns)
        groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
        names, labels = _names_of(schema, columns.label), set()
        if columns.label in schema.names:
            for batch in file.iter_batches(columns=[columns.label]):
                for value in batch[columns.label].unique().to_pylist():
                    labels.add(_class_of(value, names))
    return _File(
        path,
        state,
        [group.num_rows for group in groups],
        [group.total_byte_size for group in groups],
        sorted(labels - {None}),
        names,
    )


def _check_columns(path: str, schema: Any, columns: Columns) -> None:
    """Raises a UserError unless the image column is there and holds bytes, or {bytes, ...}, and the
    label column holds whole numbers or texts, or is "label" and not there.
    """
    import pyarrow.types as types

    for name, option in zip(columns, ("image_column", "label_column"), strict=True):
        may_lack = option == "label_column" and name in ("", "label")
        if name not in schema.names and not may_lack:
            raise UserError(
                f"{path} has no column {name!r}: it has {', '.join(schema.names)}; set "
                f"data.parquet.{option}"
            )
    kind = schema.field(columns.image).type
    content = kind
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        content = kind.field("bytes").type
    if not (types.is_binary(content) or types.is_large_binary(content)):
        raise UserError(
            f"column {columns.image!r} of {path} is {kind}: expected bytes, or {{bytes, path}}"
        )
    if columns.label not in schema.names:
        return
    kind = schema.field(columns.label).type
    value = kind.value_type if types.is_dictionary(kind) else kind
    may_be = types.is_integer, types.is_string, types.is_large_string, types.is_null
    if not any(is_it(value) for is_it in may_be):
        raise UserError(
            f"column {columns.label!r} of {path} is {kind}: expected whole numbers or texts; "
            "data.parquet.label_column='' reads no labels"
        )


def _check_sizes(groups: list[tuple[_File, int]]) -> None:
    """Raises a UserError if there is a row group that memory cannot hold."""
    file, group = max(groups, key=lambda entry: entry[0].sizes[entry[1]])
    need, room = file.sizes[group], _MEMORY_FOR_A_ROW_GROUP * memory()
    if need > room:
        raise UserError(
            f"{file.path} has a row group of {need / 1e9:.1f} GB, which is read at once, and on this "
            f"machine there are {room / 1e9:.1f} for it: write the file with row groups of some "
            "1,000 images"
        )


def _names_of(schema: Any, label: str) -> list[str]:
    """Returns the class names that Hugging Face's datasets writes into a schema, or []."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return list(about["info"]["features"][label]["names"])
    except (KeyError, ValueError, TypeError):
        return []


def _class_of(label: int | str | None, names: list[str]) -> str | None:
    """Returns the name of a label's class; None for no label, which may be written as -1."""
    if label is None or label == -1:
        return None
    if isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    return str(label)


def _classes_of(files: list[_File]) -> Classes:
    """Returns the classes of all files together: in the files' own order, or sorted."""
    labels = {name for file in files for name in file.labels}
    orders = {tuple(file.names) for file in files if file.names}
    if labels and len(orders) == 1 and labels <= set(*orders):
        return orders.pop()
    return tuple(sorted(labels.union(*orders) if labels else (), key=_number_or_text)) or None


def _number_or_text(label: str) -> tuple:
    return (0, int(label), "") if label.removeprefix("-").isdecimal() else (1, 0, label)
