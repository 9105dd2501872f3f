"""The page of several runs: a table to sort, the options that differ, and the curves overlaid."""

import glob
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from simclr_jax.errors import UserError
from simclr_jax.files import expanded
from simclr_jax.report.curves import draw_curves
from simclr_jax.report.page import render
from simclr_jax.report.record import Record, read_record

_SCORES = {  # heading: metric
    "loss": "loss",
    "contrastive accuracy": "contrastive_top1",
    "online accuracy": "classifier_accuracy",
    "images/s": "images_per_second",
}


def page_of_runs(patterns: Sequence[str], folder: pathlib.Path) -> str:
    """Makes the page of several runs, with links relative to `folder`."""
    paths = [path for pattern in patterns for path in sorted(glob.glob(str(expanded(pattern))))]
    records, skipped = [], []
    for path in dict.fromkeys(paths):
        if not pathlib.Path(path, "config.json").exists():
            skipped += [path] if os.path.isdir(path) else []
            continue
        records.append(read_record(path))
    if not records:
        raise UserError(
            f"no run in {' '.join(patterns)}: expected workdirs, or a pattern such as 'RUNS/*'"
        )
    flat = [record.options for record in records]
    names = [record.name for record in records]
    differing = [
        (option, [str(options.get(option)) for options in flat])
        for option in flat[0]
        if len({str(options.get(option)) for options in flat}) > 1
    ]
    columns, rows = _runs_table(records, folder)
    return render(
        "runs.html",
        {"curves": draw_curves(records, {})},
        title="Runs",
        header=columns,
        rows=rows,
        names=names,
        differing=differing,
        skipped=skipped,
    )


def _runs_table(records: list[Record], folder: pathlib.Path) -> tuple[list[str], list[list[dict]]]:
    """Returns the headings and the cells {"text", "value" to sort by, "link"}."""
    evaluations = sorted({name for record in records for name in record.results})
    rows = []
    for record in records:
        page = record.workdir / "report.html"
        link = os.path.relpath(page, folder.absolute()) if page.exists() else ""
        cells = [_cell(record.name, record.name, link), _cell(record.state, record.steps)]
        health = record.health["name"] if record.health else ""
        cells.append(_cell(health, health))
        for metric in _SCORES.values():
            value = record.last(metric)
            is_share = metric.endswith(("top1", "accuracy"))
            text = "" if value is None else f"{value:.1%}" if is_share else f"{value:.4g}"
            cells.append(_cell(text, "" if value is None else value))
        for name in evaluations:
            best = [
                r["accuracy"]
                for r in record.results.get(name, {"rows": []})["rows"]
                if r["features"] == "encoder" and r["labels_per_class"] is None
            ]
            cells.append(_cell(f"{best[0]:.1%}" if best else "", best[0] if best else ""))
        rows.append(cells)
    return ["run", "state", "health", *_SCORES, *evaluations], rows


def _cell(text: str, value: Any, link: str = "") -> dict:
    return {"text": text, "value": str(value), "link": link}
