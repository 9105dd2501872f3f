"""An index of what the Parquet files of a source hold, kept across runs."""

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
from typing import Any, NamedTuple

from simclr_jax.data.parquet_paths import list_files, open_parquet, state_of
from simclr_jax.data.source import Classes, class_of, in_order_of_classes
from simclr_jax.data.streamed import memory
from simclr_jax.errors import UserError
from simclr_jax.files import (
    absolute,
    cache_folder,
    write_text,
)

# A row group is read at once, in up to this share of the machine's memory.
_MEMORY_FOR_A_ROW_GROUP = 0.1
_INDEX_VERSION = 4  # 1 took an empty text for a class, 2 had no digests, 3 no is_numbered
THREADS = 16  # files that are looked at, or read for their labels, at once


_NO_IMAGES = "none of them holds images: expected a column of bytes, or of {bytes, path}"


class Columns(NamedTuple):
    """Names of the image column and the label column; "" means that there is no label column."""

    image: str
    label: str


class ParquetFile(NamedTuple):
    """The index's entry for a file.

    Attributes:
      path: within its file system.
      state: a text that changes when the file does.
      rows: rows of each row group.
      sizes: bytes of each row group, not compressed.
      labels: the classes that occur in the file; empty: it has no labels.
      names: names of the labels 0, 1, ..., where the file has them; else empty.
      is_numbered: whether labels are whole numbers, not texts.
      digests: a digest of the labels of each row group, in the order of its rows; "" where no row has a label.
      columns_of_classes: where there is no label column: those that Hugging Face's datasets says hold classes.
    """

    path: str
    state: str
    rows: list[int]
    sizes: list[int]
    labels: list[str]
    names: list[str]
    is_numbered: bool
    digests: list[str]
    columns_of_classes: list[str]


def index_files(system: Any, where: str, paths: list[str], columns: Columns) -> list[ParquetFile]:
    """Returns what each file holds, from the index where the file has not changed since.

    Args:
      system: the file system, None: this machine's.
      where: the path or glob as the user gave it; the name of the index is made of it.
      paths: the files.
      columns: which to look at.
    """
    key = json.dumps([absolute(where), columns, _INDEX_VERSION])
    name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    cache = cache_folder() / "parquet" / f"{name}.json"
    known: dict[str, ParquetFile] = {}
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError):  # none, or damaged
        known = {row[0]: ParquetFile(*row) for row in json.loads(cache.read_text())}

    def entry(path):
        state = state_of(system, path)
        same = path in known and known[path].state == state
        return known[path] if same else _look(system, path, state, columns)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as threads:
        files = list(threads.map(entry, paths))
    if files != list(known.values()):
        with contextlib.suppress(UserError):  # no room for it: the next start looks again
            write_text(cache, json.dumps(files))
    return files


def _look(system: Any, path: str, state: str, columns: Columns) -> ParquetFile:
    """Reads the footer of a file, and its labels."""
    with open_parquet(system, path) as file:
        schema, footer = file.schema_arrow, file.metadata
        _check_columns(path, schema, columns)
        groups = [footer.row_group(g) for g in range(footer.num_row_groups)]
        _check_bytes(path, groups, columns.image)
        names = _names_of(schema, columns.label)
        is_numbered = columns.label in schema.names and _is_whole(schema.field(columns.label).type)
        found: list[list[str | None]] = [[] for _ in groups]
        if columns.label in schema.names:
            for g in range(len(groups)):
                values = file.read_row_group(g, columns=[columns.label])[columns.label]
                found[g] = [named_class_of(value, names) for value in values.to_pylist()]
    labels = set(itertools.chain.from_iterable(found))
    return ParquetFile(
        path,
        state,
        [group.num_rows for group in groups],
        [group.total_byte_size for group in groups],
        sorted(label for label in labels if label is not None),
        names,
        is_numbered,
        [_digest_of(some) for some in found],
        [] if columns.label in schema.names else [n for n in schema.names if _names_of(schema, n)],
    )


def _digest_of(labels: list[str | None]) -> str:
    if not any(label is not None for label in labels):
        return ""
    return hashlib.blake2b(json.dumps(labels).encode(), digest_size=16).hexdigest()


def _holds_labels(kind: Any) -> bool:
    """Returns whether a column of this type may hold labels: whole numbers or texts."""
    import pyarrow.types as types

    value = kind.value_type if types.is_dictionary(kind) else kind
    may_be = types.is_string, types.is_large_string, types.is_null
    return _is_whole(kind) or any(is_it(value) for is_it in may_be)


def _is_whole(kind: Any) -> bool:
    """Returns whether a column of this type holds whole numbers."""
    import pyarrow.types as types

    return types.is_integer(kind.value_type if types.is_dictionary(kind) else kind)


