"""--mode=linear and --mode=finetune: classifiers trained by SGD on random crops (appendices B.5, B.6).

What is reported is the accuracy of the last step, and, where a validation part was held out of the
training split, of the step that did best on it. The test split chooses nothing.
"""

import contextlib
import functools
import itertools
from collections.abc import Generator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import Progress, say
from simclr_jax.data.broken import Broken
from simclr_jax.data.order import few_labels
from simclr_jax.data.sources import Split
from simclr_jax.errors import UserError
from simclr_jax.evals import encoders, results
from simclr_jax.evals.encoders import ENCODER, UNTRAINED
from simclr_jax.evals.features import Extractor
from simclr_jax.evals.supervised import Classified, make_optimizer, make_predict, make_step
from simclr_jax.heads import LinearClassifier
from simclr_jax.mesh import check_divides, make_mesh, replicated
from simclr_jax.train_state import TrainState, init_encoder, init_head

_VALIDATIONS = 10  # evenly spaced moments of a training among which the validation part chooses


class Setting(NamedTuple):
    """One training: how much of the labels, how long, how fast."""

    fraction: float
    epochs: float
    learning_rate: float  # before scaling by batch / 256
    weight_decay: float


class Images(NamedTuple):
    """What is trained or tested on, and which of it is known to be broken."""

    split: Split
    broken: Broken


class Outcome(NamedTuple):
    """Test accuracy at the last step, and at the step chosen on the validation part."""

    last: float
    selected: float | None
    selected_step: int | None
    validation: float | None  # accuracy at that step
    steps: int
    images: int  # trained on


def linear(config: ConfigDict, workdir: str) -> dict:
    """Linear evaluation as in appendix B.6: f frozen, SGD on random crops, all labels. Writes
    WORKDIR/linear.json and shows a table.
    """
    options = config.linear
    trainer = _Trainer(config, workdir, options, train_encoder=False, layer=0)
    title = "Linear evaluation by SGD (appendix B.6), test accuracy"
    return _rows_of(trainer, [(1.0, options.epochs)], workdir, "linear", title)


def finetune(config: ConfigDict, workdir: str) -> dict:
    """Fine-tuning of the whole network with fractions of the labels, the same number of each class
    (appendix B.5), from h or from a layer of the projection head. The untrained encoder beside it is
    trained in the same way from its random start. Writes WORKDIR/finetune.json and shows a table.
    """
    options = config.finetune
    trainer = _Trainer(config, workdir, options, train_encoder=True, layer=options.from_layer)
    title = "Fine-tuning (appendix B.5), test accuracy"
    if options.from_layer:
        title = f"Fine-tuning from layer {options.from_layer} of the head, test accuracy"
    trainings = list(zip(options.label_fractions, options.epochs, strict=True))
    return _rows_of(trainer, trainings, workdir, "finetune", title)


