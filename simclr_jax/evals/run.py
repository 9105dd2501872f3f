"""--mode=probe, knn and transfer: classifiers on the features of the newest checkpoint, of raw pixels
and of the untrained encoder.

A number without the other two says nothing: it may be the data that are easy.
"""

from typing import NamedTuple

import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import Progress, say
from simclr_jax.data.sources import Split
from simclr_jax.errors import UserError
from simclr_jax.evals import encoders, results
from simclr_jax.evals.encoders import ENCODER, RAW_PIXELS, UNTRAINED
from simclr_jax.evals.features import Extractor, raw_pixels
from simclr_jax.evals.knn import knn_accuracy
from simclr_jax.evals.linear_probe import (
    LAMBDAS,
    fit_chosen_lambda,
    probe_all_labels,
    probe_few_labels,
    scale,
)
from simclr_jax.mesh import make_mesh
from simclr_jax.train_step import to_float


class Features(NamedTuple):
    """{kind: features [n, D]} and labels [n] of both splits, and what they were made with."""

    train: dict[str, np.ndarray]
    train_labels: np.ndarray
    test: dict[str, np.ndarray]
    test_labels: np.ndarray
    classes: int
    step: int
    result: epath.Path
    mesh: Mesh


def can_evaluate(config: ConfigDict) -> bool:
    """Whether there are labels, a labelled test split, and a part to choose regularisation on."""
    if not encoders.is_labelled(assemble.source(config)):
        return False
    if config.eval.validation_fraction == 0:
        say("no probe    eval.validation_fraction=0 leaves nothing to choose its regularisation on")
        return False
    return True


def probe(config: ConfigDict, workdir: str) -> dict:
    """Linear probes with all labels and with few; writes WORKDIR/probe.json and shows a table."""
    _check_choice(config)
    features = _all_features(config, workdir, "probe")
    options = config.eval
    settings = {
        "l2": tuple(options.l2),
        "validation_fraction": options.validation_fraction,
        "seed": config.seed,
        "classes": features.classes,
        "max_iterations": options.max_iterations,
    }
    few = set(options.labels_per_class)
    if options.label_fraction > 0:
        share = options.label_fraction * len(features.train_labels) / features.classes
        few.add(max(1, round(share)))
    rows = []
    for kind in features.train:
        x_train, x_test = scale(features.train[kind], features.test[kind])
        train, test = (x_train, features.train_labels), (x_test, features.test_labels)
        for per_class in sorted(few):
            say(f"probing {kind}, {per_class} label{'s' if per_class > 1 else ''} a class")
            accuracies = probe_few_labels(
                train,
                test,
                per_class=per_class,
                seeds=options.seeds,
                mesh=features.mesh,
                **settings,
            )
            rows.append(results.row(kind, per_class, accuracies))
        say(f"probing {kind}, all labels")
        best, l2 = probe_all_labels(train, test, mesh=features.mesh, **settings)
        rows.append(results.row(kind, None, [best]) | {"l2": l2})
    return _finish(config, features, rows, settings, "Linear probe, test accuracy")


def knn(config: ConfigDict, workdir: str) -> dict:
    """Weighted kNN with all labels; writes WORKDIR/knn.json and shows a table."""
    features = _all_features(config, workdir, "knn")
    k = min(config.eval.knn_k, len(features.train_labels))
    temperature = config.eval.knn_temperature
    rows = []
    for kind in features.train:
        score = knn_accuracy(
            (features.train[kind], features.train_labels),
            (features.test[kind], features.test_labels),
            k=k,
            temperature=temperature,
            classes=features.classes,
            mesh=features.mesh,
        )
        rows.append(results.row(kind, None, [score]))
    settings = {"k": k, "temperature": temperature}
    title = f"Weighted kNN, k = {k}, test accuracy"
    return _finish(config, features, rows, settings, title)


