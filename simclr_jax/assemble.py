"""The assembly line: the only place where options turn into data sets, networks and optimizers."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax.config import check_value
from simclr_jax.data import open_source, read_options
from simclr_jax.data.broken import Broken, Images
from simclr_jax.data.order import Order, Share
from simclr_jax.data.split import DataSet, Split
from simclr_jax.encoders import ENCODERS
from simclr_jax.encoders.heads import LinearClassifier, ProjectionHead
from simclr_jax.errors import UserError
from simclr_jax.losses import LOSSES, Loss
from simclr_jax.losses.checks import check_kind, check_loss
from simclr_jax.losses.health import with_health
from simclr_jax.mesh import check_divides, gathered, make_mesh, processes_of
from simclr_jax.training import optimizer as optimizers
from simclr_jax.training.log import steps_between_reports
from simclr_jax.training.loop import Job, job_of
from simclr_jax.training.memory import MemoryRule, batches_of
from simclr_jax.training.objectives import contrastive, projection_of_second_views
from simclr_jax.training.plan import Plan, check_enough, make_plan
from simclr_jax.training.state import Networks, init_state
from simclr_jax.training.step import UpdateRule, make_step
from simclr_jax.training.verdict import References
from simclr_jax.views import crops_for_classifiers, make_distortion
from simclr_jax.views.crop import EvaluationView
from simclr_jax.views.placement import HostCrops, HostViews, Resident, Views, ViewSettings


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A pretraining run, assembled. Nothing is computed yet.

    Attributes:
      train: the images to train on.
      classes: number of classes; None: images have no label, or several.
      views: makes views of the training images.
      plan: number of steps and peak learning rate.
      job: the jitted train step and the function that makes its first state.
      loss: the loss, for its description.
      encoder: the network f, for its description.
      norm_images: images that share BatchNorm statistics.
    """

    train: Split
    classes: int | None
    views: Views
    plan: Plan
    job: Job
    loss: Loss
    encoder: Any
    norm_images: int


def pretraining(config: ConfigDict, mesh: Mesh | None = None) -> Pretraining:
    """Assembles a pretraining run.

    Args:
      config: the run's configuration.
      mesh: the devices; None: all there are.

    Raises:
      UserError: the data are not there, the batch does not divide over the devices, or the options
        do not fit each other.
    """
    mesh = mesh or make_mesh(fsdp=config.mesh.fsdp)
    data = data_set(config)
    train, several_labels = data.train, data.members is not None
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    check_enough(config.data.batch_size, train.count)
    plan = plan_of(config, train.count)
    made = views(config, mesh)
    # The online classifier and the losses take one label an image: data with several count as unlabelled.
    classes = len(train.classes) if train.classes and not several_labels else None
    loss = contrastive_loss(config, mesh)
    if loss.needs_labels and not classes:
        raise UserError(f"loss.name={config.loss.name} needs labels, and the data have none")
    width = references(config, plan).width
    check_loss(config.loss.name, loss, config.data.batch_size, width, mesh)
    if config.train.objective == "supervised":
        if not (classes and config.train.online_classifier):
            raise UserError(
                "train.objective=supervised needs one label an image and train.online_classifier=True"
            )
        loss = loss._replace(text=f"cross-entropy of the labels; only watched: {loss.text}")
    job = pretraining_job(config, plan, classes, mesh)
    return Pretraining(
        train, classes, made, plan, job, loss, encoder(config), images_of_a_norm(config, mesh)
    )


def pretraining_job(config: ConfigDict, plan: Plan, classes: int | None, mesh: Mesh) -> Job:
    """Assembles the step of pretraining over a mesh.

    Args:
      config: the run's configuration.
      plan: number of steps and peak learning rate of the run.
      classes: number of classes of the online classifier; None: there are no labels.
      mesh: the devices.
    """
    parts = networks(config, classes, mesh)
    optimizer, schedule = pretraining_optimizer(config, plan)
    made = views(config, mesh)
    loss = contrastive_loss(config, mesh)
    batches = batches_of(config.loss.memory, config.data.batch_size, loss.takes_stored)
    step = make_step(
        contrastive(parts, made.views, config.train.objective == "supervised"),
        with_health(loss).apply,
        UpdateRule(
            optimizer,
            schedule,
            config.train.microbatches,
            config.train.skip_not_finite,
            trust_ratios_of(config),
            memory_rule(config, mesh, made) if batches else None,
        ),
        fetch=made.fetch,
        gather=gathered(mesh),
    )
    remembered = (batches, config.data.batch_size) if batches else None
    init = functools.partial(
        init_state, parts, optimizer, config.data.image_size, remembered=remembered
    )
    return job_of(step, init, (jax.random.key(config.seed),), plan.steps, mesh)


