"""Writes files whole or not at all, and reports a failure to the user in one line."""

import contextlib
import errno
import fcntl
import importlib.util
import json
import os
import pathlib
import re
import secrets
from collections.abc import Iterator
from typing import IO, Any

from etils import epath

from simclr_jax.errors import Unavailable, UserError, one_line, reason

# By default TensorFlow caches for 5 s that an object in a bucket exists, and still sees a folder after its renaming.
# It reads this variable when it first accesses a bucket.
os.environ.setdefault("GCS_STAT_CACHE_MAX_AGE", "0")


@contextlib.contextmanager
def writing(path: epath.PathLike, advice: str = "") -> Iterator[None]:
    """Turns an OSError within the block into a UserError "cannot write PATH: REASON".

    Args:
      path: what is being written, for the message.
      advice: what the user can do, appended to the message.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {reason(error)}{f'. {advice}' if advice else ''}"
        ) from error


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
    """Yields a scratch path beside `path`, which takes the place of `path` when the block ends.

    A reader sees the old file or the new one, never a part. If the block raises, `path` stays as it
    was. The scratch name is drawn at random: programs on two hosts may have one process number. In a bucket it is
    `path` itself: an object appears whole, or not.

    Raises:
      OSError: the file cannot be written.
    """
    path = epath.Path(path)
    if in_bucket(path):
        yield path
        return
    scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        yield scratch
        # Else a power failure may leave an empty file under the new name.
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        scratch.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def write_text(path: epath.PathLike, content: str, advice: str = "") -> None:
    """Writes a text file whole or not at all, and makes its folder.

    Args:
      path: the file.
      content: its text.
      advice: what the user can do if it cannot be written.

    Raises:
      UserError: it cannot be written.
    """
    with writing(path, advice):
        epath.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            scratch.write_text(content)


def write_json(path: epath.PathLike, value: Any, advice: str = "") -> None:
    """Writes `value` as indented JSON, by `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n", advice)


def read_json(path: epath.PathLike, advice: str = "") -> Any:
    """Reads what `write_json` wrote. Raises a UserError, with `advice`, if the file is damaged, such as by a power failure."""
    return parsed_json(epath.Path(path).read_bytes().decode(errors="replace"), path, advice)


def parsed_json(content: str, path: epath.PathLike, advice: str = "") -> Any:
    """Returns the value of the content of a JSON file; see `read_json`."""
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}): {advice or 'remove it'}"
        ) from error


@contextlib.contextmanager
def locked(folder: epath.PathLike, advice: str) -> Iterator[None]:
    """Locks a folder while the block runs, so that no other program that takes the lock writes into it.

    The lock is the file FOLDER/lock, made with the folder; the system releases it when the program
    ends, however it ends. If nothing else is in the folder at the end, the lock is removed, and
    the folder if it was made here.
    Buckets, and file systems without locks, cannot be locked.

    Args:
      folder: to write into.
      advice: what the user can do if another program has it.

    Raises:
      UserError: another program has the lock, or the folder cannot be written.
    """
    if in_bucket(folder):
        yield
        return
    path = pathlib.Path(folder) / "lock"
    made, unused = not path.parent.exists(), False
    with writing(folder, "It must be a folder that can be written"):
        lock = _locked_file(path)
    if lock is None:
        raise UserError(f"another program is writing into {folder}: {advice}")
    try:
        with lock:
            try:
                yield
            finally:
                unused = path.parent.is_dir() and list(path.parent.iterdir()) == [path]
                if unused:
                    path.unlink()
    finally:
        # NFS keeps an open file in its folder, under another name: only now may the folder be empty.
        if unused and made:
            with contextlib.suppress(OSError):
                path.parent.rmdir()


def _locked_file(path: pathlib.Path) -> IO | None:
    """Opens and locks a file, made with its folder; returns None if another program has the lock."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError:  # a file system without locks
            return lock
        # Between opening and locking, the program that had the lock may have removed the file.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def expanded(path: str | os.PathLike) -> pathlib.Path:
    """Returns a local path with "~" and "~NAME" expanded. With an unknown NAME the path stays as it is, where
    pathlib's own expanduser would raise a RuntimeError.
    """
    return pathlib.Path(os.path.expanduser(path))


def located(path: epath.PathLike) -> epath.Path:
    """Returns a path that may be a bucket's address; a local one has "~" put in, as by `expanded`."""
    return epath.Path(os.path.expanduser(path))


def absolute(path: str) -> str:
    """Makes a local path absolute; returns an address with "://" unchanged."""
    return path if in_bucket(path) else os.path.abspath(expanded(path))


def no_folder(path: str) -> str:
    """Says that there is no folder of this name, and of a relative one where it was looked for."""
    where = "" if in_bucket(path) or expanded(path).is_absolute() else f" below {os.getcwd()}"
    return f"no folder {path!r}{where}"


def quoted(path: epath.PathLike) -> str:
    """Returns a path as a text of a Python program, in double quotes, whatever characters it has."""
    return json.dumps(str(path), ensure_ascii=False)


def in_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is an address such as gs://BUCKET/FOLDER."""
    return "://" in str(path)


def check_bucket(address: str) -> None:
    """Raises a UserError if it is clear at once that a bucket's address cannot be written to; accepts local paths.

    Without this check TensorFlow would try for ever to create a missing bucket, and orbax would fail in the middle
    of the first save if google-cloud-storage is not installed.
    """
    if not in_bucket(address):
        return
    scheme, _, rest = address.partition("://")
    if scheme != "gs":
        raise UserError(
            f"{address}: expected a local path or gs://BUCKET/FOLDER, as TensorFlow has no file system for "
            f"{scheme}://; mount the bucket, with mount-s3 or rclone, and name the folder"
        )
    bucket = rest.split("/")[0]
    try:
        if not epath.Path(f"gs://{bucket}").exists():
            raise UserError(f"no bucket gs://{bucket}: expected one that is there, in {address}")
    except UserError:
        raise
    except Exception:  # perhaps it allows writing but not looking: the first write will tell
        pass
    if not _has_google_storage():
        raise UserError(
            f"{address} needs the package google-cloud-storage: pip install google-cloud-storage"
        )


# Words in the messages of TensorFlow, TensorStore, google-cloud-storage, and of what fsspec's file systems use.
_AWAY = (
    r"UNAVAILABLE|Unavailable|DEADLINE|Deadline|retry attempts failed|RetryError|libcurl|CURL|"
    r"Connection|[Cc]annot connect|[Cc]ould not connect|Disconnected|name resolution|timed? ?out|Timeout"
)
# Statuses of HTTP. Elsewhere such numbers may be anything.
_AWAY_BY_STATUS = r"\b429\b|\b5\d\d\b"
_NOT_ALLOWED = (
    r"\b40[134]\b|PERMISSION_DENIED|PermissionDenied|Forbidden|UNAUTHENTICATED|NOT_FOUND|NotFound"
)


def storage_error(error: Exception) -> UserError | None:
    """Turns an error that a bucket's library raised into a one-line UserError; returns None for any other error.

    TensorFlow, TensorStore (for orbax) and google-cloud-storage have exceptions of their own, and none is an
    OSError. The result is an `Unavailable` if a later try may succeed.
    """
    if isinstance(error, UserError):
        return None
    said = f"{type(error).__name__}: {one_line(error)}"
    of_google = type(error).__module__.split(".")[0] == "google"
    if not of_google and not re.search(r"gs://|storage/v1/b|googleapis", said):
        return None
    words = _without_addresses(said)
    if re.search(f"{_AWAY}|{_AWAY_BY_STATUS}", words):
        return Unavailable(
            f"the bucket does not answer: {said[:300]}. The same command resumes from what is saved"
        )
    if re.search(_NOT_ALLOWED, words):
        return UserError(f"the bucket refused the request or has no such object: {said[:300]}")
    return None


def is_away(error: Exception) -> bool:
    """Returns whether an error of a library that reads over the network says that the other side does not answer."""
    if isinstance(error, FileNotFoundError | PermissionError | ImportError | ValueError):
        return False
    status = getattr(error, "status", getattr(error, "code", None))
    if isinstance(status, int) and re.search(_AWAY_BY_STATUS, str(status)):
        return True
    words = _without_addresses(f"{type(error).__name__}: {error}")
    return bool(re.search(_AWAY, words)) and not re.search(_NOT_ALLOWED, words)


def _without_addresses(said: str) -> str:
    return re.sub(r"\S*/\S*", "", said)  # they may hold any number, as of a status


def raise_if_away(error: Exception) -> None:
    """Raises an `Unavailable` if `error` says that a bucket does not answer."""
    if isinstance(away := storage_error(error), Unavailable):
        raise away from error


# Errors that say that a file may be read later: memory or file handles are short, or a network's file system is gone.
# By the system's words for them, which TensorFlow's errors have, too.
_LATER = "|".join(
    re.escape(os.strerror(number))
    for number in (
        *(errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO),
        *(errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED),
        *(errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    )
)


def raise_if_passing(error: Exception) -> None:
    """Raises if `error`, which came while reading, says nothing about the content that was read: an `Unavailable` if a
    bucket or a network's file system does not answer, or if file handles or the system's memory are short; the error itself
    if it is one, or Python's or a device's memory is short.
    """
    raise_if_away(error)
    if isinstance(error, Unavailable | MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        raise error
    if re.search(_LATER, str(error)):
        raise Unavailable(
            f"files cannot be read at the moment ({one_line(error)[:200]}): the same command resumes once they can"
        ) from error


def _has_google_storage() -> bool:
    try:
        return importlib.util.find_spec("google.cloud.storage") is not None
    except ModuleNotFoundError:  # not even google.cloud
        return False


def check_local(option: str, path: str) -> None:
    """Raises a UserError if `path`, given with `option`, is a bucket's address."""
    if in_bucket(path):
        raise UserError(
            f"{option}={path}: expected a local path; gcloud storage cp and rsync copy from and to a bucket"
        )


def cache_folder() -> epath.Path:
    """Returns the folder of this program's caches: $XDG_CACHE_HOME/simclr_jax or ~/.cache/simclr_jax."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return epath.Path(root) / "simclr_jax"
