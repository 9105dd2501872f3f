"""--mode=linear and --mode=finetune: classifiers trained by SGD on random crops (appendices B.5, B.6).

What is reported is the accuracy of the last step, and, where a validation part was held out of the
training split, of the step that did best on it. The test split chooses nothing.

Every training runs through `training.loop.fit` in a folder of its own below WORKDIR/MODE (for other
data than those of pretraining: WORKDIR/MODE_DATA), so the same command goes on where it was stopped,
and nothing that was finished is trained again.
"""

import numpy as np
from ml_collections import ConfigDict

from simclr_jax.evals import results
from simclr_jax.evals.classifier_training import Protocol, Setup, Stopped


def linear(config: ConfigDict, workdir: str) -> dict | None:
    """Evaluates linearly as in appendix B.6: f frozen, SGD on random crops, all labels.

    Writes WORKDIR/linear.json and shows a table.

    Returns:
      the result; None if a signal stopped it: the same command goes on.
    """
    options = config.linear
    title = "Linear evaluation by SGD (appendix B.6), test accuracy"
    trainings = [(1.0, options.epochs)]
    return _run(config, workdir, Protocol("linear", title, options, False, 0, trainings))


def finetune(config: ConfigDict, workdir: str) -> dict | None:
    """Fine-tunes the whole network with fractions of the labels (appendix B.5), from h or from a layer
    of the projection head. The untrained encoder beside it is trained in the same way from its random
    start.

    Writes WORKDIR/finetune.json and shows a table.

    Returns:
      the result; None if a signal stopped it: the same command goes on.
    """
    options = config.finetune
    title = "Fine-tuning (appendix B.5), test accuracy"
    if options.from_layer:
        title = f"Fine-tuning from layer {options.from_layer} of the head, test accuracy"
    trainings = list(zip(options.label_fractions, options.epochs, strict=True))
    protocol = Protocol("finetune", title, options, True, options.from_layer, trainings)
    return _run(config, workdir, protocol)


def _run(config: ConfigDict, workdir: str, protocol: Protocol) -> dict | None:
    """Trains with each fraction of the labels from each start, and returns the result.

    It is saved as it comes: on many images each row takes hours.
    """
    setup = Setup(config, workdir, protocol)
    setup.check_memory()
    rows: list[dict] = []
    result = {
        "step": setup.saved["step"],
        "rows": rows,
        "train_images": setup.part.split.count,
        "validation_images": setup.validation.split.count if setup.validation else 0,
        "test_images": setup.test.split.count,
        "settings": protocol.options.to_dict() | {"seed": config.seed},
    }
    path = setup.path
    try:
        for kind in setup.starts:
            for fraction, epochs in protocol.trainings:
                draws = 1 if fraction == 1 else config.eval.seeds
                runs = [setup.best_of(kind, fraction, epochs, draw) for draw in range(draws)]
                per_class = None if fraction == 1 else setup.per_class(fraction)
                rows.append(_row(kind, per_class, fraction, runs))
                results.save(path, config, result)
    except Stopped:
        return None
    header = ["from", "labels", "last step", "selected on validation"]
    results.show(path, result, protocol.title, (header, [_line(row) for row in rows]))
    return result


def _row(kind: str, per_class: int | None, fraction: float, runs: list[dict]) -> dict:
    row = results.row(kind, per_class, [run["last"] for run in runs]) | {"label_fraction": fraction}
    if runs[0]["selected"] is not None:
        selected = [run["selected"] for run in runs]
        row |= {
            "selected_accuracy": float(np.mean(selected)),
            "selected_std": float(np.std(selected)),
        }
    return row | {"runs": runs}


def _line(row: dict) -> list[str]:
    labels = f"{row['label_fraction']:.0%}, {row['runs'][0]['images']} images"
    held_out = "selected_accuracy" in row
    selected = results.cell(row, "selected_") if held_out else "none held out"
    return [row["features"], labels, results.cell(row), selected]
