"""The metrics of a training: read late, checked, averaged, reported."""

import collections
import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from simclr_jax.console import Progress, say
from simclr_jax.errors import NotFinite
from simclr_jax.files import write_text
from simclr_jax.training.clock import Clock
from simclr_jax.training.metrics import MetricWriter
from simclr_jax.training.verdict import Verdict

# Steps that may be under way before the loop waits for the oldest: the device always has the next
# one queued, and no more than this many batches lie in its memory.
STEPS_AHEAD = 2

# Steps in a row that may be skipped for numbers that are not finite. A training that only some batches upset
# recovers within a few; an encoder that has blown up never does.
SKIPPED_IN_A_ROW = 10


@dataclasses.dataclass(frozen=True)
class Reporting:
    """How often metrics are reported, and what they are of.

    Attributes:
      every_steps: steps between two reports; a reported mean is over these steps. The last step is reported, too.
      batch_size: B, images of the global batch, for images per second.
      advice: what the user can do about a loss that is not finite.
      judge: (step, reported means) -> verdict on the run; None: the run is not judged.
    """

    every_steps: int
    batch_size: int
    advice: str = ""
    judge: Callable[[int, dict[str, float]], Verdict] | None = None


class Log:
    """Reads every step's metrics, stops on a non-finite one, and reports means when due.

    Metrics are read two steps late, when they are ready, so that the device never waits for them.

    Attributes:
      window: metrics of the steps since the last report; a checkpoint keeps them.
    """

    def __init__(
        self,
        workdir: str,
        writer: MetricWriter | None,
        progress: Progress,
        reporting: Reporting,
        window: list[dict[str, float]],
        clock: Clock,
    ):
        """Starts with no step under way.

        Args:
          workdir: where the images of a step that is not finite are named.
          writer: writes the means; None: they are only shown.
          progress: shows the means.
          reporting: how often to report, and the sizes of the run.
          window: the `window` of the log that this one goes on from.
          clock: times the steps.
        """
        self.window = list(window)
        self._workdir, self._writer, self._progress = workdir, writer, progress
        self._reporting = reporting
        self._pending: collections.deque[tuple[int, Any, dict]] = collections.deque()
        self._skipped = 0  # in a row
        self._clock = clock
        self._verdict: Verdict | None = None

    def add(self, step: int, metrics: Any, images: dict[str, np.ndarray]) -> None:
        """Takes the metrics of `step`, still being computed, and {"epoch", "index"} of its images."""
        self._pending.append((step, metrics, images))
        if len(self._pending) > STEPS_AHEAD:
            self._read(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for all metrics taken so far."""
        while self._pending:
            # On a CPU these steps may have ended before the ones that were read last: they would count as taking no time.
            self._read(*self._pending.popleft(), is_timed=False)

    def store(self) -> None:
        """Waits for all metrics taken so far, and has them stored."""
        self.drain()
        if self._writer is not None:
            self._writer.store()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of its own, such as an evaluation's. Leaves the time since the last step out of what is timed."""
        if values and self._writer is not None:
            self._writer.write(step, values)
        self._clock.pause()

    def _read(
        self, step: int, metrics: Any, images: dict[str, np.ndarray], is_timed: bool = True
    ) -> None:
        with self._clock.computing():
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._check(step, values, images)
        self.window.append(values)
        self._clock.step(is_timed)
        self._progress.advance(step)
        if step % self._reporting.every_steps == 0 or step == self._progress.total:
            self._report(step)

    def _report(self, step: int) -> None:
        means = mean_of(self.window) | self._clock.report(self._reporting.batch_size)
        if self._writer is not None:
            self._writer.write(step, means)
        self._progress.report(step, summary_of(means))
        self.window = []
        self._judge(step, means)

    def _judge(self, step: int, means: dict[str, float]) -> None:
        """Prints the verdict when it turns bad, turns to another bad one, or is no longer bad."""
        if self._reporting.judge is None or "loss" not in means:
            return
        before, self._verdict = self._verdict, self._reporting.judge(step, means)
        was, now = (v.name if v and v.is_bad else "" for v in (before, self._verdict))
        if was != now:
            say(f"step {step}  {now or f'no longer {was!r}'}: {self._verdict.because}")

    def _check(self, step: int, values: dict[str, float], images: dict[str, np.ndarray]) -> None:
        bad = [
            f"{name} {values[name]}"
            for name in ("loss", "grad_norm")
            if not math.isfinite(values[name])
        ]
        if not bad and values.get("skipped_steps"):
            bad = ["the update or running statistics"]
        if not bad:
            self._skipped = 0
            return
        where = write_offender(self._workdir, step, values, images)
        advice = self._reporting.advice
        if "skipped_steps" not in values:
            what = f"{', '.join(bad)},"
            raise not_finite(step, what, advice, f" {where} names its images.")
        self._skipped += 1
        if self._skipped > SKIPPED_IN_A_ROW:
            what = f"{', '.join(bad)}, the {self._skipped}th in a row,"
            raise not_finite(step, what, advice)


def mean_of(window: list[dict[str, float]]) -> dict[str, float]:
    """Averages metrics over steps.

    Args:
      window: the metrics of each step, one or more.

    Returns:
      means over the steps that were not skipped, except for these:
      metrics of a classifier: means over the images that have a label; left out where no image has one.
      "labelled_share": the share of the images that have a label; left out where all have one.
      "skipped_steps": how many steps were skipped; left out where steps cannot be skipped.
      "learning_rate": that of the newest step, as a schedule has a value at a step.
    """
    taken = [values for values in window if not values.get("skipped_steps")]
    labelled = [values.get("labelled_share", 1.0) for values in taken]
    means = {}
    for name in window[-1]:
        if name in ("skipped_steps", "labelled_share"):
            continue
        # The first steps may be of an earlier version, which did not have this metric.
        there = [values for values in taken if name in values]
        weights = [
            values.get("labelled_share", 1.0) if name.startswith("classifier_") else 1.0
            for values in there
        ]
        if total := sum(weights):
            weighted = (w * values[name] for w, values in zip(weights, there, strict=True))
            means[name] = sum(weighted) / total
    if any(share < 1 for share in labelled):
        means["labelled_share"] = sum(labelled) / len(labelled)
    means["learning_rate"] = window[-1]["learning_rate"]
    if "skipped_steps" in window[-1]:
        means["skipped_steps"] = len(window) - len(taken)
    return means


def write_offender(
    workdir: str, step: int, values: dict[str, float], images: dict[str, np.ndarray]
) -> epath.Path:
    """Writes WORKDIR/not_finite_step_N.json: the metrics of a step, and this process's images of it."""
    process = f"_process_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = epath.Path(workdir) / f"not_finite_step_{step}{process}.json"
    content = {"step": step} | {name: str(value) for name, value in values.items()}
    content |= {name: rows.tolist() for name, rows in images.items()}
    write_text(path, json.dumps(content) + "\n")
    return path


def not_finite(step: int, what: str, advice: str, more: str = "") -> NotFinite:
    """Makes the error of a training that cannot go on: what is not finite, and what to do about it."""
    return NotFinite(
        f"step {step}: {what} not finite.{more} The last checkpoint is from before it; {advice}"
    )


def steps_between_reports(asked: int, steps: int) -> int:
    """Returns the steps between two reports of a training: what is asked for; of a training that is shorter than that, a
    tenth of its length, so that its curves are more than a point.
    """
    return asked if asked <= steps else max(1, steps // 10)


def summary_of(metrics: dict[str, float]) -> str:
    """Writes the few metrics that a person watches in one line."""
    parts = []
    if "loss" in metrics:  # else every step was skipped
        parts.append(f"loss {metrics['loss']:.3f}")
    if "contrastive_top1" in metrics:
        parts.append(f"contrastive acc {metrics['contrastive_top1']:.1%}")
    if metrics.get("skipped_steps"):
        parts.append(f"{metrics['skipped_steps']} steps skipped")
    if "classifier_accuracy" in metrics:
        name = "online acc" if "classifier_loss" in metrics else "training acc"
        parts.append(f"{name} {metrics['classifier_accuracy']:.1%}")
    parts.append(f"lr {metrics['learning_rate']:.2g}")
    if "images_per_second" in metrics:  # not before a second step has been timed
        parts.append(f"{metrics['images_per_second']:.0f} images/s")
    return "  ".join(parts)
