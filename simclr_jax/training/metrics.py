"""WORKDIR/metrics.jsonl and, beside it, TensorBoard events."""

import contextlib
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any, Self

from etils import epath
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from simclr_jax.errors import Unavailable
from simclr_jax.files import in_bucket, storage_error, write_text, writing
from simclr_jax.training.sinks import Sinks

# Between two copies of the metrics into a bucket: its objects cannot grow, so that each copy is of all lines.
_COPY_SECONDS = 60.0

_ADVICE = "Mend this, then the same command resumes from the newest checkpoint"


class MetricWriter:
    """Appends one JSON object a line, {"step": int, "name": value, ...}; a context manager.

    In a bucket lines are stored every minute, by `store`, and at the end.

    Lines past `resume_step` are dropped at the start: those steps are about to be run again.

    A line that is no JSON object with a step, such as one cut off by a power failure, is dropped.

    Args:
      workdir: the folder, which exists.
      resume_step: steps that the restored state has done.
      sinks: () -> further places for what is written, which are closed with the writer; None: there are none.

    Attributes:
      finished: whether the training has come to its last step, for the sinks.
    """

    def __init__(
        self, workdir: str, resume_step: int = 0, sinks: Callable[[], Sinks] | None = None
    ):
        self.finished = False
        self._folder = epath.Path(workdir)
        self._path = self._folder / "metrics.jsonl"
        before = self._path.read_bytes() if self._path.exists() else b""
        whole = before.decode(errors="replace").split("\n")[:-1]
        self._lines = [line for line in whole if 0 <= _step_of(line) <= resume_step]
        self._scratch = tempfile.TemporaryDirectory() if in_bucket(self._folder) else None
        changed = "".join(line + "\n" for line in self._lines).encode() != before
        if changed or not (self._scratch or self._path.exists()):
            self._write_all()
        self._copied = time.monotonic()
        # Not tensorboardX's SummaryWriter, whose thread and exit handler show a full disk's traceback
        # after the one line that says it.
        events = epath.Path(self._scratch.name if self._scratch else workdir) / "events"
        self._events = EventsWriter(str(events))
        # TensorBoard hides what earlier event files hold from this step on.
        self._add_event(resume_step + 1, session_log=SessionLog(status=SessionLog.START))
        self._sinks = sinks and sinks()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of this step, and stores them before it returns; in a bucket `store` does that. JSON has
        no word for a value that is not finite: the line lacks it.

        Raises:
          UserError: they cannot be written.
        """
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = json.dumps({"step": step} | finite, allow_nan=False)
        self._lines.append(line)
        with writing(self._path, _ADVICE):
            if self._scratch is None:
                # Not mode "a", which makes a missing file: a save that is under way makes a removed workdir
                # again, and the run would end well without its first metrics and its config.json.
                with open(self._path, "r+") as file:
                    file.seek(0, os.SEEK_END)
                    file.write(line + "\n")
            for name, value in values.items():
                self._add_event(step, summary=scalar(name, value))
            self._events.flush()
        if time.monotonic() - self._copied > _COPY_SECONDS:
            self.store()
        if self._sinks is not None:
            self._sinks.write(step, values)

    def store(self) -> None:
        """Copies what is written so far into the bucket, if the workdir is in one: to be called before a checkpoint,
        whose metrics should be there. Raises what the bucket's library raises, see `files.storage_error`.
        """
        if self._scratch is None:
            return
        self._write_all()
        for file in epath.Path(self._scratch.name).iterdir():
            (self._folder / file.name).write_bytes(file.read_bytes())
        self._copied = time.monotonic()

    def _add_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))

    def _write_all(self) -> None:
        write_text(self._path, "".join(line + "\n" for line in self._lines), _ADVICE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind, error, *_) -> None:
        with contextlib.ExitStack() as whatever_fails:
            if self._sinks is not None:
                whatever_fails.callback(self._sinks.close, self.finished)
            if self._scratch is not None:
                whatever_fails.callback(self._scratch.cleanup)
            with contextlib.suppress(OSError):  # what matters is in the metrics, and has been said
                self._events.close()
            # A bucket that does not answer would not do so now either.
            if not isinstance(error, Unavailable) and not (error and storage_error(error)):
                self.store()


def read_lines(file: epath.PathLike) -> list[dict]:
    """Reads a file of one JSON object with a "step" a line, such as metrics; [] if it is not there. Other lines are left
    out, such as a last one that is still being written, or one that a power failure has cut off.
    """
    path = epath.Path(file)
    lines = path.read_bytes().decode(errors="replace").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) >= 0]


def last_values(lines: list[dict]) -> dict:
    """Returns the newest value of each metric of `read_lines`; not all of them stand in every line."""
    return {name: value for line in lines for name, value in line.items()}


def _step_of(line: str) -> int:
    """Returns the step of a line, -1 if it is no JSON object with a step."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return -1
    return step if isinstance(step, int) else -1
