"""Divides the work of a loss: over the devices, each of which has rows of its own, and into tiles of rows.

Such a function gets `axes`, the names of the mesh's axes, () on one device, and passes them on to `gather` and
`first_row`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

WHOLE = -1  # an array of which every device has all


def on_each_device(function: Callable, mesh: Mesh | None, inputs: Any, outputs: Any) -> Callable:
    """Makes a function of global arrays that runs `function(*arrays, axes)` on each device.

    Args:
      function: takes a device's parts of the arrays, and `axes`.
      mesh: the devices, all axes together; None: one device.
      inputs: for each array, which of its axes is divided over the devices, or WHOLE; a tuple.
      outputs: the same of what the function returns; an int, or a tuple.
    """
    if mesh is None or mesh.size == 1:
        return functools.partial(function, axes=())
    axes = mesh.axis_names

    def spec(divided: int) -> PartitionSpec:
        return PartitionSpec() if divided == WHOLE else PartitionSpec(*[None] * divided, axes)

    return jax.shard_map(
        functools.partial(function, axes=axes),
        mesh=mesh,
        in_specs=jax.tree.map(spec, inputs),
        out_specs=jax.tree.map(spec, outputs),
        check_vma=False,  # an all-gather's result is equal everywhere, which the check cannot see
    )


def gather(x, axes):
    """Returns the rows of all devices."""
    return lax.all_gather(x, axes, tiled=True) if axes else x


def first_row(x, axes):
    """Returns the row number in the batch of this device's first row; x holds its rows."""
    return lax.axis_index(axes) * len(x) if axes else 0


def divide(x, size: int, fill=0):
    """Divides x [n, ...] into tiles [k, size, ...], filled up with `fill`."""
    x = jnp.pad(x, [(0, -len(x) % size), *[(0, 0)] * (x.ndim - 1)], constant_values=fill)
    return x.reshape(-1, size, *x.shape[1:])
