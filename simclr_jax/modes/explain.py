"""--mode=explain: says what a configuration comes to, before an hour is spent on it."""

import math
from typing import Any

import jax
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.assemble import Pretraining
from simclr_jax.bench.e2e import measure_e2e
from simclr_jax.console import duration, say
from simclr_jax.evals.evaluate import can_evaluate
from simclr_jax.modes.compile import compile_for
from simclr_jax.modes.pretrain import describe_run
from simclr_jax.training.plan import Plan

_MEASURED_SECONDS = 20.0
_OFF_THE_RULE = 3.0  # factor between a learning rate and the paper's rules; our choice


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
      UserError: the data are not there, or the options do not fit each other.
    """
    made = assemble.pretraining(config)
    describe_run(config, made)
    _say_shapes(config, made)
    _say_checkpoints(config, made)
    _say_evaluations(config)
    if topology:
        compile_for(config, workdir, topology)
    else:
        _say_time(config, made)
    found = oddities(config, made.plan, made.train.count)
    for i, line in enumerate(found or ["nothing"]):
        say(f"{'' if i else 'unusual':<12}{line}")
    return found


def _say_shapes(config: ConfigDict, made: Pretraining) -> None:
    height, width, channels = made.train.image_shape
    size = f"{height} x {width}" if height and width else "any size"
    batch, side = config.data.batch_size, config.data.image_size
    where = "the device"
    if config.data.placement == "host":
        where = "the host"
        if config.data.color_on == "device":
            where += ", but for colour and blur, which the device does"
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
        can = can_evaluate(config, options.after_training)
        said.append(
            f"{options.after_training} at the end"
            if can
            else "none at the end: it needs labels and test images"
        )
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
    memory = max((_peak(device) for device in job.mesh.local_devices), default=0)
    if memory:
        say(f"memory      {_bytes(memory)} of a device at most")


def _peak(device: Any) -> int:
    """Returns the most bytes of a device that were in use; 0 where it does not say, as CPUs do not."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def oddities(config: ConfigDict, plan: Plan, images: int) -> list[str]:
    """Lists what is unusual about a configuration, with the reason, a line each.

    Args:
      config: the run's configuration.
      plan: its length and learning rate.
      images: number of training images.
    """
    batch, size, options = config.data.batch_size, config.data.image_size, config.optimizer
    found = []
    if batch < 64 and config.loss.name == "nt_xent":
        found.append(
            f"data.batch_size={batch}: {2 * batch - 2} negatives; below 64 NT-Xent learns slowly, "
            "loss.name=dcl suffers less (Yeh et al. 2022)"
        )
    rules = (0.3 * batch / 256, 0.075 * batch**0.5)  # appendix B.1
    times = [max(plan.learning_rate / rule, rule / max(plan.learning_rate, 1e-9)) for rule in rules]
    if options.name == "lars" and min(times) > _OFF_THE_RULE:
        found.append(
            f"learning rate {plan.learning_rate:.3g}: the paper's rules are 0.3 x B / 256 = {rules[0]:.3g} and "
            f"0.075 x sqrt(B) = {rules[1]:.3g} for {batch}"
        )
    if options.name == "lars" and batch < 256:
        found.append(
            f"optimizer.name=lars at batch {batch}: the paper's smallest is 256; see sgd, or muon with "
            "learning_rate 0.008 and scaling none"
        )
    if options.name == "adamw" and plan.learning_rate > 5e-3:
        found.append(
            f"learning rate {plan.learning_rate:.2g} with adamw: above 0.005 (ours) it often diverges"
        )
    if size <= 32 and config.views.blur_probability > 0:
        found.append(
            f"views.blur_probability above 0 at {size} px: the paper leaves it out (appendix B.9)"
        )
    warmup = round(options.warmup_epochs * images / batch)
    if warmup > plan.warmup_steps:
        found.append(
            f"optimizer.warmup_epochs={options.warmup_epochs:g} is {warmup} steps of {plan.steps}: it is cut "
            f"to {plan.warmup_steps}"
        )
    if config.views.color_strength == 0 and config.views.grey_probability == 0:
        found.append(
            "no colour distortion: crops alone let colours give an image away (section 3.1)"
        )
    if not config.loss.name.startswith("margin") and not 0.05 <= config.loss.temperature <= 1:
        found.append(
            f"loss.temperature={config.loss.temperature:g}: the paper tries 0.05 to 1 (Table 5)"
        )
    if plan.steps < 100:
        found.append(f"{plan.steps} steps: enough to see that it runs, not to learn")
    if config.model.stem == "imagenet" and size <= 64 and config.model.name == "resnet":
        found.append(
            f"model.stem=imagenet at {size} px leaves {-(-size // 32)} px: see cifar or strided"
        )
    return found


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
