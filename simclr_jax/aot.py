"""--mode=compile: the train step compiled for a TPU slice that is not there, and what that tells.

The compiler says how much memory a chip needs, how many operations and bytes a step takes and which
collectives it has; with the chip's peak rates these bound the time of a step from below. A bound is
not a measurement: a real step takes longer.
"""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import config as config_lib
from simclr_jax.console import say, show_table
from simclr_jax.data.distortion import DRAWS_OF_A_VIEW
from simclr_jax.errors import UserError
from simclr_jax.mesh import FSDP, batch_sharded, check_divides, make_mesh
from simclr_jax.train import make_job


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one device of a kind can do at most; half a chip where JAX sees two cores of it.

    Attributes:
      flops: peak bfloat16 operations a second.
      bandwidth: of its memory, bytes a second.
      interconnect: what it can send to the other chips, bytes a second, all links together.
      memory: that a program can use, bytes.
      options: of the compiler's topology; "megacore" makes the two cores of a chip one device.
    """

    flops: float
    bandwidth: float
    interconnect: float
    memory: float
    options: dict = dataclasses.field(default_factory=dict)


# Rates: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e}, read 2026-11-24; interconnect is the
# pages' all-reduce bandwidth of a pod over its chips, for v5p half of the bidirectional figure.
# Memory: what the compiler names as available when a program does not fit (libtpu 0.0.42.1).
_MEGACORE = {"chip_config_name": "megacore"}
CHIPS = {
    "v3": Chip(123e12 / 2, 900e9 / 2, 340e12 / 1024 / 2, 15.48 * 2**30),
    "v4": Chip(275e12, 1200e9, 1.1e15 / 4096, 30.75 * 2**30, _MEGACORE),
    "v5e": Chip(197e12, 819e9, 51.2e12 / 256, 15.75 * 2**30),
    "v5p": Chip(459e12, 2765e9, 600e9, 95.74 * 2**30, _MEGACORE),
    "v6e": Chip(918e12, 1640e9, 102.4e12 / 256, 31.25 * 2**30),
}

# The classes of the online classifier, as the data are not opened: ImageNet's.
_CLASSES = 1000

_TOO_LARGE = (
    "try a smaller data.batch_size, model.remat=True, train.microbatches=2, mesh.fsdp=8, or a "
    "larger slice"
)


def report(config: ConfigDict, workdir: str | None, topology: str) -> dict:
    """Compiles the step of a configuration for a slice and shows what the compiler made of it.

    Prints tables and, as the last line, JSON; with a workdir also writes WORKDIR/compile.json.

    Args:
      config: of the run; `data.batch_size` is the global batch.
      workdir: where to write; None: nowhere.
      topology: "KIND:SHAPE", such as "v5e:16x16"; the shape counts chips.

    Raises:
      UserError: the slice is not known, or the step does not fit its chips.
    """
    chip, devices = slice_of(topology)
    mesh = make_mesh(devices, config.mesh.fsdp)
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    say(f"compiling for {topology}, which takes a minute to some ten")
    compiled = compile_step(config, mesh, topology)
    result = describe(config, mesh, compiled, chip, topology)
    _show(result)
    text = json.dumps(result)
    say(text)
    if workdir is not None:
        path = epath.Path(workdir) / "compile.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
    return result


def slice_of(topology: str) -> tuple[Chip, list]:
    """The chip of a slice by name, and its devices, none of which exists here."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"--topology={topology}: expected KIND:SHAPE such as v5e:4x4 or v4:2x2x4, of a kind "
            f"out of {', '.join(CHIPS)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    jax.config.update("jax_platforms", "cpu")
    # A program for devices that are not there can be written to the cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    # The library looks for a TPU, for its neighbours and for other users of it, and complains.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    chip = CHIPS[kind]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **chip.options)
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {str(error).partition(': ')[2]}") from error
    return chip, found.devices


