"""Devices and what lies where. Past `to_global`, nothing knows about processes or devices.

The mesh has two axes. The batch is divided over both; "fsdp" also divides the parameters and the
optimizer's state, and "data" repeats them.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simclr_jax.errors import UserError

AXES = DATA, FSDP = "data", "fsdp"


def make_mesh(devices=None, fsdp: int = 1) -> Mesh:
    """All devices (of all processes) as a mesh of shape (devices / fsdp, fsdp).

    Raises:
      UserError: the devices do not divide into groups of `fsdp`.
    """
    if devices is None:
        # A process's devices side by side: on some slices the ids of the hosts interleave, and
        # the rows of a global array are said to come process after process.
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    if len(devices) % fsdp:
        raise UserError(
            f"mesh.fsdp={fsdp} does not divide {len(devices)} devices: use one of "
            f"{', '.join(str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0)}"
        )
    return Mesh(np.asarray(devices).reshape(-1, fsdp), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(mesh: Mesh, abstract: Any) -> Any:
    """For each array of a tree of shapes how it lies: kernels, and what the optimizer keeps for
    them, divided over "fsdp" along their last axis that divides; all else on every device.
    """

    def sharding(x) -> NamedSharding:
        size = mesh.shape[FSDP]
        # Vectors are left whole: all together they are less than a thousandth of a ResNet.
        axes = [i for i, n in enumerate(x.shape) if n % size == 0] if len(x.shape) > 1 else []
        if size == 1 or not axes:
            return replicated(mesh)
        return NamedSharding(mesh, PartitionSpec(*[None] * axes[-1], FSDP))

    return jax.tree.map(sharding, abstract)


def to_global(mesh: Mesh, local):
    """A tree of this process's numpy arrays [n / P, ...] to global arrays [n, ...], sharded.

    The processes' parts follow each other in the order of the mesh.
    """
    sharding = batch_sharded(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def laid_out(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process holds whole, as a global array."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def check_divides(
    batch_size: int, mesh: Mesh, microbatches: int = 1, option: str = "data.batch_size"
) -> None:
    """Raises a UserError unless every device gets the same number of whole images in each
    microbatch of the batch that `option` says.
    """
    multiple = mesh.size * microbatches
    if batch_size % multiple:
        each = f" in {microbatches} microbatches" if microbatches > 1 else ""
        raise UserError(
            f"{option}={batch_size} does not divide over {mesh.size} devices "
            f"({jax.process_count()} processes){each}: use a multiple of {multiple}"
        )
