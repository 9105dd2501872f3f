"""Pretraining: the run's set-up, in words, and its loop."""

import collections
import contextlib
import functools
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble, suggest
from simclr_jax import config as config_lib
from simclr_jax.checkpoint import Checkpoints, with_shardings
from simclr_jax.config import Plan
from simclr_jax.console import Progress, say
from simclr_jax.data import folder
from simclr_jax.data.sources import Split
from simclr_jax.errors import UserError
from simclr_jax.log import Log, not_finite
from simclr_jax.mesh import (
    FSDP,
    check_divides,
    make_mesh,
    replicated,
    state_shardings,
)
from simclr_jax.metrics import MetricWriter
from simclr_jax.record import check_data, check_workdir, write_record
from simclr_jax.stopping import Stop
from simclr_jax.train_state import TrainState, count_parameters, init_state
from simclr_jax.train_step import make_train_step


class Job(NamedTuple):
    """A run, assembled: the jitted step and how its state starts."""

    step: Callable
    init: Callable  # key -> TrainState
    abstract_state: TrainState  # shapes, dtypes, shardings


def make_job(config: ConfigDict, plan: Plan, classes: int | None, mesh: Mesh) -> Job:
    """Assembles the step of a configuration over a mesh. Nothing is computed yet."""
    networks = assemble.networks(config, classes, mesh)
    optimizer, schedule = assemble.optimizer(config, plan)
    _, contrastive_loss = assemble.contrastive_loss(config, mesh)
    init = functools.partial(init_state, networks, optimizer, config.data.image_size)
    abstract = jax.eval_shape(init, jax.random.key(0))
    lies, everywhere = state_shardings(mesh, abstract), replicated(mesh)
    fetch, make_views = assemble.view_functions(config)
    step = make_train_step(
        networks,
        optimizer,
        schedule,
        config.loss.temperature,
        contrastive_loss,
        config.train.microbatches,
        # Said, as the compiler could also divide the convolutions by channels, and move images.
        gather=lambda params: jax.lax.with_sharding_constraint(params, everywhere),
        skip_not_finite=config.train.skip_not_finite,
        fetch=fetch,
        make_views=make_views,
    )
    return Job(
        step=jax.jit(
            step,
            in_shardings=(lies, None),  # of the batch: as it comes
            out_shardings=(lies, everywhere),
            donate_argnums=0,
        ),
        init=jax.jit(init, out_shardings=lies),
        abstract_state=with_shardings(abstract, lies),
    )


def pretrain(config: ConfigDict, workdir: str, extend: bool = False) -> bool:
    """Trains the encoder from the workdir's newest checkpoint, or from the start, to the end.

    On SIGTERM or SIGINT it finishes the step, saves, and returns; on all processes at one step.

    Args:
      config: of the run.
      workdir: of the run.
      extend: the run may have another length than it was begun with.

    Returns:
      Whether it came to the end.

    Raises:
      UserError: the batch does not divide, the data are not there, the workdir holds a run of
        another configuration, too many images cannot be read, the loss or the gradient is not
        finite, or a checkpoint cannot be read or written.
    """
    mesh = make_mesh(fsdp=config.mesh.fsdp)
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    saved = check_workdir(config, workdir, extend)
    train = assemble.source(config).train
    plan = config_lib.plan(config, train.count)
    fingerprint = train.fingerprint()
    check_data(train, fingerprint, saved, workdir)
    job = make_job(config, plan, len(train.classes) if train.classes else None, mesh)
    record = write_record(config, plan, train, fingerprint, workdir)
    describe_run(config, plan, train, job.abstract_state, mesh)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, **config.checkpoint.to_dict()))
        state, options = checkpoints.restore_newest(job.abstract_state)
        start = options["step"]
        if state is None:
            state = job.init(jax.random.key(config.seed))
        else:
            say(f"resumed from step {start}")
        if start > plan.steps:
            raise UserError(f"{workdir} is at step {start} already, of {plan.steps} now asked for")
        broken = assemble.broken_images(config, train, epath.Path(workdir) / "broken_images.jsonl")
        batches = stack.enter_context(
            contextlib.closing(assemble.training_batches(config, train, start, broken))
        )
        feed = assemble.feed(config, train, mesh)
        first = jax.process_index() == 0
        log = Log(
            workdir,
            stack.enter_context(MetricWriter(workdir, start)) if first else None,
            stack.enter_context(Progress(plan.steps, start)),
            every=config.train.log_every_steps,
            batch_size=config.data.batch_size,
            total=plan.steps,
            window=options["window"],
        )
        stop = stack.enter_context(Stop(mesh))
        for step in range(start + 1, plan.steps + 1):
            batch = next(batches)
            state, metrics = job.step(state, feed(batch))
            log.add(step, metrics, {name: batch[name] for name in ("epoch", "index")})
            stopping = stop.now() and step < plan.steps
            checkpoints.check(step)
            if stopping or step == plan.steps or checkpoints.due(step):
                log.drain()  # nothing is saved after a loss that is not finite
                check_state(step, state)
                checkpoints.save(step, state, record | {"step": step, "window": list(log.window)})
            if stopping or step == plan.steps:
                checkpoints.wait(step)  # here, where a signal does not cut it off
            if stopping:
                say(f"stopped after step {step}, which is saved: the same command goes on from it")
                return False
    if broken.indices:
        say(f"skipped    {len(broken.indices)} images that cannot be read, see {broken.report}")
    say(f"trained to step {plan.steps}: {workdir}/checkpoints, {workdir}/metrics.jsonl")
    return True


