"""Curves of metrics over steps, with values under the pointer, by Bokeh."""

import itertools
import math
from typing import Any, NamedTuple

from simclr_jax.errors import UserError
from simclr_jax.report.run_files import RunFiles

# Colours that the colour-blind can tell apart, on white and on dark grey (Okabe and Ito 2008).
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8a7f00", "#777777")
_DASHES = ("solid", "dashed", "dotted", "dotdash")
_TEXT = "#767676"  # readable on white and on dark grey
_MOST_POINTS = 600  # of the curves of one metric: a pixel each


class Panel(NamedTuple):
    """One diagram.

    Attributes:
      title: text above the diagram.
      metrics: {name in metrics.jsonl: what a person calls it}.
      unit: behind each value, such as "nats"; "" for none.
      log: the axis of values is logarithmic.
      percent: values are shares, shown in per cent.
    """

    title: str
    metrics: dict[str, str]
    unit: str = ""
    log: bool = False
    percent: bool = False


PANELS = (
    Panel(
        "Accuracy on the way",
        {
            "classifier_accuracy": "online classifier, training images",
            "probe_accuracy": "linear probe, test images",
            "knn_accuracy": "nearest neighbours, test images",
        },
        "%",
        percent=True,
    ),
    Panel(
        "Contrastive accuracy",
        {
            "contrastive_top1": "of all 2B - 1",
            "contrastive_top5": "of all 2B - 1, five best",
            "other_view_top1": "of the other view's B",
            "other_view_top5": "of the other view's B, five best",
        },
        "%",
        percent=True,
    ),
    Panel(
        "Entropy of the contrastive distribution",
        {"contrastive_entropy": "over 2B - 1", "other_view_entropy": "over B"},
        "nats",
    ),
    Panel("Spread of z", {"z_std": "standard deviation of z"}),
    Panel("Alignment of partners", {"alignment": "mean squared distance"}),
    Panel("Uniformity of z", {"uniformity": "ln mean exp(-2 distance²)"}),
    Panel("Effective rank (RankMe)", {"rank_h": "of h", "rank_z": "of z"}),
    Panel(
        "Gradient and update", {"grad_norm": "gradient", "update_norm": "update"}, "norm", log=True
    ),
    Panel(
        "Trust ratio of LARS",
        {"trust_ratio_min": "least", "trust_ratio_median": "median", "trust_ratio_max": "largest"},
        log=True,
    ),
    Panel("Loss of the online classifier", {"classifier_loss": "cross-entropy"}, "nats"),
    Panel("Learning rate", {"learning_rate": "learning rate"}),
    Panel("Speed", {"images_per_second": "images a second"}, "images/s"),
    Panel(
        "Share of the time",
        {
            "share_of_time_input": "waiting for images",
            "share_of_time_saving": "saving",
            "share_of_time_evaluating": "evaluating",
        },
        "%",
        percent=True,
    ),
)


def need_bokeh() -> None:
    """Raises a UserError where Bokeh is not installed."""
    try:
        import bokeh  # noqa: F401
        import jinja2  # noqa: F401
    except ImportError as error:
        raise UserError(
            "a report needs Bokeh, which is not installed: pip install -e '.[report]'"
        ) from error


def draw_curves(runs: list[RunFiles], references: dict[str, dict[str, float]]) -> list[Any]:
    """Draws every panel for which there are metrics.

    Args:
      runs: one run, or several, which are then overlaid in colours of their own.
      references: {metric: {name of a constant line: its height}}.

    Returns:
      Bokeh figures.
    """
    units = {run.loss_unit for run in runs}
    loss = Panel("Loss", {"loss": "loss"}, units.pop() if len(units) == 1 else "")
    panels = [loss, *PANELS]
    known = {name for panel in panels for name in panel.metrics}
    there = {name for run in runs for line in run.lines for name in line}
    rest = sorted(there - known - {"step", "time", "skipped_steps"})
    panels += [Panel(name, {name: name}) for name in rest]
    if len(runs) > 1:  # a colour for each run, and no line styles to tell apart
        panels = [
            panel._replace(title=name, metrics={name: name})
            for panel in panels
            for name in panel.metrics
        ]
    return [_figure(runs, panel, references) for panel in panels if there & {*panel.metrics}]


