"""--mode=report: one HTML page of a run, or of several runs side by side; --mode=views: of views only."""

import glob
import os
import shlex

import jax
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import say
from simclr_jax.data import name_of
from simclr_jax.errors import UserError, one_line
from simclr_jax.files import absolute, write_text
from simclr_jax.report.curves import need_bokeh
from simclr_jax.report.page import render
from simclr_jax.report.run_files import read_run_files
from simclr_jax.report.run_page import page_of_run
from simclr_jax.report.runs_page import page_of_runs
from simclr_jax.report.sheet import SHEET_EPOCHS, sheet_of


def report(config: ConfigDict | None, workdir: str, runs: str = "", output: str = "") -> epath.Path:
    """Writes a page about the run of a workdir, whatever state it is in, or about several runs.

    Args:
      config: the run's configuration; not used with `runs`.
      workdir: its folder; with `runs`, where the page goes.
      runs: workdirs, or patterns of them such as RUNS/*, separated by spaces, quoted as in a shell; "": the one of `workdir`.
      output: the page; "": WORKDIR/report.html, or with `runs` WORKDIR/runs.html.

    Returns:
      the page's path.

    Raises:
      UserError: there is no run, Bokeh is not installed, or the page cannot be written.
    """
    need_bokeh()
    if runs:
        path = _page_at(output or os.path.join(workdir, "runs.html"))
        # A name with spaces that is there as it stands needs no quotes.
        is_one = bool(glob.glob(os.path.expanduser(runs)))
        page = page_of_runs([runs] if is_one else _several(runs), str(path.parent))
    else:
        assert config is not None
        path = _page_at(output or os.path.join(workdir, "report.html"))
        page = page_of_run(config, read_run_files(workdir))
    write_text(path, page)
    say(f"report      {path} ({len(page.encode()) / 1e6:.1f} MB)")
    return path


def _several(runs: str) -> list[str]:
    try:
        return shlex.split(runs)
    except ValueError as error:  # a quotation without an end
        raise UserError(
            f"--runs={runs}: {error}: expected folders separated by spaces; write an apostrophe as \\'"
        ) from error


def report_at_end(config: ConfigDict, workdir: str) -> None:
    """Writes WORKDIR/report.html after a training; if that fails, for want of a package or otherwise, prints why."""
    if jax.process_count() > 1:
        say(
            f"report      by one process: python -m simclr_jax.main --mode=report --workdir={workdir}"
        )
        return
    try:
        report(config, workdir)
    except Exception as error:  # the training is saved: nothing may make it look failed
        say(f"report      none: {one_line(error)}")


def views(config: ConfigDict, workdir: str, output: str = "") -> None:
    """Writes a page of eight training images and the views that training would see of each.

    Args:
      config: a run's configuration.
      workdir: where the page goes.
      output: the page; "": WORKDIR/views.html.

    Raises:
      UserError: there are no data, or the page cannot be written.
    """
    need_bokeh()
    path = _page_at(output or os.path.join(workdir, "views.html"))
    rows = sheet_of(config, assemble.data_set(config).train)
    page = render(
        "views.html",
        {},
        title=f"Views: {name_of(config.data.to_dict())}",
        views=rows,
        epochs=SHEET_EPOCHS,
        size=config.data.image_size,
    )
    write_text(path, page)
    say(f"views       {path}")


def _page_at(path: str) -> epath.Path:
    """Returns where a page goes. Raises a UserError if the name is that of another kind of file."""
    if not path.lower().endswith((".html", ".htm")):
        raise UserError(f"--output={path}: the page is HTML: expected a file that ends in .html")
    return epath.Path(absolute(path))
