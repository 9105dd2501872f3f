"""--mode=compile: the train step compiled for a TPU slice that is not there, and what that tells.

The compiler says how much memory a chip needs, how many operations and bytes a step takes and which
collectives it has; with the chip's peak rates these bound the time of a step from below. A bound is
not a measurement: a real step takes longer.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import re
import resource
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from simclr_jax import assemble
from simclr_jax.bench.chips import CHIPS, Chip
from simclr_jax.console import say, show_table
from simclr_jax.errors import UserError
from simclr_jax.files import write_text
from simclr_jax.mesh import FSDP, check_divides, make_mesh, slices_in
from simclr_jax.modes.collectives import between_slices, collectives
from simclr_jax.training.workdir import check_no_distillation

# Number of classes of the online classifier: ImageNet's, as the data are not opened.
_CLASSES = 1000

_TOO_LARGE = (
    "try a smaller data.batch_size, model.remat=True, train.microbatches=2, mesh.fsdp=8, or a "
    "larger slice"
)


def compile_for(config: ConfigDict, workdir: str | None, topology: str) -> dict:
    """Compiles the step of a configuration for a slice and shows what the compiler made of it.

    Prints tables and, as the last line, JSON; with a workdir also writes WORKDIR/compile.json.

    Args:
      config: the run's configuration; `data.batch_size` is the global batch.
      workdir: where to write; None: nowhere.
      topology: "KIND:SHAPE", such as "v5e:16x16"; the shape counts chips. Or "NxKIND:SHAPE": N such slices,
        joined by the data-centre network.

    Raises:
      UserError: the slice is not known, the step does not fit its chips, or the workdir holds a distillation.
    """
    if workdir is not None:
        check_no_distillation(workdir, "compile")
    chip, devices = slice_of(topology)
    mesh = make_mesh(devices, config.mesh.fsdp)
    check_divides(config.data.batch_size, mesh, config.train.microbatches)
    say(f"compiling for {topology}, which takes a minute to some ten")
    compiled = compile_step(config, mesh, topology)
    result = account(config, mesh, compiled, chip, topology)
    _show(result)
    text = json.dumps(result)
    say(text)
    if workdir is not None:
        write_text(epath.Path(workdir) / "compile.json", text + "\n")
    return result


def slice_of(topology: str) -> tuple[Chip, list]:
    """Returns the kind of chip and the devices of one or several slices by name; none of the devices exists here.

    Raises:
      UserError: there is no such slice, or no compiler for it.
    """
    match = re.fullmatch(r"(?:(\d+)x)?(\w+):(\d+(?:x\d+){1,2})", topology)
    if match is None or match[2] not in CHIPS or match[1] == "0":
        raise UserError(
            f"--topology={topology}: expected KIND:SHAPE such as v5e:4x4 or v4:2x2x4, or several slices such as "
            f"2xv5e:4x4, of a kind out of {', '.join(CHIPS)}"
        )
    count, kind, shape = match.groups()
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs libtpu: pip install -e '.[tpu]'")
    jax.config.update("jax_platforms", "cpu")
    # A program for devices that are not there can be written to the cache, but not read from it.
    jax.config.update("jax_enable_compilation_cache", False)
    # Without these, libtpu looks for a TPU, for its neighbours and for other users of it, and complains.
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
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{kind}:{shape}",
            num_slices=int(count or 1),
            **chip.options,
        )
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"--topology={topology}: {str(error).partition(': ')[2]}") from error
    return chip, found.devices


def compile_step(config: ConfigDict, mesh: Mesh, topology: str) -> Any:
    """Compiles the step of pretraining over the devices of the mesh."""
    unlimited = resource.getrlimit(resource.RLIMIT_STACK)[0] == resource.RLIM_INFINITY
    if "v6e:" in topology and not unlimited:
        # For ResNet-50, the compiler of libtpu 0.0.42.1 recurses until the process dies.
        raise UserError("the compiler for v6e needs a large stack: run `ulimit -s unlimited` first")
    count = 1000 * config.data.batch_size  # sets the schedule's constants, no shape
    data = config.data
    unlabelled = data.source == "folder" and not (data.folder_labels or data.labels_file)
    if unlabelled and config.train.objective == "supervised":
        raise UserError("train.objective=supervised needs labels: see data.folder_labels")
    classes = None if unlabelled else _CLASSES
    job = assemble.pretraining_job(config, assemble.plan_of(config, count), classes, mesh)
    step: Any = job.step  # jitted
    lowered = step.lower(job.abstract_state, assemble.views(config, mesh).abstract())
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise too_large(topology, str(error)) from error


def too_large(topology: str, message: str) -> UserError:
    """Returns a UserError: the compiler's message about a program that does not fit, in one line."""
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


def account(config: ConfigDict, mesh: Mesh, compiled: Any, chip: Chip, topology: str) -> dict:
    """Collects what the compiler says of a step, and the bounds that follow. Times in s, sizes in bytes.

    Of the keys, "memory" holds the bytes a device needs by their kind and "collectives" the communication; "bounds" holds
    the seconds a step takes at least by each part of a chip, "bound" the part that takes longest, and
    "views_per_second_bound" what follows from it.

    The compiler counts one pass of a loop: with `train.microbatches` above 1 its operations and
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
    program, slices = compiled.as_text(), slices_in(mesh)
    found = collectives(program, devices)
    result = {
        "topology": topology,
        "device": mesh.devices.flat[0].device_kind,
        "devices": devices,
        "mesh": dict(mesh.shape),
        "model": f"{assemble.encoder(config).describe()} {config.model.dtype}",
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
    if slices > 1:
        result["between_slices"] = between_slices(program, slices)
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


def _show_collectives(title: str, unit: str, found: dict[str, dict]) -> None:
    lines = [[kind, str(c["count"]), f"{c['bytes'] / 1e6:.2f}"] for kind, c in found.items()]
    show_table(title, ["", "count", unit], lines)


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
    _show_collectives("Collectives of a step", "MB on a device", result["collectives"])
    if "between_slices" in result:
        title = "Between slices, over the data-centre network (in no bound)"
        _show_collectives(title, "MB a device hands over", result["between_slices"])
    if "bounds" not in result:
        say("no bounds: the compiler counts only one pass of the loop over microbatches")
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