def compile_step(config: ConfigDict, mesh: Mesh, topology: str) -> Any:
    """The compiled step over the devices of the mesh."""
    unlimited = resource.getrlimit(resource.RLIMIT_STACK)[0] == resource.RLIM_INFINITY
    if topology.startswith("v6e") and not unlimited:
        # Of libtpu 0.0.42.1, for ResNet-50: it recurses until the process dies.
        raise UserError("the compiler for v6e needs a large stack: run `ulimit -s unlimited` first")
    count = 1000 * config.data.batch_size  # sets the schedule's constants, no shape
    unlabelled = config.data.source == "folder" and not config.data.folder_labels
    job = make_job(config, config_lib.plan(config, count), None if unlabelled else _CLASSES, mesh)
    step: Any = job.step  # jitted
    lowered = step.lower(job.abstract_state, abstract_batch(config, mesh))
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise too_large(topology, str(error)) from error


def abstract_batch(config: ConfigDict, mesh: Mesh) -> dict:
    """Shapes and shardings of a global batch of views."""
    batch, size = config.data.batch_size, config.data.image_size
    if config.data.placement == "device":
        raise UserError(
            "data.placement=device holds the images in the step, and compiling does not open them: "
            "use data.color_on=device, and add the size of the data to the memory of a device"
        )
    shapes: dict = {"views": ((batch, 2, size, size, 3), np.uint8), "label": ((batch,), np.int32)}
    if config.data.color_on == "device":
        shapes["draws"] = (batch, 2, DRAWS_OF_A_VIEW), np.float32
    sharding = batch_sharded(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in shapes.items()
    }


def too_large(topology: str, message: str) -> UserError:
    """The compiler's account of a program that does not fit, in one line."""
    numbers = re.search(
        r"Used ([\d.]+)([GM]) of ([\d.]+)([GM])|"
        r"\(([\d.]+)([GM])\) exceeds available HBM \(([\d.]+)([GM])\)",
        message,
    )
    if numbers is None:
        return UserError(f"the step does not fit a chip of {topology}: {_TOO_LARGE}")
    used, used_unit, limit, limit_unit = filter(None, numbers.groups())
    gib = {"G": 1.0, "M": 1 / 1024}
    needs, has = float(used) * gib[used_unit], float(limit) * gib[limit_unit]
    return UserError(
        f"the step does not fit a chip of {topology}: it needs {needs:.2f} GiB of {has:.2f} GiB, "
        f"{needs - has:.2f} GiB too much: {_TOO_LARGE}"
    )


def describe(config: ConfigDict, mesh: Mesh, compiled: Any, chip: Chip, topology: str) -> dict:
    """What the compiler says of a step, and the bounds that follow. Times in s, sizes in bytes.

    Of a loop the compiler counts one pass: with `train.microbatches` above 1 its operations and
    bytes are those of one microbatch, and no bound is given.
    """
    devices, batch = mesh.size, config.data.batch_size
    views = 2 * batch // devices
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    kinds = {
        "state and batch": memory.argument_size_in_bytes,
        "activations and other temporaries": memory.temp_size_in_bytes,
        "results": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    found = collectives(compiled.as_text(), devices)
    result = {
        "topology": topology,
        "device": mesh.devices.flat[0].device_kind,
        "devices": devices,
        "mesh": dict(mesh.shape),
        "model": f"ResNet-{config.model.depth} x{config.model.width:g} {config.model.dtype}",
        "image_size": config.data.image_size,
        "batch_size": batch,
        "remat": config.model.remat,
        "microbatches": config.train.microbatches,
        "memory": kinds,
        "memory_total": sum(kinds.values()),
        "memory_limit": chip.memory,
        "collectives": found,
        "chip": dataclasses.asdict(chip),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu")},
    }
    if config.train.microbatches > 1:
        return result
    bounds = {
        "compute": cost["flops"] / chip.flops,
        "memory": cost["bytes accessed"] / chip.bandwidth,
        "interconnect": sum(c["sent"] for c in found.values()) / chip.interconnect,
    }
    holds = max(bounds, key=bounds.__getitem__)
    return result | {
        "flops_per_view": cost["flops"] / views,
        "bytes_per_view": cost["bytes accessed"] / views,
        "bounds": bounds,
        "bound": holds,
        "views_per_second_per_device_bound": views / bounds[holds],
        "views_per_second_bound": 2 * batch / bounds[holds],
    }


_ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}

