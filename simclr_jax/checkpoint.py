"""Checkpoints: WORKDIR/checkpoints/STEP/ with the encoder, the rest of the state, and the options.

The encoder lies in an item of its own, so that reading it never reads the optimizer's state; the
options lie beside it, so that a checkpoint folder can be copied anywhere and still be loaded.
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from simclr_jax.errors import UserError
from simclr_jax.train_state import TrainState

_ENCODER, _TRAINER, _OPTIONS = "encoder", "trainer", "config"
_HANDLERS = {
    _ENCODER: ocp.StandardCheckpointHandler,
    _TRAINER: ocp.StandardCheckpointHandler,
    _OPTIONS: ocp.JsonCheckpointHandler,
}


class Checkpoints:
    """Saves asynchronously and restores; a context manager that waits for the last save."""

    def __init__(
        self,
        workdir: str,
        *,
        every_steps: int = 1,
        keep_last: int | None = None,
        keep_every_steps: int = 0,
    ):
        self._manager = ocp.CheckpointManager(
            checkpoint_folder(workdir),
            options=ocp.CheckpointManagerOptions(
                save_interval_steps=every_steps,
                max_to_keep=keep_last,
                keep_period=keep_every_steps or None,
                cleanup_tmp_directories=True,
            ),
            item_handlers={name: handler() for name, handler in _HANDLERS.items()},
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, options: dict, *, last: bool = False) -> None:
        """Saves if a save is due at `step`, or if it is the last. Returns once the arrays are copied."""
        if self._manager.latest_step() == step:
            return
        encoder, trainer = _split(state)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _ENCODER: ocp.args.StandardSave(encoder),
                    _TRAINER: ocp.args.StandardSave(trainer),
                    _OPTIONS: ocp.args.JsonSave(options),
                }
            ),
            force=last,
        )

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, laid out over devices as the abstract state says."""
        encoder, trainer = _split(abstract)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    _ENCODER: ocp.args.StandardRestore(encoder),
                    _TRAINER: ocp.args.StandardRestore(trainer),
                }
            ),
        )
        return _join(restored[_ENCODER], restored[_TRAINER])


def checkpoint_folder(workdir: str) -> pathlib.Path:
    """Where the checkpoints of a run lie, absolute."""
    return pathlib.Path(workdir).expanduser().absolute() / "checkpoints"


def find(path: str, step: int | None) -> pathlib.Path:
    """The folder of one checkpoint.

    Args:
      path: a workdir, its checkpoints folder, or the folder of one checkpoint, wherever copied to.
      step: None takes the newest.

    Raises:
      UserError: there is none; says what is there.
    """
    root = pathlib.Path(path).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"no folder {path!r}: expected a workdir or a checkpoint folder")
    if (root / _ENCODER).is_dir():
        return root
    folder = root / "checkpoints" if (root / "checkpoints").is_dir() else root
    steps = sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    if not steps:
        raise UserError(f"no checkpoint in {path!r}: expected a workdir in which training has saved one")
    if step is None:
        return folder / str(steps[-1])
    if step not in steps:
        raise UserError(f"no checkpoint of step {step} in {path!r}: there are {', '.join(map(str, steps))}")
    return folder / str(step)


def read_options(checkpoint: pathlib.Path) -> dict:
    """What was saved beside the arrays: {"step", "config", ...}."""
    return _read(checkpoint, _OPTIONS, ocp.args.JsonRestore())


def read_encoder(checkpoint: pathlib.Path, abstract: dict) -> dict:
    """{"params", "batch_stats"} of the encoder alone, laid out as the abstract tree says."""
    return _read(checkpoint, _ENCODER, ocp.args.StandardRestore(abstract))


def _read(checkpoint: pathlib.Path, item: str, args: Any) -> Any:
    handlers = ocp.CompositeCheckpointHandler(**{item: _HANDLERS[item]()})
    with ocp.Checkpointer(handlers) as checkpointer:
        return checkpointer.restore(checkpoint, args=ocp.args.Composite(**{item: args}))[item]


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


def with_shardings(abstract: Any, sharding: jax.sharding.Sharding) -> Any:
    """A tree of shapes and dtypes, each with the sharding it is to be restored with."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), abstract
    )
