"""The assembly line: the only place where options turn into data sets, networks and optimizers."""

import functools
from collections.abc import Callable, Generator

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax.config import Plan
from simclr_jax.data.broken import Broken
from simclr_jax.data.distortion import Distortion
from simclr_jax.data.sources import Share, Source, Split, open_source
from simclr_jax.errors import UserError
from simclr_jax.heads import LinearClassifier, ProjectionHead
from simclr_jax.losses import nt_xent
from simclr_jax.losses_chunked import nt_xent_chunked
from simclr_jax.optimizer import make_optimizer, warmup_cosine
from simclr_jax.resnet import ResNet
from simclr_jax.train_state import Networks


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
) -> Generator[dict]:
    """This process's part of the batches of views from `start_step` on; close it when done.

    `batch_size` of the global batch defaults to the configuration's.
    """
    # Imported here: this needs TensorFlow, which takes 10 s to import.
    from simclr_jax.data import pipeline

    return pipeline.training_batches(
        split,
        seed=config.seed,
        batch_size=batch_size or config.data.batch_size,
        start_step=start_step,
        share=_share(),
        size=config.data.image_size,
        distortion=Distortion(**config.views.to_dict()),
        broken=broken,
    )


def evaluation_batches(
    config: ConfigDict, split: Split, batch_size: int, broken: Broken
) -> Generator[dict]:
    """This process's share of the split, each image once, `batch_size` images of all processes at
    a time.
    """
    from simclr_jax.data import pipeline

    share = _share()
    return pipeline.evaluation_batches(
        split,
        batch_size=batch_size // share.count,
        share=share,
        size=config.data.image_size,
        proportion=config.data.eval_crop,
        broken=broken,
    )


def broken_images(config: ConfigDict, split: Split, workdir: str, test: bool = False) -> Broken:
    """Where the images of a split that this process cannot read are noted, in the workdir."""
    process = f"_process_{index}" if (index := jax.process_index()) else ""
    report = epath.Path(workdir) / f"broken_images{'_test' if test else ''}{process}.jsonl"
    return Broken(split, config.data.max_broken, report)


def _share() -> Share:
    return Share(jax.process_index(), jax.process_count())


def encoder(config: ConfigDict, norm_group: int = 0) -> ResNet:
    """f. `norm_group`: see `ResNet`; evaluation has no use for it."""
    model = config.model
    return ResNet(
        model.depth,
        model.width,
        model.stem,
        jnp.dtype(model.dtype),
        model.norm_momentum,
        norm_group,
        remat=model.remat,
    )


def networks(config: ConfigDict, classes: int | None, mesh: Mesh) -> Networks:
    """f, g and, where there are `classes` and the option says so, the online classifier.

    Raises:
      UserError: the images do not divide into the groups of BatchNorm.
    """
    model = config.model
    norm_group = 2 * images_of_a_norm(config, mesh)
    return Networks(
        encoder=encoder(config, norm_group),
        head=ProjectionHead(
            model.head,
            model.head_layers,
            model.head_width,
            jnp.dtype(model.dtype),
            model.norm_momentum,
            norm_group,
        ),
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
