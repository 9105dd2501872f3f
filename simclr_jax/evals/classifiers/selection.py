"""The step of a training that does best on a validation part, found on the way."""

from collections.abc import Callable

from simclr_jax.data.broken import Images
from simclr_jax.evals.scores import BESIDE, Score
from simclr_jax.training.state import TrainState

VALIDATIONS = 10  # evenly spaced moments of a training among which the validation part chooses


class Selection:
    """A hook that evaluates on the validation part at some moments, and remembers the best of them.

    Attributes:
      name: "selection".
      memory: {"step", "validation", "test"} of the best moment so far, the later of equals, "test" a `Score` as a list
        or, from earlier versions, its value; and "now", the validation accuracy of the newest moment. None: there was
        none yet.
    """

    name = "selection"

    def __init__(
        self,
        steps: int,
        score: Callable[[TrainState, Images], Score],
        validation: Images | None,
        test: Images,
        moments: int = VALIDATIONS,
    ):
        """Remembers nothing yet.

        Args:
          steps: number of training steps.
          score: scores the classifier of a state on images.
          validation: images that choose the best step; None: none is chosen.
          test: images evaluated at each new best step and at the last; they choose nothing.
          moments: how many there are, evenly spaced; 1: the last step.
        """
        self.memory: dict | None = None
        self._moments = {round((i + 1) * steps / moments) for i in range(moments)}
        self._steps, self._score = steps, score
        self._validation, self._test = validation, test

    def due(self, step: int) -> bool:
        return self._validation is not None and step in self._moments

    def run(self, step: int, state: TrainState) -> dict[str, float]:
        assert self._validation is not None
        value = self._score(state, self._validation).value
        if self.memory is None or value >= self.memory["validation"]:
            test = list(self._score(state, self._test))
            self.memory = {"step": step, "validation": value, "test": test}
        self.memory["now"] = value
        return {"validation_accuracy": value}

    def outcome(self, state: TrainState) -> dict:
        """Returns the test score at the last step ("last", and "last_top_5" and "last_mean_per_class" where they were
        measured) and at the chosen one ("selected", "selected_top_5", ...), with the chosen step and its validation
        accuracy; None where nothing was chosen.
        Where it was, also the validation accuracy of the last step, "last_validation".
        """
        chosen = self.memory or {"step": None, "validation": None, "test": None}
        test = chosen["test"]
        selected = Score(*test) if isinstance(test, list) else Score(test)
        is_last = chosen["step"] == self._steps
        last = selected if is_last else self._score(state, self._test)
        found = {
            "last": last.value,
            "selected": selected.value,
            "selected_step": chosen["step"],
            "validation": chosen["validation"],
        }
        if "now" in chosen:  # not in memories of earlier versions
            found["last_validation"] = chosen["now"]
        scores = {"last": last, "selected": selected}
        beside = {f"{at}_{name}": getattr(scores[at], name) for at in scores for name in BESIDE}
        return found | {name: x for name, x in beside.items() if x is not None}
