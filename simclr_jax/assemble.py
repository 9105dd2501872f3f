"""The assembly line: the only place where options turn into data sets, networks and optimizers."""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax.config import Plan
from simclr_jax.data import device_augment, resident
from simclr_jax.data.broken import Broken
from simclr_jax.data.distortion import Distortion
from simclr_jax.data.sources import Share, Source, Split, open_source
from simclr_jax.errors import UserError
from simclr_jax.heads import LinearClassifier, ProjectionHead
from simclr_jax.losses import nt_xent
from simclr_jax.losses_chunked import nt_xent_chunked
from simclr_jax.mesh import replicated, to_global
from simclr_jax.optimizer import make_optimizer, warmup_cosine
from simclr_jax.resnet import ResNet
from simclr_jax.train_state import Networks
from simclr_jax.train_step import to_float


def source(config: ConfigDict) -> Source:
    """The data set of the configuration."""
    data = config.data
    return open_source(
        data.source,
        name=data.name,
        path=data.path,
        test_path=data.test_path,
        train_split=data.train_split,
        test_split=data.test_split,
        folder_labels=data.folder_labels,
        seed=config.seed,
    )


def training_batches(
    config: ConfigDict,
    split: Split,
    start_step: int,
    broken: Broken,
    batch_size: int | None = None,
    distortion: Distortion | None = None,
) -> Generator[dict]:
    """This process's part of the batches of views from `start_step` on; close it when done.

    `batch_size` of the global batch and `distortion` default to the configuration's.
    """
    where = {
        "seed": config.seed,
        "batch_size": batch_size or config.data.batch_size,
        "start_step": start_step,
        "share": _share(),
    }
    if config.data.placement == "device":
        return resident.training_batches(split, **where)
    # Imported here: this needs TensorFlow, which takes 10 s to import.
    from simclr_jax.data import pipeline

    return pipeline.training_batches(
        split,
        **where,
        size=config.data.image_size,
        distortion=distortion or _distortion(config),
        broken=broken,
        color=_color_on_host(config, distortion),
    )


def _color_on_host(config: ConfigDict, distortion: Distortion | None) -> bool:
    # What is given instead of the configuration's has no colour to leave to the device.
    return config.data.color_on == "host" or distortion is not None


def feed(
    config: ConfigDict, split: Split, mesh: Mesh, distortion: Distortion | None = None
) -> Callable[[dict], dict]:
    """What turns this process's part of a batch of `training_batches` into the global batch that
    `fetch` and `views` of `view_functions` take.
    """
    if config.data.placement == "host":
        names = ["views", "label"] + ["draws"] * (not _color_on_host(config, distortion))
        return lambda batch: to_global(mesh, {name: batch[name] for name in names})
    placed = resident.place(split, replicated(mesh))

    def which(batch: dict) -> dict:
        own = {name: batch[name].astype(np.int32) for name in ("epoch", "index")}
        return to_global(mesh, own) | placed

    return which


def view_functions(
    config: ConfigDict, distortion: Distortion | None = None
) -> tuple[Callable, Callable]:
    """What of the views is left to the device, jit-able; by the configuration's distortion, or this.

    Returns:
      fetch: a global batch to one whose every array is [B, ...]: {"views", "label", ...};
      views: such a batch, or a part of it, to float32 [b, 2, H, W, 3] in [0, 1].
    """
    distortion = distortion or _distortion(config)

    def fetch(batch: dict) -> dict:
        if config.data.placement == "host":
            return batch
        epochs, indices = batch["epoch"], batch["index"]
        crops, draws = device_augment.views_of(
            batch["images"],
            config.seed,
            epochs,
            indices,
            config.data.image_size,
            distortion,
        )
        return {"views": crops, "draws": draws, "label": batch["labels"][indices]}

    def views(batch: dict) -> jax.Array:
        if "draws" not in batch:
            return to_float(batch["views"])
        return device_augment.recolor(batch["views"], batch["draws"], distortion)

    return fetch, views


def _distortion(config: ConfigDict) -> Distortion:
    return Distortion(**config.views.to_dict())


def crops(config: ConfigDict) -> Distortion:
    """One view of an image, only cropped and flipped: what classifiers are trained on (paper,
    appendix B.5).
    """
    return dataclasses.replace(
        _distortion(config), color_strength=0.0, grey_probability=0.0, blur_probability=0.0, views=1
    )


