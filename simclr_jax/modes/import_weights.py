"""--mode=import: weights that another program wrote, into a workdir from which every other mode works."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax import weights as weights_lib
from simclr_jax.console import say
from simclr_jax.encoders import ENCODERS
from simclr_jax.errors import UserError
from simclr_jax.files import absolute
from simclr_jax.training.checkpoint import save_once
from simclr_jax.training.record import about_classifier, about_imported, write_record
from simclr_jax.training.saved import saved_steps
from simclr_jax.training.state import TrainState, count_parameters, digest_of
from simclr_jax.training.workdir import alone_in
from simclr_jax.weights.contents import Weights


def import_weights(config: ConfigDict, workdir: str, input: str) -> None:
    """Writes the weights of a file into a workdir: its config.json, and a checkpoint of step 0.

    Args:
      config: options for the later use of the weights, such as data and evaluation. The file's own options of the
        model, and of the images that it takes, replace those given here.
      workdir: a folder without checkpoints.
      input: the file: what `weights.read` takes.

    Raises:
      UserError: the workdir holds checkpoints, another program writes into it, the file cannot be read or is of no
        known network, or the workdir cannot be written.
    """
    with alone_in(workdir):
        _import(config, workdir, input)


def _import(config: ConfigDict, workdir: str, input: str) -> None:
    if saved_steps(workdir):
        raise UserError(f"{workdir} holds checkpoints already: use another --workdir")
    weights = weights_lib.read(input)
    config = config.copy_and_resolve_references()
    of_file = {f"model.{name}": x for name, x in weights.model.items()} | dict(weights.view)
    config_lib.set_options(config, of_file)
    if config.finetune.from_layer and weights.head is None and weights.classifier is None:
        config.finetune.from_layer = 0
        say("settings    finetune.from_layer=0, as the file has no projection head")
    config_lib.validate(config)
    _describe(config, weights)
    source = {
        "path": absolute(input),
        "kind": weights.kind,
        "skipped": weights.skipped,
        "digest": digest_of(weights.encoder),
    }
    about = about_imported(source)
    if weights.classifier is not None:
        outputs = weights.classifier["dense"]["bias"].size
        about["classifier"] = about_classifier(config.finetune.from_layer, outputs, weights.classes)
    save_once(workdir, 0, _state(weights), write_record(config, about, workdir))
    say(
        f"imported    {workdir}/checkpoints/0; --mode=probe, embed, finetune, export and the like take it from"
    )
    say("            there, and --config.model.init_from=WORKDIR begins a pretraining with it")


def _state(weights: Weights) -> TrainState:
    head = weights.head or {"params": {}, "batch_stats": {}}
    params = {"encoder": weights.encoder["params"], "head": head["params"]}
    if weights.classifier is not None:
        params["classifier"] = weights.classifier
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={
            "encoder": weights.encoder["batch_stats"],
            "head": head["batch_stats"],
        },
        opt_state=(),
    )


def _describe(config: ConfigDict, weights: Weights) -> None:
    """Says what the file holds, and what of it is not taken."""
    network = ENCODERS[config.model.name](config.model.to_dict())
    size = count_parameters(weights.encoder["params"]) / 1e6
    say(f"file        of {weights.kind}")
    say(f"model       {network.describe()}, {size:.2f} M parameters, stem {config.model.stem!r}")
    if weights.head is not None:
        say(f"head        {config.model.head_layers} layers, z of {config.model.head_width}")
    if weights.classifier is not None:
        classes = weights.classifier["dense"]["bias"].size
        layer = config.finetune.from_layer
        of = f"layer {layer} of the head" if layer else "h"
        say(f"classifier  of {classes} classes, on {of}; --config.finetune.from_layer=1 for")
        say("            checkpoints of SimCLR v2 fine-tuned with 1 or 10 % of the labels")
    if weights.skipped:
        what = ", ".join(f"{count} of {name}" for name, count in weights.skipped.items())
        say(f"not taken   {what}")
    view = assemble.evaluation_view(config)
    known = "which the file does not say: see data.image_size and data.eval_crop"
    known = "as the file says" if weights.view else known
    say(f"images      {view.describe()}; {known}")
    if config.model.standardize != "none":
        say(
            "pixels      normalised by ImageNet's mean and standard deviation inside the network (model.standardize)"
        )
