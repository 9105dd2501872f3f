"""Evaluations of features: of the newest checkpoint, of raw pixels and of the untrained encoder.

A number without the other two says nothing: it may be the data that are easy.
"""

import json
import time
from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax.console import Progress, say
from simclr_jax.data.broken import Images
from simclr_jax.data.split import DataSet
from simclr_jax.encoders import run, to_float
from simclr_jax.errors import UserError
from simclr_jax.evals import EVALUATIONS, results, subjects
from simclr_jax.evals.contract import Evaluation, Features
from simclr_jax.evals.features import Extractor, raw_pixels
from simclr_jax.evals.subjects import ENCODER, RAW_PIXELS, UNTRAINED, Trained
from simclr_jax.files import writing
from simclr_jax.mesh import make_mesh
from simclr_jax.training.saved import saved_steps

_LOOK_EVERY_SECONDS = 10.0  # of a run that is followed


class _Subject(NamedTuple):
    """What is evaluated, on what."""

    config: ConfigDict
    data: DataSet
    trained: Trained
    path: epath.Path  # of the result
    mesh: Mesh


def evaluate_features(name: str, config: ConfigDict, workdir: str, follow: bool = False) -> dict:
    """Runs one of `EVALUATIONS` and writes WORKDIR/NAME.json, or WORKDIR/NAME_DATA.json for other data
    than those of training; shows a table.

    Args:
      name: of the evaluation.
      config: of the evaluation.
      workdir: the run's.
      follow: evaluate each new checkpoint of a run that another process trains, until the last.

    Returns:
      the result.

    Raises:
      UserError: there are no labels or no checkpoint, or nothing to choose on.
    """
    evaluation = EVALUATIONS[name]
    if evaluation.chooses and config.eval.validation_fraction == 0:
        raise UserError("eval.validation_fraction=0: expected a part to choose regularisation on")
    config = config.copy_and_resolve_references()
    config_lib.set_options(config, dict(evaluation.changes))
    data, mesh = subjects.labelled(config), make_mesh()
    if follow:
        return _follow(name, config, workdir, data, mesh)
    return _evaluate(name, config, workdir, data, mesh)


def can_probe(config: ConfigDict) -> bool:
    """Returns whether there are labels, a labelled test split, and a part to choose regularisation on."""
    if not subjects.is_labelled(assemble.data_set(config)):
        return False
    if config.eval.validation_fraction == 0:
        say("no probe    eval.validation_fraction=0 leaves nothing to choose its regularisation on")
        return False
    return True


def _evaluate(
    name: str,
    config: ConfigDict,
    workdir: str,
    data: DataSet,
    mesh: Mesh,
    step: int | None = None,
) -> dict:
    trained = subjects.trained(config, workdir, mesh, step=step)
    path = results.path_of(config, trained.saved, data.train, workdir, name)
    evaluation = EVALUATIONS[name]
    features = _features_of_all(_Subject(config, data, trained, path, mesh))
    result = result_of(evaluation, config, features, trained.saved["step"])
    results.save(path, config, result)
    title = evaluation.title(result["settings"])
    results.show(path, result, title, evaluation.table(result["rows"]))
    return result


def result_of(
    evaluation: Evaluation, config: ConfigDict, features: dict[str, Features], step: int
) -> dict:
    """Evaluates features of each kind: {"step", "rows", "train_images", "test_images", "settings"}."""
    options = config.eval.to_dict() | {"seed": config.seed}
    first = next(iter(features.values()))
    images = len(first.train[1])
    rows = [row for kind, x in features.items() for row in evaluation.rows(x, options, kind)]
    return {
        "step": step,
        "rows": rows,
        "train_images": images,
        "test_images": len(first.test[1]),
        "settings": evaluation.settings(options, images, first.classes),
    }


def _features_of_all(subject: _Subject) -> dict[str, Features]:
    """Returns {kind: features} of the checkpoint and of the baselines."""
    config, data, trained, path, mesh = subject
    batch_size = subjects.batch_size_of(config, mesh)
    images = {
        "training": assemble.images_of(
            config, data.train, path.with_name(f"{path.stem}_broken_training.jsonl")
        ),
        "test": _test_images(config, data, path.with_name(f"{path.stem}_broken_test.jsonl")),
    }
    variables = {ENCODER: trained.encoder}
    if config.eval.baselines:
        start = subjects.untrained(config, images["training"], mesh)
        variables = {UNTRAINED: start} | variables
    network, channels = assemble.encoder(config), data.train.image_shape[-1]

    def forward(variables, images):
        x = to_float(images)
        raw = {RAW_PIXELS: raw_pixels(images, channels)} if config.eval.baselines else {}
        return raw | {kind: run(network, v, x, False)[0] for kind, v in variables.items()}

    extractor = Extractor(forward, batch_size=batch_size, size=config.data.image_size, mesh=mesh)
    views = assemble.views(config, mesh)
    found = {}
    for name, some in images.items():
        count = some.split.count
        say(f"features of {count} {name} images, encoder of step {trained.saved['step']}")
        with Progress(-(-count // batch_size)) as progress:
            batches = progress.track(views.evaluation_batches(some, batch_size))
            found[name] = extractor.extract(variables, batches, count)
    return pair(found["training"], found["test"], len(data.train.classes or ()), mesh)


def _test_images(config: ConfigDict, data: DataSet, report: epath.Path | None = None) -> Images:
    assert data.test is not None
    return assemble.images_of(config, data.test, report)


def pair(train: tuple, test: tuple, classes: int, mesh: Mesh) -> dict[str, Features]:
    """Turns ({kind: features}, labels) of both splits into {kind: Features}, baselines first."""
    (train_features, train_labels), (test_features, test_labels) = train, test
    return {
        kind: Features(
            (train_features[kind], train_labels), (test_features[kind], test_labels), classes, mesh
        )
        for kind in subjects.KINDS
        if kind in train_features
    }


def _follow(name: str, config: ConfigDict, workdir: str, data: DataSet, mesh: Mesh) -> dict:
    """Evaluates the checkpoints of a run as they appear, until that of its last step.

    Each adds a line to WORKDIR/NAME_followed.jsonl: {"step", metric}.
    """
    metric = EVALUATIONS[name].metric
    lines = epath.Path(workdir) / f"{name}_followed.jsonl"
    done = _steps_in(lines)
    say(f"following {workdir}: Ctrl-C ends it")
    while True:
        new = [step for step in saved_steps(workdir) if step not in done]
        for step in new:
            if step not in saved_steps(workdir):  # training keeps the newest ones only
                continue
            result = _evaluate(name, config, workdir, data, mesh, step)
            done.add(step)
            line = {"step": step, metric: score_of(result)}
            with writing(lines), lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
        last = _last_step(workdir)
        if last in done:
            say(f"followed to the last step, {last}: {lines}")
            return _evaluate(name, config, workdir, data, mesh, last) if not new else result
        time.sleep(0 if new else _LOOK_EVERY_SECONDS)


def _steps_in(lines: epath.Path) -> set[int]:
    if not lines.exists():
        return set()
    return {json.loads(line)["step"] for line in lines.read_text().splitlines() if line}


def _last_step(workdir: str) -> int | None:
    """Returns the last step of the run, as WORKDIR/config.json says; None if it does not."""
    try:
        return json.loads((epath.Path(workdir) / "config.json").read_text())["plan"]["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def score_of(result: dict) -> float:
    """Returns the accuracy of the trained encoder with all labels."""
    (score,) = (
        row["accuracy"]
        for row in result["rows"]
        if row["features"] == ENCODER and row["labels_per_class"] is None
    )
    return float(np.float64(score))
