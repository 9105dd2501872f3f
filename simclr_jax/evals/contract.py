"""The contracts of evaluations: of features, and by training a classifier."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

Table = tuple[list[str], list[list[str]]]  # header, lines


class Features(NamedTuple):
    """Features of one kind, and labels, of both splits.

    Attributes:
      train: features float32 [n, D], labels int [n].
      test: features and labels of the test split.
      classes: C; labels are from 0 to C - 1.
      mesh: devices to divide the work over; None: one.
      members: int8 [C, K] where images have several labels each, see `DataSet`; else None.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    mesh: Mesh | None = None
    members: np.ndarray | None = None

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Returns what a classifier is to say of labels int [n]: themselves, or int8 [n, K]."""
        return labels if self.members is None else self.members[labels]


# {option of the group "eval", without the group: value}, "seed", and "metric" as it was resolved.
Options = Mapping[str, Any]


class Evaluation(NamedTuple):
    """One way to evaluate features.

    Attributes:
      text: what it does, for --help.
      rows: (features, options, name of the features) -> rows of the result, see `results.row`.
      settings: (options, number of training images, number of classes) -> the settings used, JSON-able,
        saved beside the rows.
      title: (settings) -> the title of the table.
      table: rows -> the table.
      changes: configuration options that the evaluation sets for its features, {"a.b": value}.
      chooses: whether it chooses something on a validation part of the training split.
      metric: the name under which its score is reported during training: the accuracy of the trained encoder
        with all labels.
      sets: whether images may have several labels each.
    """

    text: str
    rows: Callable[[Features, Options, str], list[dict]]
    settings: Callable[[Options, int, int], dict]
    title: Callable[[dict], str]
    table: Callable[[list[dict]], Table]
    changes: Mapping[str, Any]
    chooses: bool
    metric: str
    sets: bool = False


class ClassifierEvaluation(NamedTuple):
    """One way to evaluate an encoder by training a classifier on it.

    Attributes:
      text: what it does, for --help.
      run: (configuration, workdir) -> the result, which it writes to WORKDIR/NAME.json.
    """

    text: str
    run: Callable[[ConfigDict, str], dict]
