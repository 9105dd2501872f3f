"""Makes the page of several runs: a table to sort, the options that differ, and the curves overlaid."""

import dataclasses
import glob
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from simclr_jax.console import say
from simclr_jax.errors import UserError
from simclr_jax.evals.results import accuracies, titles_of
from simclr_jax.evals.subjects import ENCODER
from simclr_jax.files import absolute, in_bucket
from simclr_jax.report.curves import draw_curves
from simclr_jax.report.page import in_words, render
from simclr_jax.report.run_files import RunFiles, read_run_files

_SCORES = {  # heading: metric
    "loss": "loss",
    "contrastive accuracy": "contrastive_top1",
    "online accuracy": "classifier_accuracy",
    "images/s": "images_per_second",
}


def page_of_runs(patterns: Sequence[str], folder: str) -> str:
    """Makes the page of several runs, with links relative to `folder`."""
    runs, skipped = [], []
    for path in dict.fromkeys(path for pattern in patterns for path in _paths(pattern)):
        try:
            runs.append(read_run_files(path))
        except UserError as error:
            skipped.append(str(error))
    if runs:
        for why in skipped:
            say(f"left out    {why}")
    else:
        raise UserError(
            f"no run in {' '.join(patterns)} ({'; '.join(skipped)}): expected workdirs, or a pattern such as 'RUNS/*'"
        )
    flat = [run.options for run in runs]
    runs = _named_apart(runs)
    names = [run.name for run in runs]
    differing = [
        (option, [in_words(options.get(option)) for options in flat])
        for option in flat[0]
        if len({str(options.get(option)) for options in flat}) > 1
    ]
    columns, rows = _runs_table(runs, folder)
    return render(
        "runs.html",
        {"curves": draw_curves(runs, {})},
        title="Runs",
        header=columns,
        rows=rows,
        names=names,
        differing=differing,
        skipped=skipped,
    )


def _paths(pattern: str) -> list[str]:
    """Returns the folders that a pattern stands for; itself if it stands for nothing."""
    path = absolute(pattern)
    if in_bucket(path) or os.path.isdir(path):
        return [path]
    return sorted(found for found in glob.glob(path) if os.path.isdir(found)) or [path]


def _named_apart(runs: list[RunFiles]) -> list[RunFiles]:
    """Returns the runs with names that no two share: the last folder's, or more of the path."""
    paths = [str(run.workdir).split("/") for run in runs]
    for parts in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return [dataclasses.replace(r, title=name) for r, name in zip(runs, names, strict=True)]


def _runs_table(runs: list[RunFiles], folder: str) -> tuple[list[str], list[list[dict]]]:
    """Returns the headings and the cells {"text", "value" to sort by, "link"}."""
    evaluations = sorted({name for run in runs for name in run.results})
    rows = []
    for run in runs:
        page = run.workdir / "report.html"
        link = quote(os.path.relpath(page, folder)) if page.exists() else ""
        cells = [_cell(run.name, run.name, link), _cell(run.state, run.steps)]
        health = run.verdict()["name"]
        cells.append(_cell(health, health))
        for metric in _SCORES.values():
            value = run.last(metric)
            is_share = metric.endswith(("top1", "accuracy"))
            text = "" if value is None else f"{value:.1%}" if is_share else f"{value:.4g}"
            cells.append(_cell(text, "" if value is None else value))
        for name in evaluations:
            reached = accuracies(run.results.get(name, {"rows": []})["rows"])
            best = reached.get(ENCODER, reached.get("student"))  # of --mode=distill
            cells.append(_cell("" if best is None else f"{best:.1%}", "" if best is None else best))
        rows.append(cells)
    found = {name: result for run in runs for name, result in run.results.items()}
    titles = titles_of(found)
    return ["run", "state", "health", *_SCORES, *(titles[name] for name in evaluations)], rows


def _cell(text: str, value: Any, link: str = "") -> dict:
    return {"text": text, "value": str(value), "link": link}
