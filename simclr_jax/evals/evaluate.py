"""Evaluations of features: of the newest checkpoint, of raw pixels and of the untrained encoder.

The accuracy of the checkpoint alone, without those of the other two, says nothing: the data may be easy.
"""

from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax.console import say
from simclr_jax.data.split import DataSet
from simclr_jax.errors import NotFinite, UserError
from simclr_jax.evals import EVALUATIONS, results, subjects
from simclr_jax.evals.classifiers import TRAININGS
from simclr_jax.evals.contract import Evaluation, Features, Options
from simclr_jax.evals.features import raw_pixels
from simclr_jax.evals.subjects import ENCODER, RAW_PIXELS, UNTRAINED, Trained
from simclr_jax.mesh import make_mesh

_BLOCK = 4096  # rows
# Options of the group "eval" that decide which rows a result has; not the row of the encoder with all labels.
OF_ROWS = ("labels_per_class", "label_fraction", "seeds", "baselines")


class Subject(NamedTuple):
    """An encoder and the data that it is evaluated on."""

    config: ConfigDict
    data: DataSet
    trained: Trained
    path: epath.Path  # of the result
    mesh: Mesh


def evaluate_features(name: str, config: ConfigDict, workdir: str) -> dict:
    """Runs one of `EVALUATIONS` and writes WORKDIR/NAME.json, or WORKDIR/NAME_DATA.json for data
    that differ from the training data; shows a table.

    Args:
      name: the evaluation's name.
      config: the evaluation's configuration.
      workdir: the run's folder.

    Returns:
      the result.

    Raises:
      UserError: there are no labels, no checkpoint, or no validation part to choose on.
    """
    config = config_for(name, config)
    data, mesh = subjects.labelled(config, EVALUATIONS[name].sets), make_mesh()
    of_z = config.eval.features == "z"
    trained = subjects.trained(config, workdir, mesh, head=of_z)
    path = results.path_of(config, trained.record, data, workdir, file_of(name, config))
    return evaluate_subject(name, Subject(config, data, trained, path, mesh))


def evaluate(name: str, config: ConfigDict, workdir: str) -> dict:
    """Runs one of `EVALUATIONS` or of `classifiers.TRAININGS`, and returns its result.

    Raises:
      Stopped: a signal has stopped a training.
      UserError: there is no evaluation of this name, or what the evaluation raises it for.
    """
    if name in TRAININGS:
        return TRAININGS[name].run(config, workdir)
    if name not in EVALUATIONS:
        expected = ", ".join([*EVALUATIONS, *TRAININGS])
        raise UserError(f"unknown evaluation {name!r}: expected one of {expected}")
    return evaluate_features(name, config, workdir)


def file_of(name: str, config: ConfigDict) -> str:
    """Returns the name of the result: "probe", or "probe_z" of the projections."""
    return name if config.eval.features == "h" else f"{name}_{config.eval.features}"


def config_for(name: str, config: ConfigDict) -> ConfigDict:
    """Returns a copy of the configuration with the options that an evaluation sets for its features.

    Raises:
      UserError: the evaluation chooses something, and there is nothing to choose on.
    """
    evaluation = EVALUATIONS[name]
    if why := _no_choice(config, name):
        raise UserError(f"{why}: expected a number above 0, such as 0.1")
    config = config.copy_and_resolve_references()
    config_lib.set_options(config, dict(evaluation.changes))
    return config


def why_not(config: ConfigDict, name: str) -> str:
    """Returns why an evaluation cannot be run, "" if it can: whether it has labels, a labelled test split and, where it
    chooses something, a validation part.
    """
    if why := subjects.without_labels(assemble.data_set(config)):
        return why
    return _no_choice(config, name)


def _no_choice(config: ConfigDict, name: str) -> str:
    """Returns why an evaluation has no images to choose its settings on; "" if it has, or chooses nothing."""
    if EVALUATIONS[name].chooses and config.eval.validation_fraction == 0:
        return f"eval.validation_fraction=0 leaves {name} nothing to choose its settings on"
    return ""


def evaluate_subject(name: str, subject: Subject) -> dict:
    """Runs the evaluation `name` of `EVALUATIONS` of one checkpoint, writes the result and shows it."""
    evaluation, config, path = EVALUATIONS[name], subject.config, subject.path
    metric = _metric_of(evaluation, config, subject.data)
    if config.eval.metric not in ("auto", metric):
        say(
            f"metric      {name} reports the accuracy: eval.metric={config.eval.metric} is for transfer"
        )
    features = _features_of_all(subject)
    if not evaluation.sets and (classes := subject.data.train.classes):
        results.say_if_unbalanced(features[ENCODER].test[1], classes)
    record = subject.trained.record
    result = result_of(evaluation, config, features, record["step"], metric)
    result["run"] = record.get("run")
    results.save(path, config, result)
    title = evaluation.title(result["settings"])
    results.show(path, result, title, evaluation.table(result["rows"]))
    return result


