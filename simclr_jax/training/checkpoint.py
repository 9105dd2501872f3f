"""Writing checkpoints, and going on from the newest one that can be read."""

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Self

import jax
import orbax.checkpoint as ocp

from simclr_jax import processes
from simclr_jax.console import say
from simclr_jax.errors import Unavailable, UserError, one_line
from simclr_jax.files import raise_if_passing, storage_error
from simclr_jax.training.checksums import checksum_of_record, checksums, verify, verify_record
from simclr_jax.training.saved import (
    ENCODER,
    HANDLERS,
    RECORD,
    TRAINER,
    agreed_steps,
    check_writable,
    checkpoint_folder,
    is_of_a_disk,
    read_item,
    saved_steps,
    short_reason,
)
from simclr_jax.training.state import TrainState

# Words of the error that a save raises after another process has died: the processes of a save wait for each
# other in barriers.
_OF_ANOTHER_PROCESS = r"(?i)barrier|coordination|heartbeat|unhealthy|connection reset|\bgloo\b"


@dataclasses.dataclass(frozen=True)
class Saving:
    """When checkpoints are saved and how many are kept.

    Attributes:
      every_steps: a save is due at multiples of this.
      keep_last: number of the newest checkpoints that are kept.
      keep_every_steps: above 0: checkpoints at multiples of this are kept for ever.
    """

    every_steps: int
    keep_last: int = 1
    keep_every_steps: int = 0


