"""Trainings of a classifier: with every label or few, from every start, with every candidate setting.

Every training runs through `training.loop.fit` in a folder of its own below WORKDIR/MODE, so the same
command goes on where it was stopped, and nothing that was finished is trained again.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import say
from simclr_jax.data.broken import Images
from simclr_jax.data.subsets import share_of_labels
from simclr_jax.encoders import init_encoder
from simclr_jax.encoders.classified import Classified
from simclr_jax.encoders.heads import LinearClassifier
from simclr_jax.errors import NotFinite, UserError
from simclr_jax.evals import results, subjects
from simclr_jax.evals.protocol import Protocol, Search, Training, what_decides
from simclr_jax.evals.selection import VALIDATIONS, Selection
from simclr_jax.evals.subjects import ENCODER, UNTRAINED
from simclr_jax.evals.training_folder import TrainingFolder
from simclr_jax.losses.classification import loss_of_labels
from simclr_jax.mesh import check_divides, make_mesh, replicated
from simclr_jax.training.checkpoint import Saving
from simclr_jax.training.log import Reporting
from simclr_jax.training.loop import Job, Run, fit, job_of
from simclr_jax.training.objectives import no_loss, supervised
from simclr_jax.training.optimizer import (
    make_classifier_optimizer,
    scaled_learning_rate,
    scaling_in_words,
)
from simclr_jax.training.state import TrainState, digest_of, init_head, start_of
from simclr_jax.training.step import Metrics, UpdateRule, make_step
from simclr_jax.training.workdir import about_classifier
from simclr_jax.views.placement import stream


class Setup:
    """The data, the starts and the compiled programs of a protocol.

    Attributes:
      whole: the training split's labelled images.
      part: the images of `whole` that are trained on.
      validation: the images of `whole` that settings are chosen on, or None.
      test: the test split's labelled images.
      starts: kind -> {"params", "batch_stats"} of f and of g before training.
      members: int8 [C, K], see `DataSet`; None: each image has one label.
      metric: name of the metric, a row of `METRICS`, by which candidates are chosen and reported.
      record: the record in the encoder's checkpoint.
      path: WORKDIR/MODE.json, or WORKDIR/MODE_NAME_DIGEST.json for other data than those of training; the
        trainings lie in the folder of the same name.
    """

    def __init__(self, config: ConfigDict, workdir: str, protocol: Protocol):
        self.config, self.protocol = config, protocol
        options, name = protocol.options, protocol.mode
        data = subjects.labelled(config, sets=protocol.sets)
        assert data.test is not None
        self.members = data.members
        self.metric = subjects.metric_of(config, data) if protocol.sets else "accuracy"
        self.mesh = make_mesh()
        check_divides(options.batch_size, self.mesh, option=f"{name}.batch_size")
        self.whole = data.train.labelled()
        self.test = assemble.images_of(config, data.test.labelled())
        part, self.validation = self.whole, None
        fraction = config.eval.validation_fraction
        if fraction > 0:
            part, held = self.whole.divided(fraction, config.seed)
            self.validation = assemble.images_of(config, held, whole=self.whole)
        elif any(len(search.candidates) > 1 for search in protocol.searches(ENCODER)):
            raise UserError(
                f"{name}.learning_rate and weight_decay name several values, and "
                "eval.validation_fraction=0 leaves nothing to choose them on"
            )
        self.part = assemble.images_of(config, part, whole=self.whole)
        trained = subjects.trained(config, workdir, self.mesh, head=True)
        assert trained.head is not None
        self.record = trained.record
        self.starts = {ENCODER: (trained.encoder, trained.head)}
        if config.eval.baselines:
            self.starts = {UNTRAINED: self._untrained()} | self.starts
        self.path = results.path_of(config, self.record, data, workdir, name)
        self._digest = digest_of({"encoder": trained.encoder, "head": trained.head})
        judges = [images for images in (self.validation, self.test) if images]
        self._judged_on = [images.split.fingerprint() for images in judges]
        self._views = assemble.classifier_views(config, self.mesh, options.batch_size)
        self._predict = subjects.extractor(config, self.mesh, self._model(1).predict)
        # The newest alone: trainings of one length follow each other.
        self._compiled: tuple[Any, Job, Callable] | None = None
        self._tested: int | None = None  # test images that could be read; None: none was tried yet

    def per_class(self, fraction: float) -> int:
        """Returns the mean number of labels of a class if this fraction of all labels is used, at least one."""
        assert self.whole.classes
        return max(1, round(fraction * self.whole.count / len(self.whole.classes)))

    @property
    def folder(self) -> epath.Path:
        """Returns where the trainings lie, each in a folder of its own."""
        return self.path.with_name(self.path.stem)

    @property
    def refits(self) -> bool:
        """Returns whether the chosen candidate is trained once more, on the validation part too."""
        return self.protocol.refit and self.validation is not None

    def draws(self, search: Search) -> int:
        """Returns how many times the labels of a search are drawn."""
        return 1 if search.fraction == 1 else self.config.eval.seeds

    def check_fractions(self) -> None:
        """Raises a UserError, before hours of training, if a fraction of the labels is more than the validation part
        leaves, or will not fit into memory.
        """
        assert self.whole.classes
        for search in self.protocol.searches(ENCODER):
            if search.fraction < 1:
                if search.fraction * self.whole.count > self.part.split.count + 0.5:
                    raise UserError(
                        f"{self.protocol.mode}.label_fractions names {search.fraction:g}, and the validation part "
                        f"leaves {1 / self._share(1):.3g} of the images: expected no more, or 1 for all of these"
                    )
                count = self.per_class(search.fraction) * len(self.whole.classes)
                self.part.split.check_subset(count)

    def best_of(self, kind: str, search: Search, draw: int) -> dict:
        """Trains with every candidate; the validation part chooses one, if there are several. Of several, one whose
        loss or state does not stay finite is left out.

        Returns:
          the outcome of the chosen one, see `Selection.outcome`, with "steps", "images", the labelled
          images trained on, "learning_rate" and "weight_decay".

        Raises:
          Stopped: a signal has stopped it.
          NotFinite: no candidate's training stayed finite.
        """
        images = self._labels(search.fraction, draw)
        start = Training(kind, search.fraction, draw, search.length, 0.0, 0.0)
        outcomes = []
        several = len(search.candidates) > 1
        for number, (rate, decay) in enumerate(search.candidates):
            training = start._replace(learning_rate=rate, weight_decay=decay)
            which = f"{number + 1} of {len(search.candidates)}: " * several
            outcomes.append((training, self._train(images, training, which, may_fail=several)))
        finite = [pair for pair in outcomes if "failed" not in pair[1]]
        if not finite:
            raise NotFinite(f"of all candidates: {outcomes[-1][1]['failed']}")
        training, outcome = max(finite, key=lambda pair: pair[1]["validation"] or 0.0)
        if self.refits:
            everything = assemble.images_of(self.config, self.whole)
            chosen = {"validation": outcome["validation"], "candidates": len(search.candidates)}
            outcome = self._train(everything, training._replace(refit=True), "chosen: ") | chosen
        return outcome | {
            "learning_rate": training.learning_rate,
            "weight_decay": training.weight_decay,
        }

    def _share(self, fraction: float) -> float:
        """Returns the share of the training part that has as many images as `fraction` of the whole split."""
        return fraction * self.whole.count / self.part.split.count

    def _labels(self, fraction: float, draw: int) -> Images:
        """Returns the part of the training split whose labels are used."""
        if fraction == 1:
            return self.part
        part = self.part.split
        picked = share_of_labels(part.all_labels(), self._share(fraction), draw)
        return assemble.images_of(self.config, part.subset(picked), whole=self.whole)

    def _untrained(self) -> tuple[dict, dict]:
        config, everywhere = self.config, replicated(self.mesh)
        network, size = assemble.encoder(config), config.data.image_size
        start = jax.jit(
            lambda key: (
                init_encoder(network, size, key),
                init_head(assemble.head(config), network.width, key),
            ),
            out_shardings=everywhere,
        )
        encoder, head = start(jax.random.key(config.seed))
        if not self.protocol.train_encoder:  # frozen, this start would be too weak a baseline
            images = assemble.images_of(config, self.whole)
            encoder = subjects.untrained(config, images, self.mesh)
        return encoder, head

    def _model(self, steps_per_epoch: int) -> Classified:
        assert self.whole.classes
        # Appendix B.8: a running statistic forgets within an epoch, where that is longer than ten
        # steps.
        momentum = max(1 - 10 / max(1, steps_per_epoch), 0.9)
        return Classified(
            encoder=assemble.encoder(self.config, norm_momentum=momentum),
            head=assemble.head(self.config, norm_momentum=momentum),
            layer=self.protocol.layer,
            classifier=LinearClassifier(
                len(self.whole.classes) if self.members is None else self.members.shape[1]
            ),
            train_encoder=self.protocol.train_encoder,
        )

    def _train(
        self, images: Images, training: Training, which: str, may_fail: bool = False
    ) -> dict:
        """Trains, or reads the outcome where it was trained before.

        Args:
          images: to train on.
          training: see `Training`.
          which: begins the line that says so.
          may_fail: a loss or a state that is not finite is an outcome, {"failed": why}, not an error.
        """
        batch_size = self.protocol.options.batch_size
        rate = scaling_in_words(training.learning_rate, self._scaling, batch_size)
        say(which + training.describe(images.split.count, rate))
        steps = training.length.steps(images.split.count, batch_size)
        folder = TrainingFolder(self.folder / training.folder)
        finished = folder.begin(self._about(training, images))
        if finished is not None:
            return _said(finished)
        job = self._job(training, steps, round(images.split.count / batch_size))
        # A refit has the validation part among its training images.
        judge = None if training.refit else self.validation
        selection = Selection(steps, self._score, judge, self.test, self.protocol.moments)
        advice = f"try a lower {self.protocol.mode}.learning_rate"
        reporting = Reporting(max(1, steps // VALIDATIONS), batch_size, advice)
        saving, hang = Saving(self.config.checkpoint.every_steps), self.config.train.hang_seconds
        run = Run(str(folder.path), {}, saving, reporting, hang_seconds=hang)
        try:
            state = fit(job, stream(self._views, images), run, (selection,))
        except NotFinite as error:
            if not may_fail:
                raise
            return folder.finish(_said({"failed": str(error)}))
        outcome = selection.outcome(state) | {"steps": steps, "images": images.split.count}
        outcome["test_images"] = self._tested or self.test.split.count
        reported = training.refit or not self.refits
        if reported and training.kind == ENCODER and training.draw == 0:
            kept = folder.keep_classifier(steps, state, self._record(state))
            # Relative to the folder of the result, because a workdir may be moved.
            outcome["classifier"] = str(kept.relative_to(self.path.parent))
        return folder.finish(outcome)

    def _about(self, training: Training, images: Images) -> dict:
        """Returns everything that decides what a training learns; see `what_decides`."""
        digests: dict = {"start": self._digest, "images": images.split.fingerprint()}
        digests |= {"judged_on": self._judged_on}
        crops = repr(self._views.settings.distortion)
        about = what_decides(self.config, self.protocol, training, digests, crops, self.metric)
        if training.kind == UNTRAINED and not self.protocol.train_encoder:
            # In words, as the statistics of these views may differ in the last bit on another machine.
            about["calibrated_on"] = repr(
                assemble.views(self.config, self.mesh).settings.distortion
            )
        return about

    def _record(self, state: TrainState) -> dict:
        """Returns what is saved beside a trained classifier, for `load_classifier`."""
        outputs = int(state.params["classifier"]["dense"]["bias"].shape[0])
        names = None if self.members is not None else self.whole.classes
        return {
            "config": self.config.to_dict(),
            "classifier": about_classifier(self.protocol.layer, outputs, names),
            "classes": self.whole.classes,
            "training_images": self.whole.count,
            "data_fingerprint": self.whole.fingerprint(),
            "encoder": self._digest,
        }

    def _job(self, training: Training, steps: int, steps_per_epoch: int) -> Job:
        """Compiles the step of a training; draws, starts, learning rates and weight decays share the program."""
        model = self._model(steps_per_epoch)
        options, trained = self.protocol.options, model.trained
        name = options.get("optimizer", "sgd")

        def init(encoder: dict, head: dict, key: jax.Array) -> TrainState:
            params, batch_stats = model.start(encoder, head, key)
            # Copied: the step takes the memory of its state, and the start serves again.
            params, batch_stats = jax.tree.map(jax.numpy.copy, (params, batch_stats))
            optimizer, _ = make_classifier_optimizer(
                0.0, steps, 0.0, options.momentum, trained, name
            )
            return start_of(params, batch_stats, optimizer)

        def step(state: TrainState, batch) -> tuple[TrainState, Metrics]:
            images, (rate, decay) = batch
            optimizer, schedule = make_classifier_optimizer(
                rate, steps, decay, options.momentum, trained, name
            )
            update = make_step(
                supervised(model.logits, self._views.views, loss_of_labels(self.members)),
                no_loss,
                UpdateRule(optimizer, schedule),
                fetch=self._views.fetch,
            )
            return update(state, images)

        start = (*self.starts[training.kind], jax.random.key(self.config.seed))
        if self._compiled is None or self._compiled[0] != (steps, steps_per_epoch):
            begin: Callable = jax.jit(init, out_shardings=replicated(self.mesh))
            job = job_of(step, init, start, steps, self.mesh)
            self._compiled = (steps, steps_per_epoch), job, begin
        _, job, begin = self._compiled
        rate = scaled_learning_rate(training.learning_rate, self._scaling, options.batch_size)
        candidate = np.float32(rate), np.float32(training.weight_decay)
        return job._replace(
            step=lambda state, batch: job.step(state, (batch, candidate)),
            init=lambda: begin(*start),
        )

    @property
    def _scaling(self) -> str:
        return self.protocol.options.get("scaling", "linear")

    def _score(self, state: TrainState, images: Images) -> float:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        own = self._predict, self._views, variables, images, self.members
        score, count = subjects.score_of(self.metric, *own)
        if images is self.test:
            self._tested = count
        return score


def _said(outcome: dict) -> dict:
    """Returns the outcome. Prints that the candidate is left out if the outcome is a failure."""
    if "failed" in outcome:
        say(f"left out    {outcome['failed'].partition('. ')[0]}")
    return outcome
