"""The page of one run."""

import os
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax.config import from_dict
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.split import Split
from simclr_jax.errors import UserError
from simclr_jax.evals.results import labels_table
from simclr_jax.losses.health import chance, lower_bound
from simclr_jax.pretrained import load_encoder
from simclr_jax.report import learned
from simclr_jax.report.curves import COLOURS, draw_curves
from simclr_jax.report.map import colours_of, draw_map
from simclr_jax.report.page import render
from simclr_jax.report.pictures import pictures_of
from simclr_jax.report.record import Record
from simclr_jax.report.sheet import SHEET_EPOCHS, name_of_data, name_of_image, sheet_of
from simclr_jax.report.thumbnails import tile

_EMBEDDED = 5000  # training images that the pictures are chosen from, at most
_TESTED = 2000  # test images of the confusion matrix, at most
_ON_THE_MAP = 800
_QUERIES, _ALIKE, _ISOLATED = 8, 12, 12
_MOST_CLASSES = 20  # of a matrix that can be read
_NEIGHBOURS_SHOWN = 8


def page_of_run(config: ConfigDict, record: Record) -> str:
    """Makes the page of one run. What cannot be made, as the data or a checkpoint are gone, is said on it."""
    problems: list[str] = []
    content: dict[str, Any] = {
        "views": [],
        "neighbours": [],
        "alike": [],
        "isolated": [],
        "confusion": None,
        "sample": "",
        "map_note": "",
        "legend": [],
        "map": [],
    }
    try:
        data = assemble.data_set(config)
        content["views"] = sheet_of(config, data.train)
        content |= _pictures(config, record, data)
    except UserError as error:
        problems.append(f"No pictures: {error}.")
    planned, about = record.about["plan"], record.about
    figures = {"curves": draw_curves([record], _references(record)), "map": content.pop("map")}
    options = _options(record)
    return render(
        "report.html",
        figures,
        title=record.name,
        subtitle=f"{name_of_data(config)}, {about['training_images']} training images, begun {about['time']}",
        verdict=record.verdict(),
        cards=_cards(record, planned),
        problems=problems,
        results=[_result(name, found) for name, found in record.results.items()],
        epochs=SHEET_EPOCHS,
        options=options,
        changed=sum(option["changed"] for option in options),
        environment=_environment(record),
        **content,
    )


def _cards(record: Record, planned: dict) -> list[tuple[str, str]]:
    found = [("state", record.state), ("peak learning rate", f"{planned['learning_rate']:.4g}")]
    shown = {
        "loss": ("loss", "{:.3f}"),
        "contrastive_top1": ("contrastive accuracy", "{:.1%}"),
        "classifier_accuracy": ("online accuracy", "{:.1%}"),
        "rank_h": ("rank of h", "{:.0f}"),
        "images_per_second": ("images a second", "{:.0f}"),
    }
    for name, (text, form) in shown.items():
        value = record.last(name)
        if value is not None:
            found.append((text, form.format(value)))
    return found


def _references(record: Record) -> dict[str, dict[str, float]]:
    """Returns the constant lines of the curves: the bounds of NT-Xent, and an even spread of z."""
    config = from_dict(record.about["config"])
    found: dict[str, dict[str, float]] = {}
    known = assemble.references(config, assemble.plan_of(config, record.about["training_images"]))
    found["z_std"] = {"evenly spread": known.width**-0.5}
    if known.temperature is not None:
        found["loss"] = {
            "by chance": chance(known.images),
            "at best": lower_bound(known.images, known.temperature),
        }
    return found


