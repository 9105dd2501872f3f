"""Checks of a workdir, which keep a run from being mixed with another one."""

import contextlib

import jax
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import config as config_lib
from simclr_jax import processes
from simclr_jax.console import say
from simclr_jax.data import index
from simclr_jax.data.folder import root_of
from simclr_jax.data.split import Split
from simclr_jax.errors import Unavailable, UserError
from simclr_jax.files import absolute
from simclr_jax.training.record import run_record, saved_config
from simclr_jax.training.saved import (
    agreed_steps,
    check_writable,
    find,
    is_of_checkpoints,
    read_record,
)

# Options that decide which images or labels a run finds.
_CHOOSE_IMAGES = (
    "data.source",
    "data.name",
    "data.train_split",
    "data.test_fraction",
    "data.folder_labels",
    "data.parquet.image_column",
    "data.parquet.label_column",
)

# What --extend lets differ: the length, and a warm-up that a configuration makes follow it.
_LENGTH = ("train.epochs", "train.steps")
_FOLLOWS_LENGTH = ("optimizer.warmup_epochs",)


def alone_in(workdir: str, images: str = "") -> contextlib.AbstractContextManager[None]:
    """Keeps other programs from training in a workdir while the block runs.

    Args:
      workdir: the folder.
      images: data.path, which a new run must not take for its workdir.

    Raises:
      UserError: another program trains there, nothing can be saved there, or it is the folder of the images, or of
        another run's checkpoints.
    """
    if images and absolute(images) == absolute(workdir) and run_record(workdir) is None:
        raise UserError(f"--workdir={workdir} is where the images are: expected another folder")
    check_writable(workdir)
    if is_of_checkpoints(workdir):
        raise UserError(
            f"--workdir={workdir} is a folder of checkpoints: expected the workdir that holds it, or a new one"
        )
    return processes.alone(workdir, "wait for it, stop it, or use another --workdir")


def check_encoder(config: ConfigDict, checkpoint: epath.Path) -> dict:
    """Reads what was saved beside the arrays of a checkpoint: {"step", "config", ...}.

    Args:
      config: configuration of an evaluation. Its data, and everything but the model, may differ from
        training's.
      checkpoint: the folder.

    Raises:
      UserError: the checkpoint is of another model than `config` says.
    """
    saved = read_record(checkpoint)
    changed = config_lib.differences(config_lib.from_dict(saved["config"]), config)
    changed = [change for change in changed if change.startswith("model.")]
    if changed:
        raise UserError(
            f"{checkpoint} is of another model ({'; '.join(changed)}): give the model's options as "
            "they were in training, or no --config"
        )
    return saved


def check_workdir(
    config: ConfigDict,
    workdir: str,
    train: Split,
    fingerprint: str,
    extend: bool = False,
    mode: str = "pretrain",
) -> dict | None:
    """Checks that a run may go on in a workdir.

    Args:
      config: configuration of the run that is to go on.
      workdir: its folder.
      train: its training images.
      fingerprint: `train.fingerprint()`.
      extend: the run may get another length.
      mode: the mode that made the run, "pretrain" or "distill".

    Returns:
      the newest checkpoint's record; None if there is no checkpoint, so that nothing can be lost.

    Raises:
      UserError: the checkpoints are of other images, see `check_data`, or of another configuration; says what differs.
    """
    saved = _newest_record(workdir)
    if saved is None:
        check_data(train, fingerprint, None, workdir)
        _say_what_is_replaced(config, workdir)
        return None
    if "imported" in saved:
        raise UserError(
            f"{workdir} holds imported weights, not a training that could go on: use another --workdir, and "
            f"--config.model.init_from={workdir} to begin with these weights"
        )
    if (began := saved.get("mode", "pretrain")) != mode:
        raise UserError(
            f"{workdir} holds a run of --mode={began}, not of {mode}: use another --workdir"
        )
    old = config_lib.from_dict(saved["config"])
    changed = config_lib.differences(old, config)
    # First the images, as options that are chosen by the images differ with them; unless an option says which images.
    if not any(change.startswith(_CHOOSE_IMAGES) for change in changed):
        check_data(train, fingerprint, saved, workdir)
    is_length = any(change.startswith(_LENGTH) for change in changed) and all(
        change.startswith(_LENGTH + _FOLLOWS_LENGTH) for change in changed
    )
    if changed and not (extend and is_length):
        hint = ""
        if is_length and mode == "pretrain":
            hint = "; or --extend to change its length, and with it the rest of its schedule"
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}): use another "
            f"--workdir, or the old values to go on with it{hint}"
        )
    if (
        mode == "pretrain"
        and config.model.norm_group < 0
        and len(saved["devices"]) != jax.device_count()
    ):
        raise UserError(
            f"{workdir} holds a run with BatchNorm per device on {len(saved['devices'])} devices, "
            f"and there are {jax.device_count()} now: use as many, or model.norm_group=IMAGES in "
            "another --workdir"
        )
    return saved


def check_data(train: Split, fingerprint: str, saved: dict | None, workdir: str) -> None:
    """Raises a UserError, on all processes, if they find different training images, or if the saved run began on
    other training images or other labels of them, from which its online classifier learns, as far as
    `Split.fingerprint` tells.

    Args:
      train: the training images now.
      fingerprint: `train.fingerprint()`.
      saved: the newest checkpoint's record, or None.
      workdir: for the message.
    """
    stale = ""
    if root_of(train):
        stale = (
            f"; if files were overwritten in place, remove {index.cache_of_folders()}, which keeps their "
            "old sizes"
        )
    if differ := processes.that_differ(fingerprint):
        raise UserError(
            f"processes {', '.join(map(str, differ))} found other training images than process 0 (here "
            f"{train.count}): give all of them the same files, or one folder that they share (data.path){stale}"
        )
    if saved is None or saved["data_fingerprint"] == fingerprint:
        return
    then, now = saved["training_images"], train.count
    advice = f"; --config.model.init_from={workdir} begins there with what this run has learned"
    if then == now:
        what = "other images, or on other labels of them"
        advice += f"{stale}; evaluations, such as --mode=probe, may take other labels"
    else:
        what = f"{then} training images and there are {now} now"
    raise UserError(
        f"{workdir} holds a run on {what}, so it cannot go on: restore the old data, or use another "
        f"--workdir{advice}"
    )


def _say_what_is_replaced(config: ConfigDict, workdir: str) -> None:
    """Says how the configuration differs from that of a run which saved nothing, if there was one."""
    with contextlib.suppress(UserError):  # none, or not what training wrote
        old = config_lib.from_dict(saved_config(workdir))
        if changed := config_lib.differences(old, config):
            say(f"workdir     a run that saved nothing is replaced ({'; '.join(changed)})")


def _newest_record(workdir: str) -> dict | None:
    """Returns the record of the newest checkpoint whose record can be read; all processes read it together."""
    for step in reversed(agreed_steps(workdir)):
        try:
            return read_record(find(workdir, step))
        except Unavailable:  # to go on without a record would be to begin another run here
            raise
        except UserError:  # damaged: what restores the state says so
            continue
    return None


def check_no_distillation(workdir: str, mode: str) -> None:
    """Raises a UserError if a workdir is that of a distillation, whose step `mode` would take for one of pretraining."""
    record = run_record(workdir)
    if record is not None and record.get("mode") == "distill":
        raise UserError(
            f"{workdir} holds a distillation, and --mode={mode} is about pretraining: expected another --workdir, and "
            "--config"
        )