def evaluation_batches(
    config: ConfigDict, split: Split, batch_size: int, broken: Broken, start: int = 0
) -> Iterator[dict]:
    """This process's share of the split, each image once, `batch_size` images of all processes at
    a time, from the `start`-th of these batches on.
    """
    share = _share()
    options = {
        "batch_size": batch_size // share.count,
        "share": share,
        "size": config.data.image_size,
        "proportion": config.data.eval_crop,
        "start": start,
    }
    if config.data.placement == "device":
        return resident.evaluation_batches(split, **options)
    from simclr_jax.data import pipeline

    return pipeline.evaluation_batches(split, **options, broken=broken)


def broken_images(
    config: ConfigDict, split: Split, report: epath.PathLike | None, whole: Split | None = None
) -> Broken:
    """Where the images of a split that this process cannot read are noted.

    Args:
      config: of the run.
      split: the images.
      report: the file that names them, of the first process; None: none.
      whole: see `Broken`.
    """
    if report is not None:
        report = epath.Path(report)
        if index := jax.process_index():
            report = report.with_name(f"{report.stem}_process_{index}{report.suffix}")
    return Broken(split, config.data.max_broken, report, whole)


def _share() -> Share:
    return Share(jax.process_index(), jax.process_count())


def encoder(config: ConfigDict, norm_group: int = 0, parts: int = 1) -> ResNet:
    """f. `norm_group`, for which evaluation has no use, and `parts`: see `ResNet`."""
    model = config.model
    return ResNet(
        model.depth,
        model.width,
        model.stem,
        jnp.dtype(model.dtype),
        model.norm_momentum,
        norm_group,
        remat=model.remat,
        parts=parts,
        pool_padding=model.pool_padding,
    )


def head(config: ConfigDict, norm_group: int = 0) -> ProjectionHead:
    """g. `norm_group`: see `encoder`."""
    model = config.model
    return ProjectionHead(
        model.head,
        model.head_layers,
        model.head_width,
        jnp.dtype(model.dtype),
        model.norm_momentum,
        norm_group,
    )


def networks(config: ConfigDict, classes: int | None, mesh: Mesh) -> Networks:
    """f, g and, where there are `classes` and the option says so, the online classifier.

    Raises:
      UserError: the images do not divide into the groups of BatchNorm.
    """
    norm_group = 2 * images_of_a_norm(config, mesh)
    return Networks(
        encoder=encoder(config, norm_group, mesh.size),
        head=head(config, norm_group),
        classifier=LinearClassifier(classes)
        if classes and config.train.online_classifier
        else None,
    )


def images_of_a_norm(config: ConfigDict, mesh: Mesh) -> int:
    """How many images share BatchNorm statistics, both views of each.

    Raises:
      UserError: the images that a step sees at once do not divide into such groups.
    """
    at_once = config.data.batch_size // config.train.microbatches
    group = {0: at_once, -1: at_once // mesh.size}.get(
        config.model.norm_group, config.model.norm_group
    )
    if at_once % group:
        raise UserError(
            f"model.norm_group={group} does not divide the {at_once} images that are embedded "
            "at once (data.batch_size / train.microbatches)"
        )
    return group


# A device's share of the 2B x 2B similarities, bytes, above which they are computed in tiles. On
# 2 CPU cores the two take the same time at 1 MB, and the tiles half of it from 4 MB on; on
# accelerators this is where the tiles stop to matter beside a step of the encoder.
_DENSE_BYTES = 2**24


def contrastive_loss(config: ConfigDict, mesh: Mesh) -> tuple[str, Callable]:
    """The implementation of NT-Xent, by name, and (z, temperature) to (loss, metrics)."""
    share = 4 * (2 * config.data.batch_size) ** 2 // mesh.size
    name = config.loss.implementation
    if name == "auto":
        name = "chunked" if share > _DENSE_BYTES else "dense"
    if name == "dense":
        return name, nt_xent
    return name, functools.partial(nt_xent_chunked, mesh=mesh if mesh.size > 1 else None)


def optimizer(
    config: ConfigDict, plan: Plan
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer and the schedule it follows."""
    schedule = warmup_cosine(plan.learning_rate, plan.warmup_steps, plan.steps)
    options = config.optimizer
    transformation = make_optimizer(
        options.name,
        schedule,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        trust_coefficient=options.trust_coefficient,
    )
    return transformation, schedule
