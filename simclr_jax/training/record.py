"""The record of a run: what WORKDIR/config.json and each checkpoint say of it."""

import dataclasses
import datetime
import json
import secrets
import sys
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import config as config_lib
from simclr_jax import processes
from simclr_jax.config.python_files import own_files
from simclr_jax.data.indexed import is_partly_labelled
from simclr_jax.data.split import DataSet
from simclr_jax.errors import Unavailable, UserError
from simclr_jax.files import absolute, no_folder, write_json
from simclr_jax.training.plan import Plan
from simclr_jax.training.program import commit, versions
from simclr_jax.training.saved import read_newest, read_record
from simclr_jax.training.verdict import HEALTH


def about_training(plan: Plan, data: DataSet, fingerprint: str) -> dict[str, Any]:
    """Returns what a training's record says of its length and its data.

    Args:
      plan: length and learning rate.
      data: the images.
      fingerprint: `data.train.fingerprint()`.
    """
    return {
        "plan": dataclasses.asdict(plan),
        "training_images": data.train.count,
        "classes": data.train.classes,
        "data_fingerprint": fingerprint,
        "test_fingerprint": data.test.fingerprint() if data.test else None,
        "partly_labelled": is_partly_labelled(data.train),
    }


def about_imported(weights: dict[str, Any]) -> dict[str, Any]:
    """Returns what the record of weights that were not trained here says: neither length nor data, and
    `weights`, where they are from.
    """
    nothing = {"training_images": 0, "classes": None, "data_fingerprint": None}
    plan = dataclasses.asdict(Plan(0, 0, 0.0))
    return {"plan": plan, "imported": weights, "test_fingerprint": None} | nothing


def about_classifier(
    layer: int, outputs: int, classes: Any, online: bool = False
) -> dict[str, Any]:
    """Returns what a record says of the classifier in its checkpoint.

    Args:
      layer: layer of the projection head that it reads; 0: h.
      outputs: numbers that it puts out for an image.
      classes: their names; None: unknown.
      online: it was trained along with the encoder, by a pretraining; --mode=export of such a run writes the encoder.
    """
    names = list(classes) if classes else None
    return {"layer": layer, "outputs": outputs, "classes": names, "online": online}


def write_record(
    config: ConfigDict, about: dict[str, Any], workdir: str, saved: dict | None = None
) -> dict:
    """Writes WORKDIR/config.json and returns what it holds. All processes call this together.

    Args:
      config: the run's configuration.
      about: `about_training` or `about_imported`, and whatever else is to be known of the run.
      workdir: the folder, made if it is not there.
      saved: the record of the checkpoint that the run goes on from; None: the run begins. Its "run" tells runs apart
        that are made in one folder, one after the other.

    Raises:
      UserError: the file cannot be written.
    """
    record = {
        "run": (saved or {}).get("run") or processes.text_of_first(secrets.token_hex(4)),
        "config": _found_from_anywhere(config),
        "files": own_files(),
        **about,
        "versions": versions(),
        "commit": commit(),
        "command": sys.argv,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
    }
    if jax.process_index() == 0:
        folder = epath.Path(workdir)
        advice = f"--workdir={workdir} must be a folder that can be written"
        write_json(folder / "config.json", record, advice)
        if saved is None:  # what is there says how a former run ended
            for file in (*folder.glob("not_finite_step_*.json"), folder / HEALTH):
                file.unlink(missing_ok=True)
    return record


def is_of_run(found: dict, run: str | None) -> bool:
    """Returns whether a result, which may be of an earlier version without a "run", is of the run of that name."""
    return run is None or found.get("run") in (None, run)


def _found_from_anywhere(config: ConfigDict) -> dict:
    """Returns the configuration with absolute paths, so that they name the same files whatever the current
    folder is.
    """
    found, values = config.copy_and_resolve_references(), config_lib.flatten(config)
    paths = [option.name for option in config_lib.OPTIONS if option.allowed.are_paths]
    config_lib.set_options(found, {name: absolute(values[name]) for name in paths if values[name]})
    return found.to_dict()


def saved_config(path: str, alone: bool = False) -> dict:
    """Reads the configuration that a workdir, or a checkpoint folder, was made with. All processes must call this
    together, as process 0 says what is there: a network file system may hide from one what another sees.

    Args:
      path: the folder.
      alone: this process alone asks.

    Raises:
      UserError: there is no configuration.
    """
    file = epath.Path(path) / "config.json"
    there, content = file.parent.exists(), _content(file)
    if not alone:
        there = bool(processes.as_first_process_says(there))
        content = processes.text_of_first(content)
    if not there:
        raise UserError(
            f"{no_folder(path)}: expected the --workdir of a run, or a checkpoint folder; a new run needs a --config"
        )
    if content is not None:
        return _run_record_of(content, file)["config"]
    try:
        return read_newest(path, read_record)["config"]
    except Unavailable:
        raise
    except UserError as error:
        raise UserError(
            f"no {file}: name the run's --workdir, or a checkpoint folder, or give a --config"
        ) from error


def run_record(workdir: epath.PathLike) -> dict | None:
    """Reads WORKDIR/config.json, what `write_record` wrote; returns None if no run has begun there.

    Raises:
      UserError: it is not what training wrote.
    """
    file = epath.Path(workdir) / "config.json"
    content = _content(file)
    return None if content is None else _run_record_of(content, file)


def _content(file: epath.Path) -> str | None:
    return file.read_bytes().decode(errors="replace") if file.exists() else None


def _run_record_of(content: str, file: epath.Path) -> dict:
    """Reads the content of a file that `write_record` wrote; see `run_record`."""
    try:
        record = json.loads(content)
        if {"config", "plan"} <= record.keys() and "\ufffd" not in content:
            return record
    except (ValueError, AttributeError):
        pass
    raise UserError(
        f"{file} is not what training wrote: give a --config, or a checkpoint folder as --workdir"
    )
