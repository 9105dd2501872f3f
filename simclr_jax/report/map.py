"""Draws the map of the embedding: thumbnails in a plane, framed in the colour of their class."""

from typing import Any

import numpy as np

from simclr_jax.report.curves import COLOURS
from simclr_jax.report.learned import Embedded
from simclr_jax.report.thumbnails import data_url

_TILE = 22  # pixels on the page
_NO_CLASS = "#bbbbbb"
_PICTURE = 44  # pixels of a stored thumbnail: twice _TILE, to stay sharp on an enlarged page


def colours_of(classes: tuple | None) -> list[tuple[str, str]]:
    """Returns (class, colour of its frames); colours repeat where there are more classes than colours."""
    return [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(classes or ())]


def draw_map(places: np.ndarray, some: Embedded, names: list[str], classes: tuple | None) -> Any:
    """Draws a map as a Bokeh figure.

    Args:
      places: positions of n images in the plane, [n, 2].
      some: thumbnails and labels of these images.
      names: a name for each, as a person knows it.
      classes: names of the labels; None: there are none.
    """
    from bokeh.models import ColumnDataSource, HoverTool
    from bokeh.plotting import figure

    plot = figure(
        height=560,
        sizing_mode="stretch_width",
        tools="pan,wheel_zoom,box_zoom,reset",
        active_drag=None,
        active_scroll=None,
    )
    labels = [classes[i] if classes and i >= 0 else "" for i in some.labels]
    columns = {
        "x": places[:, 0].tolist(),
        "y": places[:, 1].tolist(),
        "url": [data_url(thumbnail, _PICTURE) for thumbnail in some.thumbnails],
        "name": names,
        "label": labels,
        "colour": [
            COLOURS[i % len(COLOURS)] if i >= 0 else _NO_CLASS for i in some.labels.tolist()
        ],
    }
    source = ColumnDataSource(columns)  # shared: the pictures are written once
    side = _TILE + 4
    frames = plot.scatter("x", "y", source=source, marker="square", size=side, color="colour")
    plot.image_url(
        url="url",
        x="x",
        y="y",
        source=source,
        anchor="center",
        w=_TILE,
        h=_TILE,
        w_units="screen",
        h_units="screen",
    )
    hover = '<img src="@url" width="88"><br>@name<br><b>@label</b>'
    plot.add_tools(HoverTool(tooltips=hover, renderers=[frames]))
    plot.background_fill_alpha = plot.border_fill_alpha = 0
    plot.outline_line_color = None
    plot.axis.visible = plot.grid.visible = False
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    return plot
