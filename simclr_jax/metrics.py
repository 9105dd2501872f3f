"""Metrics to WORKDIR/metrics.jsonl and, where TensorFlow is installed, to TensorBoard events."""

import importlib.util
import json
import pathlib


class MetricWriter:
    """Appends one JSON object a line, {"step": int, "name": value, ...}; a context manager.

    Lines past `resume_step` are dropped at the start: those steps are about to be run again.

    Args:
      workdir: of the run; exists.
      resume_step: steps that the restored state has done.
    """

    def __init__(self, workdir: str, resume_step: int = 0):
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        kept = []
        if self._path.exists():
            whole = [line for line in self._path.read_text().split("\n")[:-1] if line]
            kept = [line for line in whole if json.loads(line)["step"] <= resume_step]
        self._path.write_text("".join(line + "\n" for line in kept))
        self._file = self._path.open("a")
        self._events = None
        if importlib.util.find_spec("tensorflow"):
            import tensorflow as tf

            self._summary = tf.summary
            self._events = tf.summary.create_file_writer(str(workdir))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes the values of this step; they reach the disk before it returns."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        if self._events is not None:
            with self._events.as_default(step=step):
                for name, value in values.items():
                    self._summary.scalar(name, value)
            self._events.flush()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


class NoWriter:
    """What the processes other than the first write to."""

    def write(self, step: int, values: dict[str, float]) -> None:
        pass

    def __enter__(self) -> "NoWriter":
        return self

    def __exit__(self, *_) -> None:
        pass
