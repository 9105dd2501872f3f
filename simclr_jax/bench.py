"""How fast the parts of a run are: `python -m simclr_jax.bench input|step|loss|e2e`.

Machines drift, so what is compared is run in turns within one call. Needs no TensorFlow but for
`input` and `e2e` of data that are not placed on the device.
"""

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax import config as config_lib
from simclr_jax.aot import CHIPS, abstract_batch
from simclr_jax.console import duration, say, show_table
from simclr_jax.data.broken import Broken
from simclr_jax.data.sources import in_memory
from simclr_jax.errors import UserError
from simclr_jax.heads import LinearClassifier
from simclr_jax.losses import cross_entropy, nt_xent
from simclr_jax.losses_chunked import nt_xent_chunked
from simclr_jax.main import keep_compiled_programs
from simclr_jax.mesh import batch_sharded, check_divides, make_mesh, replicated
from simclr_jax.train import make_job
from simclr_jax.train_state import init_encoder
from simclr_jax.train_step import to_float

# Peak bfloat16 operations a second by what a device calls itself. GPUs: NVIDIA's data sheets of the
# SXM cards, dense, without sparsity.
_PEAKS = {
    "TPU v3": CHIPS["v3"].flops,
    "TPU v4": CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5p": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
}

_CLASSES = 1000  # of the online and of the supervised classifier: ImageNet's
_ROUNDS = 3  # turns of what is compared
_LOSS_PAIRS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_LOSS_WIDTH = 128
_DENSE_MOST_PAIRS = 8192  # of the dense loss: 1 GB of similarities, of which some copies are held


def measure_input(config: ConfigDict, seconds: float) -> list[dict]:
    """Images a second that this process makes batches of, two views each, with nothing else to do."""
    train = assemble.source(config).train
    began = time.perf_counter()
    with _batches(config, train) as batches:
        next(batches)
        first = time.perf_counter() - began
        for _ in range(2):  # what was prefetched while the clock stood still
            next(batches)
        count, began = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            count += len(next(batches)["index"])
    return [
        {
            "of": "input",
            "images_per_second": count / elapsed,
            "views_per_second": 2 * count / elapsed,
            "seconds_to_first_batch": first,
        }
    ]


@contextlib.contextmanager
def _batches(config: ConfigDict, split) -> Iterator:
    batches = assemble.training_batches(config, split, 0, Broken(split, config.data.max_broken))
    with contextlib.closing(batches):
        yield batches


