"""Makes the page of one run."""

import shlex
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax.console import say
from simclr_jax.data import name_of, read_options
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.split import Split
from simclr_jax.data.subsets import evenly
from simclr_jax.errors import UserError
from simclr_jax.evals.nearest import unit
from simclr_jax.evals.results import labels_table, settings_in_words, titles_of
from simclr_jax.evals.scores import METRIC_NAMES
from simclr_jax.losses.health import chance, lower_bound
from simclr_jax.pretrained import load_encoder
from simclr_jax.report import learned
from simclr_jax.report.curves import COLOURS, draw_curves
from simclr_jax.report.map import colours_of, draw_map
from simclr_jax.report.page import in_words, render
from simclr_jax.report.run_files import RunFiles
from simclr_jax.report.sheet import SHEET_EPOCHS, name_of_image, sheet_of, short_name
from simclr_jax.report.thumbnails import tile

_EMBEDDED = 5000  # training images that the pictures are chosen from, at most
_TESTED = 2000  # test images of the confusion matrix, at most
_ON_THE_MAP = 800
_QUERIES, _ALIKE, _ISOLATED = 8, 12, 12
_ONE_POINT = 0.01  # if h has less than this share of an even spread, a map would show rounding
_MOST_CLASSES = 20  # for which a matrix can still be read
_NEIGHBOURS_SHOWN = 8


def page_of_run(config: ConfigDict, run: RunFiles) -> str:
    """Makes the page of one run. If the data or the checkpoints are gone, the page says why pictures are missing."""
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
        if run.about.get("data_fingerprint") not in (None, data.train.fingerprint()):
            problems.append("The pictures are of other images than the run was trained on.")
        if run.is_contrastive and not run.is_imported:
            try:
                content["views"] = sheet_of(config, data.train)
            except UserError as error:
                problems.append(f"No views: {error}.")
        content |= _pictures(config, run, data)
    except UserError as error:
        problems.append(f"No pictures: {error}.")
    for problem in problems:
        say(f"pictures    {problem}")
    figures = {"curves": draw_curves([run], _references(run)), "map": content.pop("map")}
    options, titles = _options(run), titles_of(run.results)
    return render(
        "report.html",
        figures,
        title=run.name,
        subtitle=_subtitle(config, run),
        verdict=run.verdict(),
        cards=_cards(run),
        problems=problems,
        results=[_result(titles[name], found) for name, found in run.results.items()],
        epochs=SHEET_EPOCHS,
        options=options,
        changed=sum(option["changed"] for option in options),
        environment=_environment(run),
        **content,
    )


def _cards(run: RunFiles) -> list[tuple[str, str]]:
    if run.is_imported:
        return []
    planned = run.about["plan"]
    found = [("state", run.state), ("peak learning rate", f"{planned['learning_rate']:.4g}")]
    shown = {
        "loss": ("loss", "{:.3f}"),
        "contrastive_top1": ("contrastive accuracy", "{:.1%}"),
        "classifier_accuracy": ("online accuracy", "{:.1%}"),
        "rank_h": ("rank of h", "{:.0f}"),
        "images_per_second": ("images a second", "{:.0f}"),
    }
    for name, (text, form) in shown.items():
        value = run.last(name)
        if value is not None:
            found.append((text, form.format(value)))
    return found


def _references(run: RunFiles) -> dict[str, dict[str, float]]:
    """Returns the constant lines of the curves: the bounds of NT-Xent, and an even spread of z. A distillation has
    another loss, and no z.
    """
    if not run.is_contrastive:
        return {}
    known = run.references
    found = {"z_std": {"evenly spread": known.width**-0.5}}
    if known.temperature is not None:
        found["loss"] = {
            "by chance": chance(known.images),
            "at best": lower_bound(known.images, known.temperature),
        }
    return found


def _pictures(config: ConfigDict, run: RunFiles, data: Any) -> dict[str, Any]:
    """Embeds a sample of the training images by the newest checkpoint, and makes the pictures of the page from it.

    Raises:
      UserError: there is no checkpoint, or its encoder has diverged.
    """
    encoder = load_encoder(str(run.workdir))
    split = data.train
    some = learned.embed_sample(encoder, split, _EMBEDDED, read_options(config.data))
    if len(some.h) < 2:
        return {}
    if not np.isfinite(some.h).all():
        raise UserError("the encoder's features hold numbers that are not finite")
    near = learned.nearest_of_each(some)
    sample = _sample(len(some.h), split)
    names = [name_of_image(split, int(i)) for i in some.indices]
    classes = split.classes if data.members is None else None

    def shown(i: int, *said: str) -> dict:
        label = classes[some.labels[i]] if classes and some.labels[i] >= 0 else ""
        lines = [line for line in (*said, label, short_name(names[i])) if line]
        return tile(some.thumbnails[i], 96, names[i], lines)

    def row(i: int) -> dict:
        best = zip(near.indices[i, :_NEIGHBOURS_SHOWN], near.similarities[i], strict=False)
        return {"original": shown(i), "views": [shown(int(j), f"{s:.2f}") for j, s in best]}

    queries = evenly(len(names), _QUERIES)
    alike = [
        {"first": shown(i), "second": shown(j), "said": f"cosine {cosine:.3f}"}
        for i, j, cosine in learned.most_alike(near, _ALIKE)
    ]
    return {
        "sample": sample,
        "neighbours": [row(int(i)) for i in queries],
        "alike": alike,
        "isolated": [
            shown(int(i), f"{near.similarities[i].mean():.2f}")
            for i in learned.most_isolated(near, _ISOLATED)
        ],
        "confusion": _confusion(config, encoder, some, data) if classes else None,
    } | _map(some, names, classes)


