"""--mode=explain: says what a configuration comes to, before an hour is spent on it."""

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.assemble import Pretraining
from simclr_jax.bench.e2e import measure_e2e
from simclr_jax.console import duration, say
from simclr_jax.data.streamed import memory
from simclr_jax.evals.evaluate import why_not
from simclr_jax.mesh import make_mesh
from simclr_jax.modes.compile import compile_for, slice_of
from simclr_jax.modes.oddities import oddities, say_unusual
from simclr_jax.modes.pretrain import describe_run
from simclr_jax.training.workdir import check_no_distillation

_MEASURED_SECONDS = 20.0


def explain(config: ConfigDict, workdir: str, topology: str = "") -> list[str]:
    """Says what training would be: data, model, learning rate, memory, time, checkpoints, evaluations, and
    what is unusual about it. Trains a copy for 20 s to measure the time, and writes nothing but, with
    `topology`, WORKDIR/compile.json.

    Args:
      config: the run's configuration.
      workdir: a folder.
      topology: compile the step for this TPU slice instead of measuring it here; see --mode=compile.

    Returns:
      what is unusual, a line each.

    Raises:
      UserError: the data are not there, the options do not fit each other, or the workdir holds a distillation.
    """
    check_no_distillation(workdir, "explain")
    devices = slice_of(topology)[1] if topology else None
    made = assemble.pretraining(config, make_mesh(devices, config.mesh.fsdp))
    describe_run(config, made)
    _say_shapes(config, made)
    _say_checkpoints(config, made)
    _say_evaluations(config)
    if topology:
        compile_for(config, workdir, topology)
    else:
        _say_time(config, made)
    found = oddities(config, made.plan, made.train.count)
    say_unusual(found or ["nothing"])
    return found


def _say_shapes(config: ConfigDict, made: Pretraining) -> None:
    height, width, channels = made.train.image_shape
    size = f"{height} x {width}" if height and width else "any size"
    batch, side = config.data.batch_size, config.data.image_size
    where = "the device"
    if config.data.placement == "host":
        where = "the host"
        if config.data.color_on == "device":
            where += ", except for colour and blur, which the device does"
    say(
        f"images      {size}, {channels} channel{'s' if channels > 1 else ''}; views made on {where}"
    )
    say(f"shapes      views [{batch}, 2, {side}, {side}, 3], h [{2 * batch}, {made.encoder.width}]")


def _say_checkpoints(config: ConfigDict, made: Pretraining) -> None:
    leaves = jax.tree.leaves(made.job.abstract_state)
    size = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    options, steps = config.checkpoint, made.plan.steps
    saved = sorted({*range(options.every_steps, steps, options.every_steps), steps})
    newest, every = saved[-options.keep_last :], options.keep_every_steps
    kept = len({*newest, *(step for step in saved if every and step % every == 0)})
    say(
        f"checkpoints {_bytes(size)} each, every {options.every_steps} steps, {kept} kept: "
        f"{_bytes(kept * size)}"
    )


def _say_evaluations(config: ConfigDict) -> None:
    options = config.eval
    said = []
    if options.every_steps or options.every_epochs:
        every = (
            f"{options.every_steps} steps"
            if options.every_steps
            else f"{options.every_epochs:g} epochs"
        )
        said.append(f"{options.on_the_way} every {every}")
    if options.after_training != "none":
        why = why_not(config, options.after_training)
        name = options.after_training
        said.append(f"no {name} at the end: {why}" if why else f"{name} at the end")
    say(f"evaluation  {'; '.join(said) or 'none'}")


def _say_time(config: ConfigDict, made: Pretraining) -> None:
    job: Any = made.job
    if config.data.placement == "host":  # else the images would have to be loaded first
        compiled = job.step.lower(job.abstract_state, made.views.abstract()).compile()
        plan, flops = compiled.memory_analysis(), compiled.cost_analysis().get("flops", 0.0)
        size = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        say(
            f"a step      {_bytes(size)} of a device's memory as the compiler plans it, {flops / 1e9:.3g} "
            "GFLOP as it counts them (a loop once)"
        )
        if size > (there := _memory(job.mesh.local_devices[0])):
            say(
                f"speed       not measured: a device here has {_bytes(there)}; --topology=v5e:8x8, for instance, says whether "
                "the step fits a TPU slice"
            )
            return
    if jax.process_count() > 1:  # if one made a step more than the others, it would wait for ever
        say("speed       not measured: there are several processes")
        return
    say(f"measuring   for {_MEASURED_SECONDS:.0f} s, after the step is compiled")
    (row,) = measure_e2e(config, _MEASURED_SECONDS)
    rate, images = row["images_per_second"], made.train.count
    steps = made.plan.steps
    seconds = row["seconds_to_first_step"] + steps * config.data.batch_size / rate
    say(
        f"speed       {rate:.0f} images/s, {row['share_waiting_for_input']:.0%} of the time waiting for images"
    )
    say(
        f"time        {duration(images / rate)} an epoch, {duration(seconds)} in all, evaluations aside"
    )
    peak = max((_peak(device) for device in job.mesh.local_devices), default=0)
    if peak:
        say(f"memory      {_bytes(peak)} of a device at most")


def _memory(device: Any) -> int:
    """Returns the bytes of a device's memory: of CPUs, which do not say, each one's part of the machine's."""
    return (device.memory_stats() or {}).get("bytes_limit") or memory() // jax.local_device_count()


def _peak(device: Any) -> int:
    """Returns the most bytes of a device that were in use; 0 where it does not say, as CPUs do not."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