# Bytes a device sends at least, of the bytes of the result, among n devices.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: n - 1,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


def collectives(program: str, devices: int) -> dict[str, dict]:
    """The collectives of a compiled program, each kind with its count, the bytes of its results on
    a device, and the bytes a device sends for them at least. A loop's body counts once.

    `program` is the text of the optimised HLO. One collective may stand in it several times, where
    the compiler has written out its overlap with other work: those share a channel.
    """
    pattern = re.compile(
        rf"= (.*?) ({'|'.join(_SENT)})(-start)?\(.*?channel_id=(\d+)(?:.*?replica_groups=(\S+))?"
    )
    found: dict[str, dict[str, tuple[int, float]]] = collections.defaultdict(dict)
    for line in program.splitlines():
        match = pattern.search(line)
        if match is None:
            continue
        shapes, kind, start, channel, groups = match.groups()
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        if start and kind != "all-reduce":
            # Operands, results, and scalars that the runtime keeps.
            arrays = [(dtype, dims) for dtype, dims in arrays if (dtype, dims) != ("u32", "")]
            arrays = arrays[len(arrays) // 2 :]
        size = sum(
            _ITEM_BYTES.get(dtype, 4) * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in arrays
        )
        found[kind][channel] = size, size * _SENT[kind](_group_size(groups, devices))
    return {
        kind: {
            "count": len(by_channel),
            "bytes": sum(size for size, _ in by_channel.values()),
            "sent": sum(sent for _, sent in by_channel.values()),
        }
        for kind, by_channel in sorted(found.items())
    }


def _group_size(groups: str | None, devices: int) -> int:
    """How many devices take part, from {{0,1},{2,3}} or [2,2]<=[4]; all in any other notation."""
    if groups and (listed := re.match(r"\{\{([\d,]+)\}", groups)):
        return len(listed[1].split(","))
    if groups and (shape := re.match(r"\[(\d+),(\d+)\]<=", groups)):
        return int(shape[2])
    return devices


def _show(result: dict) -> None:
    gib, devices = 2**30, result["devices"]
    say()
    say(
        f"compiled for {devices} devices of {result['topology']} ({result['device']}): "
        f"{result['model']}, {result['image_size']} px, batch {result['batch_size']}, "
        f"{result['batch_size'] // devices} images a device"
        + (f", parameters divided over {n}" if (n := result["mesh"][FSDP]) > 1 else "")
    )
    rows = [[kind, f"{size / gib:.2f}"] for kind, size in result["memory"].items()]
    rows.append(["all", f"{result['memory_total'] / gib:.2f}"])
    rows.append(["limit", f"{result['memory_limit'] / gib:.2f}"])
    show_table("Memory of a device", ["", "GiB"], rows)
    show_table(
        "Collectives of a step",
        ["", "count", "MB on a device"],
        [
            [kind, str(c["count"]), f"{c['bytes'] / 1e6:.1f}"]
            for kind, c in result["collectives"].items()
        ],
    )
    if "bounds" not in result:
        say("no bounds: of a loop over microbatches the compiler counts one pass")
        return
    say(
        f"a view takes {result['flops_per_view'] / 1e9:.1f} GFLOP and "
        f"{result['bytes_per_view'] / 1e6:.0f} MB of memory traffic"
    )
    show_table(
        "Lower bounds of a step's time",
        ["", "ms"],
        [[name, f"{1e3 * seconds:.1f}"] for name, seconds in result["bounds"].items()],
    )
    say(
        f"bound by {result['bound']}: at most {result['views_per_second_per_device_bound']:,.0f} "
        f"views/s a device, {result['views_per_second_bound']:,.0f} views/s in all (bound, not "
        "measured)"
    )
