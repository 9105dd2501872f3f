"""Metrics to WORKDIR/metrics.jsonl and, beside it, to TensorBoard events."""

import contextlib
import json
from typing import Self

from etils import epath
from tensorboardX import SummaryWriter

from simclr_jax.errors import UserError


class MetricWriter:
    """Appends one JSON object a line, {"step": int, "name": value, ...}; a context manager.

    Lines past `resume_step` are dropped at the start: those steps are about to be run again.

    Args:
      workdir: of the run; exists.
      resume_step: steps that the restored state has done.
    """

    def __init__(self, workdir: str, resume_step: int = 0):
        self._path = epath.Path(workdir) / "metrics.jsonl"
        before = self._path.read_text() if self._path.exists() else ""
        whole = [line for line in before.split("\n")[:-1] if line]
        self._lines = [line for line in whole if json.loads(line)["step"] <= resume_step]
        if "".join(line + "\n" for line in self._lines) != before:
            self._write_all()
        # TensorBoard hides what earlier event files hold from purge_step on.
        self._events = SummaryWriter(str(workdir), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of this step; they are stored before it returns.

        Raises:
          UserError: they cannot be.
        """
        try:
            self._write(step, values)
        except OSError as error:
            raise UserError(
                f"step {step}: cannot write {self._path}: {error.strerror}. Mend this, then the "
                "same command goes on from the newest checkpoint"
            ) from error

    def _write(self, step: int, values: dict[str, float]) -> None:
        line = json.dumps({"step": step} | values)
        self._lines.append(line)
        if "://" in str(self._path):
            self._write_all()  # objects of a bucket cannot grow
        else:
            with self._path.open("a") as file:
                file.write(line + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()

    def _write_all(self) -> None:
        self._path.write_text("".join(line + "\n" for line in self._lines))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # what matters is in the metrics, and has been said
            self._events.close()