class _Trainer:
    """The data, the starts, and one compiled program for each setting."""

    def __init__(
        self,
        config: ConfigDict,
        workdir: str,
        options: ConfigDict,
        *,
        train_encoder: bool,
        layer: int,
    ):
        source = encoders.labelled(config)
        assert source.test is not None
        assert source.train.classes
        self.mesh = make_mesh()
        name = "finetune" if train_encoder else "linear"
        check_divides(options.batch_size, self.mesh, option=f"{name}.batch_size")
        self.config, self.options = config, options
        self.whole, self.test = source.train, self._images(source.test)
        part, self.validation = source.train, None
        fraction = config.eval.validation_fraction
        if fraction > 0:
            part, held = self.whole.divided(fraction, config.seed)
            self.validation = self._images(held, self.whole)
        elif len(options.learning_rate) * len(options.weight_decay) > 1:
            raise UserError(
                f"{name}.learning_rate and weight_decay name several values, and "
                "eval.validation_fraction=0 leaves nothing to choose them on"
            )
        self.part = self._images(part, self.whole)
        trained = encoders.trained(config, workdir, self.mesh, head=True)
        self.saved, self.step = trained.saved, trained.saved["step"]
        self._starts = {ENCODER: (trained.encoder, trained.head)}
        if config.eval.baselines:
            self._starts = {UNTRAINED: self._untrained(train_encoder)} | self._starts
        self._train_encoder, self._layer = train_encoder, layer
        batch_size = encoders.batch_size_of(config, self.mesh)
        self._predict = Extractor(
            make_predict(self._model(1)),
            batch_size=batch_size,
            size=config.data.image_size,
            mesh=self.mesh,
        )
        self._batch_size = batch_size

    def _images(self, split: Split, whole: Split | None = None) -> Images:
        return Images(split, assemble.broken_images(self.config, split, None, whole))

    @property
    def kinds(self) -> list[str]:
        return list(self._starts)

    def per_class(self, fraction: float) -> int:
        """How many labels of each class a fraction of the training split's is, at least one."""
        assert self.whole.classes
        return max(1, round(fraction * self.whole.count / len(self.whole.classes)))

    def check_memory(self, fractions: list[float]) -> None:
        """Raises a UserError, before hours of training, if a fraction will not fit into memory."""
        assert self.whole.classes
        for fraction in fractions:
            if fraction < 1:
                count = self.per_class(fraction) * len(self.whole.classes)
                self.part.split.check_subset(count)

    def best_of(self, kind: str, fraction: float, epochs: float, draw: int) -> dict:
        """Trains with every candidate; the validation part chooses one, if there are several."""
        images, options = self._labels(fraction, draw), self.options
        outcomes = []
        for rate, decay in itertools.product(options.learning_rate, options.weight_decay):
            setting = Setting(fraction, epochs, rate, decay)
            say(
                f"{kind}, {images.split.count} labels"
                + (f", draw {draw + 1}" if fraction < 1 else "")
                + f", {epochs:g} epochs, learning rate {rate:g} x {options.batch_size} / 256"
                + (f", weight decay {decay:g}" if decay else "")
            )
            outcomes.append((setting, self._train(kind, images, setting)))
        setting, outcome = max(outcomes, key=lambda pair: pair[1].validation or 0.0)
        return outcome._asdict() | {
            "learning_rate": setting.learning_rate,
            "weight_decay": setting.weight_decay,
        }

    def _labels(self, fraction: float, draw: int) -> Images:
        """The part of the training split whose labels are used."""
        if fraction == 1:
            return self.part
        part = self.part.split
        picked = few_labels(part.all_labels(), self.per_class(fraction), draw)
        return self._images(part.subset(picked), self.whole)

    def _untrained(self, train_encoder: bool) -> tuple[dict, dict]:
        config, everywhere = self.config, replicated(self.mesh)
        network, size = assemble.encoder(config), config.data.image_size
        key = jax.random.key(config.seed)
        start = jax.jit(
            lambda key: (
                init_encoder(network, size, key),
                init_head(assemble.head(config), network.width_of_h, key),
            ),
            out_shardings=everywhere,
        )
        encoder, head = start(key)
        if not train_encoder:  # frozen, it would be a straw man
            batch_size = encoders.batch_size_of(config, self.mesh)
            encoder = encoders.untrained(config, *self._images(self.whole), batch_size, self.mesh)
        return encoder, head

    def _model(self, steps_per_epoch: int) -> Classified:
        assert self.whole.classes
        # Appendix B.8: a running statistic forgets within an epoch, where that is longer than ten
        # steps.
        momentum = max(1 - 10 / max(1, steps_per_epoch), 0.9)
        config = self.config
        return Classified(
            encoder=assemble.encoder(config, parts=self.mesh.size).clone(norm_momentum=momentum),
            head=assemble.head(config).clone(norm_momentum=momentum),
            layer=self._layer,
            classifier=LinearClassifier(len(self.whole.classes)),
            train_encoder=self._train_encoder,
        )

    def _train(self, kind: str, images: Images, setting: Setting) -> Outcome:
        per_epoch = images.split.count / self.options.batch_size
        steps = max(1, round(setting.epochs * per_epoch))
        step, start = self._compiled(setting, steps, round(per_epoch))
        state, frozen = start(kind)
        moments = {round((i + 1) * steps / _VALIDATIONS) for i in range(_VALIDATIONS)}
        # What is kept of the best moment is copied, as the step takes its state's memory.
        best: tuple[float, int, Any] | None = None
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(Progress(steps))
            batches = stack.enter_context(contextlib.closing(self._batches(images)))
            for number in range(1, steps + 1):
                state, metrics = step(state, frozen, next(batches))
                if self.validation is not None and number in moments:
                    score = self._accuracy(self._variables(state, frozen), self.validation)
                    if best is None or score >= best[0]:
                        kept = jax.tree.map(jnp.copy, (state.params, state.batch_stats))
                        best = score, number, kept
                if number in moments:
                    progress.report(number, jax.tree.map(float, jax.device_get(metrics)))
                else:
                    progress.advance(number)
        last = self._accuracy(self._variables(state, frozen), self.test)
        if best is None:
            return Outcome(last, None, None, None, steps, images.split.count)
        score, number, (params, batch_stats) = best
        chosen = {"params": frozen | params, "batch_stats": batch_stats}
        selected = last if number == steps else self._accuracy(chosen, self.test)
        return Outcome(last, selected, number, score, steps, images.split.count)

    @functools.lru_cache(maxsize=1)  # noqa: B019  the draws of a setting follow each other
    def _compiled(self, setting: Setting, steps: int, steps_per_epoch: int):
        """The jitted step, and kind to the state before it and what is frozen."""
        config, options, mesh = self.config, self.options, self.mesh
        model = self._model(steps_per_epoch)
        peak = setting.learning_rate * options.batch_size / 256
        optimizer, schedule = make_optimizer(peak, steps, setting.weight_decay, options.momentum)
        fetch, make_views = assemble.view_functions(config, assemble.crops(config))
        everywhere = replicated(mesh)
        step = jax.jit(
            make_step(model, optimizer, schedule, fetch, make_views),
            out_shardings=everywhere,
            donate_argnums=0,
        )

        def start(kind: str) -> tuple[TrainState, dict]:
            encoder, head = self._starts[kind]
            build = jax.jit(model.start, out_shardings=everywhere)
            variables = build(encoder, head, jax.random.key(config.seed))
            params = model.trained_part(variables["params"])
            state = TrainState(
                step=jnp.zeros((), jnp.int32),
                params=params,
                batch_stats=variables["batch_stats"],
                opt_state=jax.jit(optimizer.init, out_shardings=everywhere)(params),
            )
            frozen = {k: v for k, v in variables["params"].items() if k not in params}
            return state, frozen

        return step, start

    def _batches(self, images: Images) -> Generator[dict]:
        config, distortion = self.config, assemble.crops(self.config)
        split, broken = images
        batches = assemble.training_batches(
            config, split, 0, broken, self.options.batch_size, distortion
        )
        feed = assemble.feed(config, split, self.mesh, distortion)
        with contextlib.closing(batches):
            for batch in batches:
                yield feed(batch)

    @staticmethod
    def _variables(state: TrainState, frozen: dict) -> dict:
        return {"params": frozen | state.params, "batch_stats": state.batch_stats}

    def _accuracy(self, variables: dict, images: Images) -> float:
        split, broken = images
        batches = assemble.evaluation_batches(self.config, split, self._batch_size, broken)
        found, labels = self._predict.extract(variables, batches, split.count)
        return float(np.mean(found["class"][:, 0] == labels))


