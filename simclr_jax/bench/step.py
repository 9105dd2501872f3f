"""How many views a second the train step takes, beside a supervised step of the same encoder."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.bench.chips import PEAKS
from simclr_jax.data.arrays import in_memory
from simclr_jax.encoders import init_encoder
from simclr_jax.encoders.classified import Classified
from simclr_jax.encoders.heads import LinearClassifier
from simclr_jax.encoders.images import to_float
from simclr_jax.mesh import batch_sharded, check_divides, gathered, laid_out, make_mesh
from simclr_jax.training.loop import Job, job_of
from simclr_jax.training.objectives import no_loss, supervised
from simclr_jax.training.state import TrainState, start_of
from simclr_jax.training.step import UpdateRule, make_step

_CLASSES = 1000  # of the online and of the supervised classifier: ImageNet's
_ROUNDS = 3  # how often each program is measured, in turns


def measure_step(config: ConfigDict, seconds: float) -> list[dict]:
    """Measures the train step on random views, and the same encoder trained with labels on 2B images,
    one view each, in turns.

    Args:
      config: a run's configuration; its data are not opened.
      seconds: time to measure for, s.

    Returns:
      a row for "SimCLR" and one for "supervised": images_per_second, views_per_second (all devices and
      per device), flops_per_second_per_device and share_of_peak (None on CPUs, and of SimCLR with microbatches),
      peak_memory_bytes, seconds_to_first_step, steps.
    """
    mesh = make_mesh(fsdp=config.mesh.fsdp)
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    programs = [
        _prepared("SimCLR", *simclr_job(config, mesh)),
        _prepared("supervised", *_supervised(config, mesh)),
    ]
    count: dict = {program.name: [0, 0.0] for program in programs}
    for _ in range(_ROUNDS):
        for program in programs:
            steps, elapsed = program.run(seconds / _ROUNDS)
            count[program.name][0] += steps
            count[program.name][1] += elapsed
    rows = []
    for program in programs:
        steps, elapsed = count[program.name]
        views = 2 * config.data.batch_size * steps / elapsed
        flops = program.flops * steps / elapsed
        peak = next((p for kind, p in PEAKS.items() if _device_kind().startswith(kind)), None)
        rows.append(
            {
                "of": program.name,
                "images_per_second": views / (2 if program.name == "SimCLR" else 1),
                "views_per_second": views,
                "views_per_second_per_device": views / mesh.size,
                "flops_per_second_per_device": flops,
                "share_of_peak": flops / peak if peak else None,
                "peak_memory_bytes": program.memory,
                "seconds_to_first_step": program.first,
                "steps": steps,
            }
        )
    # The compiler counts the body of a loop once: microbatches, and on a CPU convolutions, are loops.
    for row, in_microbatches in zip(rows, (config.train.microbatches > 1, False), strict=True):
        if in_microbatches or jax.default_backend() == "cpu":
            row |= {"flops_per_second_per_device": None, "share_of_peak": None}
    rows[0]["share_of_supervised"] = rows[0]["views_per_second"] / rows[1]["views_per_second"]
    return rows


class _Program(NamedTuple):
    """A step that is compiled and has been run once.

    Attributes:
      run: (seconds to run for) -> (steps done, seconds taken).
      flops: operations of a step on a device, as the compiler counts them.
      memory: bytes that a step takes on a device.
      first: seconds from nothing to the end of the first step.
    """

    name: str
    run: Callable[[float], tuple[int, float]]
    flops: float
    memory: int
    first: float


def _prepared(name: str, job: Job, batch: Any) -> _Program:
    """Compiles the step of a job and runs it once."""
    began = time.perf_counter()
    state, step = job.init(), cast(Any, job.step)
    compiled = step.lower(state, batch).compile()
    held = [compiled(state, batch)[0]]
    jax.block_until_ready(held)
    first = time.perf_counter() - began
    sizes, cost = compiled.memory_analysis(), compiled.cost_analysis()

    def run(seconds: float) -> tuple[int, float]:
        steps, began = 0, time.perf_counter()
        waiting = None
        while time.perf_counter() - began < seconds:
            held[0], metrics = compiled(held[0], batch)
            if waiting is not None:  # one step ahead, as the loop of a run is
                jax.block_until_ready(waiting)
            waiting = metrics
            steps += 1
        jax.block_until_ready(held)
        return steps, time.perf_counter() - began

    # What the compiler plans, the same on every device; a GPU's allocator keeps more.
    memory = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    return _Program(name, run, cost["flops"], memory, first)


def simclr_job(config: ConfigDict, mesh: Mesh) -> tuple[Job, dict]:
    """Returns the job of pretraining and a global batch of noise for it."""
    plan = assemble.plan_of(config, 1000 * config.data.batch_size)
    return assemble.pretraining_job(config, plan, _CLASSES, mesh), _random_batch(config, mesh)


def _random_batch(config: ConfigDict, mesh: Mesh) -> dict:
    """Makes a global batch of noise, laid out as the step takes it."""
    rng = np.random.default_rng(0)
    size, batch = config.data.image_size, config.data.batch_size
    views = assemble.views(config, mesh)
    if config.data.placement == "device":
        images = rng.integers(0, 256, (1024, size, size, 3)).astype(np.uint8)
        split = in_memory(images, np.arange(len(images)) % _CLASSES)
        where = np.arange(batch // jax.process_count()) % len(images)
        return views.placer(split)({"epoch": 0 * where, "index": where})

    def random(x: jax.ShapeDtypeStruct) -> jax.Array:
        whole = rng.random(x.shape, np.float32)  # draws
        if np.issubdtype(x.dtype, np.integer):  # views and labels
            whole = (whole * (256 if x.dtype == np.uint8 else _CLASSES)).astype(x.dtype)
        return laid_out(whole, x.sharding)

    return jax.tree.map(random, views.abstract())


def _supervised(config: ConfigDict, mesh: Mesh) -> tuple[Job, dict]:
    """Returns the job of the same encoder with a linear classifier, and 2B images of noise, one view
    each.
    """
    classified = Classified(
        assemble.encoder(config), assemble.head(config), 0, LinearClassifier(_CLASSES), True
    )
    rule = UpdateRule(*assemble.pretraining_optimizer(config, assemble.plan_of(config, 10**6)))
    step = make_step(
        supervised(classified.logits, lambda batch: to_float(batch["views"])),
        no_loss,
        rule,
        gather=gathered(mesh),
    )

    def init(key: jax.Array) -> TrainState:
        encoder = init_encoder(classified.encoder, config.data.image_size, key)
        head: dict = {"params": {}, "batch_stats": {}}
        return start_of(*classified.start(encoder, head, key), rule.optimizer)

    rng = np.random.default_rng(0)
    size, count = config.data.image_size, 2 * config.data.batch_size
    whole = {
        "views": rng.integers(0, 256, (count, 1, size, size, 3)).astype(np.uint8),
        "label": rng.integers(0, _CLASSES, count).astype(np.int32),
    }
    batch = {name: laid_out(x, batch_sharded(mesh)) for name, x in whole.items()}
    return job_of(step, init, (jax.random.key(0),), 10**6, mesh), batch


def _device_kind() -> str:
    return jax.devices()[0].device_kind
