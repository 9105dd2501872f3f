"""Results of evaluations: WORKDIR/NAME.json, and a table at the terminal."""

import collections
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from simclr_jax.console import say, show_table
from simclr_jax.data import name_of
from simclr_jax.data.indexed import is_partly_labelled
from simclr_jax.data.split import DataSet
from simclr_jax.evals.contract import Table
from simclr_jax.evals.scores import BESIDE, Score, is_unbalanced
from simclr_jax.files import absolute, write_json
from simclr_jax.training.saved import beside


def row(kind: str, per_class: int | None, found: Sequence[Score]) -> dict:
    """Makes one row of a result: {"features", "labels_per_class", "accuracy", "std", "seeds"}, mean and
    sample standard deviation (n - 1) over the draws of the labels, 0 for one draw; and, where they were measured,
    "top_5_accuracy" and "mean_per_class_accuracy", the means over the draws.

    Args:
      kind: name of the features.
      per_class: labels of each class; None: all there are.
      found: one for each draw.
    """
    values = [one.value for one in found]
    beside = {name: [getattr(one, name) for one in found] for name in BESIDE}
    return {
        "features": kind,
        "labels_per_class": per_class,
        "accuracy": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
        "seeds": len(values),
    } | {f"{name}_accuracy": float(np.mean(x)) for name, x in beside.items() if None not in x}


def say_if_unbalanced(labels: np.ndarray, classes: Sequence[str]) -> None:
    """Says what always answering the largest class would reach, where the classes are unbalanced (`scores.is_unbalanced`),
    and how many classes have no test image.

    Args:
      labels: int [N], of the test images.
      classes: names of the classes.
    """
    counts = np.bincount(labels, minlength=len(classes))
    if is_unbalanced(labels, len(classes)):
        share = counts.max() / counts.sum()
        say(
            f"classes     always answering {classes[int(counts.argmax())]!r}, the largest of {len(classes)}, would reach {share:.1%}; "
            "the mean of the classes counts each class as much"
        )
    if lacking := int(np.sum(counts == 0)):
        say(f"classes     {lacking} of {len(classes)} have no test image")


def accuracies(rows: Sequence[Mapping], per_class: int | None = None) -> dict[str, float]:
    """Returns {features: accuracy} of the rows with `per_class` labels of each class; None: with all labels."""
    return {r["features"]: r["accuracy"] for r in rows if r["labels_per_class"] == per_class}


def cell(of: dict, which: str = "") -> str:
    """Writes a row's accuracies as people read them; `which`: prefix of its keys, "" or "selected_"."""
    spread = f" ± {of[f'{which}std']:.1%}" if of["seeds"] > 1 else ""
    beside = {title: of.get(f"{which}{name}_accuracy") for name, title in BESIDE.items()}
    more = [f", {title} {x:.1%}" for title, x in beside.items() if x is not None]
    return "".join([f"{of[f'{which}accuracy']:.1%}{spread}", *more])


def labels_table(rows: list[dict]) -> Table:
    """Makes a table of rows: kinds of features down, labels per class across."""
    columns: dict[tuple, str] = {}
    cells: dict[str, dict[tuple, str]] = {}
    for r in rows:
        labels, share = r["labels_per_class"] or np.inf, r.get("label_fraction", 1.0)
        columns[labels, share] = "all" if labels == np.inf else str(labels)
        cells.setdefault(r["features"], {})[labels, share] = cell(r)
    order = sorted(columns)
    names = list(columns.values())
    # Two shares of the labels of few images may be as many a class.
    header = ["labels per class"] + [
        columns[c] + (f" ({100 * c[1]:g}%)" if names.count(columns[c]) > 1 else "") for c in order
    ]
    return header, [[kind, *(by.get(c, "") for c in order)] for kind, by in cells.items()]


def path_of(config: ConfigDict, record: dict, data: DataSet, workdir: str, mode: str) -> epath.Path:
    """Returns WORKDIR/MODE.json, or WORKDIR/MODE_NAME_DIGEST.json for other data than the run's; says so. Of the
    checkpoint WORKDIR/checkpoints/STEP, MODE is followed by _step_STEP.

    Args:
      config: the evaluation's configuration.
      record: the checkpoint's record, which holds the fingerprints of the run's data.
      data: the data of the evaluation.
      workdir: the run's folder, or that of a checkpoint.
      mode: the evaluation's name.
    """
    train, test = data.train.fingerprint(), data.test.fingerprint() if data.test else None
    if _was_trained_on(config, record, data):
        say(
            "data        the encoder may have been trained on some of the test images, without their labels: new images "
            "may be recognised less well"
        )
    folder, suffix = beside(absolute(workdir))
    mode += suffix
    then = record["data_fingerprint"], record.get("test_fingerprint", test)
    if (train, test) == then:
        return folder / f"{mode}.json"
    digest = hashlib.blake2b(f"{train} {test}".encode(), digest_size=3).hexdigest()
    path = folder / f"{mode}_{_name_of(config.data.to_dict())}_{digest}.json"
    which = "training" if train != then[0] else "test"
    why = f"other {which} images or labels than the run's"
    if then[0] is None:
        why = "the weights were imported, and have no data of their own"
    say(f"data        {why}, so the result goes to {path.name}")
    return path


