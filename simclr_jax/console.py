"""Lines, tables and progress at the terminal. Only the first process prints."""

import time
from collections.abc import Iterable, Iterator
from typing import Self

import jax
import rich.console
import rich.progress
import rich.table

# Markup and emoji are off, because a file name may contain [/b] or :100:.
_console = rich.console.Console(highlight=False, soft_wrap=True, markup=False, emoji=False)


def say(text: str = "") -> None:
    """Prints a line, as it is."""
    if jax.process_index() == 0:
        _console.print(text)


def show_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Prints a table, each text as it is: the first column to the left, the others to the right."""
    if jax.process_index() != 0:
        return
    table = rich.table.Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    _console.print(table)


class Progress:
    """Shows how far a training, an evaluation or an embedding is. A context manager.

    Metrics are plain lines. On a terminal a live bar of less than 80 columns stays below them.

    Attributes:
      total: the number of steps.
    """

    def __init__(self, total: int, start: int = 0):
        """Starts at step `start` of `total`."""
        self.total, self._start = total, start
        self._first: tuple[int, float] | None = None  # first step and its end: compilation is over
        self._bar = None
        if _console.is_terminal and jax.process_index() == 0:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}"),
                rich.progress.BarColumn(bar_width=20),
                rich.progress.TextColumn("{task.percentage:>3.0f} %  {task.fields[text]}"),
                rich.progress.TimeRemainingColumn(),
                console=_console,
            )
            self._task = self._bar.add_task("", total=total, completed=start, text="compiling")

    def advance(self, step: int) -> None:
        """Moves the bar to `step`, which has just ended."""
        self._first = self._first or (step, time.monotonic())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text="left")

    def report(self, step: int, text: str) -> None:
        """Shows a text about a step as a line, with the time that is left."""
        self.advance(step)
        left = self._left(step)
        ending = f"  left {duration(left)}" if left is not None and self._bar is None else ""
        say(f"step {step}/{self.total}  {text}{ending}")

    def _left(self, step: int) -> float | None:
        """Estimates the seconds left from the time of the steps after the first one; None before there is one."""
        assert self._first is not None
        first, began = self._first
        if step == first:
            return None
        return (time.monotonic() - began) / (step - first) * (self.total - step)

    def track(self, items: Iterable) -> Iterator:
        """Yields the items, each of which is a step, and moves the bar with each."""
        for step, item in enumerate(items, self._start + 1):
            self.advance(step)  # before the yield: the consumer may stop after the last item
            yield item

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        if self._bar is not None:
            self._bar.stop()


def duration(seconds: float) -> str:
    """Writes seconds as h:mm:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
