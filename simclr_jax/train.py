"""Pretraining: the run's set-up, in words, and its loop."""

import collections
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble, config as config_lib
from simclr_jax.checkpoint import Checkpoints, with_shardings
from simclr_jax.config import Plan
from simclr_jax.console import Progress, say
from simclr_jax.data.sources import Share, Split
from simclr_jax.errors import UserError
from simclr_jax.mesh import batch_sharded, check_divides, make_mesh, replicated, to_global
from simclr_jax.metrics import MetricWriter, NoWriter
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
    networks = assemble.networks(config, classes)
    optimizer, schedule = assemble.optimizer(config, plan)
    everywhere = replicated(mesh)
    init = functools.partial(init_state, networks, optimizer, config.data.image_size)
    abstract = with_shardings(jax.eval_shape(init, jax.random.key(0)), everywhere)
    step = make_train_step(networks, optimizer, schedule, config.loss.temperature)
    return Job(
        step=jax.jit(
            step,
            in_shardings=(everywhere, batch_sharded(mesh)),
            out_shardings=(everywhere, everywhere),
            donate_argnums=0,
        ),
        init=jax.jit(init, out_shardings=everywhere),
        abstract_state=abstract,
    )


def pretrain(config: ConfigDict, workdir: str) -> None:
    """Trains the encoder from the workdir's newest checkpoint, or from the start, to the end.

    Raises:
      UserError: the batch does not divide, the data are not there, the workdir holds a run of
        another configuration, or the loss or the gradient is not finite.
    """
    mesh = make_mesh()
    check_divides(config.data.batch_size, mesh)
    check_workdir(config, workdir)
    train = assemble.source(config).train
    plan = config_lib.plan(config, train.count)
    job = make_job(config, plan, len(train.classes) if train.classes else None, mesh)
    record = write_record(config, plan, workdir)
    describe_run(config, plan, train, job.abstract_state, mesh)

    options = config.checkpoint
    with Checkpoints(
        workdir,
        every_steps=options.every_steps,
        keep_last=options.keep_last,
        keep_every_steps=options.keep_every_steps,
    ) as checkpoints:
        start = checkpoints.latest_step or 0
        if start:
            state = checkpoints.restore(start, job.abstract_state)
            say(f"resumed from step {start}")
        else:
            state = job.init(jax.random.key(config.seed))
        batches = (to_global(mesh, batch) for batch in host_batches(config, train, start))
        writer = MetricWriter(workdir, start) if jax.process_index() == 0 else NoWriter()
        with writer, Progress(plan.steps, start) as progress:
            log = Log(writer, progress, config.train.log_every_steps, config.data.batch_size, plan.steps)
            for step, state in run_steps(job.step, state, batches, start, plan.steps, log):
                checkpoints.save(step, state, record | {"step": step}, last=step == plan.steps)
    say(f"trained to step {plan.steps}: {workdir}/checkpoints, {workdir}/metrics.jsonl")


def run_steps(
    train_step: Callable, state: TrainState, batches: Iterable, start: int, total: int, log: "Log"
) -> Iterator[tuple[int, TrainState]]:
    """Yields (steps done, state) after each step; the state is gone once the next one is taken.

    Metrics are read two steps late, when they are ready, so that the device never waits for them.
    """
    pending: collections.deque[tuple[int, Any]] = collections.deque()
    for step, batch in zip(range(start + 1, total + 1), batches, strict=False):
        state, metrics = train_step(state, batch)
        pending.append((step, metrics))
        if len(pending) > _STEPS_AHEAD:
            log.add(*pending.popleft())
        yield step, state
    for step, metrics in pending:
        log.add(step, metrics)


