"""The one loop of every training: resume, signals, finite check, progress, evaluations on the way."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from simclr_jax.console import Progress, say
from simclr_jax.errors import Stopped, UserError
from simclr_jax.mesh import replicated, state_shardings, traced_on
from simclr_jax.training.checkpoint import Checkpoints, Saving
from simclr_jax.training.clock import Clock
from simclr_jax.training.log import Log, Reporting, not_finite
from simclr_jax.training.metrics import MetricWriter
from simclr_jax.training.saved import with_shardings
from simclr_jax.training.sinks import Sinks
from simclr_jax.training.state import TrainState
from simclr_jax.training.step import Step, all_finite
from simclr_jax.training.stopping import Stop
from simclr_jax.training.watch import Watch

# start step -> generator of (global batch, {"epoch", "index"} of this process's images), without end.
Batches = Callable[[int], Generator[tuple[Any, dict[str, np.ndarray]]]]


class Job(NamedTuple):
    """A training, assembled. Nothing is computed yet.

    Attributes:
      step: jitted; reuses the memory of the state that it is given, which is gone after the call.
      init: () -> the state before the first step, laid out over the devices.
      abstract_state: shapes, dtypes and shardings of the state.
      steps: steps of the whole training.
      mesh: all devices.
    """

    step: Step
    init: Callable[[], TrainState]
    abstract_state: TrainState
    steps: int
    mesh: Mesh


def job_of(step: Step, init: Callable, start: tuple, steps: int, mesh: Mesh) -> Job:
    """Makes the `Job` of a step over a mesh. Each program is compiled when it is first needed.

    Args:
      step: (state, batch) -> (state, metrics).
      init: (*start) -> the state before the first step.
      start: arguments of `init`: arrays, such as a random key.
      steps: steps of the whole training.
      mesh: all devices. The state lies on them as `mesh.state_shardings` says.
    """
    abstract: TrainState = jax.eval_shape(init, *start)
    lies = state_shardings(mesh, abstract)
    begin = jax.jit(traced_on(mesh, init), out_shardings=lies)
    return Job(
        step=jax.jit(
            traced_on(mesh, step),
            in_shardings=(lies, None),  # of the batch: as it comes
            out_shardings=(lies, replicated(mesh)),
            donate_argnums=0,
        ),
        init=lambda: begin(*start),
        abstract_state=with_shardings(abstract, lies),
        steps=steps,
        mesh=mesh,
    )


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how often a training writes.

    Attributes:
      workdir: a folder, which exists.
      record: JSON-able, saved beside every checkpoint.
      saving: when checkpoints are saved, and how many are kept.
      reporting: when metrics are reported, and how.
      sinks: () -> further places for metrics, opened on process 0; None: there are none.
      hang_seconds: the process is ended after this many seconds without a step, see `Watch`; 0: never.
    """

    workdir: str
    record: dict
    saving: Saving
    reporting: Reporting
    sinks: Callable[[], Sinks] | None = None
    hang_seconds: float = 0.0


class Hook(Protocol):
    """Something done on the way, such as an evaluation.

    Attributes:
      name: names its memory in the checkpoints.
      memory: JSON-able; saved with every checkpoint, and set before the first step of a resumed
        training, so that it goes on as if it had never been stopped.
    """

    name: str
    memory: Any

    def due(self, step: int) -> bool:
        """Returns whether to run after `step`, the same on all processes."""

    def run(self, step: int, state: TrainState) -> dict[str, float]:
        """Runs on all processes together. Returns metrics of this step, written as one line."""


