"""--mode=linear, finetune and transfer_finetune: classifiers trained on random crops (appendices
B.5, B.6 and B.8).

They report the accuracy of the last step and, if a validation part was held out of the training split, that of
the step that did best on it. The test split chooses nothing.

Every training runs through `training.loop.fit` in a folder of its own below WORKDIR/MODE (for other
data than those of pretraining: WORKDIR/MODE_NAME_DIGEST), so the same command goes on where it was stopped,
and nothing that was finished is trained again.
"""

import itertools

from ml_collections import ConfigDict

from simclr_jax import processes
from simclr_jax.console import say
from simclr_jax.evals import results
from simclr_jax.evals.classifier_training import Setup
from simclr_jax.evals.contract import Table
from simclr_jax.evals.protocol import Length, Protocol, Search
from simclr_jax.evals.scores import METRIC_NAMES
from simclr_jax.evals.subjects import ENCODER


def linear(config: ConfigDict, workdir: str) -> dict:
    """Evaluates linearly as in appendix B.6: f frozen, SGD on random crops, all labels.

    Writes WORKDIR/linear.json and shows a table.

    Returns:
      the result.

    Raises:
      Stopped: a signal has stopped it.
    """
    options = config.linear
    title = "Linear evaluation by SGD (appendix B.6), test accuracy"
    searches = [Search(1.0, Length(options.epochs, "epochs"), _candidates(options))]
    protocol = Protocol(
        "linear", title, options, train_encoder=False, layer=0, searches=lambda _: searches
    )
    return _run(config, workdir, protocol)


def finetune(config: ConfigDict, workdir: str) -> dict:
    """Fine-tunes the whole network with fractions of the labels (appendix B.5), from h or from a layer
    of the projection head. The untrained encoder beside it is trained in the same way from its random
    start.

    Writes WORKDIR/finetune.json and shows a table.

    Returns:
      the result.

    Raises:
      Stopped: a signal has stopped it.
    """
    options = config.finetune
    title = "Fine-tuning (appendix B.5), test accuracy"
    if options.from_layer:
        title = f"Fine-tuning from layer {options.from_layer} of the head, test accuracy"
    searches = [
        Search(fraction, Length(epochs, "epochs"), _candidates(options))
        for fraction, epochs in zip(options.label_fractions, options.epochs, strict=True)
    ]
    protocol = Protocol(
        "finetune",
        title,
        options,
        train_encoder=True,
        layer=options.from_layer,
        searches=lambda _: searches,
    )
    return _run(config, workdir, protocol)


def transfer_finetune(config: ConfigDict, workdir: str) -> dict:
    """Fine-tunes the whole network as for transfer to other data (appendix B.8): trains with a grid of learning
    rates and weight decays, chooses a pair on the validation part, and trains with it once more on all training
    images. The untrained encoder beside it is trained for longer, with a grid of its own.

    Writes WORKDIR/transfer_finetune.json and shows a table.

    Returns:
      the result.

    Raises:
      Stopped: a signal has stopped it.
    """
    options = config.transfer_finetune

    def searches(kind: str) -> list[Search]:
        own = "" if kind == ENCODER else "untrained_"
        steps = options[f"{own}steps"]
        # Appendix B.8: "We divide these values of weight decay by the learning rate".
        grid = [(r, d / r) for r, d in _candidates(options, own)]
        return [Search(1.0, Length(steps, "steps"), grid)]

    title = "Fine-tuning for transfer (appendix B.8), test"
    protocol = Protocol(
        "transfer_finetune",
        title,
        options,
        train_encoder=True,
        layer=0,
        searches=searches,
        moments=1,
        refit=True,
        sets=True,
    )
    return _run(config, workdir, protocol)


# Evaluations that train a classifier, by the names of their modes.
TRAININGS = {"linear": linear, "finetune": finetune, "transfer_finetune": transfer_finetune}


def _candidates(options: ConfigDict, prefix: str = "") -> list[tuple[float, float]]:
    """Returns every (learning rate, weight decay) of the options whose names begin with `prefix`."""
    rates, decays = options[f"{prefix}learning_rate"], options[f"{prefix}weight_decay"]
    return list(itertools.product(rates, decays))


def _run(config: ConfigDict, workdir: str, protocol: Protocol) -> dict:
    """Trains with each fraction of the labels from each start, and returns the result.

    Raises:
      Stopped: a signal has stopped it.
      UserError: another program does so in this workdir, the data do not fit, or a training cannot go on.
    """
    setup = Setup(config, workdir, protocol)
    setup.check_fractions()
    with processes.alone(setup.folder, "wait for it, or stop it"):
        return _rows(config, setup, protocol)


def _rows(config: ConfigDict, setup: Setup, protocol: Protocol) -> dict:
    """Does the work of `_run`. The result is saved as it comes: on many images each row takes hours."""
    rows: list[dict] = []
    result = {
        "step": setup.record["step"],
        "rows": rows,
        "train_images": setup.part.split.count,
        "validation_images": setup.validation.split.count if setup.validation else 0,
        "test_images": setup.test.split.count,
        "settings": protocol.options.to_dict() | {"seed": config.seed, "metric": setup.metric},
    }
    path = setup.path
    _say_how_many(setup, protocol)
    for kind in setup.starts:
        for search in protocol.searches(kind):
            fraction = search.fraction
            runs = [setup.best_of(kind, search, draw) for draw in range(setup.draws(search))]
            per_class = None if fraction == 1 else setup.per_class(fraction)
            rows.append(_row(kind, per_class, fraction, runs))
            result["test_images"] = runs[-1].get("test_images", result["test_images"])
            results.save(path, config, result)
    title = protocol.title + (f" {METRIC_NAMES[setup.metric]}" if protocol.refit else "")
    results.show(path, result, title, (_chosen if protocol.refit else _at_steps)(rows))
    for row in rows:
        where = row["runs"][0].get("classifier")
        if where:  # only for the encoder, and not in results of older versions
            say(
                f"classifier  of {100 * row['label_fraction']:g}% of the labels: {path.parent / where}"
            )
    return result


def _say_how_many(setup: Setup, protocol: Protocol) -> None:
    """Says how many trainings there are, before the first of them: 112 of 20,000 and more steps in appendix B.8."""
    count = steps = 0
    for kind in setup.starts:
        for search in protocol.searches(kind):
            trainings = (len(search.candidates) + setup.refits) * setup.draws(search)
            # A fraction is one of all labels, those of the validation part among them.
            count_of = setup.part.split.count if search.fraction == 1 else setup.whole.count
            images = round(search.fraction * count_of)
            count += trainings
            steps += trainings * search.length.steps(images, protocol.options.batch_size)
    say(
        f"trainings   {count}, some {steps:,} steps in all; what was trained before is not trained again"
    )


def _row(kind: str, per_class: int | None, fraction: float, runs: list[dict]) -> dict:
    row = results.row(kind, per_class, [run["last"] for run in runs]) | {"label_fraction": fraction}
    if runs[0]["selected"] is not None:
        selected = results.row(kind, per_class, [run["selected"] for run in runs])
        row |= {f"selected_{name}": selected[name] for name in ("accuracy", "std")}
    return row | {"runs": runs}


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
