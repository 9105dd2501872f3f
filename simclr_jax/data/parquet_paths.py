"""Parquet files of a path, on this machine or in another system: which there are, and how they are opened."""

import contextlib
import fnmatch
import glob
import os
from collections.abc import Iterator
from typing import Any

from simclr_jax.errors import Unavailable, UserError, reason
from simclr_jax.files import absolute, in_bucket, is_away, raise_if_passing


def list_files(path: str) -> tuple[Any, list[str]]:
    """Returns the file system (None: this machine's) and the paths of the files, sorted."""
    if in_bucket(path):
        system, paths = _list_remote(path)
    else:
        system, inner = None, absolute(path)
        parent, name = os.path.split(inner)  # of a folder whose own name has brackets
        found = (
            _below(inner)
            or glob.glob(inner, recursive=True)
            or glob.glob(os.path.join(glob.escape(parent), name))
            or [inner]
        )
        # Once each, however many links lead to it: by its shortest path.
        longest_first = sorted(found, key=lambda x: (len(x), x), reverse=True)
        files = {os.path.realpath(x): x for x in longest_first}
        paths = [path for path in files.values() if os.path.isfile(path)]
    if not paths:
        raise UserError(
            f"no Parquet file {path!r}: expected a file, a folder with *.parquet files, or a glob"
        )
    return system, sorted(paths)


def _below(folder: str) -> list[str]:
    """Lists the files *.parquet below a folder, each folder once: links may lead in circles. What begins with a
    dot is hidden.
    """
    seen, found = set(), []
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        names = [] if real in seen else [name for name in folders if not name.startswith(".")]
        folders[:] = sorted(names)
        if real not in seen:
            found += [os.path.join(where, name) for name in fnmatch.filter(files, "[!.]*.parquet")]
        seen.add(real)
    return found


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
        raise _error_of(f"cannot open {path}", error, system=path) from error


def _error_of(what: str, error: Exception, system: Any) -> UserError:
    """Makes the error that a file cannot be read: an `Unavailable` if it may be read later. `system`: None: of this
    machine.
    """
    if system is None:
        raise_if_passing(error)
    elif is_away(error):
        return Unavailable(f"{what}: {reason(error)}. The same command resumes once it answers")
    return UserError(f"{what}: {reason(error)}")


@contextlib.contextmanager
def open_parquet(system: Any, path: str) -> Iterator[Any]:
    """Opens a Parquet file for the block. Raises a UserError if it cannot be read, then or in the block; an `Unavailable`
    if the file system does not answer.
    """
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
        if isinstance(error, pa.ArrowException):
            raise UserError(
                f"cannot read {path}: {reason(error)}; expected a Parquet file"
            ) from error
        raise _error_of(f"cannot read {path}", error, system) from error


def state_of(system: Any, path: str) -> str:
    """Returns a text that changes when the file does."""
    try:
        if system is not None:
            return system.ukey(path)
        status = os.stat(path)
    except Exception as error:  # any of many systems' network and permission errors
        raise _error_of(f"cannot read {path}", error, system) from error
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"