def data_set(config: ConfigDict) -> DataSet:
    """Opens the data set of the configuration. Raises a UserError if it is not there or not usable."""
    return open_source(config.data.to_dict() | {"seed": config.seed})


def plan_of(config: ConfigDict, images: int) -> Plan:
    """Works out the length of a run on `images` training images, and its learning rate."""
    return make_plan(
        images,
        config.data.batch_size,
        steps=config.train.steps,
        epochs=config.train.epochs,
        warmup_epochs=config.optimizer.warmup_epochs,
        learning_rate=config.optimizer.learning_rate,
        scaling=config.optimizer.scaling,
    )


def views(config: ConfigDict, mesh: Mesh) -> Views:
    """Makes the views of pretraining: two of each image, as distorted as the configuration says."""
    distortion = make_distortion(config.views.to_dict())
    settings = _view_settings(config, mesh, config.data.batch_size, distortion)
    if config.data.placement == "device":
        return Resident(settings)
    return HostCrops(settings) if config.data.color_on == "device" else HostViews(settings)


def classifier_views(config: ConfigDict, mesh: Mesh, batch_size: int) -> Views:
    """Makes the views that classifiers are trained on: one of each image, only cropped and flipped."""
    settings = _view_settings(
        config, mesh, batch_size, crops_for_classifiers(config.views.to_dict())
    )
    return Resident(settings) if config.data.placement == "device" else HostViews(settings)


def _view_settings(
    config: ConfigDict, mesh: Mesh, batch_size: int, distortion: Any
) -> ViewSettings:
    processes = processes_of(mesh)
    share = Share(processes.index(jax.process_index()), len(processes))
    order = Order(config.seed, batch_size, share)
    return ViewSettings(order, distortion, evaluation_view(config), mesh)


def evaluation_view(config: ConfigDict) -> EvaluationView:
    """Returns what every evaluation sees of an image."""
    data, antialias = config.data, config.views.antialias
    return EvaluationView(data.image_size, data.eval_crop, antialias, read_options(data))


def images_of(
    config: ConfigDict,
    split: Split,
    report: epath.PathLike | None = None,
    whole: Split | None = None,
) -> Images:
    """Makes `Images`: a split, and the list of those of its images that this process cannot read.

    Args:
      config: the run's configuration.
      split: the images.
      report: file that lists the unreadable images of process 0; process i writes NAME_process_i beside
        it; None: no file.
      whole: see `Broken`.
    """
    if report is not None:
        report = epath.Path(report)
        if index := jax.process_index():
            report = report.with_name(f"{report.stem}_process_{index}{report.suffix}")
    return Images(split, Broken(split, config.data.max_broken, report, whole))


def encoder(config: ConfigDict, **changed: Any) -> Any:
    """Makes the encoder f. `changed` overrides options of the group "model".

    model.norm_group is ignored unless it is in `changed`, as evaluation does not need it.

    Raises:
      UserError: there is no such encoder, or it cannot take images of the configuration's size.
    """
    options = config.model.to_dict() | {"norm_group": 0} | changed
    check_value("model.name", config.model.name)  # one of a checkpoint may be unknown here
    made = ENCODERS[config.model.name](options)
    made.check_image_size(config.data.image_size)
    return made


def head(config: ConfigDict, **changed: Any) -> ProjectionHead:
    """Makes the projection head g. `changed`: see `encoder`."""
    model = config.model.to_dict() | {"norm_group": 0} | changed
    return ProjectionHead(
        model["head"],
        model["head_layers"],
        model["head_width"],
        jax.numpy.dtype(model["dtype"]),
        model["norm_momentum"],
        model["norm_group"],
    )


