"""The assembly line: the only place where options turn into data sets, networks and optimizers."""

from collections.abc import Generator

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from simclr_jax.config import Plan
from simclr_jax.data.sources import Share, Source, Split, open_source
from simclr_jax.heads import LinearClassifier, ProjectionHead
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
    config: ConfigDict, split: Split, start_step: int, batch_size: int | None = None
) -> Generator[dict]:
    """This process's part of the batches of views from `start_step` on; close it when done.

    `batch_size` of the global batch defaults to the configuration's.
    """
    # Imported here: this needs TensorFlow, which takes 10 s to import.
    from simclr_jax.data import host_augment, pipeline

    return pipeline.training_batches(
        split,
        seed=config.seed,
        batch_size=batch_size or config.data.batch_size,
        start_step=start_step,
        share=_share(),
        size=config.data.image_size,
        distortion=host_augment.Distortion(**config.views.to_dict()),
    )


def evaluation_batches(config: ConfigDict, split: Split, batch_size: int) -> Generator[dict]:
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
    )


def _share() -> Share:
    return Share(jax.process_index(), jax.process_count())


def encoder(config: ConfigDict) -> ResNet:
    """f."""
    model = config.model
    return ResNet(model.depth, model.width, model.stem, jnp.dtype(model.dtype), model.norm_momentum)


def networks(config: ConfigDict, classes: int | None) -> Networks:
    """f, g and, where there are `classes` and the option says so, the online classifier."""
    model = config.model
    return Networks(
        encoder=encoder(config),
        head=ProjectionHead(
            model.head,
            model.head_layers,
            model.head_width,
            jnp.dtype(model.dtype),
            model.norm_momentum,
        ),
        classifier=LinearClassifier(classes)
        if classes and config.train.online_classifier
        else None,
    )


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
