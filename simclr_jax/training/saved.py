"""Reading checkpoints: WORKDIR/checkpoints/STEP/, or such a folder copied anywhere.

The encoder lies in an item of its own, so that reading it never reads the optimizer's state; the
record lies beside it, so that a checkpoint folder can be copied anywhere and still be loaded.
"""

import json
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from simclr_jax import processes
from simclr_jax.errors import Unavailable, UserError, one_line
from simclr_jax.files import absolute, in_bucket, located, no_folder, raise_if_passing
from simclr_jax.training.checksums import (
    ENCODER,
    RECORD,
    TRAINER,
    network_of,
    verify,
    verify_record,
)

HANDLERS = {
    ENCODER: ocp.StandardCheckpointHandler,
    TRAINER: ocp.StandardCheckpointHandler,
    RECORD: ocp.JsonCheckpointHandler,
}
_T = TypeVar("_T")
_OF_A_DISK = r"No space left on device|Disk quota exceeded|Read-only file system"


def checkpoint_folder(workdir: epath.PathLike) -> epath.Path:
    """Returns WORKDIR/checkpoints, absolute."""
    return _absolute(workdir) / "checkpoints"


def check_writable(folder: epath.PathLike) -> None:
    """Raises a UserError if the absolute path of a folder has a character by which Orbax, which looks for its own files
    by a pattern, would write checkpoints that cannot be read: a bracket or a backslash.
    """
    path = str(_absolute(folder))
    if found := re.search(r"[\[\]\\]", path):
        raise UserError(
            f"{path}: checkpoints below a folder with {found[0]!r} in its name could not be read again: expected a path "
            "without [, ] and backslashes"
        )


def _absolute(path: epath.PathLike) -> epath.Path:
    """Makes a local path absolute; leaves a bucket's, "gs://BUCKET/FOLDER", as it is."""
    path = located(path)
    return path if in_bucket(path) else path.absolute()


def saved_steps(path: epath.PathLike) -> list[int]:
    """Lists the steps of the checkpoints below a workdir or its checkpoints folder, ascending."""
    folder = _folder(path)
    if not folder.is_dir():
        return []
    try:
        names = list(folder.iterdir())
    except FileNotFoundError:  # removed at this moment
        return []
    return sorted(int(p.name) for p in names if p.name.isdigit() and _is_whole(p))


def agreed_steps(path: epath.PathLike) -> list[int]:
    """Lists the steps of the checkpoints that process 0 sees, ascending, once all processes see them; all must call
    this together. Raises a UserError if a process does not see them.
    """
    steps: list[int] = []

    def see() -> bool:  # listed anew each time, as a training may replace them
        own = saved_steps(path)
        steps[:] = json.loads(processes.text_of_first(json.dumps(own)) or "[]")
        return set(steps) <= set(own)

    processes.wait_until_all_see(f"all checkpoints of {path} that process 0 sees", see)
    return steps


def _is_whole(checkpoint: epath.Path) -> bool:
    # A local folder gets its number when it is whole; in a bucket, which cannot rename, orbax marks it.
    return not in_bucket(checkpoint) or ocp.utils.is_checkpoint_finalized(checkpoint)


def _folder(path: epath.PathLike) -> epath.Path:
    # A workdir may be called "checkpoints" itself: what lies inside decides.
    inner = checkpoint_folder(path)
    return inner.parent if inner.parent.name == inner.name and not inner.is_dir() else inner


def beside(path: str) -> tuple[epath.Path, str]:
    """Returns the folder for what is made from a workdir or a checkpoint folder, and a suffix for its name: of
    WORKDIR/checkpoints/STEP the workdir and "_step_STEP", as training removes a checkpoint's folder with all that lies
    in it; of WORKDIR/checkpoints the workdir and ""; otherwise the folder itself and "".
    """
    folder = epath.Path(absolute(path))
    if _is_all_checkpoints(folder):
        return folder.parent, ""
    if folder.parent.name == "checkpoints" and (folder / RECORD).is_dir():
        return folder.parent.parent, f"_step_{folder.name}"
    return epath.Path(path), ""


def is_of_checkpoints(path: str) -> bool:
    """Returns whether a path is WORKDIR/checkpoints, or a checkpoint itself."""
    folder = epath.Path(absolute(path))
    return _is_checkpoint(folder) or _is_all_checkpoints(folder)


def _is_checkpoint(folder: epath.Path) -> bool:
    return (folder / ENCODER).is_dir() and (folder / RECORD).is_dir()


def _is_all_checkpoints(folder: epath.Path) -> bool:
    return _folder(folder) == folder and bool(saved_steps(folder))


def find(path: str, step: int | None) -> epath.Path:
    """Finds the folder of one checkpoint.

    Args:
      path: a workdir, its checkpoints folder, or the folder of one checkpoint, wherever copied to.
      step: None takes the newest.

    Raises:
      UserError: there is no such checkpoint; names those that are there.
    """
    root = _absolute(path)
    if not root.is_dir():
        raise UserError(f"{no_folder(path)}: expected a workdir or a checkpoint folder")
    steps = saved_steps(root)
    # A checkpoint itself. A workdir may have folders of these names too, beside its checkpoints.
    if not steps and _is_checkpoint(root):
        if step is not None and step != (found := read_record(root)["step"]):
            raise UserError(f"{path!r} is the checkpoint of step {found}, not of step {step}")
        return root
    if not steps:
        raise UserError(
            f"no checkpoint in {path!r}: expected a workdir in which training has saved one"
        )
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"no checkpoint of step {step} in {path!r}: there are {there}")
    return _folder(path) / str(steps[-1] if step is None else step)


