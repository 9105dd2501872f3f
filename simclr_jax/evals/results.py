"""Results of evaluations: WORKDIR/NAME.json, and a table at the terminal."""

import pathlib

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from simclr_jax.console import say, show_table
from simclr_jax.data.split import Split
from simclr_jax.evals.contract import Table
from simclr_jax.files import write_json


def row(kind: str, per_class: int | None, accuracies: list[float]) -> dict:
    """Makes one row of a result: {"features", "labels_per_class", "accuracy", "std", "seeds"}, mean and
    standard deviation over the draws of the labels.

    Args:
      kind: name of the features.
      per_class: labels of each class; None: all there are.
      accuracies: in [0, 1], one for each draw.
    """
    return {
        "features": kind,
        "labels_per_class": per_class,
        "accuracy": float(np.mean(accuracies)),
        "std": float(np.std(accuracies)),
        "seeds": len(accuracies),
    }


def cell(of: dict, which: str = "") -> str:
    """Writes a row's accuracy as people read it; `which`: prefix of its keys, "" or "selected_"."""
    spread = f" ± {of[f'{which}std']:.1%}" if of["seeds"] > 1 else ""
    return f"{of[f'{which}accuracy']:.1%}{spread}"


def labels_table(rows: list[dict]) -> Table:
    """Makes a table of rows: kinds of features down, labels a class across."""
    columns = sorted({r["labels_per_class"] or np.inf for r in rows})
    cells: dict[str, dict[float, str]] = {}
    for r in rows:
        cells.setdefault(r["features"], {})[r["labels_per_class"] or np.inf] = cell(r)
    header = ["labels a class"] + ["all" if c == np.inf else str(c) for c in columns]
    return header, [[kind, *(by[c] for c in columns)] for kind, by in cells.items()]


def path_of(config: ConfigDict, saved: dict, train: Split, workdir: str, mode: str) -> epath.Path:
    """Returns WORKDIR/MODE.json, or WORKDIR/MODE_NAME.json for other data than those of training.

    Args:
      config: the evaluation's configuration.
      saved: the checkpoint's record, which holds the fingerprint of the training data.
      train: the training split of the evaluation.
      workdir: the run's folder.
      mode: the evaluation's name.
    """
    data, name = config.data, ""
    if train.fingerprint() != saved["data_fingerprint"]:
        name = f"_{data.name or pathlib.PurePath(data.path).stem or data.source}"
    return epath.Path(workdir) / f"{mode}{name}.json"


def save(path: epath.Path, config: ConfigDict, result: dict) -> None:
    """Writes a result and the configuration of the evaluation. Raises a UserError if it cannot."""
    if jax.process_index() == 0:
        write_json(path, result | {"config": config.to_dict()})


def show(path: epath.Path, result: dict, title: str, table: Table) -> None:
    """Shows a result as a table at the terminal, and says where it lies."""
    say()
    show_table(title, *table)
    say(f"{result['test_images']} test images, step {result['step']}: {path}")
