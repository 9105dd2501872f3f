"""The result of a protocol: a row for each start and fraction of the labels.

It reports the accuracy of the last step and, if a validation part was held out of the training split, that of
the step that did best on it. The test split chooses nothing.
"""

import math

from ml_collections import ConfigDict

from simclr_jax import assemble, processes
from simclr_jax.console import say
from simclr_jax.evals import results
from simclr_jax.evals.classifiers.protocol import Protocol
from simclr_jax.evals.classifiers.training import Trainer
from simclr_jax.evals.contract import Table
from simclr_jax.evals.scores import BESIDE, METRIC_NAMES, Score
from simclr_jax.evals.subjects import ENCODER

_FEW_STEPS = 10  # of a training, below which it is called unusual: ours

# Options of the group "eval" that decide a result, of its labels and rows.
_OF_LABELS = ("validation_fraction", "seeds", "baselines")


def train_all(config: ConfigDict, workdir: str, protocol: Protocol) -> dict:
    """Trains with each fraction of the labels from each start, and returns the result.

    Raises:
      Stopped: a signal has stopped it.
      UserError: another program does so in this workdir, the data do not fit, or a training cannot go on.
    """
    trainer = Trainer(config, workdir, protocol)
    for search in protocol.searches(ENCODER):
        trainer.parts.check_fraction(protocol.mode, search.fraction)
    with processes.alone(trainer.folder, "wait for it, or stop it"):
        return _rows(config, trainer, protocol)


def _rows(config: ConfigDict, trainer: Trainer, protocol: Protocol) -> dict:
    """Does the work of `train_all`. The result is saved as it comes: on many images each row takes hours."""
    rows: list[dict] = []
    result = {
        "step": trainer.starts.record["step"],
        "run": trainer.starts.record.get("run"),
        "rows": rows,
        "train_images": trainer.parts.part.split.count,
        "validation_images": trainer.parts.validation.split.count
        if trainer.parts.validation
        else 0,
        "test_images": trainer.parts.test.split.count,
        "settings": protocol.options.to_dict()
        | {
            "seed": config.seed,
            "metric": trainer.parts.metric,
            "labels": {name: config.eval[name] for name in _OF_LABELS},
            "views": assemble.evaluation_view(config).by_option(),
        },
    }
    path = trainer.path
    _say_how_many(trainer, protocol)
    for kind in trainer.starts.networks:
        for search in protocol.searches(kind):
            fraction = search.fraction
            runs = [trainer.best_of(kind, search, draw) for draw in range(trainer.draws(search))]
            per_class = None if fraction == 1 else trainer.parts.per_class(fraction)
            rows.append(_row(kind, per_class, fraction, runs))
            result["test_images"] = runs[-1].get("test_images", result["test_images"])
            results.save(path, config, result)
    title = protocol.title + (f" {METRIC_NAMES[trainer.parts.metric]}" if protocol.refit else "")
    results.show(path, result, title, (_chosen if protocol.refit else _at_steps)(rows))
    for row in rows:
        where = row["runs"][0].get("classifier")
        if where:  # only for the encoder, and not in results of older versions
            say(
                f"classifier  of {100 * row['label_fraction']:g}% of the labels: {path.parent / where}"
            )
    return result


def _say_how_many(trainer: Trainer, protocol: Protocol) -> None:
    """Says how many trainings there are, before the first of them: 112 of 20,000 and more steps in appendix B.8."""
    count, steps, shortest = 0, 0, math.inf
    for kind in trainer.starts.networks:
        for search in protocol.searches(kind):
            trainings = (len(search.candidates) + trainer.refits) * trainer.draws(search)
            # A fraction is one of all labels, those of the validation part among them.
            count_of = (
                trainer.parts.part.split.count
                if search.fraction == 1
                else trainer.parts.whole.count
            )
            images = round(search.fraction * count_of)
            length = search.length.steps(images, protocol.options.batch_size)
            count, steps = count + trainings, steps + trainings * length
            shortest = min(shortest, length)
    if shortest < _FEW_STEPS:
        option = f"{protocol.mode}.batch_size"
        say(
            f"unusual     {option}={protocol.options.batch_size}: {shortest} steps for the fewest labels are too few to learn; "
            f"a smaller --config.{option} makes more"
        )
    say(
        f"trainings   {count}, some {steps:,} steps in all; what was trained before is not trained again"
    )


def _row(kind: str, per_class: int | None, fraction: float, runs: list[dict]) -> dict:
    row = results.row(kind, per_class, _scores(runs, "last")) | {"label_fraction": fraction}
    if runs[0]["selected"] is not None:
        selected = results.row(kind, per_class, _scores(runs, "selected"))
        names = selected.keys() & {"accuracy", "std", *(f"{name}_accuracy" for name in BESIDE)}
        row |= {f"selected_{name}": selected[name] for name in sorted(names)}
    return row | {"runs": runs}


def _scores(runs: list[dict], when: str) -> list[Score]:
    beside = [{name: run.get(f"{when}_{name}") for name in BESIDE} for run in runs]
    return [Score(run[when], **more) for run, more in zip(runs, beside, strict=True)]


def _at_steps(rows: list[dict]) -> Table:
    lines = []
    for row in rows:
        labels = f"{100 * row['label_fraction']:g}%, {row['runs'][0]['images']} images"
        held_out = "selected_accuracy" in row
        selected = results.cell(row, "selected_") if held_out else "none held out"
        lines.append([row["features"], labels, results.cell(row), selected])
    return ["from", "labels", "last step", "selected on validation"], lines


def _chosen(rows: list[dict]) -> Table:
    lines = []
    for row in rows:
        (run,) = row["runs"]
        chosen = f"{run['learning_rate']:.2g}, {run['weight_decay']:.2g}"
        lines.append([row["features"], f"{run['images']}", chosen, results.cell(row)])
    return ["from", "labels", "chosen rate, decay", "last step"], lines
