"""The figure of a study: ours with mean and spread over seeds, and the paper's numbers on an axis of their
own, so that the shapes can be compared.
"""

import datetime
import importlib.util
import itertools
import math
from typing import Any

from etils import epath

from simclr_jax.errors import UserError
from simclr_jax.files import replacing, writing
from simclr_jax.studies.claims import deviation, mean
from simclr_jax.studies.contract import Key, Published, Scores, Study
from simclr_jax.studies.outcomes import Outcomes

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def need_matplotlib() -> None:
    """Raises a UserError unless matplotlib is installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError(
            "a study's figure needs matplotlib: pip install matplotlib, or pip install -e '.[studies]'"
        )


def draw(study: Study, outcomes: Outcomes, data: str, folder: epath.Path) -> list[epath.Path]:
    """Draws the figure of what is there, as FOLDER/figure.png and figure.svg.

    Args:
      study: the study that is drawn.
      outcomes: the accuracies of its runs.
      data: names the data, for the caption.
      folder: the study's.

    Returns:
      the files; none if nothing is there yet.

    Raises:
      UserError: a file cannot be written.
    """
    if not outcomes.scores:
        return []
    import matplotlib as mpl
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and asks for a screen

    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.grid": True,
                         "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False}):  # fmt: skip
        panels = 2 if study.published else 1
        size = (4.6, 4.6) if study.matrix else (4.2, 3.6)
        figure = Figure(figsize=(size[0] * panels, size[1]), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        axes[0].set_title(f"{data}, {_seeds(outcomes.scores)}", fontsize=9)
        if study.published:
            axes[1].set_title(study.published.source, fontsize=9)
        if study.matrix:
            _matrices(axes, study, outcomes.scores)
        else:
            _panels(figure, axes, study, outcomes.scores)
        today = datetime.date.today().isoformat()
        figure.suptitle(f"{study.title}, {today}{_incomplete(outcomes)}", fontsize=10)
        files = [folder / f"figure.{kind}" for kind in ("png", "svg")]
        for file, kind in zip(files, ("png", "svg"), strict=True):
            with writing(file), replacing(file) as scratch, scratch.open("wb") as opened:
                figure.savefig(opened, format=kind, dpi=150)
    return files


def _incomplete(outcomes: Outcomes) -> str:
    """Says how many runs are missing and have failed, to end a title; "" if none are."""
    said = []
    if outcomes.missing:
        further = all(run.seed > 0 for run in outcomes.missing)
        said.append(f"{len(outcomes.missing)} runs{' of further seeds' if further else ''} missing")
    if outcomes.failed:
        said.append(f"{len(outcomes.failed)} failed")
    return f" ({', '.join(said)})" if said else ""


def _seeds(scores: Scores) -> str:
    counts = {len(of_key) for of_key in scores.values()}
    fewest, most = min(counts), max(counts)
    return f"{most if fewest == most else f'{fewest} to {most}'} seed{'s' if most > 1 else ''}"


def _panels(figure: Any, axes: Any, study: Study, scores: Scores) -> None:
    """Draws ours and, beside it, the paper's numbers as points, with one legend for both."""
    _panel(axes[0], study, scores, f"{study.evaluation}, test {study.measure}, %")
    if study.published:
        _panel(axes[1], study, _scores_of(study.published), f"{study.measure}, %")
        if not study.factors[0].numbers:
            axes[1].set_yticklabels([])  # those of the panel beside it
            axes[1].set(ylabel=None)
    if len(_layout(study)[1]) > 1:
        marks, names = axes[0].get_legend_handles_labels()
        title = study.factors[1].name if len(study.factors) > 1 else None
        # At 8 points some 16 characters fit into an inch, and a mark takes as much as 8 of them.
        fit = int(16 * figure.get_figwidth() / (8 + max(map(len, names))))
        how: dict[str, Any] = {
            "loc": "outside lower center",
            "ncols": max(1, min(3, fit, len(names))),
            "frameon": False,
        }
        figure.legend(marks, names, title=title, fontsize=8, **how)


