"""The folder of one training of a classifier, by which it is recognised, resumed and not repeated."""

import dataclasses
import itertools

import jax
from etils import epath

from simclr_jax import processes
from simclr_jax.evals.classifiers.protocol import decides_the_same
from simclr_jax.files import parsed_json, read_json, write_json
from simclr_jax.training.checkpoint import save_once
from simclr_jax.training.state import TrainState

_AGAIN = "remove the folder, and it is trained again"  # of a file that is damaged


class TrainingFolder:
    """A folder below WORKDIR/MODE.

    Attributes:
      path: the folder. about.json says what decides the training, outcome.json what came of it; "checkpoints" is there
        until the training is finished; "classifier" is the trained classifier, where it is kept.
    """

    def __init__(self, path: epath.Path):
        self.path = path

    def begin(self, about: dict) -> dict | None:
        """Makes the folder, see `_own`. All processes call this together.

        Args:
          about: everything that decides what the training learns, JSON-able.

        Returns:
          the outcome, where this training was finished before.
        """
        own = str(self._own(about)) if jax.process_index() == 0 else None
        self.path = epath.Path(processes.text_of_first(own) or "")
        finished = self.path / "outcome.json"
        read = jax.process_index() == 0 and finished.exists()
        outcome = processes.text_of_first(
            finished.read_bytes().decode(errors="replace") if read else None
        )
        return None if outcome is None else parsed_json(outcome, finished, _AGAIN)

    def _own(self, about: dict) -> epath.Path:
        """Returns the folder of this training: `path`, or PATH_2, PATH_3, ... where finished trainings with other options
        or images lie in the way, whose classifiers may be in use. One that was not finished gives way.
        """
        numbers = itertools.count(2)
        folder, free = self.path, None
        while (file := folder / "about.json").exists():
            if decides_the_same(read_json(file, _AGAIN), about):
                return folder
            if free is None and not (folder / "outcome.json").exists():
                free = folder
            folder = self.path.with_name(f"{self.path.name}_{next(numbers)}")
        free = free or folder
        free.rmtree(missing_ok=True)
        write_json(free / "about.json", about)
        return free

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
