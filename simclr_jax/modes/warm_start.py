"""Pretraining that begins with given weights, model.init_from, instead of random ones.

Unlike a resumed run it begins at step 0, with its own learning rate, schedule and data.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble, encoders, processes, weights
from simclr_jax import config as config_lib
from simclr_jax.console import say
from simclr_jax.encoders.resnet import channels_of
from simclr_jax.errors import UserError
from simclr_jax.files import absolute, located
from simclr_jax.mesh import laid_out, make_mesh, replicated
from simclr_jax.pretrained import read_head_variables, read_variables
from simclr_jax.training import saved
from simclr_jax.training.loop import Job
from simclr_jax.training.state import TrainState, digest_of

# Options that decide shapes and names of arrays.
_RESNET = ("model.depth", "model.width", "model.project_shortcuts")
# Options that leave the shapes of arrays as they are and decide what an image looks like to the network.
_OF_IMAGES = ("data.image_size", "data.sample_bits", "data.upright", "views.antialias")
# Options, these and the model's, that follow from what the weights were trained on: another value is usually a mistake.
_KEEP = {"data.sample_bits", "model.standardize", "model.pool_padding", "model.project_shortcuts"}
_HEAD = ("model.head", "model.head_layers", "model.head_width")


class Start(NamedTuple):
    """Weights to begin with.

    Attributes:
      parts: {"encoder", and "head" if wanted}: {"params", "batch_stats"}, numpy arrays.
      about: {"path", "step", "parts", "digest"}, for the run's record.
      notes: options of the model that differ from those the weights were trained with, in words.
    """

    parts: dict[str, dict]
    about: dict[str, Any]
    notes: list[str]


def read_start(config: ConfigDict, step: int | None = None) -> Start:
    """Reads the weights of model.init_from: a workdir, a checkpoint folder, or what `weights.read` takes.

    Args:
      config: the run's configuration.
      step: which checkpoint of a workdir; None: the newest.

    Raises:
      UserError: they cannot be read, or are of another model than the configuration's.
    """
    path, with_head = config.model.init_from, config.model.init_parts == "encoder_and_head"
    if weights.recognised(path):
        found = weights.read(path)
        source = config_lib.default()
        config_lib.set_options(source, {f"model.{name}": x for name, x in found.model.items()})
        parts, found_step = {"encoder": found.encoder}, 0
        if with_head and found.head is not None:
            parts["head"] = found.head
    else:
        source, parts, found_step = _of_checkpoint(path, with_head, step)
    if with_head and "head" not in parts:
        raise UserError(f"model.init_parts=encoder_and_head, and {path} has no projection head")
    notes = _compared(path, source, config, with_head)
    about = {"path": absolute(path), "step": found_step, "parts": config.model.init_parts}
    return Start(parts, about | {"digest": digest_of(parts)}, notes)


def _of_checkpoint(
    path: str, with_head: bool, step: int | None
) -> tuple[ConfigDict, dict[str, dict], int]:
    """Returns the configuration of a checkpoint, its parts and its step."""
    if not _exists(path):
        raise UserError(
            f"model.init_from={path!r} does not exist: expected a workdir, a checkpoint folder, or the local path "
            "of a TensorFlow checkpoint or a .safetensors file"
        )
    everywhere = replicated(make_mesh())

    def read(folder: Any) -> tuple[ConfigDict, dict[str, dict], int]:
        record = saved.read_record(folder)
        source = config_lib.from_dict(record["config"])
        network = assemble.encoder(source)
        parts = {"encoder": read_variables(source, network, folder, everywhere)}
        if with_head and source.model.head != "none":
            parts["head"] = read_head_variables(source, network, folder, everywhere)
        return source, jax.tree.map(np.asarray, parts), record["step"]

    return saved.read_newest(path, read) if step is None else read(saved.find(path, step))


def _exists(path: str) -> bool:
    return located(path).exists()


def _compared(path: str, source: ConfigDict, config: ConfigDict, with_head: bool) -> list[str]:
    """Returns the differences between the two models that leave the arrays as they are.

    Raises:
      UserError: there are others.
    """
    before, after = config_lib.flatten(source), config_lib.flatten(config)
    is_vit = config.model.name == "vit"
    names = [
        *(o.name for o in encoders.OPTIONS if o.name.startswith("model.vit.") == is_vit),
        *(_HEAD if with_head else ()),
    ]
    changes = {
        name: f"{name}: {before[name]} there, {after[name]} here"
        for name in dict.fromkeys(("model.name", *names, *_OF_IMAGES))
        if not _alike(name, before[name], after[name])
    }
    needed: tuple[str, ...] = ("model.name", "model.vit.", *_RESNET, *_HEAD)
    if "imagenet" in (before["model.stem"], after["model.stem"]):  # whose kernel has another size
        needed += ("model.stem",)
    for name in _KEEP & changes.keys():
        if before[name] or not name.startswith("data."):  # no scale is none to keep
            changes[name] += f" (--config.{name}={before[name]} keeps it)"
    wrong = [text for name, text in changes.items() if name.startswith(needed)]
    if wrong:
        raise UserError(
            f"model.init_from={path!r} is of another model ({'; '.join(wrong)}): give the options of the model "
            "as they are there"
        )
    return [text for name, text in changes.items() if name != "model.zero_init_residual"]


def _alike(name: str, before: Any, after: Any) -> bool:
    """Returns whether two values of an option make the same model. A file has a number of channels, not a width."""
    if name == "model.width":
        return channels_of(before) == channels_of(after)
    return before == after


def begun_with(start: Start, job: Job) -> Job:
    """Returns the job, with the weights of `start` in its first state.

    Raises:
      UserError: the shapes of the arrays are not those of the job's state.
    """
    abstract = job.abstract_state
    for part, tree in start.parts.items():
        for kind, arrays in tree.items():
            _check_shapes(start.about["path"], arrays, getattr(abstract, kind)[part])

    def init() -> TrainState:
        state = job.init()
        replaced: dict[str, Any] = {}
        for kind in ("params", "batch_stats"):
            whole = dict(getattr(state, kind))
            for part, tree in start.parts.items():
                lies = jax.tree.map(lambda x: x.sharding, getattr(abstract, kind)[part])
                whole[part] = jax.tree.map(laid_out, tree[kind], lies)
            replaced[kind] = whole
        if state.memory is not None:  # its moving average starts at the same weights
            followed = {name: replaced["params"][name] for name in state.memory.params}
            # A copy, as a step gives up the memory of both.
            followed = jax.tree.map(jnp.copy, followed)
            replaced["memory"] = dataclasses.replace(state.memory, params=followed)
        return dataclasses.replace(state, **replaced)

    return job._replace(init=init)


def _check_shapes(path: str, arrays: dict, wanted: dict) -> None:
    found = {
        jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(arrays)
    }
    expected = {
        jax.tree_util.keystr(p): x.shape for p, x in jax.tree_util.tree_leaves_with_path(wanted)
    }
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"model.init_from={path!r}: {name} has shape {found.get(name, 'none')}, and this model's has "
                f"{expected.get(name, 'none')}"
            )


def find_start(
    config: ConfigDict, saved_run: dict | None, workdir: str
) -> tuple[Start | None, dict | None]:
    """Finds what a run begins, or began, with.

    Args:
      config: the run's configuration.
      saved_run: the record of the newest checkpoint; None: the run is yet to begin.
      workdir: for messages.

    Returns:
      the weights, None if the run goes on or begins with random ones; and `Start.about` for the record, None
      if it begins with random ones.

    Raises:
      UserError: the run that goes on began with other weights than model.init_from names, or they cannot be
        read.
    """
    path = config.model.init_from
    began_with = (saved_run or {}).get("init_from")
    if not path:
        if began_with:
            raise UserError(
                f"{workdir} holds a run that began with the weights of {began_with['path']}: give "
                f"--config.model.init_from={began_with['path']} as then, or use another --workdir"
            )
        return None, None
    if saved_run is None:
        start = read_start(config)
        return start, start.about
    if began_with is None or not _are_those_of_then(config, began_with):
        then = f"those of {began_with['path']}" if began_with else "random ones"
        raise UserError(
            f"{workdir} holds a run that began with other weights ({then}) than {path!r} has now: use "
            "another --workdir"
        )
    return None, began_with


def _are_those_of_then(config: ConfigDict, began_with: dict) -> bool:
    """Returns whether model.init_from names the weights that a run began with. True also where these weights no longer
    exist: the run has a checkpoint of its own. If they are in a workdir that has trained on since, the step recorded
    then is compared, as long as it is kept.
    """
    path, step = config.model.init_from, began_with["step"]
    if config.model.init_parts != began_with["parts"]:
        return False
    # All processes read the weights together, so they are gone if one process does not see them.
    if not all(processes.of_all(float(_exists(path)))):
        return True
    steps = saved.saved_steps(path)
    # Process 0 decides for all: a workdir that trains on may delete the step at this moment.
    if processes.as_first_process_says(int(not steps or step in steps)):
        now = read_start(config, step if steps else None).about
        return now["digest"] == began_with["digest"]
    if absolute(path) != began_with["path"]:
        return False
    say(f"begun       with step {step} of {path}, which is no longer there")
    return True


def describe_start(start: Start) -> str:
    """Returns a line that says what a run begins with."""
    about = start.about
    notes = f"; differs: {'; '.join(start.notes)}" if start.notes else ""
    return f"begins      with the {about['parts'].replace('_', ' ')} of {about['path']}, step {about['step']}{notes}"
