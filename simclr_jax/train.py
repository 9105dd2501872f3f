"""Pretraining: the run's set-up, in words, and its loop."""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax.checkpoint import Checkpoints, find, read_options, saved_steps, with_shardings
from simclr_jax.config import Plan
from simclr_jax.console import Progress, say
from simclr_jax.data.sources import Split
from simclr_jax.errors import UserError
from simclr_jax.mesh import (
    FSDP,
    batch_sharded,
    check_divides,
    make_mesh,
    replicated,
    state_shardings,
    to_global,
)
from simclr_jax.metrics import MetricWriter
from simclr_jax.train_state import TrainState, count_parameters, init_state
from simclr_jax.train_step import make_train_step

# Steps that may be under way before the loop waits for the oldest: the device always has the next
# one queued, and no more than this many batches lie in its memory.
_STEPS_AHEAD = 2

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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
    step = make_train_step(
        networks,
        optimizer,
        schedule,
        config.loss.temperature,
        contrastive_loss,
        config.train.microbatches,
        # Said, as the compiler could also divide the convolutions by channels, and move images.
        gather=lambda params: jax.lax.with_sharding_constraint(params, everywhere),
    )
    return Job(
        step=jax.jit(
            step,
            in_shardings=(lies, batch_sharded(mesh)),
            out_shardings=(lies, everywhere),
            donate_argnums=0,
        ),
        init=jax.jit(init, out_shardings=lies),
        abstract_state=with_shardings(abstract, lies),
    )


def pretrain(config: ConfigDict, workdir: str) -> None:
    """Trains the encoder from the workdir's newest checkpoint, or from the start, to the end.

    Raises:
      UserError: the batch does not divide, the data are not there, the workdir holds a run of
        another configuration, or the loss or the gradient is not finite.
    """
    mesh = make_mesh(fsdp=config.mesh.fsdp)
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    saved = check_workdir(config, workdir)
    train = assemble.source(config).train
    plan = config_lib.plan(config, train.count)
    check_count(train.count, saved, workdir)
    job = make_job(config, plan, len(train.classes) if train.classes else None, mesh)
    record = write_record(config, plan, train.count, workdir)
    describe_run(config, plan, train, job.abstract_state, mesh)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, **config.checkpoint.to_dict()))
        start = checkpoints.latest_step or 0
        if start:
            state = checkpoints.restore(start, job.abstract_state)
            say(f"resumed from step {start}")
        else:
            state = job.init(jax.random.key(config.seed))
        batches = stack.enter_context(
            contextlib.closing(assemble.training_batches(config, train, start))
        )
        first = jax.process_index() == 0
        log = Log(
            stack.enter_context(MetricWriter(workdir, start)) if first else None,
            stack.enter_context(Progress(plan.steps, start)),
            every=config.train.log_every_steps,
            batch_size=config.data.batch_size,
            total=plan.steps,
        )
        for step in range(start + 1, plan.steps + 1):
            state, metrics = job.step(state, to_global(mesh, next(batches)))
            log.add(step, metrics)
            last = step == plan.steps
            if last or checkpoints.due(step):
                log.drain()  # nothing is saved after a loss that is not finite
                check_state(step, state)
                checkpoints.save(step, state, record | {"step": step})
    say(f"trained to step {plan.steps}: {workdir}/checkpoints, {workdir}/metrics.jsonl")


