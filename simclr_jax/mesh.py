"""Devices, and which array lies on which of them.

Past `to_global`, nothing knows about processes or devices.

The mesh has two axes. The batch is divided over both; "fsdp" also divides the parameters and the
optimizer's state, and "data" repeats them.
"""

import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from simclr_jax.errors import UserError

AXES = DATA, FSDP = "data", "fsdp"


def make_mesh(devices=None, fsdp: int = 1) -> Mesh:
    """Makes a mesh of shape (devices / fsdp, fsdp) of all devices of all processes.

    With several TPU slices, joined by the data-centre network, each slice is a block of consecutive rows. So a
    group of "fsdp", which gathers parameters in every step, lies within a slice; only the batch spans slices.

    Raises:
      UserError: the devices, of each slice, do not divide into groups of `fsdp`.
    """
    if devices is None:
        # Keep each process's devices together, although the hosts' ids interleave on some slices: `to_global` takes
        # the rows of a global array process after process.
        devices = sorted(jax.devices(), key=lambda d: (_slice_of(d), d.process_index, d.id))
    slices = collections.Counter(map(_slice_of, devices))
    least = min(slices.values())
    if any(count % fsdp for count in slices.values()):
        where = f"{least} devices of a slice" if len(slices) > 1 else f"{least} devices"
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide {where}: use one of "
            f"{', '.join(str(n) for n in range(1, least + 1) if least % n == 0)}"
        )
    return Mesh(np.asarray(devices).reshape(-1, fsdp), AXES)


def slices_in(mesh: Mesh) -> int:
    """Returns how many TPU slices the devices of a mesh belong to; 1 for other devices."""
    return len({_slice_of(device) for device in mesh.devices.flat})


def processes_of(mesh: Mesh) -> list[int]:
    """Lists the processes whose devices are in a mesh, in its order, in which `to_global` takes their rows. It is that of
    their numbers unless the processes of several slices interleave.
    """
    return list(dict.fromkeys(device.process_index for device in mesh.devices.flat))


def _slice_of(device: Any) -> int:
    # JAX calls each host of GPUs a slice, too, but groups of "fsdp" may span hosts.
    return getattr(device, "slice_index", None) or 0 if device.platform == "tpu" else 0


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def here() -> SingleDeviceSharding:
    """Returns the sharding of an array that this process's first device alone holds."""
    return SingleDeviceSharding(jax.local_devices()[0])


def gathered(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a jit-able function that gathers arrays which are divided over the mesh. A step gathers its parameters
    explicitly: the compiler could also divide convolutions by channels and move images.
    """
    return lambda tree: jax.lax.with_sharding_constraint(tree, replicated(mesh))


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array whose first axis is divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(mesh: Mesh, abstract: Any) -> Any:
    """Returns the sharding of each array of a state.

    Kernels and the optimizer's state for them are divided over "fsdp", along the last axis whose length is a
    multiple of its size. The projections in the memory of negatives, [S, B, D], are divided over all devices along
    B. Every device holds all other arrays whole.

    Args:
      mesh: the devices.
      abstract: tree of shapes.

    Returns:
      a tree of shardings like it.
    """

    def sharding(path, x) -> NamedSharding:
        if [getattr(part, "name", None) for part in path[-2:]] == ["memory", "keys"]:
            return NamedSharding(mesh, PartitionSpec(None, AXES))
        size = mesh.shape[FSDP]
        # Vectors are left whole: all together they are less than a thousandth of a ResNet.
        axes = [i for i, n in enumerate(x.shape) if n % size == 0] if len(x.shape) > 1 else []
        if size == 1 or not axes:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * axes[-1], FSDP))

    return jax.tree_util.tree_map_with_path(sharding, abstract)


def to_global(mesh: Mesh, local):
    """Turns a tree of this process's numpy arrays [n / P, ...] into global arrays [n, ...], sharded.

    The processes' parts follow each other in the order of `processes_of`.
    """
    sharding = batch_sharded(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def laid_out(x: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Turns an array that every process holds whole into a global array."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """Wraps a function so that, while `jax.jit` traces it, `jax.sharding.get_abstract_mesh` returns the mesh.

    Only convolutions on CPUs use that, see `encoders/conv.py`.
    """

    @functools.wraps(function)
    def on_mesh(*args):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return on_mesh


def check_divides(
    batch_size: int, mesh: Mesh, microbatches: int = 1, option: str = "data.batch_size"
) -> None:
    """Raises a UserError unless every device gets the same number of whole images in a microbatch.

    Args:
      batch_size: images of the global batch.
      mesh: the devices.
      microbatches: parts of the batch.
      option: where the batch size was set, for the message.
    """
    multiple = mesh.size * microbatches
    if batch_size % multiple:
        each = f" in {microbatches} microbatches" if microbatches > 1 else ""
        several = f" of {n} processes" if (n := jax.process_count()) > 1 else ""
        counts = range(mesh.shape[FSDP], mesh.size, mesh.shape[FSDP]) if not several else ()
        fit = [n for n in counts if batch_size % (n * microbatches) == 0]
        fewer = f", or let the process see {fit[-1]} device{'s' * (fit[-1] > 1)}" if fit else ""
        raise UserError(
            f"{option}={batch_size} does not divide over {mesh.size} devices{several}{each}: use a multiple of "
            f"{multiple}{fewer}"
        )