def transfer(config: ConfigDict, workdir: str) -> dict:
    """Transfer as in the paper's appendix B.8: features of the centred square, without random crops,
    and logistic regression whose lambda is chosen out of 45 on a validation part and which is then
    fitted to all training labels. Writes WORKDIR/transfer.json, or transfer_NAME.json for other
    data than those of training, and shows a table.
    """
    _check_choice(config)
    config = config.copy_and_resolve_references()
    config.data.eval_crop = 1.0
    features = _all_features(config, workdir, "transfer")
    settings = {
        "lambdas": LAMBDAS,
        "validation_fraction": config.eval.validation_fraction,
        "seed": config.seed,
        "max_iterations": config.eval.max_iterations,
    }
    rows, lines = [], []
    for kind in features.train:
        say(f"fitting {kind}, {len(LAMBDAS)} values of lambda")
        found = fit_chosen_lambda(
            (features.train[kind], features.train_labels),
            (features.test[kind], features.test_labels),
            classes=features.classes,
            mesh=features.mesh,
            **settings,
        )
        rows.append(results.row(kind, None, [found.pop("accuracy")]) | found)
        lines.append(
            [
                kind,
                results.cell(rows[-1]),
                f"{found['mean_per_class_accuracy']:.1%}",
                f"{found['lambda']:.2g}",
            ]
        )
    table = ["features", "accuracy", "mean of classes", "lambda"], lines
    title = "Logistic regression (appendix B.8), test accuracy"
    return _finish(config, features, rows, settings, title, table)


def _check_choice(config: ConfigDict) -> None:
    if config.eval.validation_fraction == 0:
        raise UserError("eval.validation_fraction=0: expected a part to choose regularisation on")


def _all_features(config: ConfigDict, workdir: str, mode: str) -> Features:
    """Features of every image of both splits, by the newest checkpoint and by the baselines."""
    source = encoders.labelled(config)
    assert source.test is not None
    assert source.train.classes
    mesh = make_mesh()
    trained = encoders.trained(config, workdir, mesh)
    step, batch_size = trained.saved["step"], encoders.batch_size_of(config, mesh)
    network = assemble.encoder(config, parts=mesh.size)
    path = results.path_of(config, trained.saved, source.train, workdir, mode)
    broken = {
        split: assemble.broken_images(
            config, images, path.with_name(f"{path.stem}_broken_{split}.jsonl")
        )
        for split, images in (("training", source.train), ("test", source.test))
    }
    variables = {ENCODER: trained.encoder}
    if config.eval.baselines:
        start = encoders.untrained(config, source.train, broken["training"], batch_size, mesh)
        variables = {UNTRAINED: start} | variables

    def forward(variables, images):
        x = to_float(images)
        channels = source.train.image_shape[-1]
        raw = {RAW_PIXELS: raw_pixels(images, channels)} if config.eval.baselines else {}
        return raw | {kind: network.apply(v, x, train=False) for kind, v in variables.items()}

    extractor = Extractor(forward, batch_size=batch_size, size=config.data.image_size, mesh=mesh)

    def features_of(split: Split, name: str):
        say(f"features of {split.count} {name} images, encoder of step {step}")
        with Progress(-(-split.count // batch_size)) as progress:
            batches = assemble.evaluation_batches(config, split, batch_size, broken[name])
            return extractor.extract(variables, progress.track(batches), split.count)

    train, train_labels = features_of(source.train, "training")
    test, test_labels = features_of(source.test, "test")
    kinds = [kind for kind in encoders.KINDS if kind in train]
    return Features(
        {kind: train[kind] for kind in kinds},
        train_labels,
        test,
        test_labels,
        len(source.train.classes),
        step,
        path,
        mesh,
    )


def _finish(
    config: ConfigDict,
    features: Features,
    rows: list[dict],
    settings: dict,
    title: str,
    table: tuple | None = None,
) -> dict:
    result = {
        "step": features.step,
        "rows": rows,
        "train_images": len(features.train_labels),
        "test_images": len(features.test_labels),
        "settings": settings,
    }
    results.save(features.result, config, result)
    results.show(features.result, result, title, *(table or results.labels_table(rows)))
    return result
