"""HTML pages: a template and what it shows, in one file that needs no network."""

import datetime
import importlib.resources
from typing import Any


def render(template: str, figures: dict[str, list[Any]], **content: Any) -> str:
    """Fills a template of this package's. All text is escaped: it may come from names of files.

    Args:
      template: its file name in report/templates.
      figures: Bokeh figures, by the name under which the template places them.
      content: what else the template shows.

    Returns:
      HTML with the style sheet and, where there are figures, Bokeh's script inside.
    """
    import jinja2

    folder = importlib.resources.files("simclr_jax.report") / "templates"
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = ""
    parts: dict[str, list[str]] = {name: [] for name in figures}
    if any(figures.values()):
        from bokeh.embed import components
        from bokeh.resources import Resources

        flat = [plot for plots in figures.values() for plot in plots]
        drawn, divisions = components(flat)
        script = (
            Resources(mode="inline", components=["bokeh"], log_level="warn").render_js() + drawn
        )
        left = iter(divisions)
        parts = {name: [next(left) for _ in plots] for name, plots in figures.items()}
    return environment.get_template(template).render(
        script=script,
        figures=parts,
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **content,
    )


def in_words(value: Any) -> str:
    """Writes the value of an option; numbers with six digits at most."""
    if isinstance(value, tuple):
        return f"({', '.join(map(in_words, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
