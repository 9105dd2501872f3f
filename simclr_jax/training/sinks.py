"""Further places for metrics: Weights & Biases and MLflow, each by its own library, which reads its own
environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, ...).

A resumed run goes on in the record that it began, whose identity the workdir holds.
"""

import contextlib
import secrets
from collections.abc import Callable
from typing import Any, Protocol

from etils import epath

from simclr_jax.console import say
from simclr_jax.errors import UserError, one_line
from simclr_jax.files import absolute, in_bucket


class Sink(Protocol):
    """A place for metrics."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends the metrics of a step."""

    def close(self, finished: bool) -> None:
        """Sends what is still waiting, and says whether the training came to its last step."""


class WeightsAndBiases:
    """A run of Weights & Biases; WORKDIR/wandb_run holds its identity."""

    def __init__(self, workdir: str, config: dict[str, Any]):
        """Begins the run, or goes on with it. `config`: options of the run."""
        import wandb

        file = epath.Path(workdir) / "wandb_run"
        known = file.read_text().strip() if file.exists() else secrets.token_hex(8)
        how: dict[str, Any] = {"id": known, "resume": "allow", "name": _name(workdir)}
        file.write_text(known + "\n")  # first: a run that is killed here goes on with it
        self._run = wandb.init(config=config, dir=None if in_bucket(workdir) else workdir, **how)
        # Steps that a resumed run takes again are written again: W&B's own counter only grows.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step} | values)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """A run of MLflow; WORKDIR/mlflow_run holds its identity."""

    def __init__(self, workdir: str, config: dict[str, Any]):
        """Begins the run, or goes on with it. `config`: options of the run."""
        import mlflow

        self._client = mlflow
        file = epath.Path(workdir) / "mlflow_run"
        known = file.read_text().strip() if file.exists() else None
        run = mlflow.start_run(run_id=known, run_name=_name(workdir))
        if known is not None:
            return
        try:
            mlflow.log_params({name: str(value) for name, value in config.items()})
            file.write_text(run.info.run_id + "\n")
        except Exception:
            self.close(finished=False)  # MLflow has one open run at a time
            raise

    def write(self, step: int, values: dict[str, float]) -> None:
        self._client.log_metrics(values, step=step)

    def close(self, finished: bool) -> None:
        self._client.end_run("FINISHED" if finished else "FAILED")


def _name(workdir: str) -> str:
    return absolute(workdir).rstrip("/").rpartition("/")[2]


SINKS: dict[str, Callable[[str, dict[str, Any]], Sink]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


class Sinks:
    """Several places for metrics. One that fails during a training does not end it: it is reported and dropped."""

    def __init__(self, names: tuple[str, ...], workdir: str, config: dict[str, Any]):
        """Opens the places that the option train.sinks names.

        Args:
          names: keys of SINKS.
          workdir: the run's folder.
          config: {option: value}.

        Raises:
          UserError: a library is not installed, or cannot begin a run.
        """
        self._open: dict[str, Sink] = {}
        for name in names:
            try:
                self._open[name] = SINKS[name](workdir, config)
            except Exception as error:  # of many kinds: no network, no key, another server
                self.close(finished=False)
                if isinstance(error, ImportError):
                    text = f"train.sinks={name} needs its library: pip install {name}"
                    raise UserError(text) from error
                raise UserError(f"train.sinks={name} cannot begin: {one_line(error)}") from error

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends the metrics of a step everywhere."""
        for name, sink in list(self._open.items()):
            try:
                sink.write(step, values)
            except Exception as error:
                say(f"step {step}  no more metrics to {name}: {one_line(error)}")
                with contextlib.suppress(Exception):  # else MLflow refuses the process's next run
                    self._open.pop(name).close(finished=False)

    def close(self, finished: bool) -> None:
        """Closes all; `finished`: the training came to its last step."""
        for name, sink in self._open.items():
            try:
                sink.close(finished)
            except Exception as error:
                say(f"{name} was not closed: {one_line(error)}")
        self._open = {}