def _was_trained_on(config: ConfigDict, record: dict, data: DataSet) -> bool:
    """Returns whether test images may be among those that the encoder was trained on, as far as digests and options tell:
    the test images are the training images; or they are held out where training held some out, and more of them (a
    smaller held-out part lies within a larger one), or of another number of images, or, where only labelled images are
    or were held out, of other images or labels. Nothing is known of the data of imported weights.

    Args:
      config: the evaluation's configuration.
      record: the checkpoint's.
      data: the evaluation's.
    """
    if record["data_fingerprint"] is None:
        return False
    if data.test is not None and data.test.fingerprint() == record["data_fingerprint"]:
        return True
    then, now = record.get("config", {}).get("data"), config.data.to_dict()
    if then is None or absolute(then.get("path", "")) != absolute(now["path"]):
        return False
    alike = all(then.get(name) == now[name] for name in ("source", "name", "train_split"))
    before = then.get("test_fraction", 0.0)
    other_count = now["test_fraction"] == before and data.train.count != record.get(
        "training_images", data.train.count
    )
    files = (absolute(x) if x else "" for x in (then.get("labels_file", ""), now["labels_file"]))
    other_labels = len({*files}) > 1 or then.get("folder_labels", False) != now["folder_labels"]
    if now["test_fraction"] == before:  # else the fingerprints differ in any case
        other_labels = data.train.fingerprint() != record["data_fingerprint"]
    other_labels &= is_partly_labelled(data.train) or record.get("partly_labelled", False)
    others = min(before, now["test_fraction"]) > 0 and (other_count or other_labels)
    return alike and (now["test_fraction"] > before or others)


def _name_of(data: dict) -> str:
    return re.sub(r"[^\w.-]+", "-", name_of(data))  # TFDS has names such as SET/CONFIG


def titles_of(found: Mapping[str, dict]) -> dict[str, str]:
    """Returns what a person calls results: "knn", or of other data than the run's "knn on DATA, test images of PATH", with
    the digest of the data where two would be called alike.

    Args:
      found: {the file's name without ".json", see `path_of`: what `save` wrote there}.
    """
    titles = {stem: _title_of(stem, result) for stem, result in found.items()}
    count = collections.Counter(titles.values())
    return {
        stem: title if count[title] == 1 else f"{title} ({stem.rpartition('_')[2]})"
        for stem, title in titles.items()
    }


def _title_of(stem: str, result: dict) -> str:
    data = result.get("config", {}).get("data")
    if data is None or not (
        found := re.fullmatch(rf"(.+)_{re.escape(_name_of(data))}_\w{{6}}", stem)
    ):
        return stem
    test = data.get("test_path")
    of_test = f", test images of {name_of(data | {'path': test})}" if test else ""
    return f"{found[1]} on {name_of(data)}{of_test}"


def settings_in_words(settings: Mapping[str, Any]) -> str:
    """Writes the settings of a result that are single values, such as "k 200, temperature 0.1"."""
    return ", ".join(
        f"{name} {value}"
        for name, value in settings.items()
        if isinstance(value, int | float | str)
    )


def save(path: epath.Path, config: ConfigDict, result: dict) -> None:
    """Writes a result and the configuration of the evaluation, and says so if it replaces one with other settings.

    Raises:
      UserError: it cannot be written.
    """
    if jax.process_index() > 0:
        return
    now, before = _one_level(json.loads(json.dumps(result["settings"]))), _settings_there(path)
    if differ := [name for name, value in before.items() if now.get(name) != value]:
        then = ", ".join(f"{name} {before[name]}" for name in differ)
        say(f"replaces    {path.name}, made with {then}")
    write_json(path, result | {"config": config.to_dict()})


def _settings_there(path: epath.Path) -> dict:
    """Returns the settings of the result that lies at `path`, see `_one_level`; {} if there is none, or another file."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    settings = found.get("settings") if isinstance(found, dict) else None
    return _one_level(settings) if isinstance(settings, dict) else {}


def _one_level(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings with those of "labels" and "views" beside the evaluation's own."""
    groups = {name: settings[name] for name in ("labels", "views") if name in settings}
    own = {name: value for name, value in settings.items() if name not in groups}
    return own | {k: v for group in groups.values() for k, v in group.items()}


def show(path: epath.Path, result: dict, title: str, table: Table) -> None:
    """Shows a result as a table at the terminal, and says where it lies."""
    say()
    show_table(title, *table)
    say(f"{result['test_images']} test images, step {result['step']}: {path}")
