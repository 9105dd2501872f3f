"""What a workdir remembers of its run, and refuses to mix with another."""

import dataclasses
import importlib.metadata
import json

import jax
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import config as config_lib
from simclr_jax.checkpoint import find, read_newest, read_options, saved_steps
from simclr_jax.config import Plan
from simclr_jax.data.sources import Split
from simclr_jax.errors import UserError

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

# What --extend lets differ.
_LENGTH = ("train.epochs", "train.steps")


def saved_config(path: str) -> dict:
    """The configuration that a workdir, or a checkpoint folder, was made with.

    Raises:
      UserError: there is none.
    """
    file = epath.Path(path) / "config.json"
    if file.exists():
        try:
            return json.loads(file.read_text())["config"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not what training wrote: give a --config, or a checkpoint folder as --workdir"
            ) from error
    try:
        return read_newest(path, read_options)["config"]
    except UserError as error:
        raise UserError(
            f"no {file}: name the run's --workdir, or a checkpoint folder, or give a --config"
        ) from error


def check_encoder(config: ConfigDict, checkpoint: epath.Path) -> dict:
    """What a checkpoint was saved with. Raises a UserError if it is of another model than `config`
    says: data and everything else may be others than in training.
    """
    saved = read_options(checkpoint)
    changed = config_lib.differences(config_lib.from_dict(saved["config"]), config)
    changed = [change for change in changed if change.startswith("model.")]
    if changed:
        raise UserError(
            f"{checkpoint} is of another model ({'; '.join(changed)}): leave --config out"
        )
    return saved


def check_workdir(config: ConfigDict, workdir: str, extend: bool = False) -> dict | None:
    """What the workdir's newest checkpoint was saved with; None where nothing was saved yet, so
    that nothing can be lost.

    Args:
      config: of the run that is to go on.
      workdir: of the run.
      extend: the run may get another length.

    Raises:
      UserError: it is of another configuration; says what differs.
    """
    saved = _newest_options(workdir)
    if saved is None:
        return None
    old = config_lib.from_dict(saved["config"])
    changed = config_lib.differences(old, config, _LENGTH if extend else ())
    if changed:
        hint = ""
        if all(change.startswith(_LENGTH) for change in changed):
            hint = "; or --extend to change its length, and with it the rest of its schedule"
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}): use another "
            f"--workdir, or the old values to go on with it{hint}"
        )
    if config.model.norm_group < 0 and len(saved["devices"]) != jax.device_count():
        raise UserError(
            f"{workdir} holds a run with BatchNorm per device on {len(saved['devices'])} devices, "
            f"and there are {jax.device_count()} now: use as many, or model.norm_group=IMAGES in "
            "another --workdir"
        )
    return saved


def _newest_options(workdir: str) -> dict | None:
    for step in reversed(saved_steps(workdir)):
        try:
            return read_options(find(workdir, step))
        except UserError:  # damaged: what restores the state says so
            continue
    return None


def check_data(train: Split, fingerprint: str, saved: dict | None, workdir: str) -> None:
    """Raises a UserError if the saved run began on other training images.

    `fingerprint` is that of `train`.
    """
    if saved is None or saved["data_fingerprint"] == fingerprint:
        return
    then, now = saved["training_images"], train.count
    what = f"{then} training images and there are {now} now" if then != now else "other images"
    raise UserError(
        f"{workdir} holds a run on {what}, so it cannot go on: restore the old data, or use "
        "another --workdir"
    )


def write_record(
    config: ConfigDict, plan: Plan, train: Split, fingerprint: str, workdir: str
) -> dict:
    """Writes WORKDIR/config.json, whole or not at all, and returns what it holds."""
    record = {
        "config": config.to_dict(),
        "plan": dataclasses.asdict(plan),
        "training_images": train.count,
        "data_fingerprint": fingerprint,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
    }
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "config.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".json.new")
            scratch.write_text(json.dumps(record, indent=2) + "\n")
            scratch.replace(path)
        except OSError as error:
            raise UserError(f"cannot write into --workdir {workdir!r}: {error.strerror}") from error
    return record
