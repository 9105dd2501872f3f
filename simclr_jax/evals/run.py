"""--mode=probe and --mode=knn: the newest checkpoint beside raw pixels and the untrained encoder.

A number without the other two says nothing: it may be the data that are easy.
"""

import contextlib
import functools
import json
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.checkpoint import find, read_encoder, read_options, with_shardings
from simclr_jax.config import differences, from_dict
from simclr_jax.console import Progress, say, show_table
from simclr_jax.data.sources import Split
from simclr_jax.errors import UserError
from simclr_jax.evals.features import extract, raw_pixels
from simclr_jax.evals.knn import knn_accuracy
from simclr_jax.evals.linear_probe import probe_all_labels, probe_few_labels, scale
from simclr_jax.mesh import make_mesh, replicated
from simclr_jax.resnet import ResNet
from simclr_jax.train_state import init_encoder
from simclr_jax.train_step import to_float

KINDS = RAW_PIXELS, UNTRAINED, ENCODER = "raw pixels", "untrained encoder", "encoder"


class Features(NamedTuple):
    """{kind: features [n, D]} and labels [n] of both splits, and how they were made."""

    train: dict[str, np.ndarray]
    train_labels: np.ndarray
    test: dict[str, np.ndarray]
    test_labels: np.ndarray
    classes: int
    step: int


def can_evaluate(config: ConfigDict) -> bool:
    """Whether the data have labels and a labelled test split."""
    source = assemble.source(config)
    return bool(source.train.classes and source.test is not None and source.test.classes)


def probe(config: ConfigDict, workdir: str) -> dict:
    """Linear probes with all labels and with few; writes WORKDIR/probe.json and shows a table."""
    features = _all_features(config, workdir)
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
    for kind in KINDS:
        x_train, x_test = scale(features.train[kind], features.test[kind])
        train, test = (x_train, features.train_labels), (x_test, features.test_labels)
        for per_class in sorted(few):
            say(f"probing {kind}, {per_class} label{'s' if per_class > 1 else ''} a class")
            accuracies = probe_few_labels(
                train, test, per_class=per_class, seeds=options.seeds, **settings
            )
            rows.append(_row(kind, per_class, accuracies))
        say(f"probing {kind}, all labels")
        best, l2 = probe_all_labels(train, test, **settings)
        rows.append(_row(kind, None, [best]) | {"l2": l2})
    result = _result(config, features, rows) | {"settings": settings}
    _finish(result, workdir, "probe", "Linear probe, test accuracy")
    return result


def knn(config: ConfigDict, workdir: str) -> dict:
    """Weighted kNN with all labels; writes WORKDIR/knn.json and shows a table."""
    features = _all_features(config, workdir)
    k = min(config.eval.knn_k, len(features.train_labels))
    temperature = config.eval.knn_temperature
    rows = []
    for kind in KINDS:
        score = knn_accuracy(
            (features.train[kind], features.train_labels),
            (features.test[kind], features.test_labels),
            k=k,
            temperature=temperature,
            classes=features.classes,
        )
        rows.append(_row(kind, None, [score]))
    settings = {"k": k, "temperature": temperature}
    result = _result(config, features, rows) | {"settings": settings}
    _finish(result, workdir, "knn", f"Weighted kNN, k = {k}, test accuracy")
    return result


