"""Losses over the projections of the whole batch. To add one, write its file and a row in `LOSSES`.

Each is written for the whole batch [2B, D]: under `jit` over a sharded batch the compiler gathers the
projections, and the result is that of one device, to the rounding of sums in another order.
"""

from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from simclr_jax.losses import decoupled, nt_xent_dense
from simclr_jax.losses.contract import Loss
from simclr_jax.losses.decoupled import dcl
from simclr_jax.losses.nt_xent_dense import nt_xent
from simclr_jax.losses.nt_xent_tiles import nt_xent_chunked
from simclr_jax.options import Option, number, one_of

# name: ({option of the group "loss", without the group: value}, mesh, B) -> Loss
LOSSES: dict[str, Callable[[Mapping[str, Any], Mesh, int], Loss]] = {
    "nt_xent": nt_xent_dense.build,
    "dcl": decoupled.build,
}

OPTIONS = (
    Option("loss.name", "nt_xent", one_of(*LOSSES), "the loss over all projections of the batch"),
    Option(
        "loss.temperature",
        0.1,
        number(1e-3, 1e3),
        "tau, divides the cosine similarities; 0.5 for CIFAR (appendix B.9)",
    ),
    Option(
        "loss.implementation",
        "auto",
        one_of("auto", "dense", "chunked"),
        '"dense": one matrix of similarities; "chunked": in tiles, for large batches; "auto": by size',
        resumable=True,
    ),
)

__all__ = ["LOSSES", "OPTIONS", "Loss", "dcl", "nt_xent", "nt_xent_chunked"]
