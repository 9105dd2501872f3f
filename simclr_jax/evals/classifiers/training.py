"""Trainings of a classifier: with every label or few, from every start, with every candidate setting."""

from typing import NamedTuple

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import say
from simclr_jax.data.broken import Images
from simclr_jax.encoders import init_encoder
from simclr_jax.errors import NotFinite
from simclr_jax.evals import results, subjects
from simclr_jax.evals.classifiers.folder import TrainingFolder
from simclr_jax.evals.classifiers.parts import Parts, parts_of
from simclr_jax.evals.classifiers.program import Program
from simclr_jax.evals.classifiers.protocol import (
    UNTRAINED_START,
    Protocol,
    Search,
    Training,
    what_decides,
)
from simclr_jax.evals.classifiers.selection import VALIDATIONS, Selection
from simclr_jax.evals.scores import Score
from simclr_jax.evals.subjects import ENCODER, UNTRAINED
from simclr_jax.mesh import check_divides, make_mesh, replicated
from simclr_jax.training.checkpoint import Saving
from simclr_jax.training.log import Reporting
from simclr_jax.training.loop import Run, fit
from simclr_jax.training.optimizer import scaled_learning_rate, scaling_in_words
from simclr_jax.training.record import about_classifier
from simclr_jax.training.state import TrainState, digest_of, init_head


class Starts(NamedTuple):
    """The networks that trainings start from.

    Attributes:
      networks: kind -> {"params", "batch_stats"} of f and of g.
      record: the record in the encoder's checkpoint.
      digest: that of the trained encoder and head.
    """

    networks: dict[str, tuple[dict, dict]]
    record: dict
    digest: str


