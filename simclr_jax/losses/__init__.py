"""Losses over the projections of the whole batch. To add one, write its file and a row in `LOSSES`.

Each is written for the whole batch [2B, D]: under `jit` over a sharded batch the compiler gathers the
projections, and the result is that of one device, to the rounding of sums in another order.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from simclr_jax.losses import decoupled, nt_xent_dense, pairwise
from simclr_jax.losses.contract import Loss
from simclr_jax.losses.decoupled import dcl
from simclr_jax.losses.nt_xent_dense import nt_xent
from simclr_jax.losses.nt_xent_tiles import nt_xent_chunked
from simclr_jax.options import Option, flag, name_in, number, one_of, whole

# name: ({option of the group "loss", without the group: value}, mesh, B) -> Loss
LOSSES: dict[str, Callable[[Mapping[str, Any], Mesh, int], Loss]] = {
    "nt_xent": nt_xent_dense.build,
    "dcl": decoupled.build,
    "nt_logistic": functools.partial(pairwise.build_nt_logistic, semihard=False),
    "nt_logistic_semihard": functools.partial(pairwise.build_nt_logistic, semihard=True),
    "margin": functools.partial(pairwise.build_margin, semihard=False),
    "margin_semihard": functools.partial(pairwise.build_margin, semihard=True),
    "supcon": pairwise.build_supcon,
}

OPTIONS = (
    Option("loss.name", "nt_xent", name_in(LOSSES), "the loss over all projections of the batch"),
    Option(
        "loss.temperature",
        0.1,
        number(1e-3, 1e3),
        "tau, divides the cosine similarities; 0.5 for CIFAR (appendix B.9)",
    ),
    Option(
        "loss.margin",
        0.8,
        number(0, 2),
        "m of the losses margin and margin_semihard; the paper tries 0, 0.4, 0.8, 1.6 (B.10)",
    ),
    Option(
        "loss.over_negatives",
        "mean",
        one_of("mean", "sum"),
        "of the terms of an anchor's negatives, in nt_logistic and margin; the paper does not say",
    ),
    Option(
        "loss.normalize",
        True,
        flag(),
        "compare z by their cosine; False: by their dot product (Table 5)",
    ),
    Option(
        "loss.negatives",
        "both_views",
        one_of("both_views", "other_view"),
        "an anchor's negatives: the 2B - 2 views of other images; or, of an anchor that is a first view, their B - 1 "
        "second views, and the other way round (appendix B.10)",
    ),
    Option(
        "loss.memory",
        0,
        whole(0),
        "negatives of earlier batches, a multiple of the batch; SimCLR v2: 65536; 0: none. For nt_xent and dcl",
    ),
    Option(
        "loss.memory_decay",
        0.999,
        number(0, 1),
        "of the moving average of the weights that projects them (SimCLR v2, section 2)",
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