def _pictures(config: ConfigDict, record: Record, data: Any) -> dict[str, Any]:
    """Embeds a sample of the training images by the newest checkpoint, and makes what is shown of it.

    Raises:
      UserError: there is no checkpoint.
    """
    encoder = load_encoder(str(record.workdir))
    split, upright = data.train, config.data.upright
    some = learned.embed_pictures(encoder, pictures_of(split, _EMBEDDED, upright))
    if len(some.h) < 2:
        return {}
    near = learned.nearest(some)
    sample = _sample(len(some.h), split)
    names = [name_of_image(config, split, int(i)) for i in some.indices]
    classes = split.classes if data.members is None else None

    def shown(i: int, *said: str) -> dict:
        label = classes[some.labels[i]] if classes and some.labels[i] >= 0 else ""
        lines = [line for line in (*said, label, os.path.basename(names[i])) if line]
        return tile(some.thumbnails[i], 96, names[i], lines)

    def row(i: int) -> dict:
        best = zip(near.indices[i, :_NEIGHBOURS_SHOWN], near.similarities[i], strict=False)
        return {"original": shown(i), "views": [shown(int(j), f"{s:.2f}") for j, s in best]}

    queries = np.unique(np.linspace(0, len(names) - 1, _QUERIES).round().astype(int))
    alike = [
        {"first": shown(i), "second": shown(j), "said": f"cosine {cosine:.3f}"}
        for i, j, cosine in learned.most_alike(near, _ALIKE)
    ]
    on_the_map = np.unique(np.linspace(0, len(names) - 1, _ON_THE_MAP).round().astype(int))
    part = learned.Embedded(
        some.h[on_the_map],
        some.features[on_the_map],
        [some.thumbnails[i] for i in on_the_map],
        some.indices[on_the_map],
        some.labels[on_the_map],
    )
    places = learned.map_of(part.h)
    frames = "Frames have the colour of the class, which the pointer names" if classes else ""
    frames += ("; colours repeat. " if len(classes) > len(COLOURS) else ". ") if classes else ""
    return {
        "sample": sample,
        "neighbours": [row(int(i)) for i in queries],
        "alike": alike,
        "isolated": [
            shown(int(i), f"{near.similarities[i].mean():.2f}")
            for i in learned.most_isolated(near, _ISOLATED)
        ],
        "legend": colours_of(classes),
        "map": [draw_map(places, part, [names[i] for i in on_the_map], classes)],
        "map_note": f"{len(on_the_map)} of the images, similar ones together, by t-SNE. {frames}"
        "Distances between groups mean little.",
        "confusion": _confusion(config, encoder, some, data),
    }


def _sample(count: int, split: Split) -> str:
    if count == split.count:
        return f"the {count} training images"
    which = "evenly spaced" if isinstance(split, IndexedSplit) else "the first ones"
    return f"{count} training images ({which} of {split.count})"


def _confusion(config: ConfigDict, encoder: Any, train: learned.Embedded, data: Any) -> dict | None:
    if (
        not data.train.classes
        or data.test is None
        or not data.test.classes
        or data.members is not None
    ):
        return None
    test = learned.embed_pictures(encoder, pictures_of(data.test, _TESTED, config.data.upright))
    classes = data.train.classes
    counts = learned.confusions(train, test, len(classes))
    total = int(counts.sum())
    if not total:
        return None
    right = int(np.trace(counts)) / total
    pairs = [
        f"{classes[i]} for {classes[j]} ({n} times)" for i, j, n in learned.most_confused(counts, 8)
    ]
    rows = []
    if len(classes) <= _MOST_CLASSES:
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        rows = [
            (
                name,
                [
                    {"count": int(n), "share": round(0.85 * float(s), 3)}
                    for n, s in zip(*pair, strict=True)
                ],
            )
            for name, *pair in zip(classes, counts, shares, strict=True)
        ]
    note = (
        f"{total} test images, true class by row, and what a linear classifier of {len(train.h)} training "
        f"images takes them for: {right:.1%} are right. It is fitted for this picture only, with fixed "
        "settings; the results above are the ones to quote."
    )
    return {"classes": classes, "rows": rows, "pairs": pairs, "note": note}


def _result(name: str, found: dict) -> dict:
    header, rows = labels_table(found["rows"])
    images = found.get("test_images")
    note = f"Accuracy at step {found['step']}" + (f", {images} test images" if images else "")
    return {
        "title": name,
        "header": header,
        "rows": rows,
        "note": f"{note}, mean ± sample deviation over draws of labels.",
    }


def _options(record: Record) -> list[dict]:
    defaults = config_lib.flatten(config_lib.default())
    return [
        {
            "name": name,
            "value": str(value),
            "default": str(defaults.get(name)),
            "changed": value != defaults.get(name),
        }
        for name, value in record.options.items()
    ]


def _environment(record: Record) -> list[tuple[str, str]]:
    about = record.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    devices = about["devices"]
    return [
        ("workdir", str(record.workdir.absolute())),
        ("command", " ".join(about["command"])),
        ("begun", about["time"]),
        ("commit", about["commit"] or "no checkout"),
        ("packages", versions),
        (
            "devices",
            f"{len(devices)}: {', '.join(devices[:8])}{', ...' if len(devices) > 8 else ''}",
        ),
        ("processes", str(about["processes"])),
        ("classes", ", ".join(about["classes"] or ()) or "none"),
        ("data fingerprint", str(about["data_fingerprint"])),
    ]
