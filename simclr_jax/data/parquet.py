"""Parquet files as a source: an image column, and a label column or none, read by row groups.

Columns are as Hugging Face writes them: an image is bytes, or a struct {bytes, path}; a label is a
whole number or text. What the files hold is read from their footers and label columns and kept in an
index, so that a later start opens no file that has not changed.
"""

import concurrent.futures
import functools
import hashlib
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from simclr_jax.console import say
from simclr_jax.data.parquet_files import (
    THREADS,
    Columns,
    check_sizes,
    classes_of,
    index_files,
    named_class_of,
)
from simclr_jax.data.parquet_paths import list_files, open_parquet
from simclr_jax.data.source import Classes, ShardedSource, codes_of
from simclr_jax.data.split import DataSet
from simclr_jax.data.streamed import StreamedSplit
from simclr_jax.errors import UserError
from simclr_jax.options import Option, text

OPTIONS = (
    Option(
        "data.parquet.image_column",
        "image",
        text(),
        "column that holds the images: the bytes of image files, or {bytes, path}",
    ),
    Option(
        "data.parquet.label_column",
        "label",
        text(),
        "column that holds the labels: whole numbers (-1: no label) or texts (empty: no label). If this option is "
        'empty, or is "label" and there is no such column, the images have no labels',
    ),
)


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
        self._system, paths = list_files(path)
        self._columns, self.title = columns, path
        files = index_files(self._system, path, paths, columns)
        self._groups = [(file, g) for file in files for g, rows in enumerate(file.rows) if rows]
        if not self._groups:
            raise UserError(f"no image in {path!r}: the Parquet files have no rows")
        self.lengths = np.asarray([file.rows[g] for file, g in self._groups], np.int64)
        self.total_bytes = sum(file.sizes[g] for file, g in self._groups)
        check_sizes(self._groups)
        self.columns_of_classes = files[0].columns_of_classes
        occurring = classes_of(files)
        known = occurring if classes is None else classes or None
        self.classes = known if occurring else None  # images without any label have no classes
        self._code = codes_of(occurring or (), self.classes, repr(path)) if self.classes else {}

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
        with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
            return np.concatenate(list(threads.map(labels_of, shards)))

    def _table(self, shard: int, columns: list[str]) -> Any:
        file, group = self._groups[int(shard)]
        with open_parquet(self._system, file.path) as opened:
            there = [name for name in columns if name in opened.schema_arrow.names]
            return opened.read_row_group(group, columns=there)

    def _labels_of(self, shard: int, table: Any) -> np.ndarray:
        """Returns int32 [n], the labels of the rows of a shard."""
        file, _ = self._groups[int(shard)]
        if not self.classes or self._columns.label not in table.column_names:
            return np.full(self.lengths[shard], -1, np.int32)
        found = [named_class_of(x, file.names) for x in table[self._columns.label].to_pylist()]
        return np.asarray([self._code[name] for name in found], np.int32)

    @functools.cached_property
    def files(self) -> set[str]:
        """Returns the paths of the files, with links resolved where they are local."""
        paths = {file.path for file, _ in self._groups}
        return paths if self._system else set(map(os.path.realpath, paths))

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
            about = f"{file.rows[group]} {file.sizes[group]} {file.labels}\n{file.digests[group]}"
            digest.update(about.encode())
        return digest.hexdigest()


def open_data_set(data: Mapping[str, Any]) -> DataSet:
    """Opens the Parquet files "path" and, unless it is empty, "test_path".

    The options "parquet" name their columns. Where training has no labels, the test split has none either.

    Raises:
      UserError: there is no such file or column.
    """
    columns = Columns(data["parquet"]["image_column"], data["parquet"]["label_column"])
    train = RowGroups(data["path"], columns)
    if columns.label and train.classes is None and train.columns_of_classes:
        say(
            f"data        no labels: there is no column {columns.label!r}, but {', '.join(train.columns_of_classes)} with "
            f"classes; --config.data.parquet.label_column={train.columns_of_classes[0]} reads them"
        )
    test = None
    if data["test_path"]:
        rows = RowGroups(data["test_path"], columns, train.classes or ())
        # All files are those that training reads: `data` says that in one line for every source.
        if train.files != rows.files and (both := sorted(train.files & rows.files)):
            raise UserError(
                f"{len(both)} of the {len(rows.files)} Parquet files of data.test_path are among those of data.path, "
                f"such as {both[0]}: expected other ones, such as 'DATA/train*.parquet' and 'DATA/test*.parquet'"
            )
        test = StreamedSplit(rows)
    return DataSet(StreamedSplit(train), test)
