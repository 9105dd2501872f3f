"""The compiled programs of a protocol: the step that trains a classifier, and its score."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.data.broken import Images
from simclr_jax.encoders.classified import Classified
from simclr_jax.encoders.heads import LinearClassifier
from simclr_jax.evals import subjects
from simclr_jax.evals.classifiers.parts import Parts
from simclr_jax.evals.classifiers.protocol import Protocol
from simclr_jax.evals.scores import Score
from simclr_jax.losses.classification import loss_of_labels
from simclr_jax.mesh import replicated
from simclr_jax.training.loop import Job, job_of
from simclr_jax.training.objectives import no_loss, supervised
from simclr_jax.training.optimizer import make_classifier_optimizer
from simclr_jax.training.state import TrainState, start_of
from simclr_jax.training.step import Metrics, UpdateRule, make_step
from simclr_jax.views.placement import stream


class Program:
    """Trains and scores classifiers. Trainings of one length share the compiled step.

    Attributes:
      distortion: the crops that a classifier is trained on.
    """

    def __init__(self, config: ConfigDict, protocol: Protocol, parts: Parts, mesh: Mesh):
        self._config, self._protocol, self._parts, self._mesh = config, protocol, parts, mesh
        self._views = assemble.classifier_views(config, mesh, protocol.options.batch_size)
        self.distortion = self._views.settings.distortion
        self._predict = subjects.extractor(config, mesh, self._model(1).predict)
        # That of the newest length alone: trainings of one length follow each other.
        self._compiled: tuple[tuple[int, int], Job, Callable] | None = None

    def batches(self, images: Images) -> Callable:
        """Returns what `fit` takes batches from, see `stream`."""
        return stream(self._views, images)

    def job(
        self, start: tuple[dict, dict], steps: int, steps_per_epoch: int, rate: float, decay: float
    ) -> Job:
        """Compiles the step of a training. Draws, starts, learning rates and weight decays share the program.

        Args:
          start: {"params", "batch_stats"} of f and of g before training.
          steps: number of training steps.
          steps_per_epoch: see `_model`.
          rate: learning rate of the whole batch.
          decay: weight decay.
        """
        if self._compiled is None or self._compiled[0] != (steps, steps_per_epoch):
            self._compiled = (steps, steps_per_epoch), *self._compile(start, steps, steps_per_epoch)
        _, job, begin = self._compiled
        candidate, key = (np.float32(rate), np.float32(decay)), jax.random.key(self._config.seed)
        return job._replace(
            step=lambda state, batch: job.step(state, (batch, candidate)),
            init=lambda: begin(*start, key),
        )

    def score(self, state: TrainState, images: Images) -> tuple[Score, int]:
        """Returns (score by the metric of the parts, number of images that could be read)."""
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        own = self._predict, self._views, variables, images, self._parts.data.members
        return subjects.score_of(self._parts.metric, *own)

    def _model(self, steps_per_epoch: int) -> Classified:
        # Appendix B.8: a running statistic forgets within an epoch, where that is longer than ten
        # steps.
        momentum = max(1 - 10 / max(1, steps_per_epoch), 0.9)
        return Classified(
            encoder=assemble.encoder(self._config, norm_momentum=momentum),
            head=assemble.head(self._config, norm_momentum=momentum),
            layer=self._protocol.layer,
            classifier=LinearClassifier(self._parts.outputs),
            train_encoder=self._protocol.train_encoder,
        )

    def _compile(
        self, start: tuple[dict, dict], steps: int, steps_per_epoch: int
    ) -> tuple[Job, Callable]:
        """Returns a job whose batches are (images, (learning rate, weight decay)), and what makes its first state of a
        start and a random key.
        """
        model = self._model(steps_per_epoch)
        options, trained = self._protocol.options, model.trained
        name = options.get("optimizer", "sgd")

        def init(encoder: dict, head: dict, key: jax.Array) -> TrainState:
            params, batch_stats = model.start(encoder, head, key)
            # Copied: the step takes the memory of its state, and the start serves again.
            params, batch_stats = jax.tree.map(jax.numpy.copy, (params, batch_stats))
            optimizer, _ = make_classifier_optimizer(
                0.0, steps, 0.0, options.momentum, trained, name
            )
            return start_of(params, batch_stats, optimizer)

        def step(state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
            images, (rate, decay) = batch
            optimizer, schedule = make_classifier_optimizer(
                rate, steps, decay, options.momentum, trained, name
            )
            update = make_step(
                supervised(
                    model.logits, self._views.views, loss_of_labels(self._parts.data.members)
                ),
                no_loss,
                UpdateRule(optimizer, schedule),
                fetch=self._views.fetch,
            )
            return update(state, images)

        begin: Callable = jax.jit(init, out_shardings=replicated(self._mesh))
        key = jax.random.key(self._config.seed)
        return job_of(step, init, (*start, key), steps, self._mesh), begin
