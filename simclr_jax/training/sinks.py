"""Further places for metrics: Weights & Biases and MLflow, each by its own library, which reads its own
environment variables (WANDB_MODE, WANDB_PROJECT, MLFLOW_TRACKING_URI, ...).

A resumed run goes on in the record that it began: its identity follows from the workdir.
"""

import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

from etils import epath

from simclr_jax.errors import UserError
from simclr_jax.files import absolute


class Sink(Protocol):
    """A place for metrics."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Sends the metrics of a step."""

    def close(self) -> None:
        """Sends what is still waiting."""


class WeightsAndBiases:
    """A run of Weights & Biases."""

    def __init__(self, workdir: str, config: dict[str, Any]):
        """Begins the run, or goes on with it. `config`: options of the run."""
        import wandb

        identity = hashlib.blake2b(absolute(workdir).encode(), digest_size=8).hexdigest()
        name = pathlib.PurePath(workdir).name
        how: dict[str, Any] = {"id": identity, "resume": "allow", "name": name}
        self._run = wandb.init(config=config, dir=None if "://" in workdir else workdir, **how)
        # Steps that a resumed run takes again are written again: W&B's own counter only grows.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step} | values)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow; WORKDIR/mlflow_run holds its identity."""

    def __init__(self, workdir: str, config: dict[str, Any]):
        """Begins the run, or goes on with it. `config`: options of the run."""
        import mlflow

        self._client = mlflow
        file = epath.Path(workdir) / "mlflow_run"
        known = file.read_text().strip() if file.exists() else None
        run = mlflow.start_run(run_id=known, run_name=pathlib.PurePath(workdir).name)
        if known is None:
            file.write_text(run.info.run_id + "\n")
            mlflow.log_params({name: str(value) for name, value in config.items()})

    def write(self, step: int, values: dict[str, float]) -> None:
        self._client.log_metrics(values, step=step)

    def close(self) -> None:
        self._client.end_run()


SINKS: dict[str, Callable[[str, dict[str, Any]], Sink]] = {
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def open_sinks(names: tuple[str, ...], workdir: str, config: dict[str, Any]) -> list[Sink]:
    """Opens the places that the option train.sinks names.

    Args:
      names: keys of SINKS.
      workdir: the run's folder.
      config: {option: value}.

    Raises:
      UserError: a library is not installed, or cannot begin a run.
    """
    found = []
    for name in names:
        try:
            found.append(SINKS[name](workdir, config))
        except ImportError as error:
            raise UserError(f"train.sinks={name} needs its library: pip install {name}") from error
        except Exception as error:  # of many kinds: no network, no key, another server
            reason = " ".join(str(error).split())
            raise UserError(f"train.sinks={name} cannot begin: {reason}") from error
    return found