def measure_step(config: ConfigDict, seconds: float) -> list[dict]:
    """The train step on random views, and the same encoder trained with labels on as many single
    views, in turns.
    """
    mesh = make_mesh(fsdp=config.mesh.fsdp)
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    programs = [
        _prepared("SimCLR", *_simclr(config, mesh)),
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
        peak = next((p for kind, p in _PEAKS.items() if _device_kind().startswith(kind)), None)
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
    rows[0]["share_of_supervised"] = rows[0]["views_per_second"] / rows[1]["views_per_second"]
    return rows


class _Program(NamedTuple):
    """A step that is compiled and has been run once.

    Attributes:
      run: seconds to (steps done, seconds taken).
      flops: of a step, on a device, as the compiler counts them.
      memory: of a device, bytes.
      first: seconds from nothing to the end of the first step.
    """

    name: str
    run: Callable[[float], tuple[int, float]]
    flops: float
    memory: int
    first: float


def _prepared(name: str, step: Any, init: Callable, batch: Any) -> _Program:
    """Compiles and runs once (state, batch) -> (state, metrics), a jitted step that donates."""
    began = time.perf_counter()
    state = init(jax.random.key(0))
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


def _simclr(config: ConfigDict, mesh: Mesh) -> tuple:
    plan = config_lib.plan(config, 1000 * config.data.batch_size)
    job = make_job(config, plan, _CLASSES, mesh)
    return job.step, job.init, _random_batch(config, mesh)


def _random_batch(config: ConfigDict, mesh: Mesh) -> dict:
    """A global batch of noise, laid out as the step takes it."""
    rng = np.random.default_rng(0)
    size, batch = config.data.image_size, config.data.batch_size
    if config.data.placement == "device":
        images = rng.integers(0, 256, (1024, size, size, 3)).astype(np.uint8)
        split = in_memory(images, np.arange(len(images)) % _CLASSES)
        share = batch // jax.process_count()
        where = np.arange(share) % len(images)
        return assemble.feed(config, split, mesh)({"epoch": 0 * where, "index": where})

    def random(x) -> jax.Array:
        whole = rng.random(x.shape, np.float32)  # draws
        if np.issubdtype(x.dtype, np.integer):  # views and labels
            whole = (whole * (256 if x.dtype == np.uint8 else _CLASSES)).astype(x.dtype)
        return _laid_out(whole, x.sharding)

    return jax.tree.map(random, abstract_batch(config, mesh))


def _laid_out(whole: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    return jax.make_array_from_callback(whole.shape, sharding, lambda where: whole[where])


def _supervised(config: ConfigDict, mesh: Mesh) -> tuple:
    """The step of the same encoder with a linear classifier on 2B images, one view each."""
    encoder, classifier = assemble.encoder(config, parts=mesh.size), LinearClassifier(_CLASSES)
    optimizer, _ = assemble.optimizer(config, config_lib.plan(config, 10**6))
    everywhere = replicated(mesh)

    def init(key):
        variables = init_encoder(encoder, config.data.image_size, key)
        h = jnp.zeros((1, encoder.width_of_h))
        params = {"encoder": variables["params"], "classifier": classifier.init(key, h)["params"]}
        return params, variables["batch_stats"], optimizer.init(params)

    def step(state, batch):
        params, stats, opt_state = state

        def objective(params):
            x = to_float(batch["images"])
            h, seen = encoder.apply(
                {"params": params["encoder"], "batch_stats": stats},
                x,
                train=True,
                mutable=["batch_stats"],
            )
            logits = classifier.apply({"params": params["classifier"]}, h)
            loss, accuracy = cross_entropy(logits, batch["label"])
            return loss, (accuracy, seen["batch_stats"])

        (loss, (accuracy, stats)), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return (params, stats, opt_state), {"loss": loss, "accuracy": accuracy}

    rng = np.random.default_rng(0)
    size, count = config.data.image_size, 2 * config.data.batch_size
    whole = {
        "images": rng.integers(0, 256, (count, size, size, 3)).astype(np.uint8),
        "label": rng.integers(0, _CLASSES, count).astype(np.int32),
    }
    lies = batch_sharded(mesh)
    batch = {name: _laid_out(x, lies) for name, x in whole.items()}
    jitted = jax.jit(step, donate_argnums=0, out_shardings=everywhere)
    return jitted, jax.jit(init, out_shardings=everywhere), batch


def measure_loss(seconds: float) -> list[dict]:
    """NT-Xent forward and backward on one device, dense and in tiles, in turns, by size."""
    rows = []
    for pairs in _LOSS_PAIRS:
        z = jax.random.normal(jax.random.key(0), (2 * pairs, _LOSS_WIDTH))
        losses: dict[str, Callable] = {"chunked": nt_xent_chunked}
        if pairs <= _DENSE_MOST_PAIRS:
            losses["dense"] = nt_xent
        programs: dict[str, Any] = {}
        for name, loss in losses.items():
            gradient = jax.jit(jax.value_and_grad(lambda z, loss=loss: loss(z, 0.1), has_aux=True))
            programs[name] = gradient.lower(z).compile()
            jax.block_until_ready(programs[name](z))
        times: dict = {name: [] for name in programs}
        began = time.perf_counter()
        while time.perf_counter() - began < seconds / len(_LOSS_PAIRS) or len(times["chunked"]) < 3:
            for name, program in programs.items():
                start = time.perf_counter()
                jax.block_until_ready(program(z))
                times[name].append(time.perf_counter() - start)
        rows += [
            {
                "of": f"NT-Xent, {name}",
                "pairs": pairs,
                "seconds": float(np.median(times[name])),
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            }
            for name, program in programs.items()
        ]
    return rows


def measure_e2e(config: ConfigDict, seconds: float) -> list[dict]:
    """A run's own loop, without what it writes: batches as they come, and steps."""
    mesh = make_mesh(fsdp=config.mesh.fsdp)
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    began = time.perf_counter()
    train = assemble.source(config).train
    plan = config_lib.plan(config, train.count)
    job = make_job(config, plan, len(train.classes) if train.classes else None, mesh)
    feed = assemble.feed(config, train, mesh)
    state = job.init(jax.random.key(config.seed))
    with _batches(config, train) as batches:
        state, metrics = job.step(state, feed(next(batches)))
        jax.block_until_ready(metrics)
        first = time.perf_counter() - began
        steps, waited, pending = 0, 0.0, metrics
        began = time.perf_counter()
        while (elapsed := time.perf_counter() - began) < seconds:
            asked = time.perf_counter()
            batch = feed(next(batches))
            waited += time.perf_counter() - asked
            state, metrics = job.step(state, batch)
            jax.block_until_ready(pending)
            pending = metrics
            steps += 1
        jax.block_until_ready(state)
        elapsed = time.perf_counter() - began
    images = steps * config.data.batch_size / elapsed
    return [
        {
            "of": "whole run",
            "images_per_second": images,
            "views_per_second_per_device": 2 * images / mesh.size,
            "share_waiting_for_input": waited / elapsed,
            "seconds_to_first_step": first,
            "steps": steps,
        }
    ]


# column of the table: how its value is written.
_COLUMNS: dict[str, tuple[str, Callable]] = {
    "pairs": ("pairs", "{:,}".format),
    "seconds": ("ms", lambda s: f"{1e3 * s:,.1f}"),
    "temporary_bytes": ("temporary MB", lambda b: f"{b / 1e6:,.1f}"),
    "images_per_second": ("images/s", "{:,.1f}".format),
    "views_per_second": ("views/s", "{:,.1f}".format),
    "views_per_second_per_device": ("views/s a device", "{:,.1f}".format),
    "share_of_supervised": ("of supervised", "{:.0%}".format),
    "share_waiting_for_input": ("waiting for input", "{:.0%}".format),
    "flops_per_second_per_device": ("GFLOP/s a device", lambda f: f"{f / 1e9:,.0f}"),
    "share_of_peak": ("of bfloat16 peak", "{:.0%}".format),
    "peak_memory_bytes": ("GiB a device", lambda b: f"{b / 2**30:.2f}"),
    "seconds_to_first_step": ("to first step", duration),
    "seconds_to_first_batch": ("to first batch", duration),
}


def _show(title: str, rows: list[dict]) -> None:
    """A column for each thing measured; of the loss, which has many, a row for each."""
    names = [n for n in _COLUMNS if any(row.get(n) is not None for row in rows)]

    def cell(row: dict, name: str) -> str:
        return _COLUMNS[name][1](row[name]) if row.get(name) is not None else ""

    if "pairs" in names:
        header = ["", *(_COLUMNS[n][0] for n in names)]
        show_table(title, header, [[row["of"], *(cell(row, n) for n in names)] for row in rows])
        return
    header = ["", *(row["of"] for row in rows)]
    show_table(title, header, [[_COLUMNS[n][0], *(cell(row, n) for row in rows)] for n in names])


def _device_kind() -> str:
    return jax.devices()[0].device_kind


def main(argv: list[str]) -> None:
    """Measures, shows a table and writes JSON. Raises UserError for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m simclr_jax.bench",
        description="How fast the parts of a run are.",
        epilog="Any option can be set, as in simclr_jax.main: --config.data.batch_size=512",
        allow_abbrev=False,
    )
    parser.add_argument(
        "what",
        choices=("input", "step", "loss", "e2e"),
        help="input: the host's batches; step: the device's steps on random views, beside "
        "supervised ones; loss: NT-Xent by size; e2e: both together, as in a run",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="needed by all but loss")
    parser.add_argument("--seconds", type=float, default=20.0, help="to measure for; default 20")
    parser.add_argument("--output", metavar="FILE.json", help="default: bench_WHAT.json")
    args, overrides = parser.parse_known_args(argv)
    keep_compiled_programs()
    if args.what == "loss":
        if args.config or overrides:
            raise UserError("bench loss takes no configuration: it measures sizes of its own")
        config, rows = None, measure_loss(args.seconds)
    else:
        if not args.config:
            raise UserError(f"bench {args.what} needs a --config=configs/NAME.py")
        config = config_lib.load(args.config, overrides)
        measure = {"input": measure_input, "step": measure_step, "e2e": measure_e2e}[args.what]
        rows = measure(config, args.seconds)
    kinds = sorted({d.device_kind for d in jax.devices()})
    say()
    _show(f"{args.what}, {jax.device_count()} x {', '.join(kinds)}", rows)
    result = {
        "what": args.what,
        "date": datetime.date.today().isoformat(),
        "devices": [str(d.device_kind) for d in jax.devices()],
        "versions": {n: importlib.metadata.version(n) for n in ("jax", "jaxlib", "flax", "numpy")},
        "config": config.to_dict() if config else None,
        "rows": rows,
    }
    path = pathlib.Path(args.output or f"bench_{args.what}.json")
    try:
        path.write_text(json.dumps(result, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    say(f"written to {path}")


if __name__ == "__main__":
    from simclr_jax.main import shell

    shell(main, sys.argv[1:])
