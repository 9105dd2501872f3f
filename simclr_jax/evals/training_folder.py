"""The folder of one training of a classifier, by which it is recognised, resumed and not repeated."""

import dataclasses
import hashlib
import json

import jax
from etils import epath

from simclr_jax import processes
from simclr_jax.files import write_json
from simclr_jax.training.checkpoint import save_once
from simclr_jax.training.state import TrainState


class TrainingFolder:
    """A folder below WORKDIR/MODE.

    Attributes:
      path: the folder. about.json says what decides the training, outcome.json what came of it; "checkpoints" is there
        until the training is finished; "classifier" is the trained classifier, where it is kept.
    """

    def __init__(self, path: epath.Path):
        self.path = path

    def begin(self, about: dict) -> dict | None:
        """Makes the folder; first empties one that is of another training. All processes call this together.

        Args:
          about: everything that decides what the training learns, JSON-able.

        Returns:
          the outcome, where this training was finished before.
        """
        digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()
        file = self.path / "about.json"
        if jax.process_index() == 0 and not (
            file.exists() and json.loads(file.read_text())["digest"] == digest
        ):
            if self.path.exists():
                self.path.rmtree()
            write_json(file, about | {"digest": digest})
        processes.wait_for_all(f"{self.path} is begun")
        finished = self.path / "outcome.json"
        return json.loads(finished.read_text()) if finished.exists() else None

    def finish(self, outcome: dict) -> dict:
        """Writes and returns the outcome, and removes the checkpoints."""
        if jax.process_index() == 0:
            write_json(self.path / "outcome.json", outcome)
            (self.path / "checkpoints").rmtree(missing_ok=True)
        return outcome

    def keep_classifier(self, step: int, state: TrainState, record: dict) -> epath.Path:
        """Saves a trained classifier, with the encoder and the head below it. Returns its folder."""
        folder = self.path / "classifier"
        if jax.process_index() == 0:
            # That of a training which ended between this line and its outcome.
            folder.rmtree(missing_ok=True)
        processes.wait_for_all(f"{folder} is free")
        save_once(str(folder), step, dataclasses.replace(state, opt_state=()), record)
        return folder
