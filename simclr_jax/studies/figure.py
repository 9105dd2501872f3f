"""The figure of a study: ours with mean and spread over seeds, and the paper's numbers on an axis of their
own, so that the shapes can be compared.
"""

import datetime
import itertools
from collections.abc import Sequence
from typing import Any

from etils import epath

from simclr_jax.errors import UserError
from simclr_jax.files import replacing, writing
from simclr_jax.studies.claims import deviation, mean
from simclr_jax.studies.contract import Key, Scores, Study
from simclr_jax.studies.outcomes import Outcomes

# Okabe and Ito's colours, which the colour-blind tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000")


def draw(study: Study, outcomes: Outcomes, data: str, folder: epath.Path) -> list[epath.Path]:
    """Draws the figure of what is there, as FOLDER/figure.png and figure.svg.

    Args:
      study: what is drawn.
      outcomes: what its runs reached.
      data: names the data, for the caption.
      folder: the study's.

    Returns:
      the files; none if nothing is there yet.

    Raises:
      UserError: matplotlib is not installed, or a file cannot be written.
    """
    if not outcomes.scores:
        return []
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError(
            "a study's figure needs matplotlib: pip install matplotlib, or pip install -e '.[studies]'"
        ) from error
    from matplotlib.figure import Figure  # not pyplot, which keeps figures and asks for a screen

    with mpl.rc_context({"font.size": 9, "svg.fonttype": "none", "axes.grid": True,
                         "grid.alpha": 0.3, "axes.spines.top": False,
                         "axes.spines.right": False}):  # fmt: skip
        panels = 2 if study.published else 1
        figure = Figure(figsize=(4.2 * panels, 3.6), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        seeds = max(len(x) for x in outcomes.scores.values())
        _panel(axes[0], study, outcomes.scores)
        axes[0].set_title(f"{data}, {seeds} seed{'s' if seeds > 1 else ''}", fontsize=9)
        axes[0].set_ylabel(f"{study.evaluation}, test accuracy, %")
        if study.published:
            published = {k: {0: v / 100} for k, v in study.published.values.items()}
            _panel(axes[1], study, published)
            axes[1].set_title(study.published.source, fontsize=9)
            axes[1].set_ylabel("accuracy, %")
        missing = f"; {len(outcomes.missing)} runs missing" if outcomes.missing else ""
        today = datetime.date.today().isoformat()
        figure.suptitle(f"{study.title} ({today}{missing})", fontsize=10)
        files = [folder / f"figure.{kind}" for kind in ("png", "svg")]
        for file, kind in zip(files, ("png", "svg"), strict=True):
            with writing(file), replacing(file) as scratch, scratch.open("wb") as opened:
                figure.savefig(opened, format=kind, dpi=150)
    return files


def _panel(axes: Any, study: Study, scores: Scores) -> None:
    """Draws a line or a group of bars for each level of the second factor, or for each reading."""
    first = study.factors[0]
    places = [float(name) for name in first.levels] if first.numbers else range(len(first.levels))
    series = _series(study)
    for number, (name, keys) in enumerate(series.items()):
        there = [(x, key) for x, key in zip(places, keys, strict=True) if scores.get(key)]
        if not there:
            continue
        x = [place for place, _ in there]
        y = [100 * mean(scores, key) for _, key in there]
        error = [100 * deviation(scores, key) for _, key in there]
        colour = _COLOURS[number % len(_COLOURS)]
        if first.numbers:
            axes.errorbar(x, y, error, color=colour, marker="o", capsize=3, label=name)
            continue
        width = 0.8 / len(series)
        x = [place + (number - (len(series) - 1) / 2) * width for place in x]
        axes.bar(x, y, width * 0.9, yerr=error, color=colour, capsize=3, label=name)
    if first.numbers:
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, list(first.levels))
        axes.minorticks_off()
    else:
        axes.set_xticks(list(places), list(first.levels), rotation=25, ha="right")
        _cut_bars(axes, scores, _flat(series))
    axes.set_xlabel(first.name)
    if len(series) > 1:
        axes.legend(fontsize=8, frameon=False, title=_name_of_series(study))


def _cut_bars(axes: Any, scores: Scores, keys: Sequence[Key]) -> None:
    """Begins the axis below the lowest bar: studies differ by points, not by tens of them."""
    values = [100 * v for key in keys for v in scores.get(key, {}).values()]
    if values:
        room = max(2.0, 0.25 * (max(values) - min(values)))
        axes.set_ylim(max(0.0, min(values) - room), min(100.0, max(values) + room))


def _series(study: Study) -> dict[str, list[Key]]:
    first = study.factors[0]
    rest = [list(factor.levels) for factor in study.factors[1:]]
    if len(study.readings) > 1:
        rest.append(list(study.readings))
    return {
        ", ".join(others): [(name, *others) for name in first.levels]
        for others in itertools.product(*rest)
    }


def _name_of_series(study: Study) -> str:
    return study.factors[1].name if len(study.factors) > 1 else ""


def _flat(series: dict[str, list[Key]]) -> list[Key]:
    return [key for keys in series.values() for key in keys]
