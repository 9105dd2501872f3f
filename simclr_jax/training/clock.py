"""Counts what a training spends its time on, since the last report and since the run began."""

import contextlib
import time
from collections.abc import Callable, Iterator

import numpy as np

from simclr_jax import processes

_SAVES_THAT_TELL = 5
_COSTLY = 0.1  # share of the time


class Clock:
    """Counts the seconds of one process."""

    def __init__(
        self,
        memory: dict[str, float] | None = None,
        gather: Callable[[float], list[float]] = processes.of_all,
    ):
        """Begins with the first step, which compiles, under way.

        Args:
          memory: `memory` of the clock that this one goes on from; None: the run begins now.
          gather: this process's number -> those of all processes. With several it waits for the steps under way.
        """
        self._began = memory["began"] if memory else time.time()
        self._trained = memory["trained"] if memory else 0.0
        self._gather = gather
        self._reported_at = time.monotonic()
        self._last_step_at: float | None = None  # None: nothing is timed until the next step
        self._is_timed = True  # whether the next step is
        self._saved_since_step = 0.0  # seconds
        self._save_seconds: list[float] = []  # of each save
        self._first_step_at: float | None = None
        self._warned = False
        self._spent: dict[str, float] = {}
        self._forget()

    def _forget(self) -> None:
        self._steps, self._seconds = 0, 0.0  # those that ended while the clock was running
        self._computed = 0.0
        self._spent = dict.fromkeys(self._spent, 0.0)

    @property
    def memory(self) -> dict[str, float]:
        """For a checkpoint: when the run began, in seconds since 1970, and how many seconds it has trained."""
        return {"began": self._began, "trained": self._trained}

    @contextlib.contextmanager
    def spending(self, on: str) -> Iterator[None]:
        """Counts the time of the block as spent on "input", "saving" or "evaluating"."""
        began = time.monotonic()
        yield
        seconds = time.monotonic() - began
        self._spent[on] = self._spent.get(on, 0.0) + seconds
        if on == "saving":
            self._saved_since_step += seconds
            self._save_seconds.append(seconds)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Counts the time of the block as spent on the devices, where processes wait for each other."""
        began = time.monotonic()
        yield
        self._computed += time.monotonic() - began

    def step(self, is_timed: bool = True) -> None:
        """Says that a step has ended. `is_timed=False`: neither this step nor the next one counts in images_per_second,
        as the time between them is not that of a step.
        """
        now = time.monotonic()
        self._first_step_at = now if self._first_step_at is None else self._first_step_at
        if self._last_step_at is not None:
            if is_timed and self._is_timed:
                self._steps += 1
                self._seconds += now - self._last_step_at
            self._trained += max(0.0, now - self._last_step_at - self._saved_since_step)
        self._last_step_at, self._saved_since_step = now, 0.0
        self._is_timed = is_timed

    def pause(self) -> None:
        """Leaves the time since the last step out."""
        if self._last_step_at is not None:
            self._last_step_at, self._saved_since_step = time.monotonic(), 0.0
            self._is_timed = False

    def costly_saving(self) -> str | None:
        """Returns, once, a line that says what saves cost, if five or more took over a tenth of the time."""
        if (
            self._warned
            or len(self._save_seconds) < _SAVES_THAT_TELL
            or self._first_step_at is None
        ):
            return None
        share = sum(self._save_seconds) / max(time.monotonic() - self._first_step_at, 1e-9)
        if share < _COSTLY:
            return None
        self._warned = True
        each = sum(self._save_seconds) / len(self._save_seconds)
        return (
            f"saving      takes {100 * share:.0f} % of the time, {each:.2g} s each: a larger "
            "checkpoint.every_steps costs less, and a stop that cannot save loses up to as many steps"
        )

    def report(self, batch_size: int) -> dict[str, float]:
        """Returns metrics of the time since the last report; all processes call it after the same step.

        images_per_second: while steps were timed; a step has B = batch_size images.
        share_of_time_input, _saving, _evaluating: in [0, 1], of this process.
        goodput: the share of the time since the run began, over all restarts, that was spent on steps which
            were kept; compiling, restoring, saving, evaluating, standing still and steps lost count against it.
        slowest_process, slowest_process_share: with several processes, the process that spends the largest share
            of its time outside the step, in which processes wait for each other, and that share.
        """
        found = {}
        if self._steps:
            found["images_per_second"] = self._steps * batch_size / self._seconds
        now = time.monotonic()
        passed = max(now - self._reported_at, 1e-9)
        for on, seconds in self._spent.items():
            found[f"share_of_time_{on}"] = seconds / passed
        found["goodput"] = min(1.0, self._trained / max(time.time() - self._began, 1e-9))
        busy = self._gather(max(0.0, passed - self._computed) / passed)
        if len(busy) > 1:
            found["slowest_process"] = float(np.argmax(busy))
            found["slowest_process_share"] = max(busy)
        # After the gathering, in which processes wait for each other.
        self._reported_at = time.monotonic()
        self._forget()
        return found
