"""Checkpoints: WORKDIR/checkpoints/STEP/ with the encoder, the rest of the state, and the options.

The encoder lies in an item of its own, so that reading it never reads the optimizer's state; the
options lie beside it, so that a checkpoint folder can be copied anywhere and still be loaded.
"""

import re
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from simclr_jax.console import say
from simclr_jax.errors import UserError
from simclr_jax.train_state import TrainState

_ENCODER, _TRAINER, _OPTIONS = "encoder", "trainer", "config"
_T = TypeVar("_T")
_HANDLERS = {
    _ENCODER: ocp.StandardCheckpointHandler,
    _TRAINER: ocp.StandardCheckpointHandler,
    _OPTIONS: ocp.JsonCheckpointHandler,
}


class Checkpoints:
    """Saves asynchronously and restores; a context manager that waits for the last save."""

    def __init__(self, workdir: str, *, every_steps: int, keep_last: int, keep_every_steps: int):
        """The checkpoints of a run.

        Args:
          workdir: of the run.
          every_steps: a save is due at multiples of this.
          keep_last: as many of the newest are kept,
          keep_every_steps: and all at multiples of this, if above 0.
        """
        self._workdir = workdir
        self._every_steps = every_steps
        self._manager = ocp.CheckpointManager(
            checkpoint_folder(workdir),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep_last,
                keep_period=keep_every_steps or None,
                cleanup_tmp_directories=True,
            ),
            item_handlers={name: handler() for name, handler in _HANDLERS.items()},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:  # else that error says more
                raise self._failure(None, error) from error

    def check(self, step: int) -> None:
        """Raises a UserError if a save that was under way at `step` has failed."""
        self._guard(step, self._manager.check_for_errors)

    def wait(self, step: int) -> None:
        """Waits until all is written. Raises a UserError if that fails."""
        self._guard(step, self._manager.wait_until_finished)

    def _guard(self, step: int, action: Callable) -> None:
        try:
            action()
        except Exception as error:  # whatever a storage may raise
            raise self._failure(step, error) from error

    def _failure(self, step: int | None, error: Exception) -> UserError:
        whole = saved_steps(self._workdir)
        newest = f"the newest whole one is of step {whole[-1]}" if whole else "there is none yet"
        when = f"step {step}: " if step is not None else ""
        return UserError(
            f"{when}a checkpoint could not be written to {self._workdir} ({_reason(error)}); {newest}. "
            "Mend this, then the same command goes on from there"
        )

    def due(self, step: int) -> bool:
        """Whether a save is due at `step`."""
        return step % self._every_steps == 0

    def save(self, step: int, state: TrainState, options: dict) -> None:
        """Saves, and returns once the arrays are copied; the writing goes on.

        Raises:
          UserError: this or the last one cannot be written.
        """
        encoder, trainer = _split(state)
        arguments = ocp.args.Composite(
            **{
                _ENCODER: ocp.args.StandardSave(encoder),
                _TRAINER: ocp.args.StandardSave(trainer),
                _OPTIONS: ocp.args.JsonSave(options),
            }
        )
        self._guard(step, lambda: self._manager.save(step, args=arguments, force=True))

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState | None, dict]:
        """The newest state that can be read, laid out over devices as the abstract state says, and
        the options saved with it; (None, those of step 0) where nothing was saved.

        A checkpoint that cannot be read is set aside as WORKDIR/broken_checkpoints/STEP, and the
        one before it is taken.

        Raises:
          UserError: there are checkpoints, and none can be read.
        """
        reasons, failed = [], []
        for step in reversed(saved_steps(self._workdir)):
            state: TrainState | None = None
            options: dict = {}
            reason = "another process cannot read it"
            try:
                state, options = self._restore(step, abstract)
            except Exception as error:  # whatever a damaged file may lead to
                reason = _reason(error)
            # A step is taken by all processes or by none.
            if not np.all(multihost_utils.process_allgather(np.array(state is not None))):
                reasons.append(f"step {step}: {reason}")
                failed.append(step)
                continue
            for reason in reasons:
                say(f"cannot read the checkpoint of {reason}")
            self._set_aside(failed)
            return state, options
        if reasons:
            raise UserError(
                f"no checkpoint in {self._workdir} can be read ({'; '.join(reasons)}): use another "
                "--workdir to begin anew"
            )
        return None, {"step": 0, "window": []}

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            aside = checkpoint_folder(self._workdir).parent / "broken_checkpoints"
            aside.mkdir(exist_ok=True)
            for step in steps:
                target = aside / str(step)
                while target.exists():
                    target = target.with_name(f"{target.name}_again")
                (checkpoint_folder(self._workdir) / str(step)).rename(target)
        multihost_utils.sync_global_devices("broken checkpoints are set aside")
        self._manager.reload()

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        encoder, trainer = _split(abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    _ENCODER: ocp.args.StandardRestore(encoder),
                    _TRAINER: ocp.args.StandardRestore(trainer),
                    _OPTIONS: ocp.args.JsonRestore(),
                }
            ),
        )
        return _join(restored[_ENCODER], restored[_TRAINER]), restored[_OPTIONS]


def checkpoint_folder(workdir: epath.PathLike) -> epath.Path:
    """Where the checkpoints of a run lie, absolute."""
    return _absolute(workdir) / "checkpoints"