def _matrices(axes: Any, study: Study, scores: Scores) -> None:
    """Draws ours and, beside it, the paper's numbers as matrices."""
    _matrix(axes[0], study, scores)
    if study.published:
        _matrix(axes[1], study, _scores_of(study.published))


def _scores_of(published: Published) -> Scores:
    return {key: {0: value / 100} for key, value in published.values.items()}


def _matrix(axes: Any, study: Study, scores: Scores) -> None:
    """Draws means in per cent as a matrix, the first factor downwards, and the mean of each row beside it."""
    rows, columns = ([*factor.levels] for factor in study.factors)
    cells = [
        [
            100 * mean(scores, (row, column)) if scores.get((row, column)) else math.nan
            for column in columns
        ]
        for row in rows
    ]
    for line in cells:
        there = [value for value in line if not math.isnan(value)]
        line.append(sum(there) / len(there) if there else math.nan)
    axes.imshow(cells, cmap="Blues")
    middle = _middle(cells)
    for r, line in enumerate(cells):
        for c, value in enumerate(line):
            text = "" if math.isnan(value) else f"{value:.1f}"
            colour = "white" if value > middle else "black"
            axes.text(c, r, text, ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(columns) + 1), [*columns, "mean"], rotation=45, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=study.factors[1].name, ylabel=study.factors[0].name)
    axes.grid(visible=False)


def _middle(cells: list[list[float]]) -> float:
    """Returns the middle between the least and the largest number."""
    there = [value for line in cells for value in line if not math.isnan(value)]
    return (min(there) + max(there)) / 2


def _panel(axes: Any, study: Study, scores: Scores, measure: str) -> None:
    """Draws means as points with error bars: accuracy upwards over numbers, to the right for named levels.
    Draws no filled bars: their lengths mislead where the axis does not begin at 0.
    """
    first, (names, series) = study.factors[0], _layout(study)
    places = [float(name) for name in names] if first.numbers else range(len(names))
    for number, (name, keys) in enumerate(series.items()):
        # From -0.5 to 0.5: series lie beside each other, so that none hides another.
        aside = (number + 0.5) / len(series) - 0.5
        there = [(place, key) for place, key in zip(places, keys, strict=True) if scores.get(key)]
        middle = [100 * mean(scores, key) for _, key in there]
        spread = [100 * deviation(scores, key) for _, key in there]
        bars = spread if any(spread) else None
        look = {"color": _COLOURS[number % len(_COLOURS)], "marker": "o", "capsize": 3}
        if first.numbers:
            columns = [place * 2 ** (aside / 5) for place, _ in there]
            axes.errorbar(columns, middle, bars, label=name, **look)
            continue
        rows = [place + aside / 2 for place, _ in there]
        axes.errorbar(middle, rows, xerr=bars, label=name, linestyle="none", **look)
    if first.numbers:
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, names)
        axes.minorticks_off()
        axes.set(xlabel=first.name, ylabel=measure)
    else:
        axes.set_yticks(list(places), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set(xlabel=measure, ylabel=first.name)


def _layout(study: Study) -> tuple[list[str], dict[str, list[Key]]]:
    """Returns the names along the first axis, and {series: its key for each of them}.

    The axis shows the levels of the first factor. If that is the only factor and has one level, the axis shows the
    beginnings A of several readings "A, B", and each B is a series.
    """
    first, readings = study.factors[0], list(study.readings)
    alone = len(study.factors) == 1 and len(first.levels) == 1 and not first.numbers
    if alone and len(readings) > 1:
        (level,) = first.levels
        parts = [reading.rpartition(", ") for reading in readings]
        names = list(dict.fromkeys(name for name, _, _ in parts))
        kinds = list(dict.fromkeys(kind for _, _, kind in parts))
        return names, {
            kind: [(level, f"{name}, {kind}" if name else kind) for name in names] for kind in kinds
        }
    rest = [list(factor.levels) for factor in study.factors[1:]]
    if len(readings) > 1:
        rest.append(readings)
    return list(first.levels), {
        ", ".join(others): [(name, *others) for name in first.levels]
        for others in itertools.product(*rest)
    }
