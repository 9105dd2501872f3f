"""Devices and what lies where. Past `to_global`, nothing knows about processes or devices."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from simclr_jax.errors import UserError

DATA_AXIS = "data"


def make_mesh(devices=None) -> Mesh:
    """All devices (of all processes) along the axis "data"."""
    if devices is None:
        # A process's devices side by side: on some slices the ids of the hosts interleave, and
        # the rows of a global array are said to come process after process.
        devices = sorted(jax.devices(), key=lambda d: (d.process_index, d.id))
    return Mesh(np.asarray(devices), (DATA_AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """The first axis divided over the devices."""
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def to_global(mesh: Mesh, local):
    """A tree of this process's numpy arrays [n / P, ...] to global arrays [n, ...], sharded.

    The processes' parts follow each other in the order of the mesh.
    """
    sharding = batch_sharded(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), local)


def check_divides(batch_size: int, mesh: Mesh) -> None:
    """Raises a UserError unless every device gets the same number of whole images."""
    if batch_size % mesh.size:
        raise UserError(
            f"data.batch_size={batch_size} does not divide over {mesh.size} devices "
            f"({jax.process_count()} processes): use a multiple of {mesh.size}"
        )