def networks(config: ConfigDict, classes: int | None, mesh: Mesh) -> Networks:
    """Makes f, g and, where there are `classes` and the option says so, the online classifier.

    Raises:
      UserError: the images do not divide into the groups of BatchNorm.
    """
    rows = 2 * images_of_a_norm(config, mesh)
    return Networks(
        encoder=encoder(config, norm_group=rows),
        head=head(config, norm_group=rows),
        classifier=LinearClassifier(classes)
        if classes and config.train.online_classifier
        else None,
    )


def images_of_a_norm(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the number of images whose two views share one set of BatchNorm statistics.

    Raises:
      UserError: the images that a step sees at once do not divide into such groups.
    """
    at_once = config.data.batch_size // config.train.microbatches
    asked = config.model.norm_group
    group = {0: at_once, -1: at_once // mesh.size}.get(asked, asked)
    if at_once % group:
        raise UserError(
            f"model.norm_group={group} does not divide the {at_once} images that are embedded "
            "at once (data.batch_size / train.microbatches)"
        )
    return group


def contrastive_loss(config: ConfigDict, mesh: Mesh) -> Loss:
    """Makes the loss over all projections of the batch."""
    # `overrides.load` leaves the loss of a saved run unchecked.
    check_value("loss.name", config.loss.name)
    name = config.loss.name
    return check_kind(name, LOSSES[name](config.loss.to_dict(), mesh, config.data.batch_size))


def memory_rule(config: ConfigDict, mesh: Mesh, made: Views) -> MemoryRule:
    """Makes the rule by which each step adds projections of its batch to the memory of negatives."""
    # The memory's network sees one view an image: its BatchNorm groups have half the rows of the trained network's.
    rows = images_of_a_norm(config, mesh)
    if rows < 2 and config.model.head != "none":  # the head's BatchNorm makes a single projection 0
        raise UserError("loss.memory needs BatchNorm over model.norm_group of 2 images or more")
    single = Networks(encoder(config, norm_group=rows), head(config, norm_group=rows), None)
    return MemoryRule(projection_of_second_views(single, made.views), config.loss.memory_decay)


def references(config: ConfigDict, plan: Plan) -> References:
    """Makes the reference numbers that a run's metrics are compared with."""
    is_bounded = (
        config.loss.name == "nt_xent"
        and config.loss.normalize
        and config.loss.negatives == "both_views"
        and not config.loss.memory
        and config.train.objective == "contrastive"
    )
    temperature = config.loss.temperature if is_bounded else None
    every = steps_between_reports(config.train.log_every_steps, plan.steps)
    settled_after = plan.warmup_steps + every
    width = head(config).width_of_z(encoder(config).width)
    return References(config.data.batch_size, width, settled_after, temperature)


def trust_ratios_of(config: ConfigDict) -> Callable | None:
    """Returns the function (params, gradients) -> metrics of LARS's trust ratios; None for other optimizers."""
    options = config.optimizer
    if options.name != "lars":
        return None
    return functools.partial(
        optimizers.lars_trust_ratios,
        trained=_trained(config),
        weight_decay=options.weight_decay,
        trust_coefficient=options.trust_coefficient,
    )


def _trained(config: ConfigDict) -> frozenset[str]:
    """Returns the parts of the parameters that are trained: not the head if it has no gradient, as LARS would shrink
    its kernels by a trust ratio of coefficient / decay, 1,000 by default.
    """
    is_contrastive = config.train.objective == "contrastive"
    return frozenset({"encoder", "classifier", *(["head"] if is_contrastive else [])})


def pretraining_optimizer(
    config: ConfigDict, plan: Plan
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Makes the optimizer, of the head too unless labels alone train the encoder, and the schedule it follows."""
    schedule = optimizers.warmup_cosine(plan.learning_rate, plan.warmup_steps, plan.steps)
    options = config.optimizer
    transformation = optimizers.make_optimizer(
        options.name,
        schedule,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        trust_coefficient=options.trust_coefficient,
    )
    if config.train.objective == "supervised":
        transformation = optimizers.of_parts(transformation, _trained(config))
    return transformation, schedule
