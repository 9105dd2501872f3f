"""The encoders that are evaluated: the newest of a workdir, and an untrained one beside it."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.console import Progress
from simclr_jax.data.broken import Images
from simclr_jax.data.split import DataSet
from simclr_jax.encoders import apply_network, init_encoder
from simclr_jax.encoders.images import to_float
from simclr_jax.errors import UserError
from simclr_jax.evals import scores
from simclr_jax.evals.features import Extractor
from simclr_jax.mesh import laid_out, make_mesh, replicated, traced_on
from simclr_jax.pretrained import read_head_variables, read_variables
from simclr_jax.training.saved import find, read_newest
from simclr_jax.training.state import init_head
from simclr_jax.training.workdir import check_encoder
from simclr_jax.views.placement import Views

# Images that a device embeds at once, unless eval.batch_size is smaller: 256 chips would have one each.
_LEAST_OF_A_DEVICE = 16

KINDS = RAW_PIXELS, UNTRAINED, ENCODER = "raw pixels", "untrained encoder", "encoder"


_CALIBRATION_IMAGES = 512


class Trained(NamedTuple):
    """A trained encoder.

    Attributes:
      encoder: {"params", "batch_stats"} of f.
      head: {"params", "batch_stats"} of g; None: it was not asked for.
      record: the checkpoint's record: {"step", "config", ...}.
    """

    encoder: dict
    head: dict | None
    record: dict


def trained(
    config: ConfigDict, workdir: str, mesh: Mesh, head: bool = False, step: int | None = None
) -> Trained:
    """Reads an encoder onto every device.

    Args:
      config: the evaluation's configuration.
      workdir: a run's folder, or a checkpoint folder.
      mesh: all devices.
      head: read the projection head too.
      step: the checkpoint's step; None: the newest.

    Raises:
      UserError: there is no checkpoint, or its model differs from the configuration's.
    """

    def read(checkpoint: epath.Path) -> Trained:
        record = check_encoder(config, checkpoint)
        network, everywhere = assemble.encoder(config), replicated(mesh)
        encoder = read_variables(config, network, checkpoint, everywhere)
        if not head:
            return Trained(encoder, None, record)
        return Trained(
            encoder, read_head_variables(config, network, checkpoint, everywhere), record
        )

    return read_newest(workdir, read) if step is None else read(find(workdir, step))


def without_labels(data: DataSet, sets: bool = False) -> str:
    """Returns why nothing can be evaluated on the data, "" if something can. Both splits must have labels: one an image,
    or any number if `sets`.
    """
    if not data.train.has_labels():
        return "the data have no labels, so there is nothing to evaluate on"
    if data.test is None or not data.test.has_labels():
        return (
            "the data have no labelled test split, so there is nothing to evaluate on; "
            "--config.data.test_fraction=0.1 would hold out a tenth of the images"
        )
    one_class = data.members is None and len(data.train.classes or ()) == 1
    if one_class and data.train.labelled().count > 1:
        return "all labels are of one class, so there is nothing to tell apart"
    if data.members is not None and not sets:
        return (
            "images of these data have several labels each: --mode=transfer and "
            "--mode=transfer_finetune evaluate on them"
        )
    return ""


def fingerprint(data: DataSet) -> str:
    """Returns a digest of the images and labels of both splits."""
    test = data.test.fingerprint() if data.test else ""
    return f"{data.train.fingerprint()} {test}"


def labelled(config: ConfigDict, sets: bool = False) -> DataSet:
    """Opens the data of the configuration.

    Args:
      config: the evaluation's configuration.
      sets: whether images may have several labels each.

    Raises:
      UserError: not both splits have labels, or images have several and must not.
    """
    data = assemble.data_set(config)
    if why := without_labels(data, sets):
        options = (
            "; see data.folder_labels, data.labels_file, data.test_path, data.test_fraction and "
            "data.test_split"
        )
        raise UserError(why + options * (data.members is None))
    return data


def metric_of(config: ConfigDict, data: DataSet) -> str:
    """Returns the name of the metric that eval.metric asks for; "auto" is the one that the paper reports
    for the data set (appendix B.8.1).

    Raises:
      UserError: it is not of the kind of the labels.
    """
    asked = config.eval.metric
    if data.members is None:
        if asked == "11_point_map":
            raise UserError(
                f"eval.metric={asked} is for several labels an image, and these have one"
            )
        return scores.published_metric(asked, config.data.source, config.data.name)
    if asked not in ("auto", "11_point_map"):
        raise UserError(
            f"eval.metric={asked} is for one label an image, and these have several: expected auto or "
            "11_point_map"
        )
    return "11_point_map"


def batch_size_of(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the number of images embedded at once: eval.batch_size, rounded up to a multiple of the devices,
    and so many that each of many devices has something to do.
    """
    asked = config.eval.batch_size
    return mesh.size * max(-(-asked // mesh.size), min(_LEAST_OF_A_DEVICE, asked))


def representations(config: ConfigDict, with_z: bool) -> Callable[[Any, Any], dict]:
    """Returns a jit-able function: variables (of f, of g), images uint8 [N, H, W, 3] -> {"h": [N, D]} and, `with_z`,
    "z" of the head's last layer. Neither is normalised.
    """
    network, head = assemble.encoder(config), assemble.head(config)

    def represent(variables, images):
        h, _ = apply_network(network, variables[0], to_float(images), train=False)
        if not with_z:
            return {"h": h}
        return {"h": h, "z": apply_network(head, variables[1], h, train=False)[0][-1]}

    return represent


def extractor(config: ConfigDict, mesh: Mesh, forward: Callable) -> Extractor:
    """Makes the extractor of a `forward`, see `Extractor`, for images as the configuration has them."""
    size = config.data.image_size
    return Extractor(forward, batch_size=batch_size_of(config, mesh), size=size, mesh=mesh)


def features_of(
    extractor: Extractor, views: Views, variables: Any, images: Images, shown: bool = False
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Extracts the features of all images of a split that can be read and have a label, see `Extractor.extract`.

    `shown`: show how far it is.
    """
    count, batch_size = images.split.count, extractor.batch_size
    batches: Any = views.evaluation_batches(images, batch_size)
    with Progress(-(-count // batch_size)) if shown else contextlib.nullcontext() as progress:
        return extractor.extract(variables, progress.track(batches) if progress else batches, count)


def score_of(
    metric: str,
    extractor: Extractor,
    views: Views,
    variables: Any,
    images: Images,
    members: np.ndarray | None = None,
) -> tuple[scores.Score, int]:
    """Scores the logits of a classifier.

    Args:
      metric: a row of `scores.METRICS`.
      extractor: computes {"logits"}.
      views: make the images' evaluation views.
      variables: the classifier's.
      images: labelled images.
      members: see `DataSet`.

    Returns:
      (score, number of images that could be read)
    """
    found, labels = features_of(extractor, views, variables, images)
    targets = labels if members is None else members[labels]
    return scores.score(metric, found["logits"], targets), len(labels)


def untrained(config: ConfigDict, images: Images, mesh: Mesh) -> dict:
    """Makes {"params", "batch_stats"} of the encoder before training, as good as it can be.

    Where the encoder has BatchNorm, its running statistics are those of one view each of 512 training images,
    or of all if there are fewer; see also `EncoderNetwork.as_baseline`. Each process computes them on one device, so
    that they depend neither on the devices nor on eval.batch_size.
    """
    network = assemble.encoder(config, norm_momentum=0.0).as_baseline()
    config = config.copy_and_resolve_references()
    config.data.batch_size = min(_CALIBRATION_IMAGES, images.split.count)
    alone = make_mesh(jax.local_devices()[:1])
    made = assemble.views(config, alone)
    with contextlib.closing(made.batches(images, 0)) as batches:
        batch = made.placer(images.split)(next(batches))

    def calibrated(key, batch):
        variables = init_encoder(network, config.data.image_size, key)
        first = made.views(made.fetch(batch))[:, 0]
        _, seen = apply_network(network, variables, first, train=True)
        return {"params": variables["params"], "batch_stats": seen}

    found = jax.jit(traced_on(alone, calibrated))(jax.random.key(config.seed), batch)
    return _on_every_device(found, mesh)


def untrained_head(config: ConfigDict, mesh: Mesh) -> dict:
    """Makes {"params", "batch_stats"} of the projection head before training."""
    start = init_head(
        assemble.head(config), assemble.encoder(config).width, jax.random.key(config.seed)
    )
    return _on_every_device(start, mesh)


def _on_every_device(tree: dict, mesh: Mesh) -> dict:
    everywhere = replicated(mesh)
    return jax.tree.map(lambda x: laid_out(np.asarray(x), everywhere), tree)