def _absolute(path: epath.PathLike) -> epath.Path:
    """A local folder, absolute, or a bucket's, "gs://BUCKET/FOLDER", as it is."""
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.absolute()


def saved_steps(path: epath.PathLike) -> list[int]:
    """The steps of the checkpoints below a workdir or its checkpoints folder, ascending."""
    folder = _folder(path)
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and _is_whole(p))


def _is_whole(checkpoint: epath.Path) -> bool:
    # A local folder gets its number when it is whole; in a bucket, which cannot rename, orbax marks it.
    return "://" not in str(checkpoint) or ocp.utils.is_checkpoint_finalized(checkpoint)


def _folder(path: epath.PathLike) -> epath.Path:
    # A workdir may be called "checkpoints" itself: what lies inside decides.
    inner = checkpoint_folder(path)
    return inner.parent if inner.parent.name == inner.name and not inner.is_dir() else inner


def find(path: str, step: int | None) -> epath.Path:
    """The folder of one checkpoint.

    Args:
      path: a workdir, its checkpoints folder, or the folder of one checkpoint, wherever copied to.
      step: None takes the newest.

    Raises:
      UserError: there is none; says what is there.
    """
    root = _absolute(path)
    if not root.is_dir():
        raise UserError(f"no folder {path!r}: expected a workdir or a checkpoint folder")
    if (root / _ENCODER).is_dir():
        if step is not None and step != (found := read_options(root)["step"]):
            raise UserError(f"{path!r} is the checkpoint of step {found}, not of step {step}")
        return root
    steps = saved_steps(root)
    if not steps:
        raise UserError(
            f"no checkpoint in {path!r}: expected a workdir in which training has saved one"
        )
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"no checkpoint of step {step} in {path!r}: there are {there}")
    return _folder(path) / str(steps[-1] if step is None else step)


def read_options(checkpoint: epath.Path) -> dict:
    """What was saved beside the arrays: {"step", "config", ...}."""
    return _read(checkpoint, _OPTIONS, ocp.args.JsonRestore())


def read_encoder(checkpoint: epath.Path, abstract: dict) -> dict:
    """{"params", "batch_stats"} of the encoder alone, laid out as the abstract tree says."""
    return _read(checkpoint, _ENCODER, ocp.args.StandardRestore(abstract))


def read_head(checkpoint: epath.Path, abstract: dict) -> dict:
    """{"params", "batch_stats"} of the projection head alone, laid out as the abstract tree says."""
    wanted = {part: {"head": tree} for part, tree in abstract.items()}
    args = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,  # the optimizer's state lies beside it
    )
    read = _read(checkpoint, _TRAINER, args, ocp.PyTreeCheckpointHandler)
    return {part: tree["head"] for part, tree in read.items()}


def read_newest(path: str, read: Callable[[epath.Path], _T]) -> _T:
    """read(folder of the newest checkpoint), which training may still be writing next to, and may
    delete for a newer one while it is read: then of that one. `path`: see `find`.
    """
    while True:
        found = find(path, _agreed_step(path))
        try:
            return read(found)
        except UserError:
            # What is still the newest is damaged. What is not may be half deleted: a folder is left
            # when its files are gone.
            steps = saved_steps(path)
            if not steps or str(steps[-1]) == found.name or jax.process_count() > 1:
                raise


def _agreed_step(path: str) -> int | None:
    """The newest step that process 0 sees, so that all processes read the same one."""
    if jax.process_count() == 1:
        return None
    steps = saved_steps(path)
    step = int(multihost_utils.broadcast_one_to_all(np.int32(steps[-1] if steps else -1)))
    return step if step >= 0 else None


def _read(checkpoint: epath.Path, item: str, args: Any, handler: Any = None) -> Any:
    handlers = ocp.CompositeCheckpointHandler(**{item: (handler or _HANDLERS[item])()})
    try:
        with ocp.Checkpointer(handlers) as checkpointer:
            return checkpointer.restore(checkpoint, args=ocp.args.Composite(**{item: args}))[item]
    except Exception as error:  # whatever a damaged file may lead to
        raise UserError(
            f"{checkpoint} cannot be read ({_reason(error)}): use an older checkpoint, or run the "
            "training command again, which sets it aside"
        ) from error


def _reason(error: Exception) -> str:
    """A storage library's account of pages in a few words."""
    text = " ".join(str(error).split())
    known = re.search(r"No space left on device|Disk quota exceeded|Read-only file system", text)
    return known[0] if known else text[:200]


def _split(state: TrainState) -> tuple[dict, dict]:
    params, stats = dict(state.params), dict(state.batch_stats)
    encoder = {"params": params.pop("encoder"), "batch_stats": stats.pop("encoder")}
    trainer = {
        "step": state.step,
        "params": params,
        "batch_stats": stats,
        "opt_state": state.opt_state,
    }
    return encoder, trainer


def _join(encoder: dict, trainer: dict) -> TrainState:
    return TrainState(
        step=trainer["step"],
        params={"encoder": encoder["params"]} | trainer["params"],
        batch_stats={"encoder": encoder["batch_stats"]} | trainer["batch_stats"],
        opt_state=trainer["opt_state"],
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """A tree of shapes and dtypes, each with the sharding it is to be restored with.

    `shardings` is one for all, or a tree of them.
    """
    if isinstance(shardings, jax.sharding.Sharding):
        shardings = jax.tree.map(lambda _: shardings, abstract)
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract,
        shardings,
    )