def check_state(step: int, state: TrainState) -> None:
    """Raises a UserError if the state after `step` holds a number that is not finite: an update may
    overflow, or a BatchNorm statistic, that no loss has seen yet.
    """
    if not _all_finite(state):
        raise not_finite(step, "the updated state is")


@jax.jit
def _all_finite(tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def describe_run(
    config: ConfigDict, plan: Plan, train: Split, state: TrainState, mesh: Mesh
) -> None:
    """Says what the configuration comes to, before anything is computed."""
    batch, options = config.data.batch_size, config.optimizer
    how = {
        "linear": f"{options.learning_rate:g} x {batch} / 256",
        "sqrt": f"{options.learning_rate:g} x sqrt({batch})",
        "none": "as given",
    }[options.scaling]
    f, g = (count_parameters(state.params[name]) for name in ("encoder", "head"))
    kinds = collections.Counter(device.device_kind for device in mesh.devices.flat)
    devices = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
    labels = f"{len(train.classes)} classes" if train.classes else "no labels"
    if config.data.source == "folder":
        describe_folder(config)
    say(f"data        {train.count} images, {labels}; views of {config.data.image_size} px")
    say(
        f"model       ResNet-{config.model.depth} x{config.model.width:g}, {f / 1e6:.2f} M parameters; head {g / 1e6:.2f} M"
    )
    say(
        f"batch       {batch} images, {2 * batch} views, {2 * batch - 2} negatives an anchor, tau {config.loss.temperature:g}"
    )
    name, _ = assemble.contrastive_loss(config, mesh)
    chosen = " for this size" if config.loss.implementation == "auto" else ""
    say(f"loss        NT-Xent, {name}{chosen}; BatchNorm over {norm_of(config, mesh)}")
    say(
        f"steps       {plan.steps} ({plan.steps * batch / train.count:.1f} epochs), of which {plan.warmup_steps} warm-up"
    )
    say(
        f"optimizer   {options.name}, peak learning rate {plan.learning_rate:.4g} ({how}), weight decay {options.weight_decay:g}"
    )
    microbatches, shards = config.train.microbatches, mesh.shape[FSDP]
    say(
        f"devices     {devices}; {jax.process_count()} process{'es' if jax.process_count() > 1 else ''}, {batch // mesh.size} images a device"
        + (f" in {microbatches} microbatches" if microbatches > 1 else "")
        + (f"; parameters divided over {shards}" if shards > 1 else "")
    )


def describe_folder(config: ConfigDict) -> None:
    """Says what a folder holds, and which options follow from it."""
    found = folder.look(pathlib.Path(config.data.path).expanduser())
    for i, line in enumerate(folder.describe(found)):
        say(f"{'' if i else 'folder':<12}{line}")
    values = config_lib.flatten(config)
    accelerator = jax.default_backend() != "cpu"
    for i, choice in enumerate(suggest.settings(found.images, found.short_side, accelerator)):
        option, suggested, reason = choice
        given = values[option]
        why = reason if given == suggested else f"given; the images suggest {suggested}"
        say(f"{'' if i else 'settings':<12}{option}={given}  ({why})")


def norm_of(config: ConfigDict, mesh: Mesh) -> str:
    """What BatchNorm takes its statistics over, in words."""
    images = assemble.images_of_a_norm(config, mesh)
    return "the batch" if images == config.data.batch_size else f"groups of {images} images"