def _all_features(config: ConfigDict, workdir: str) -> Features:
    """Features of every image of both splits, by the newest checkpoint and by the baselines."""
    source = assemble.source(config)
    if not can_evaluate(config):
        lacking = "labelled test split" if source.train.classes else "labels"
        raise UserError(
            f"the data have no {lacking}, so there is nothing to evaluate on; see "
            "data.folder_labels, data.test_path and data.test_split"
        )
    assert source.test is not None
    assert source.train.classes
    checkpoint = find(workdir, None)
    saved = read_options(checkpoint)
    step = saved["step"]
    # How it was trained does not matter to what it is; --extend may have changed it since.
    changed = differences(from_dict(saved["config"]), config, ("train.", "optimizer.", "loss."))
    if changed:
        raise UserError(
            f"{checkpoint} is of another configuration ({'; '.join(changed)}): leave --config out"
        )
    mesh = make_mesh()
    # The global batch must divide over the devices: round it up.
    batch_size = -(-config.eval.batch_size // mesh.size) * mesh.size
    network = assemble.encoder(config, parts=mesh.size)
    variables = {
        UNTRAINED: _untrained(config, network, source.train, workdir, batch_size, mesh),
        ENCODER: _trained(config, network, checkpoint, mesh),
    }

    def forward(variables, images):
        x = to_float(images)
        return {
            RAW_PIXELS: raw_pixels(images, source.train.image_shape[-1]),
            UNTRAINED: network.apply(variables[UNTRAINED], x, train=False),
            ENCODER: network.apply(variables[ENCODER], x, train=False),
        }

    def features_of(split: Split, name: str):
        broken = assemble.broken_images(config, split, workdir, test=split is source.test)
        say(f"features of {split.count} {name} images, encoder of step {step}")
        with Progress(-(-split.count // batch_size)) as progress:
            return extract(
                forward,
                variables,
                progress.track(assemble.evaluation_batches(config, split, batch_size, broken)),
                count=split.count,
                batch_size=batch_size,
                size=config.data.image_size,
                mesh=mesh,
            )

    train, train_labels = features_of(source.train, "training")
    test, test_labels = features_of(source.test, "test")
    return Features(train, train_labels, test, test_labels, len(source.train.classes), step)


def _trained(config: ConfigDict, network: ResNet, checkpoint: epath.Path, mesh: Mesh) -> dict:
    start = functools.partial(init_encoder, network, config.data.image_size)
    abstract = jax.eval_shape(start, jax.random.key(0))
    return read_encoder(checkpoint, with_shardings(abstract, replicated(mesh)))


def _untrained(
    config: ConfigDict, network: ResNet, split: Split, workdir: str, batch_size: int, mesh: Mesh
) -> dict:
    """The encoder before training, made as good as an untrained one can be.

    As initialised it would be a straw man: with the last BatchNorm scale of each block at zero it
    sees through its strided 1x1 shortcuts only (at 16 px: one corner of the image). So here these
    scales are one, and the running statistics are those of one batch of views.
    """
    size = config.data.image_size
    network = network.clone(zero_init_residual=False, norm_momentum=0.0)
    broken = assemble.broken_images(config, split, workdir)
    batches = assemble.training_batches(config, split, 0, broken, batch_size)
    with contextlib.closing(batches):
        batch = assemble.feed(config, split, mesh)(next(batches))
    fetch, make_views = assemble.view_functions(config)

    def calibrated(key, batch):
        variables = init_encoder(network, size, key)
        first = make_views(fetch(batch))[:, 0]
        _, seen = network.apply(variables, first, train=True, mutable=["batch_stats"])
        return {"params": variables["params"], "batch_stats": seen["batch_stats"]}

    return jax.jit(calibrated, out_shardings=replicated(mesh))(jax.random.key(config.seed), batch)


def _row(kind: str, per_class: int | None, accuracies: list[float]) -> dict:
    return {
        "features": kind,
        "labels_per_class": per_class,
        "accuracy": float(np.mean(accuracies)),
        "std": float(np.std(accuracies)),
        "seeds": len(accuracies),
    }


def _result(config: ConfigDict, features: Features, rows: list[dict]) -> dict:
    return {
        "step": features.step,
        "rows": rows,
        "train_images": len(features.train_labels),
        "test_images": len(features.test_labels),
        "config": config.to_dict(),
    }


def _finish(result: dict, workdir: str, name: str, title: str) -> None:
    if jax.process_index() == 0:
        path = epath.Path(workdir) / f"{name}.json"
        try:
            path.write_text(json.dumps(result, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    columns = sorted({row["labels_per_class"] or np.inf for row in result["rows"]})
    cells: dict[str, dict[float, str]] = {}
    for row in result["rows"]:
        spread = f" ± {row['std']:.1%}" if row["seeds"] > 1 else ""
        column = row["labels_per_class"] or np.inf
        cells.setdefault(row["features"], {})[column] = f"{row['accuracy']:.1%}{spread}"
    header = ["labels a class"] + ["all" if c == np.inf else str(c) for c in columns]
    say()
    show_table(title, header, [[kind, *(by[c] for c in columns)] for kind, by in cells.items()])
    say(f"{result['test_images']} test images, step {result['step']}: {workdir}/{name}.json")