class Checkpoints:
    """Saves asynchronously and restores; a context manager that waits for the last save."""

    def __init__(self, workdir: str, saving: Saving):
        """Opens WORKDIR/checkpoints, which need not be there yet. Raises a UserError if nothing saved there could be
        read again.
        """
        check_writable(workdir)
        self._workdir = workdir
        self._every_steps = saving.every_steps
        self._manager = ocp.CheckpointManager(
            checkpoint_folder(workdir),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=saving.keep_last,
                keep_period=saving.keep_every_steps or None,
                cleanup_tmp_directories=True,
            ),
            item_handlers={name: handler() for name, handler in HANDLERS.items()},
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

    def _failure(self, step: int | None, error: Exception) -> Exception:
        of_a_process = re.search(_OF_ANOTHER_PROCESS, str(error)) and not is_of_a_disk(error)
        if jax.process_count() > 1 and of_a_process:
            return jax.errors.JaxRuntimeError(one_line(error))  # and not the storage's
        kind = Unavailable if isinstance(storage_error(error), Unavailable) else UserError
        whole = saved_steps(self._workdir)
        newest = f"the newest whole one is of step {whole[-1]}" if whole else "there is none yet"
        when = f"step {step}: " if step is not None else ""
        return kind(
            f"{when}a checkpoint could not be written to {self._workdir} ({short_reason(error)}); {newest}. "
            "Mend this, then the same command resumes from there"
        )

    def due(self, step: int) -> bool:
        """Returns whether a save is due at `step`."""
        return step % self._every_steps == 0

    def save(self, step: int, state: TrainState, record: dict) -> None:
        """Saves a state, and returns once it and the record are copied; the writing goes on.

        Raises:
          UserError: this checkpoint or the last one cannot be written.
        """
        encoder, trainer = _split(state)
        sums = checksums(encoder, trainer) | {RECORD: checksum_of_record(record)}
        arguments = ocp.args.Composite(
            **{
                ENCODER: ocp.args.StandardSave(encoder),
                TRAINER: ocp.args.StandardSave(trainer),
                # A copy: a thread writes the record while the caller goes on and may change it.
                RECORD: ocp.args.JsonSave(copy.deepcopy(record) | {"checksums": sums}),
            }
        )
        self._guard(step, lambda: self._manager.save(step, args=arguments, force=True))

    def restore_newest(self, abstract: TrainState) -> tuple[TrainState | None, dict]:
        """Reads the newest state that can be read.

        A checkpoint that cannot be read is set aside as WORKDIR/broken_checkpoints/STEP, and the
        one before it is taken. Which checkpoints there are, process 0 says.

        Args:
          abstract: shapes, dtypes and shardings of the state.

        Returns:
          the state, laid out as `abstract` says, and the record saved with it; (None,
          {"step": 0, "window": []}) where nothing was saved.

        Raises:
          UserError: there are checkpoints, and none can be read; or a process does not see one of them.
        """
        failed: dict[int, str] = {}  # step: why it cannot be read
        steps = agreed_steps(self._workdir)
        if steps != sorted(self._manager.all_steps()):  # it listed them when it was made
            self._manager.reload()
        for step in reversed(steps):
            found, reason = self._restore(step, abstract)
            if found is None:
                failed[step] = f"step {step}: {reason}"
                continue
            for why in failed.values():
                say(f"cannot read the checkpoint of {why}")
            self._set_aside(list(failed))
            return _join(found[ENCODER], found[TRAINER]), found[RECORD]
        if failed:
            raise UserError(
                f"no checkpoint in {self._workdir} can be read ({'; '.join(failed.values())}): use another "
                "--workdir to begin anew"
            )
        return None, {"step": 0, "window": []}

    def _set_aside(self, steps: list[int]) -> None:
        if not steps:
            return
        if jax.process_index() == 0:
            aside = checkpoint_folder(self._workdir).parent / "broken_checkpoints"
            aside.mkdir(parents=True, exist_ok=True)  # plain mkdir fails in buckets
            for step in steps:
                target = aside / str(step)
                while target.exists():
                    target = target.with_name(f"{target.name}_again")
                (checkpoint_folder(self._workdir) / str(step)).rename(target)
        processes.wait_for_all("broken checkpoints are set aside")
        self._manager.reload()

    def _restore(self, step: int, abstract: TrainState) -> tuple[dict | None, str]:
        """Returns the items of a checkpoint, on all processes or on none, and what this process found wrong."""
        found: dict | None = None
        reason = "another process cannot read it"
        try:
            # Nothing in here may wait for the other processes: theirs may be read well where this one is damaged.
            found = self._read_alone(step, abstract)
        except Exception as error:  # whatever a damaged file may lead to
            raise_if_passing(error)
            reason = short_reason(error)
        readable = all(processes.of_all(found is not None))
        if found is None or not readable:
            return None, reason
        try:
            for item in (ENCODER, TRAINER):
                verify(item, found[item], found[RECORD])
        except ValueError as error:
            return None, str(error)
        return found, ""

    def _read_alone(self, step: int, abstract: TrainState) -> dict:
        encoder, trainer = _split(abstract)
        checkpoint = checkpoint_folder(self._workdir) / str(step)
        record = read_item(checkpoint, RECORD, ocp.args.JsonRestore())
        verify_record(record)
        return {
            ENCODER: read_item(checkpoint, ENCODER, ocp.args.StandardRestore(encoder)),
            TRAINER: read_item(checkpoint, TRAINER, ocp.args.StandardRestore(trainer)),
            RECORD: record,
        }


def save_once(folder: str, step: int, state: TrainState, record: dict) -> None:
    """Saves one checkpoint, of weights that are not trained further here.

    Args:
      folder: a workdir, which may not be there yet; FOLDER/checkpoints/STEP is written.
      step: the checkpoint's number.
      state: its opt_state may be ().
      record: saved beside the arrays.

    Raises:
      UserError: it cannot be written.
    """
    with Checkpoints(folder, Saving(every_steps=1)) as checkpoints:
        checkpoints.save(step, state, record | {"step": step, "window": [], "hooks": {}})
        checkpoints.wait(step)


def _split(state: TrainState) -> tuple[dict, dict]:
    params, stats = dict(state.params), dict(state.batch_stats)
    encoder = {"params": params.pop("encoder"), "batch_stats": stats.pop("encoder")}
    trainer = {
        "step": state.step,
        "params": params,
        "batch_stats": stats,
        "opt_state": state.opt_state,
    }
    return encoder, trainer | ({"memory": state.memory} if state.memory else {})


def _join(encoder: dict, trainer: dict) -> TrainState:
    return TrainState(
        step=trainer["step"],
        params={"encoder": encoder["params"]} | trainer["params"],
        batch_stats={"encoder": encoder["batch_stats"]} | trainer["batch_stats"],
        opt_state=trainer["opt_state"],
        memory=trainer.get("memory"),
    )