class Trainer:
    """Trains the classifiers of a protocol.

    Attributes:
      parts: the images.
      starts: the networks that trainings start from.
      path: WORKDIR/MODE.json, or WORKDIR/MODE_NAME_DIGEST.json for other data than those of pretraining; from layer L
        of the head MODE is followed by _layer_L. The trainings lie in the folder of the same name.
    """

    def __init__(self, config: ConfigDict, workdir: str, protocol: Protocol):
        self._config, self._protocol, self._mesh = config, protocol, make_mesh()
        batch_size = protocol.options.batch_size
        check_divides(batch_size, self._mesh, option=f"{protocol.mode}.batch_size")
        self.parts = parts_of(config, protocol)
        self.starts = _starts(config, workdir, self._mesh, self.parts, protocol.train_encoder)
        record = self.starts.record
        name = protocol.mode + (f"_layer_{protocol.layer}" if protocol.layer else "")
        self.path = results.path_of(config, record, self.parts.data, workdir, name)
        self._judged_on = self.parts.judged_on()
        self._program = Program(config, protocol, self.parts, self._mesh)
        self._tested: int | None = None  # test images that could be read; None: none was tried yet

    @property
    def folder(self) -> epath.Path:
        """Returns where the trainings lie, each in a folder of its own."""
        return self.path.with_name(self.path.stem)

    @property
    def refits(self) -> bool:
        """Returns whether the chosen candidate is trained once more, on the validation part too."""
        return self._protocol.refit and self.parts.validation is not None

    def draws(self, search: Search) -> int:
        """Returns how many times the labels of a search are drawn."""
        return 1 if search.fraction == 1 else self._config.eval.seeds

    def best_of(self, kind: str, search: Search, draw: int) -> dict:
        """Trains with every candidate. The validation accuracy of the last step chooses among several, of which one whose
        loss or state does not stay finite is left out.

        Returns:
          the outcome of the chosen one, see `Selection.outcome`, with "steps", "images", the labelled
          images trained on, "learning_rate" and "weight_decay".

        Raises:
          Stopped: a signal has stopped it.
          NotFinite: no candidate's training stayed finite.
        """
        images = self.parts.labels(search.fraction, draw)
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
        # Outcomes of earlier versions have no validation accuracy of the last step.
        name = "last_validation" if all("last_validation" in x for _, x in finite) else "validation"
        training, outcome = max(finite, key=lambda pair: pair[1][name] or 0.0)
        if self.refits:
            again = self._train(self.parts.everything, training._replace(refit=True), "chosen: ")
            chosen = {"validation": outcome["validation"], "candidates": len(search.candidates)}
            outcome = again | chosen
        return outcome | {
            "learning_rate": training.learning_rate,
            "weight_decay": training.weight_decay,
        }

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
        count, batch_size = images.split.count, self._protocol.options.batch_size
        scaling = self._protocol.options.get("scaling", "linear")
        in_words = scaling_in_words(training.learning_rate, scaling, batch_size)
        say(which + training.describe(count, in_words))
        steps = training.length.steps(count, batch_size)
        folder = TrainingFolder(self.folder / training.folder)
        finished = folder.begin(self._about(training, images))
        if finished is not None:
            return _said(finished)
        start, rate = self.starts.networks[training.kind], training.learning_rate
        rate = scaled_learning_rate(rate, scaling, batch_size)
        per_epoch = round(count / batch_size)
        job = self._program.job(start, steps, per_epoch, rate, training.weight_decay)
        # A refit has the validation part among its training images.
        judge = None if training.refit else self.parts.validation
        judges = judge, self.parts.test
        selection = Selection(steps, self._score, *judges, self._protocol.moments)
        try:
            run = self._run(folder, steps)
            state = fit(job, self._program.batches(images), run, (selection,))
        except NotFinite as error:
            if not may_fail:
                raise
            return folder.finish(_said({"failed": str(error)}))
        outcome = selection.outcome(state) | {"steps": steps, "images": count}
        outcome["test_images"] = self._tested or self.parts.test.split.count
        reported = training.refit or not self.refits
        if reported and training.kind == ENCODER and training.draw == 0:
            kept = folder.keep_classifier(steps, state, self._record())
            # Relative to the folder of the result, because a workdir may be moved.
            outcome["classifier"] = str(kept.relative_to(self.path.parent))
        return folder.finish(outcome)

    def _run(self, folder: TrainingFolder, steps: int) -> Run:
        """Returns how a training of so many steps is saved and reported."""
        advice = f"try a lower {self._protocol.mode}.learning_rate"
        batch_size = self._protocol.options.batch_size
        reporting = Reporting(max(1, steps // VALIDATIONS), batch_size, advice)
        saving = Saving(self._config.checkpoint.every_steps)
        hang_seconds = self._config.train.hang_seconds
        return Run(str(folder.path), {}, saving, reporting, hang_seconds=hang_seconds)

    def _score(self, state: TrainState, images: Images) -> Score:
        score, count = self._program.score(state, images)
        if images is self.parts.test:
            self._tested = count
        return score

    def _about(self, training: Training, images: Images) -> dict:
        """Returns everything that decides what a training learns; see `what_decides`."""
        start = UNTRAINED_START if training.kind == UNTRAINED else self.starts.digest
        digests: dict = {"start": start, "images": images.split.fingerprint()}
        digests |= {"judged_on": self._judged_on}
        crops, metric = repr(self._program.distortion), self.parts.metric
        about = what_decides(self._config, self._protocol, training, digests, crops, metric)
        if training.kind == UNTRAINED and not self._protocol.train_encoder:
            # In words, as the statistics of these views may differ in the last bit on another machine.
            views = assemble.views(self._config, self._mesh)
            about["calibrated_on"] = repr(views.settings.distortion)
        return about

    def _record(self) -> dict:
        """Returns what is saved beside a trained classifier, for `load_classifier`."""
        parts = self.parts
        names = None if parts.data.members is not None else parts.classes
        return {
            "config": self._config.to_dict(),
            "classifier": about_classifier(self._protocol.layer, parts.outputs, names),
            "classes": parts.classes,
            "training_images": parts.data.train.count,
            "data_fingerprint": parts.data.train.fingerprint(),
            "encoder": self.starts.digest,
        }


def _starts(
    config: ConfigDict, workdir: str, mesh: Mesh, parts: Parts, train_encoder: bool
) -> Starts:
    """Reads the trained encoder and head of a workdir and, where baselines are asked for, makes untrained ones."""
    trained = subjects.trained(config, workdir, mesh, head=True)
    assert trained.head is not None
    networks = {ENCODER: (trained.encoder, trained.head)}
    if config.eval.baselines:
        networks = {UNTRAINED: _untrained(config, mesh, parts, train_encoder)} | networks
    digest = digest_of({"encoder": trained.encoder, "head": trained.head})
    return Starts(networks, trained.record, digest)


def _untrained(
    config: ConfigDict, mesh: Mesh, parts: Parts, train_encoder: bool
) -> tuple[dict, dict]:
    network, size = assemble.encoder(config), config.data.image_size
    start = jax.jit(
        lambda key: (
            init_encoder(network, size, key),
            init_head(assemble.head(config), network.width, key),
        ),
        out_shardings=replicated(mesh),
    )
    encoder, head = start(jax.random.key(config.seed))
    if not train_encoder:  # frozen, this start would be too weak a baseline
        encoder = subjects.untrained(config, parts.everything, mesh)
    return encoder, head


def _said(outcome: dict) -> dict:
    """Returns the outcome. Prints that the candidate is left out if the outcome is a failure."""
    if "failed" in outcome:
        say(f"left out    {outcome['failed'].partition('. ')[0]}")
    return outcome
