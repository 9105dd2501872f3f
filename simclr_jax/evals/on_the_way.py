"""Evaluation on the way: a hook of the training loop that evaluates f as it is at a step."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.assemble import Pretraining
from simclr_jax.console import say
from simclr_jax.data.broken import Images
from simclr_jax.errors import UserError
from simclr_jax.evals import EVALUATIONS, subjects
from simclr_jax.evals.evaluate import config_for, pair, result_of
from simclr_jax.evals.results import accuracies
from simclr_jax.evals.subjects import ENCODER
from simclr_jax.training.loop import Hook
from simclr_jax.training.state import TrainState


class OnTheWay:
    """Runs an evaluation of features every so many steps. It keeps nothing between them.

    Attributes:
      name: the evaluation's name.
      memory: None.
    """

    def __init__(self, config: ConfigDict, every_steps: int, made: Pretraining):
        """Compiles nothing yet.

        Args:
          config: the run's configuration; config.eval.on_the_way names the evaluation.
          every_steps: steps between evaluations, above 0.
          made: the assembled run.

        Raises:
          UserError: the data have no labels or no test split, or nothing to choose on.
        """
        self.name, self.memory = config.eval.on_the_way, None
        config = config_for(self.name, config)
        config.eval.labels_per_class, config.eval.label_fraction = (), 0.0  # all labels only
        self._every, self._config, self._mesh = every_steps, config, made.job.mesh
        self._data, self._views = subjects.labelled(config), assemble.views(config, self._mesh)
        assert self._data.test is not None
        # Made once: they remember which images cannot be read.
        self._images = [assemble.images_of(config, s) for s in (self._data.train, self._data.test)]
        represent = subjects.representations(config, with_z=config.eval.features == "z")
        self._extractor = subjects.extractor(config, self._mesh, represent)

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def run(self, step: int, state: TrainState) -> dict[str, float]:
        """Returns {metric of the evaluation: accuracy in [0, 1] with all labels}."""
        parts = ("encoder", "head") if self._config.eval.features == "z" else ("encoder",)
        variables = tuple(map(state.variables, parts))
        evaluation = EVALUATIONS[self.name]
        train, test = (self._features(variables, images) for images in self._images)
        features = pair(train, test, len(self._data.train.classes or ()), self._mesh)
        rows = result_of(evaluation, self._config, features, step)["rows"]
        score = accuracies(rows)[ENCODER]
        say(f"step {step}  {evaluation.metric} {score:.1%}")
        return {evaluation.metric: score}

    def _features(self, variables: tuple, images: Images) -> tuple[dict, np.ndarray]:
        found, labels = subjects.features_of(self._extractor, self._views, variables, images)
        return {ENCODER: found[self._config.eval.features]}, labels


def evaluations_on_the_way(config: ConfigDict, made: Pretraining) -> Sequence[Hook]:
    """Returns the hook that eval.every_steps or eval.every_epochs asks for, if any.

    Raises:
      UserError: both options are set, or the data have no labels or no test split.
    """
    steps, epochs = config.eval.every_steps, config.eval.every_epochs
    if steps and epochs:
        raise UserError(
            f"eval.every_steps={steps} and eval.every_epochs={epochs:g}: set one of them, and the "
            "other to 0"
        )
    if epochs:
        steps = max(1, round(epochs * made.train.count / config.data.batch_size))
    return (OnTheWay(config, steps, made),) if steps else ()
