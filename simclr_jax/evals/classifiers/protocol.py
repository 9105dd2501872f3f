"""The protocols by which classifiers are trained: which trainings, from where, how long, how fast."""

import itertools
import json
from collections.abc import Callable
from typing import NamedTuple

from ml_collections import ConfigDict

from simclr_jax.config import OPTIONS, flatten, set_options, with_defaults
from simclr_jax.evals.classifiers.selection import VALIDATIONS
from simclr_jax.evals.subjects import ENCODER


class Length(NamedTuple):
    """How long a training is: a number of "epochs" or of "steps"."""

    number: float
    unit: str

    def __str__(self) -> str:
        return f"{self.number:g} {self.unit}"

    def steps(self, images: int, batch_size: int) -> int:
        """Returns the number of steps over `images` training images, at least one."""
        per_unit = images / batch_size if self.unit == "epochs" else 1
        return max(1, round(self.number * per_unit))


class Search(NamedTuple):
    """Trains one candidate after the other with a share of the labels; the best makes one row of the result.

    Attributes:
      fraction: share of each class's labels that is used.
      length: how long each training is.
      candidates: (learning rate, weight decay) of each; the validation part chooses one of several.
    """

    fraction: float
    length: Length
    candidates: list[tuple[float, float]]


class Protocol(NamedTuple):
    """The settings of --mode=linear, finetune or transfer_finetune.

    Attributes:
      mode: its name, also the group of its options.
      title: stands above the table.
      options: batch_size and momentum.
      train_encoder: train f and g too, or only the classifier.
      layer: layer of the projection head whose output is classified; 0 is h.
      searches: function from a start, one of `subjects.KINDS`, to its list of `Search`.
      moments: evenly spaced moments of a training at which the validation part is looked at.
      refit: train once more, with the chosen candidate, on the validation part too.
      sets: whether images may have several labels each.
    """

    mode: str
    title: str
    options: ConfigDict
    train_encoder: bool
    layer: int
    searches: Callable[[str], list[Search]]
    moments: int = VALIDATIONS
    refit: bool = False
    sets: bool = False


class Training(NamedTuple):
    """One training: from which start, with how many of the labels, how long and how fast.

    Attributes:
      kind: the start.
      fraction: share of each class's labels that is used.
      draw: number of the random draw of the labels, from 0.
      length: how long the training is.
      learning_rate: before it is scaled by the batch.
      weight_decay: see `make_classifier_optimizer`.
      refit: whether it is trained on the validation part too.
    """

    kind: str
    fraction: float
    draw: int
    length: Length
    learning_rate: float
    weight_decay: float
    refit: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder below WORKDIR/MODE."""
        start = "encoder" if self.kind == ENCODER else "untrained"
        return (
            f"{start}_{self.fraction:g}_of_labels_draw_{self.draw}_{self.length.number:g}"
            f"_{self.length.unit}_rate_{self.learning_rate:g}_decay_{self.weight_decay:g}"
            + ("_refit" if self.refit else "")
        )

    def record(self) -> dict:
        """Returns what is recorded of it, by which a training that was stopped is known again."""
        fields = {"kind": self.kind, "fraction": self.fraction, "draw": self.draw}
        fields |= {self.length.unit: self.length.number}
        fields |= {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        return fields | ({"refit": True} if self.refit else {})

    def describe(self, images: int, rate: str) -> str:
        """Says what is about to be trained, on `images` labelled images with the learning rate `rate`."""
        return (
            f"{self.kind}, {images} labels"
            + (f", draw {self.draw + 1}" if self.fraction < 1 else "")
            + f", {self.length}, learning rate {rate}"
            + (f", weight decay {self.weight_decay:g}" if self.weight_decay else "")
        )


def candidates(options: ConfigDict, prefix: str = "") -> list[tuple[float, float]]:
    """Returns every (learning rate, weight decay) of the options whose names begin with `prefix`."""
    rates, decays = options[f"{prefix}learning_rate"], options[f"{prefix}weight_decay"]
    return list(itertools.product(rates, decays))


def what_decides(
    config: ConfigDict,
    protocol: Protocol,
    training: Training,
    digests: dict,
    crops: str,
    metric: str,
) -> dict:
    """Returns everything that decides what a training learns, JSON-able, so that a stopped training is recognised.

    Keys that appear only with an unusual value were added later, so that older trainings are still recognised.

    Args:
      config: the evaluation's configuration.
      protocol: the one that asks for the training.
      training: says which it is.
      digests: "start", a digest of the weights that the training starts from; "images", a digest of the images that it
        trains on; "judged_on", the digests of the images that choose and of the test images.
      crops: the views, in words.
      metric: see `scores.METRICS`.
    """
    own = protocol.options
    options = {name: own[name] for name in ("batch_size", "momentum")}
    usual = {"optimizer": "sgd", "scaling": "linear"}
    options |= {name: own[name] for name, x in usual.items() if own.get(name, x) != x}
    about = {
        "setting": training.record(),
        **digests,
        "options": options | {"layer": protocol.layer},
        "data": {name: config.data[name] for name in ("image_size", "placement", "eval_crop")},
        "crops": crops,
        "model": _model_that_decides(config),
        "validation_fraction": config.eval.validation_fraction,
        "seed": config.seed,
    }
    about |= {"metric": metric} if metric != "accuracy" else {}
    bits = config.data.sample_bits
    about |= {"sample_bits": bits} if bits else {}
    return about | ({} if config.data.upright else {"upright": False})


UNTRAINED_START = "untrained"  # follows from the model and the seed, whatever the checkpoint is


def decides_the_same(then: dict, now: dict) -> bool:
    """Returns whether two records, as of `what_decides`, are of one training. `then` may be of an earlier version: an
    option of the model that it lacks counts as at its default.
    """
    then, now = json.loads(json.dumps(then)), json.loads(json.dumps(now))
    then.pop("digest", None)  # in records of earlier versions
    if now.get("start") == UNTRAINED_START and then["setting"] == now["setting"]:
        then["start"] = UNTRAINED_START  # earlier versions wrote the trained encoder's digest
    model, now_model = (flatten(ConfigDict(x.pop("model"))) for x in (then, now))
    return (then, with_defaults(model, now_model, "model.")) == (now, now_model)


def _model_that_decides(config: ConfigDict) -> dict:
    """Returns the options of the model, those at their defaults that change nothing that is learned, such as remat."""
    copy = config.copy_and_resolve_references()
    options = (o for o in OPTIONS if o.name.startswith("model.") and o.resumable)
    set_options(copy, {option.name: option.default for option in options})
    return copy.model.to_dict()