def read_record(checkpoint: epath.Path) -> dict:
    """Reads what was saved beside the arrays: {"step", "config", ...}."""
    record = _read(checkpoint, RECORD, ocp.args.JsonRestore())
    try:
        verify_record(record)
    except ValueError as error:
        raise _unreadable(checkpoint, error) from error
    return record


def read_encoder_arrays(checkpoint: epath.Path, abstract: dict) -> dict:
    """Reads {"params", "batch_stats"} of the encoder alone, laid out as the abstract tree says."""
    found = _read(checkpoint, ENCODER, ocp.args.StandardRestore(abstract))
    _check_read(checkpoint, {ENCODER: found})
    return found


def read_head_arrays(checkpoint: epath.Path, abstract: dict) -> dict:
    """Reads {"params", "batch_stats"} of the projection head, laid out as the abstract tree says."""
    read = read_parts(checkpoint, {part: {"head": tree} for part, tree in abstract.items()})
    return {part: tree["head"] for part, tree in read.items()}


def read_parts(checkpoint: epath.Path, abstract: dict) -> dict:
    """Reads some of what lies beside the encoder, without the optimizer's state.

    `abstract`: {"params": {"head": ..., "classifier": ...}, "batch_stats": {"head": ...}}, or a part of it.
    """
    args = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
        partial_restore=True,
    )
    found = _read(checkpoint, TRAINER, args, ocp.PyTreeCheckpointHandler)
    _check_read(checkpoint, {name: network_of(found, name) for name in found["params"]})
    return found


def _check_read(checkpoint: epath.Path, trees: dict[str, Any]) -> None:
    """Raises a UserError if one of these, by the names of `checksums`, is not what was saved."""
    record = read_record(checkpoint)
    try:
        for name, tree in trees.items():
            verify(name, tree, record)
    except ValueError as error:
        raise _unreadable(checkpoint, error) from error


def read_newest(path: str, read: Callable[[epath.Path], _T]) -> _T:
    """Returns read(folder of the newest checkpoint).

    A training that is still running may replace that checkpoint by a newer one while it is read. Then the
    newer one is read, unless there are several processes.

    Args:
      path: see `find`.
      read: the folder of a checkpoint -> anything; raises a UserError if it cannot be read.
    """
    while True:
        found = find(path, _agreed_step(path))
        try:
            return read(found)
        except UserError:
            # A checkpoint that is still the newest is damaged. An older one may be half deleted: its folder
            # outlasts its files.
            steps = saved_steps(path)
            if not steps or str(steps[-1]) == found.name or jax.process_count() > 1:
                raise


def _agreed_step(path: str) -> int | None:
    """Returns the newest step that process 0 sees, so that all processes read the same one."""
    if jax.process_count() == 1:
        return None
    steps = agreed_steps(path)
    return steps[-1] if steps else None


def read_item(checkpoint: epath.Path, item: str, args: Any, handler: Any = None) -> Any:
    """Reads one item of a checkpoint. Does not wait for the other processes, because the read may fail on one alone.

    Args:
      checkpoint: its folder.
      item: ENCODER, TRAINER or RECORD.
      args: Orbax's arguments for it.
      handler: Orbax's handler class; None: the one that saved the item.

    Raises:
      Unavailable: this user may not read it.
      Exception: it cannot be read; the storage decides which.
    """
    _check_allowed(checkpoint / item)
    handlers = ocp.CompositeCheckpointHandler(**{item: (handler or HANDLERS[item])()})
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    with ocp.Checkpointer(handlers, multiprocessing_options=alone) as checkpointer:
        return checkpointer.restore(checkpoint, args=ocp.args.Composite(**{item: args}))[item]


def _check_allowed(folder: epath.Path) -> None:
    """Raises an `Unavailable` if a local folder may not be read: Orbax would say that it is not there, and training would set
    the checkpoint aside.
    """
    for path in () if in_bucket(folder) else (folder.parent, folder):
        if os.path.exists(path) and not os.access(path, os.R_OK | os.X_OK):
            raise Unavailable(
                f"{path} may not be read (permission denied): ask its owner for permission, or set it with chmod"
            )


def _read(checkpoint: epath.Path, item: str, args: Any, handler: Any = None) -> Any:
    try:
        return read_item(checkpoint, item, args, handler)
    except Exception as error:  # whatever a damaged file may lead to
        raise_if_passing(error)
        raise _unreadable(checkpoint, error) from error


def _unreadable(checkpoint: epath.Path, error: Exception) -> UserError:
    return UserError(
        f"{checkpoint} cannot be read ({short_reason(error)}): use an older checkpoint, or run the "
        "training command again, which sets it aside"
    )


def short_reason(error: Exception) -> str:
    """Shortens a storage library's error, which may have pages, to a few words."""
    text = one_line(error)
    known = re.search(_OF_A_DISK, text)
    # Left by an error of TensorStore whose text is that of a method.
    return known[0] if known else re.sub(r"\s*<bound method pybind11_\S+", "", text)[:200]


def is_of_a_disk(error: Exception) -> bool:
    """Returns whether an error says that a disk is full or cannot be written."""
    return re.search(_OF_A_DISK, str(error)) is not None


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Adds to a tree of shapes and dtypes the shardings that its arrays are to be restored with.

    Args:
      abstract: tree of `jax.ShapeDtypeStruct`.
      shardings: one sharding for all arrays, or a tree of them.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
