"""The step of a training that does best on a validation part, found on the way."""

from typing import Any

from simclr_jax.data.broken import Images
from simclr_jax.training.state import TrainState

VALIDATIONS = 10  # evenly spaced moments of a training among which the validation part chooses


class Selection:
    """A hook that evaluates on the validation part at some moments, and remembers the best of them.

    Attributes:
      name: "selection".
      memory: {"step", "validation", "test"} of the best moment so far, the later of equals; None: there
        was none yet.
    """

    name = "selection"

    def __init__(
        self,
        steps: int,
        accuracy: Any,
        validation: Images | None,
        test: Images,
        moments: int = VALIDATIONS,
    ):
        """Remembers nothing yet.

        Args:
          steps: number of training steps.
          accuracy: (state, images) -> accuracy in [0, 1].
          validation: images that choose the best step; None: none is chosen.
          test: images evaluated at each new best step and at the last; they choose nothing.
          moments: how many there are, evenly spaced; 1: the last step.
        """
        self.memory: dict | None = None
        self._moments = {round((i + 1) * steps / moments) for i in range(moments)}
        self._steps, self._accuracy = steps, accuracy
        self._validation, self._test = validation, test

    def due(self, step: int) -> bool:
        return self._validation is not None and step in self._moments

    def run(self, step: int, state: TrainState) -> dict[str, float]:
        assert self._validation is not None
        score = self._accuracy(state, self._validation)
        if self.memory is None or score >= self.memory["validation"]:
            test = self._accuracy(state, self._test)
            self.memory = {"step": step, "validation": score, "test": test}
        return {"validation_accuracy": score}

    def outcome(self, state: TrainState) -> dict:
        """Returns the test score at the last step ("last") and at the chosen one ("selected"), with the
        chosen step and its validation accuracy; None where nothing was chosen.
        """
        if self.memory is not None and self.memory["step"] == self._steps:
            last = self.memory["test"]
        else:
            last = self._accuracy(state, self._test)
        chosen = self.memory or {"step": None, "validation": None, "test": None}
        return {
            "last": last,
            "selected": chosen["test"],
            "selected_step": chosen["step"],
            "validation": chosen["validation"],
        }