def fit(job: Job, batches: Batches, run: Run, hooks: Sequence[Hook] = ()) -> TrainState:
    """Trains from the workdir's newest checkpoint, or from the start, to the last step, and returns its state.

    On SIGTERM, SIGINT or SIGHUP it finishes the step and saves, at the same step on all processes. With one process,
    a signal that comes in the last step is delivered again once everything is saved.

    Args:
      job: the step and how its state starts.
      batches: the batches to train on.
      run: where to write.
      hooks: run in this order after each step at which they are due, before it is saved.

    Raises:
      Stopped: a signal came before the last step.
      UserError: the checkpoints are of a longer training, the loss or the state is not finite, or a
        checkpoint cannot be read or written.
    """
    with contextlib.ExitStack() as stack:
        # First, to be left last: closing waits for the last save and for sinks, which may be stuck as well.
        watch = stack.enter_context(Watch(run.workdir, run.hang_seconds))
        checkpoints = stack.enter_context(Checkpoints(run.workdir, run.saving))
        state, saved = _restore_or_begin(checkpoints, job, run.workdir, hooks)
        start = saved["step"]
        stream = stack.enter_context(contextlib.closing(batches(start)))
        writer = None
        if jax.process_index() == 0:
            writer = stack.enter_context(MetricWriter(run.workdir, start, run.sinks))
        progress = stack.enter_context(Progress(job.steps, start))
        clock = Clock(saved.get("clock"))
        log = Log(run.workdir, writer, progress, run.reporting, saved["window"], clock)
        stop = stack.enter_context(Stop(job.mesh))
        stopping = False
        for step in range(start + 1, job.steps + 1):
            with clock.spending("input"), watch.doing("input"):
                batch, images = next(stream)
            with watch.doing("computing"):
                with clock.computing():
                    state, metrics = job.step(state, batch)
                log.add(step, metrics, images)
                with clock.computing():
                    stopping = stop.now()
            watch.beat(step)
            last = step == job.steps
            stopping = stopping and not last
            checkpoints.check(step)
            due = [hook for hook in hooks if hook.due(step)]
            if due:
                log.drain()
                for hook in due:
                    with clock.spending("evaluating"), watch.doing("evaluating"):
                        found = hook.run(step, state)
                    log.write(step, found)
            if stopping or last or checkpoints.due(step):
                log.store()  # checks every loss first: a loss that ends the run prevents the save
                check_state(step, state, run.reporting.advice)
                memories = {hook.name: hook.memory for hook in hooks}
                then = {
                    "step": step,
                    "window": log.window,
                    "hooks": memories,
                    "clock": clock.memory,
                }
                with clock.spending("saving"), watch.doing("saving"):
                    checkpoints.save(step, state, run.record | then)
                if costly := clock.costly_saving():
                    say(costly)
            if stopping or last:
                with watch.doing("saving"):
                    checkpoints.wait(step)  # while `stop` still keeps a signal from ending it
            if stopping:
                break
        if writer is not None:
            writer.finished = not stopping
    if stopping:  # once everything is closed, as of a run that has come to its end
        say(f"stopped after step {step}, which is saved: the same command resumes from it")
        raise Stopped(f"after step {step}, which is saved")
    stop.pass_on()
    return state


def _restore_or_begin(
    checkpoints: Checkpoints, job: Job, workdir: str, hooks: Sequence[Hook]
) -> tuple[TrainState, dict]:
    """Returns the newest saved state, or else the first one, and what was saved beside it. Sets the hooks' memories.

    Raises:
      UserError: the checkpoints are of a longer training, or none can be read.
    """
    state, saved = checkpoints.restore_newest(job.abstract_state)
    if state is None:
        state = job.init()
    else:
        say(f"resumed from step {saved['step']}")
    check_length(workdir, saved["step"], job.steps)
    for hook in hooks:
        hook.memory = saved.get("hooks", {}).get(hook.name, hook.memory)
    return state, saved


def check_length(workdir: str, step: int, steps: int) -> None:
    """Raises a UserError if a training of `steps` steps would go on from a later `step`."""
    if step > steps:
        raise UserError(
            f"{workdir} is at step {step} already, and {steps} steps are asked for: give {step} or more, or another "
            "--workdir"
        )


def check_state(step: int, state: TrainState, advice: str) -> None:
    """Raises a UserError if the state after `step` holds a number that is not finite: an update may
    overflow, or a BatchNorm statistic, that no loss has seen yet.
    """
    if not jax.jit(all_finite)(state):
        raise not_finite(step, "the updated state is", advice)