def _map(some: learned.Embedded, names: list[str], classes: tuple | None) -> dict[str, Any]:
    """Makes the map of up to 800 of the images; none of fewer than five, or where all lie in nearly one point."""
    if len(some.h) < 5:
        return {"map_note": "None: there are fewer than five images."}
    h = unit(some.h)
    if float(np.std(h, axis=0).mean()) < _ONE_POINT * h.shape[1] ** -0.5:
        return {"map_note": "None: the encoder takes all images for nearly one point."}
    chosen = evenly(len(names), _ON_THE_MAP)
    part = learned.Embedded(
        h[chosen],
        [some.thumbnails[i] for i in chosen],
        some.indices[chosen],
        some.labels[chosen] if classes else np.full(len(chosen), -1),
    )
    frames = ""
    if classes:
        repeat = "; colours repeat" if len(classes) > len(COLOURS) else ""
        frames = f"Frames have the colour of the class, which the pointer names{repeat}. "
    plot = draw_map(learned.map_of(part.h), part, [names[i] for i in chosen], classes)
    return {
        "legend": colours_of(classes),
        "map": [plot],
        "map_note": f"{len(chosen)} of the images, similar ones together, by t-SNE. {frames}"
        "Distances between groups mean little.",
    }


def _sample(count: int, split: Split) -> str:
    if count == split.count:
        return f"the {count} training images"
    asked = min(_EMBEDDED, split.count)
    lost = f"; {asked - count} cannot be read" if count < asked else ""
    if asked == split.count:
        return f"{count} of the {asked} training images{lost}"
    how = "evenly spaced of" if isinstance(split, IndexedSplit) else "in runs of adjacent ones, of"
    return f"{count} training images ({how} {split.count}{lost})"


def _confusion(
    config: ConfigDict, encoder: Any, train: learned.Embedded, data: Any
) -> dict[str, Any] | None:
    """Makes the table of confusions of labelled test images; None where there are none."""
    classes, test = data.train.classes, data.test
    if test is None or not test.classes:
        return None
    asked = learned.embed_sample(encoder, test, _TESTED, read_options(config.data))
    counts = learned.confusions(train, asked)
    if not counts:
        return None
    total = counts.total()
    right = sum(n for (i, j), n in counts.items() if i == j) / total
    pairs = [
        f"{classes[i]} for {classes[j]} ({n} times)" for i, j, n in learned.most_confused(counts, 8)
    ]
    note = (
        f"{total} test images, true class by row, and what a linear classifier of "
        f"{int((train.labels >= 0).sum())} training images takes them for: {right:.1%} are right. It is "
        "fitted for this picture only, with fixed settings; the results above are the ones to quote."
    )
    rows = _matrix(counts, classes) if len(classes) <= _MOST_CLASSES else []
    return {"classes": classes, "rows": rows, "pairs": pairs, "note": note}


def _matrix(counts: dict[tuple[int, int], int], classes: tuple[str, ...]) -> list[tuple]:
    """Returns (class, cells {"count", "share" of its row}) for each class."""
    rows = []
    for i, name in enumerate(classes):
        row = [counts.get((i, j), 0) for j in range(len(classes))]
        most = max(1, sum(row))
        rows.append((name, [{"count": n, "share": round(0.85 * n / most, 3)} for n in row]))
    return rows


def _subtitle(config: ConfigDict, run: RunFiles) -> str:
    about, data = run.about, name_of(config.data.to_dict())
    time = about.get("time", "at an unknown time")
    if run.is_imported:
        return f"weights of {about['imported']['kind']}, imported {time}; pictures of {data}"
    return f"{data}, {about['training_images']} training images, last started {time}"


def _result(title: str, found: dict) -> dict:
    """Makes the table of an evaluation; one that is not finished has empty cells."""
    header, rows = labels_table(found["rows"])
    metric = METRIC_NAMES.get(found.get("settings", {}).get("metric", ""), "accuracy")
    images = found.get("test_images")
    note = f"Test {metric} at step {found['step']}" + (f", {images} images" if images else "")
    spread = (
        ", mean ± sample deviation over draws of labels"
        if any("±" in c for r in rows for c in r)
        else ""
    )
    used = settings_in_words(found.get("settings", {}))
    with_settings = f" Settings: {used}." if used else ""
    return {
        "title": title,
        "header": header,
        "rows": rows,
        "note": f"{note}{spread}.{with_settings}",
    }


def _options(run: RunFiles) -> list[dict]:
    defaults = config_lib.flatten(config_lib.default())
    return [
        {
            "name": name,
            "value": in_words(value),
            "default": in_words(defaults.get(name)),
            "changed": value != defaults.get(name),
        }
        for name, value in run.options.items()
    ]


def _environment(run: RunFiles) -> list[tuple[str, str]]:
    about = run.about
    versions = ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items())
    devices = about.get("devices", [])
    return [
        ("workdir", str(run.workdir.absolute())),
        ("command", shlex.join(about.get("command", []))),
        ("last started", about.get("time", "")),
        ("commit", about.get("commit") or "no checkout"),
        ("packages", versions),
        (
            "devices",
            f"{len(devices)}: {', '.join(devices[:8])}{', ...' if len(devices) > 8 else ''}",
        ),
        ("processes", str(about.get("processes", 1))),
        ("classes", ", ".join(about.get("classes") or ()) or "none"),
        ("data fingerprint", str(about.get("data_fingerprint"))),
    ]