def _figure(runs: list[RunFiles], panel: Panel, references: dict[str, dict[str, float]]) -> Any:
    from bokeh.models import BasicTickFormatter, ColumnDataSource, HoverTool
    from bokeh.plotting import figure

    plot = figure(
        title=panel.title + (f", {panel.unit}" if panel.unit else ""),
        height=240,
        sizing_mode="stretch_width",
        y_axis_type="log" if panel.log else "linear",
        tools="xpan,xwheel_zoom,box_zoom,reset",
        active_drag=None,
        active_scroll=None,
        x_axis_label="step",
    )
    factor = 100.0 if panel.percent else 1.0
    marks: list[Any] = []
    # Either several runs with one metric, or one run with several metrics: `number` picks the colour.
    for number, (run, name) in enumerate(itertools.product(runs, panel.metrics)):
        steps, values = _thinned(*run.series(name), max(2, _MOST_POINTS // len(runs)))
        if not steps:
            continue
        label = run.name if len(runs) > 1 else panel.metrics[name]
        source = ColumnDataSource({"x": steps, "y": [factor * v for v in values]})
        colour = COLOURS[number % len(COLOURS)]
        turn = number // len(COLOURS) if len(runs) > 1 else number
        look: dict[str, Any] = {"source": source, "color": colour, "legend_label": label}
        plot.line("x", "y", line_dash=_DASHES[turn % len(_DASHES)], line_width=2, **look)
        size = 0 if len(steps) > 40 else 5
        marks.append(plot.scatter("x", "y", size=size, name=label, **look))
    ends = [min(line["step"] for r in runs for line in r.lines), max(r.steps for r in runs)]
    for name in panel.metrics:
        for text, height in references.get(name, {}).items():
            level = [factor * height] * 2
            label = f"{text}: {height:.3g}"
            plot.line(ends, level, color=_TEXT, line_dash=[2, 4], legend_label=label)
    if not panel.log:
        plot.yaxis.formatter = BasicTickFormatter(power_limit_low=-6)
    unit = f" {panel.unit}" if panel.unit else ""
    said = [("", "$name"), ("step", "@x{0,0}"), ("", "@y{%.4g}" + unit)]
    formats: dict[str, Any] = {"@y": "printf"}
    plot.add_tools(HoverTool(tooltips=said, formatters=formats, renderers=marks, mode="vline"))
    _style(plot)
    return plot


def _thinned(steps: list[int], values: list[float], most: int) -> tuple[list[int], list[float]]:
    """Returns at most `most` finite points, every n-th one back from the newest."""
    kept = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)][::-1]
    kept = kept[:: max(1, math.ceil(len(kept) / most))][::-1]
    return [s for s, _ in kept], [v for _, v in kept]


def _style(plot: Any) -> None:
    """Makes a diagram readable on a light and on a dark page."""
    plot.background_fill_alpha = 0
    plot.border_fill_alpha = 0
    plot.outline_line_color = None
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.title.text_color = _TEXT
    plot.grid.grid_line_color = _TEXT
    plot.grid.grid_line_alpha = 0.25
    for axis in plot.axis:
        axis.axis_label_text_color = axis.major_label_text_color = _TEXT
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = _TEXT
    if plot.legend:
        legend = plot.legend[0]
        legend.background_fill_alpha = 0
        legend.border_line_alpha = 0
        legend.label_text_color = _TEXT
        legend.label_text_font_size = "11px"
        legend.padding = legend.margin = legend.spacing = 1
        legend.label_height = legend.glyph_height = 14
        legend.click_policy = "hide"
        plot.add_layout(legend, "below")
        plot.height += 16 * len(legend.items)