def _metric_of(evaluation: Evaluation, config: ConfigDict, data: DataSet) -> str:
    """Returns the metric of B.8.1 that an evaluation for several labels an image reports; others report accuracy."""
    return subjects.metric_of(config, data) if evaluation.sets else "accuracy"


def _options_of(config: ConfigDict, metric: str) -> Options:
    return config.eval.to_dict() | {"seed": config.seed, "metric": metric}


def result_of(
    evaluation: Evaluation,
    config: ConfigDict,
    features: dict[str, Features],
    step: int,
    metric: str = "accuracy",
) -> dict:
    """Evaluates features of each kind: {"step", "rows", "train_images", "test_images", "settings"}."""
    options = _options_of(config, metric)
    first = next(iter(features.values()))
    images = len(first.train[1])
    rows = [row for kind, x in features.items() for row in evaluation.rows(x, options, kind)]
    return {
        "step": step,
        "rows": rows,
        "train_images": images,
        "test_images": len(first.test[1]),
        "settings": _settings(evaluation, config, metric, images, first.classes),
    }


def settings_of(name: str, config: ConfigDict, data: DataSet) -> dict:
    """Returns everything that decides the result of an evaluation on `data`, as the result holds it in "settings"."""
    evaluation, classes = EVALUATIONS[name], len(data.train.classes or ())
    metric = _metric_of(evaluation, config, data)
    return _settings(evaluation, config, metric, data.train.count, classes)


def _settings(
    evaluation: Evaluation, config: ConfigDict, metric: str, images: int, classes: int
) -> dict:
    """Returns everything that decides a result: the evaluation's own settings, which labels it takes, and the views."""
    labels = {name: config.eval[name] for name in OF_ROWS}
    labels["labels_per_class"] = list(labels["labels_per_class"])
    return evaluation.settings(_options_of(config, metric), images, classes) | {
        "labels": labels,
        "views": assemble.evaluation_view(config).by_option(),
    }


def _features_of_all(subject: Subject) -> dict[str, Features]:
    """Returns {kind: features} of the checkpoint and of the baselines."""
    config, data, trained, path, mesh = subject
    assert data.test is not None
    images = {
        "training": assemble.images_of(
            config, data.train, path.with_name(f"{path.stem}_broken_training.jsonl")
        ),
        "test": assemble.images_of(
            config, data.test, path.with_name(f"{path.stem}_broken_test.jsonl")
        ),
    }
    variables = {ENCODER: (trained.encoder, trained.head)}
    if config.eval.baselines:
        start = subjects.untrained(config, images["training"], mesh)
        start_of_head = subjects.untrained_head(config, mesh) if trained.head else None
        variables = {UNTRAINED: (start, start_of_head)} | variables
    channels = data.train.image_shape[-1]

    asked = config.eval.features
    represent = subjects.representations(config, with_z=asked == "z")

    def forward(variables, images):
        raw = {RAW_PIXELS: raw_pixels(images, channels)} if config.eval.baselines else {}
        return raw | {kind: represent(of, images)[asked] for kind, of in variables.items()}

    extractor = subjects.extractor(config, mesh, forward)
    views, step = assemble.views(config, mesh), trained.record["step"]
    found = {}
    for name, some in images.items():
        say(f"features of {some.split.count} {name} images, encoder of step {step}")
        found[name] = subjects.features_of(extractor, views, variables, some, shown=True)
    about = len(data.train.classes or ()), mesh, data.members
    return pair(found["training"], found["test"], *about)


def pair(
    train: tuple, test: tuple, classes: int, mesh: Mesh, members: np.ndarray | None = None
) -> dict[str, Features]:
    """Turns ({kind: features}, labels) of both splits into {kind: Features}, baselines first.

    Raises:
      NotFinite: features are not finite.
      UserError: there are too few images.
    """
    (train_features, train_labels), (test_features, test_labels) = train, test
    if len(train_labels) < 2 or not len(test_labels):
        raise UserError(
            f"{len(train_labels)} labelled training images and {len(test_labels)} labelled test images "
            "can be read: expected two or more to train on, and one or more to test on"
        )
    for kind in train_features:
        if not (_are_finite(train_features[kind]) and _are_finite(test_features[kind])):
            raise NotFinite(
                f"the features of the {kind} hold numbers that are not finite: its weights are damaged, or its "
                "training has diverged"
            )
    return {
        kind: Features(
            (train_features[kind], train_labels),
            (test_features[kind], test_labels),
            classes,
            mesh,
            members,
        )
        for kind in subjects.KINDS
        if kind in train_features
    }


def _are_finite(features: np.ndarray) -> bool:
    """Returns whether all numbers are finite; by blocks of rows, as ImageNet's features fill most of the memory."""
    starts = range(0, len(features), _BLOCK)
    return all(np.isfinite(features[start : start + _BLOCK]).all() for start in starts)
