"""The metrics of a run: read late, checked, averaged, reported."""

import collections
import json
import math
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from simclr_jax.console import Progress
from simclr_jax.errors import UserError
from simclr_jax.metrics import MetricWriter

# Steps that may be under way before the loop waits for the oldest: the device always has the next
# one queued, and no more than this many batches lie in its memory.
_STEPS_AHEAD = 2

# Steps in a row that may be skipped for a loss or gradient that is not finite. A scale that is only
# too large for some batches recovers within a few; an encoder that has blown up never does.
_SKIPPED_IN_A_ROW = 10


class Log:
    """Reads every step's metrics, stops on a non-finite one, and reports means when due.

    Metrics are read two steps late, when they are ready, so that the device never waits for them.
    """

    def __init__(
        self,
        workdir: str,
        writer: MetricWriter | None,
        progress: Progress,
        *,
        every: int,
        batch_size: int,
        total: int,
        window: list[dict[str, float]],
    ):
        """Starts with no step under way.

        Args:
          workdir: where the images of a step that is not finite are named.
          writer: of the means; None: they are only shown.
          progress: where they are shown.
          every: steps a mean is over.
          batch_size: B.
          total: steps of the run.
          window: `window` of the log that this one goes on from.
        """
        self.window = list(window)  # metrics of the steps since the last report
        self._workdir, self._writer, self._progress = workdir, writer, progress
        self._every, self._batch_size, self._total = every, batch_size, total
        self._pending: collections.deque[tuple[int, Any, dict]] = collections.deque()
        self._skipped = 0  # in a row
        self._timed = 0  # steps of the window that ended after `_since`
        self._since: float | None = None  # the first step compiles, which is not timed

    def add(self, step: int, metrics: Any, images: dict[str, np.ndarray]) -> None:
        """Takes the metrics of `step`, still being computed, and which images it saw."""
        self._pending.append((step, metrics, images))
        if len(self._pending) > _STEPS_AHEAD:
            self._read(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for all metrics taken so far."""
        while self._pending:
            self._read(*self._pending.popleft())

    def _read(self, step: int, metrics: Any, images: dict[str, np.ndarray]) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._check(step, values, images)
        self.window.append(values)
        now = time.monotonic()
        if self._since is None:
            self._since = now
        else:
            self._timed += 1
        self._progress.advance(step)
        if step % self._every == 0 or step == self._total:
            means = mean_of(self.window)
            if self._timed:
                means["images_per_second"] = self._timed * self._batch_size / (now - self._since)
            if self._writer is not None:
                self._writer.write(step, means)
            self._progress.report(step, means)
            self.window, self._timed, self._since = [], 0, now

    def _check(self, step: int, values: dict[str, float], images: dict[str, np.ndarray]) -> None:
        bad = [
            f"{name} {values[name]}"
            for name in ("loss", "grad_norm")
            if not math.isfinite(values[name])
        ]
        if not bad:
            self._skipped = 0
            return
        where = write_offender(self._workdir, step, values, images)
        if "skipped_steps" not in values:
            raise not_finite(step, f"{', '.join(bad)},", f" {where} names its images.")
        self._skipped += 1
        if self._skipped > _SKIPPED_IN_A_ROW:
            raise not_finite(step, f"{', '.join(bad)}, the {self._skipped}th in a row,")


def mean_of(window: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps that were not skipped, how many were skipped, and the newest learning
    rate: a schedule has a value at a step, not a mean over some.
    """
    taken = [values for values in window if not values.get("skipped_steps")]
    means = {
        name: sum(values[name] for values in taken) / len(taken)
        for name in window[-1]
        if taken and name != "skipped_steps"
    }
    means["learning_rate"] = window[-1]["learning_rate"]
    if "skipped_steps" in window[-1]:
        means["skipped_steps"] = len(window) - len(taken)
    return means


def write_offender(
    workdir: str, step: int, values: dict[str, float], images: dict[str, np.ndarray]
) -> epath.Path:
    """Names the images of this process's part of a step that is not finite, in the workdir."""
    process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = epath.Path(workdir) / f"not_finite_step_{step}{process}.json"
    content = {"step": step} | {name: str(value) for name, value in values.items()}
    content |= {name: rows.tolist() for name, rows in images.items()}
    path.write_text(json.dumps(content) + "\n")
    return path


def not_finite(step: int, what: str, more: str = "") -> UserError:
    """The error of a run that cannot go on."""
    return UserError(
        f"step {step}: {what} not finite.{more} The last checkpoint is from before it; in another "
        "--workdir, try a lower optimizer.learning_rate, a longer warm-up, model.dtype=float32 or "
        "train.skip_not_finite=True"
    )