def _row(kind: str, per_class: int | None, fraction: float, runs: list[dict]) -> dict:
    row = results.row(kind, per_class, [run["last"] for run in runs]) | {"label_fraction": fraction}
    if runs[0]["selected"] is not None:
        selected = [run["selected"] for run in runs]
        row |= {
            "selected_accuracy": float(np.mean(selected)),
            "selected_std": float(np.std(selected)),
        }
    return row | {"runs": runs}


def _rows_of(
    trainer: _Trainer, trainings: list[tuple[float, float]], workdir: str, mode: str, title: str
) -> dict:
    """Trains with each (fraction of the labels, epochs), from each start, and returns the result.
    It is saved as it comes: on many images each row takes hours.
    """
    config = trainer.config
    trainer.check_memory([fraction for fraction, _ in trainings])
    rows: list[dict] = []
    result = {
        "step": trainer.step,
        "rows": rows,
        "train_images": trainer.part.split.count,
        "validation_images": trainer.validation.split.count if trainer.validation else 0,
        "test_images": trainer.test.split.count,
        "settings": trainer.options.to_dict() | {"seed": config.seed},
    }
    path = results.path_of(config, trainer.saved, trainer.whole, workdir, mode)
    for kind in trainer.kinds:
        for fraction, epochs in trainings:
            draws = 1 if fraction == 1 else config.eval.seeds
            runs = [trainer.best_of(kind, fraction, epochs, draw) for draw in range(draws)]
            per_class = None if fraction == 1 else trainer.per_class(fraction)
            rows.append(_row(kind, per_class, fraction, runs))
            results.save(path, config, result)
    header = ["from", "labels", "last step", "selected on validation"]
    results.show(path, result, title, header, [_line(row) for row in rows])
    return result


def _line(row: dict) -> list[str]:
    labels = f"{row['label_fraction']:.0%}, {row['runs'][0]['images']} images"
    held_out = "selected_accuracy" in row
    selected = results.cell(row, "selected_") if held_out else "none held out"
    return [row["features"], labels, results.cell(row), selected]