class Log:
    """Collects every step's metrics, stops on a non-finite one, and reports means when due."""

    def __init__(self, writer, progress: Progress, every: int, batch_size: int, total: int):
        self._writer, self._progress = writer, progress
        self._every, self._batch_size, self._total = every, batch_size, total
        self._window: list[dict[str, float]] = []
        self._since = time.monotonic()

    def add(self, step: int, metrics: Any) -> None:
        """Takes the metrics of `step`, waiting for them if need be."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        check_finite(step, values)
        self._window.append(values)
        self._progress.advance(step)
        if step % self._every == 0 or step == self._total:
            now = time.monotonic()
            steps = len(self._window)
            means = {name: sum(v[name] for v in self._window) / steps for name in values}
            # A schedule has a value at a step, not a mean over some.
            means["learning_rate"] = values["learning_rate"]
            means["images_per_second"] = steps * self._batch_size / (now - self._since)
            self._writer.write(step, means)
            self._progress.report(step, means)
            self._window, self._since = [], now


def check_finite(step: int, values: dict[str, float]) -> None:
    """Raises a UserError that names the step unless loss and gradient norm are finite."""
    bad = [f"{name} {values[name]}" for name in ("loss", "grad_norm") if not math.isfinite(values[name])]
    if bad:
        raise UserError(
            f"step {step}: {', '.join(bad)}, not finite. The last checkpoint is from before it: try a "
            "lower optimizer.learning_rate, a longer warm-up or model.dtype=float32"
        )


def host_batches(config: ConfigDict, split: Split, start_step: int) -> Iterator[dict]:
    """This process's batches of views from `start_step` on."""
    # Imported here: this needs TensorFlow, which takes 10 s to import.
    from simclr_jax.data.host_augment import Distortion
    from simclr_jax.data.pipeline import training_batches

    return training_batches(
        split,
        seed=config.seed,
        batch_size=config.data.batch_size,
        start_step=start_step,
        share=Share(jax.process_index(), jax.process_count()),
        size=config.data.image_size,
        distortion=Distortion(**config.views.to_dict()),
    )


def check_workdir(config: ConfigDict, workdir: str) -> None:
    """Raises a UserError if the workdir holds a run of another configuration, with what differs."""
    if not (pathlib.Path(workdir) / "config.json").exists():
        return
    changed = config_lib.differences(config_lib.read_saved(workdir), config)
    if changed:
        raise UserError(
            f"{workdir} holds a run of another configuration ({'; '.join(changed)}): use another "
            "--workdir, or the old values to go on with it"
        )


def write_record(config: ConfigDict, plan: Plan, workdir: str) -> dict:
    """Writes WORKDIR/config.json, whole or not at all, and returns what it holds."""
    record = {
        "config": config.to_dict(),
        "plan": dataclasses.asdict(plan),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "devices": [str(device) for device in jax.devices()],
        "processes": jax.process_count(),
    }
    if jax.process_index() == 0:
        path = pathlib.Path(workdir) / "config.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(".json.new")
            scratch.write_text(json.dumps(record, indent=2) + "\n")
            os.replace(scratch, path)
        except OSError as error:
            raise UserError(f"cannot write into --workdir {workdir!r}: {error.strerror}") from error
    return record


def describe_run(config: ConfigDict, plan: Plan, train: Split, state: TrainState, mesh: Mesh) -> None:
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
    say(f"model       ResNet-{config.model.depth} x{config.model.width:g}, {f / 1e6:.2f} M parameters; head {g / 1e6:.2f} M")
    say(f"batch       {batch} images, {2 * batch} views, {2 * batch - 2} negatives an anchor, tau {config.loss.temperature:g}")
    say(f"steps       {plan.steps} ({plan.steps * batch / train.count:.1f} epochs), of which {plan.warmup_steps} warm-up")
    say(f"optimizer   {options.name}, peak learning rate {plan.learning_rate:.4g} ({how}), weight decay {options.weight_decay:g}")
    say(f"devices     {devices}; {jax.process_count()} process{'es' if jax.process_count() > 1 else ''}, {batch // mesh.size} images a device")
