"""What an evaluation leaves: WORKDIR/NAME.json, and a table at the terminal."""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import config as config_lib
from simclr_jax.console import say, show_table
from simclr_jax.errors import UserError


def row(kind: str, per_class: int | None, accuracies: list[float]) -> dict:
    """One line of a result: mean and spread over the draws of the labels.

    Args:
      kind: of the features.
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
    """A row's accuracy, as people read it; `which` may be "selected_"."""
    spread = f" ± {of[f'{which}std']:.1%}" if of["seeds"] > 1 else ""
    return f"{of[f'{which}accuracy']:.1%}{spread}"


def labels_table(rows: list[dict]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of a table: kinds of features down, labels a class across."""
    columns = sorted({r["labels_per_class"] or np.inf for r in rows})
    cells: dict[str, dict[float, str]] = {}
    for r in rows:
        cells.setdefault(r["features"], {})[r["labels_per_class"] or np.inf] = cell(r)
    header = ["labels a class"] + ["all" if c == np.inf else str(c) for c in columns]
    return header, [[kind, *(by[c] for c in columns)] for kind, by in cells.items()]


def write(
    result: dict,
    config: ConfigDict,
    trained_with: dict,
    workdir: str,
    mode: str,
    title: str,
    table: tuple[list[str], list[list[str]]],
) -> None:
    """Writes WORKDIR/MODE.json and shows the table.

    Args:
      result: {"step", "rows", "test_images", ...}.
      config: of the evaluation.
      trained_with: the configuration of the checkpoint. Where it names other data, these are named
        in the file's name.
      workdir: of the run.
      mode: what was done.
      title: of the table.
      table: header and lines.
    """
    path = epath.Path(workdir) / f"{mode}{_other_data(config, trained_with)}.json"
    result |= {"config": config.to_dict()}
    if jax.process_index() == 0:
        try:
            path.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    say()
    show_table(title, *table)
    say(f"{result['test_images']} test images, step {result['step']}: {path}")


def _other_data(config: ConfigDict, trained_with: dict) -> str:
    def which(options: ConfigDict) -> tuple[Any, ...]:
        return options.data.source, options.data.name, options.data.path

    if which(config)[:2] == which(config_lib.from_dict(trained_with))[:2]:
        return ""
    return f"_{config.data.name or pathlib.PurePath(config.data.path).stem or config.data.source}"