class Log:
    """Reads every step's metrics, stops on a non-finite one, and reports means when due.

    Metrics are read two steps late, when they are ready, so that the device never waits for them.
    """

    def __init__(
        self,
        writer: MetricWriter | None,
        progress: Progress,
        *,
        every: int,
        batch_size: int,
        total: int,
    ):
        self._writer, self._progress = writer, progress
        self._every, self._batch_size, self._total = every, batch_size, total
        self._pending: collections.deque[tuple[int, Any]] = collections.deque()
        self._window: list[dict[str, float]] = []
        self._timed = 0  # steps of the window that ended after `_since`
        self._since: float | None = None  # the first step compiles, which is not timed

    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of `step`, still being computed."""
        self._pending.append((step, metrics))
        if len(self._pending) > _STEPS_AHEAD:
            self._read(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for all metrics taken so far."""
        while self._pending:
            self._read(*self._pending.popleft())

    def _read(self, step: int, metrics: Any) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        check_finite(step, values)
        self._window.append(values)
        now = time.monotonic()
        if self._since is None:
            self._since = now
        else:
            self._timed += 1
        self._progress.advance(step)
        if step % self._every == 0 or step == self._total:
            means = {
                name: sum(v[name] for v in self._window) / len(self._window) for name in values
            }
            # A schedule has a value at a step, not a mean over some.
            means["learning_rate"] = values["learning_rate"]
            if self._timed:
                means["images_per_second"] = self._timed * self._batch_size / (now - self._since)
            if self._writer is not None:
                self._writer.write(step, means)
            self._progress.report(step, means)
            self._window, self._timed, self._since = [], 0, now


def check_finite(step: int, values: dict[str, float]) -> None:
    """Raises a UserError that names the step unless loss and gradient norm are finite."""
    bad = [
        f"{name} {values[name]}"
        for name in ("loss", "grad_norm")
        if not math.isfinite(values[name])
    ]
    if bad:
        raise not_finite(step, ", ".join(bad))


def check_state(step: int, state: TrainState) -> None:
    """Raises a UserError if the state after `step` holds a number that is not finite: an update may
    overflow, or a BatchNorm statistic, that no loss has seen yet.
    """
    if not _all_finite(state):
        raise not_finite(step, "the updated state")


@jax.jit
def _all_finite(tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def not_finite(step: int, what: str) -> UserError:
    return UserError(
        f"step {step}: {what}, not finite. The last checkpoint is from before it; in another "
        "--workdir, try a lower optimizer.learning_rate, a longer warm-up or model.dtype=float32"
    )


def check_workdir(config: ConfigDict, workdir: str) -> dict | None:
    """What the workdir's newest checkpoint was saved with; None where nothing was saved yet, so
    that nothing can be lost.

    Raises:
      UserError: it is of another configuration; says what differs.
    """
    if not saved_steps(workdir):
        return None
    saved = read_options(find(workdir, None))
    changed = config_lib.differences(config_lib.from_dict(saved["config"]), config)
    if changed:
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}): use another "
            "--workdir, or the old values to go on with it"
        )
    if config.model.norm_group < 0 and len(saved["devices"]) != jax.device_count():
        raise UserError(
            f"{workdir} holds a run with BatchNorm per device on {len(saved['devices'])} devices, "
            f"and there are {jax.device_count()} now: use as many, or model.norm_group=IMAGES in "
            "another --workdir"
        )
    return saved


def check_count(images: int, saved: dict | None, workdir: str) -> None:
    """Raises a UserError if the saved run began on another number of training images."""
    if saved is not None and saved["training_images"] != images:
        raise UserError(
            f"{workdir} holds a run on {saved['training_images']} training images and there are "
            f"{images} now, so it cannot go on: restore the old data, or use another --workdir"
        )


def write_record(config: ConfigDict, plan: Plan, images: int, workdir: str) -> dict:
    """Writes WORKDIR/config.json, whole or not at all, and returns what it holds."""
    record = {
        "config": config.to_dict(),
        "plan": dataclasses.asdict(plan),
        "training_images": images,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
    }
    if jax.process_index() == 0:
        path = epath.Path(workdir) / "config.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".json.new")
            scratch.write_text(json.dumps(record, indent=2) + "\n")
            scratch.replace(path)
        except OSError as error:
            raise UserError(f"cannot write into --workdir {workdir!r}: {error.strerror}") from error
    return record


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


def norm_of(config: ConfigDict, mesh: Mesh) -> str:
    """What BatchNorm takes its statistics over, in words."""
    images = assemble.images_of_a_norm(config, mesh)
    return "the batch" if images == config.data.batch_size else f"groups of {images} images"