def _check_columns(path: str, schema: Any, columns: Columns) -> None:
    """Raises a UserError unless the image column is there and holds bytes, or {bytes, ...}, and the
    label column holds whole numbers or texts, or is "label" and not there.
    """
    for name, option in zip(columns, ("image_column", "label_column"), strict=True):
        may_lack = option == "label_column" and name in ("", "label")
        if name not in schema.names and not may_lack:
            fit = [field.name for field in schema if _holds_labels(field.type)]
            if option == "image_column":
                fit = _image_columns(schema)
            none = _NO_IMAGES if option == "image_column" else f"set data.parquet.{option}=''"
            remedy = f"set data.parquet.{option}, such as to {fit[0]!r}" if fit else none
            raise UserError(
                f"{path} has no column {name!r}: it has {', '.join(schema.names)}; {remedy}"
            )
        if schema.names.count(name) > 1:
            raise UserError(f"{path} has several columns {name!r}: expected one")
    kind = schema.field(columns.image).type
    if not _holds_images(kind):
        raise UserError(
            f"column {columns.image!r} of {path} is {kind}: expected bytes, or {{bytes, path}}"
        )
    if columns.label not in schema.names:
        return
    kind = schema.field(columns.label).type
    if not _holds_labels(kind):
        raise UserError(
            f"column {columns.label!r} of {path} is {kind}: expected whole numbers or texts; "
            "data.parquet.label_column='' reads no labels"
        )


def _check_bytes(path: str, groups: list, column: str) -> None:
    """Raises a UserError if no row has the content of an image, as far as the footer's row groups tell."""
    empty = rows = 0
    for group in groups:
        chunks = [group.column(i) for i in range(group.num_columns)]
        by_path = {chunk.path_in_schema: chunk for chunk in chunks}
        contents = by_path.get(column) or by_path[f"{column}.bytes"]
        if not (contents.is_stats_set and contents.statistics.has_null_count):
            return
        empty, rows = empty + contents.statistics.null_count, rows + group.num_rows
    if rows and empty == rows:
        raise UserError(
            f"column {column!r} of {path} has no bytes in any row: expected the content of image files, not paths "
            "alone; Hugging Face's datasets embed it by push_to_hub, or datasets.table.embed_table_storage before "
            "to_parquet"
        )


def _holds_images(kind: Any) -> bool:
    """Returns whether a column of this type holds bytes, or {bytes, ...}."""
    import pyarrow.types as types

    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def image_columns(path: str) -> list[str]:
    """Returns the names of the columns of the Parquet files of a path that hold bytes, or {bytes, ...}.

    Raises:
      UserError: there is no such file, or the first cannot be read.
    """
    system, paths = list_files(path)
    with open_parquet(system, paths[0]) as file:
        return _image_columns(file.schema_arrow)


def _image_columns(schema: Any) -> list[str]:
    return [field.name for field in schema if _holds_images(field.type)]


def chosen_column(columns: list[str], usual: str) -> str:
    """Returns which of the `image_columns` to read: the usual one, or the only one where that is not among them."""
    return columns[0] if usual not in columns and len(columns) == 1 else usual


def check_sizes(groups: list[tuple[ParquetFile, int]]) -> None:
    """Raises a UserError if there is a row group that memory cannot hold."""
    file, group = max(groups, key=lambda entry: entry[0].sizes[entry[1]])
    need, room = file.sizes[group], _MEMORY_FOR_A_ROW_GROUP * memory()
    if need > room:
        raise UserError(
            f"{file.path} has a row group of {need / 1e9:.1f} GB, which is read at once, and on this "
            f"machine {room / 1e9:.1f} GB may be used for it: write the file with row groups of some "
            "1,000 images"
        )


def _names_of(schema: Any, label: str) -> list[str]:
    """Returns the class names that Hugging Face's datasets writes into a schema, or []."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])
        return list(about["info"]["features"][label]["names"])
    except (KeyError, ValueError, TypeError):
        return []


def named_class_of(label: int | str | None, names: list[str]) -> str | None:
    """Returns the class of a label, which may be its number among `names`; None for no label, see `class_of`."""
    if isinstance(label, int) and 0 <= label < len(names):
        return names[label]
    return class_of(label)


def classes_of(files: list[ParquetFile]) -> Classes:
    """Returns the classes of all files together: in the files' own order, or sorted.

    Raises:
      UserError: one file numbers its classes and another one names them, so that nobody can tell which are the same.
    """
    labels = {name for file in files for name in file.labels}
    named = next((file for file in files if file.names), None)
    names = set(named.names) if named else set()
    numbered = (file for file in files if file.is_numbered and not file.names)
    bare = next((file for file in numbered if not set(file.labels) <= names), None)
    if named and bare:
        raise UserError(
            f"{bare.path} numbers its classes, and {named.path} names them ({', '.join(named.names[:3])}, ...): "
            "write all files in the same way"
        )
    orders = {tuple(file.names) for file in files if file.names}
    if labels and len(orders) == 1 and labels <= set(*orders):
        return orders.pop()
    return in_order_of_classes(labels.union(*orders) if labels else ()) or None
