"""Losses over the projections of the whole batch. To add one, write its file and a row in `LOSSES`.

Each is written for the whole batch [2B, D]: under `jit` over a sharded batch the compiler gathers the
projections, and the result is the same as on one device, except for the rounding of sums in another order.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from simclr_jax.losses import pairwise, softmax
from simclr_jax.losses.contract import Loss
from simclr_jax.losses.softmax import dcl, nt_xent
from simclr_jax.losses.softmax_tiles import nt_xent_chunked
from simclr_jax.options import Option, flag, name_in, number, one_of, whole

# name: ({option of the group "loss", without the group: value}, mesh, B) -> Loss
LOSSES: dict[str, Callable[[Mapping[str, Any], Mesh, int], Loss]] = {
    "nt_xent": functools.partial(softmax.build, name="NT-Xent", positive_in_sum=True),
    "dcl": functools.partial(softmax.build, name="DCL", positive_in_sum=False),
    "nt_logistic": functools.partial(pairwise.build_nt_logistic, semihard=False),
    "nt_logistic_semihard": functools.partial(pairwise.build_nt_logistic, semihard=True),
    "margin": functools.partial(pairwise.build_margin, semihard=False),
    "margin_semihard": functools.partial(pairwise.build_margin, semihard=True),
    "supcon": pairwise.build_supcon,
}

OPTIONS = (
    Option(
        "loss.name",
        "nt_xent",
        name_in(LOSSES),
        "the loss, over all projections of the global batch",
    ),
    Option(
        "loss.temperature",
        0.1,
        number(1e-3, 1e3),
        "tau, which divides the similarities; 0.5 for CIFAR (appendix B.9)",
    ),
    Option(
        "loss.margin",
        0.8,
        number(0, 2),
        "m in the losses margin and margin_semihard; the paper tries 0, 0.4, 0.8 and 1.6 (B.10)",
    ),
    Option(
        "loss.over_negatives",
        "mean",
        one_of("mean", "sum"),
        "how nt_logistic and margin combine the terms of an anchor's negatives; the paper does not say",
    ),
    Option(
        "loss.normalize",
        True,
        flag(),
        "compare projections by their cosine; False: by their dot product (Table 5)",
    ),
    Option(
        "loss.negatives",
        "both_views",
        one_of("both_views", "other_view"),
        'which views are an anchor\'s negatives; "both_views": all 2B - 2 views of other images; '
        '"other_view": of these only the B - 1 of the other kind, second views for a first view and '
        "first views for a second (appendix B.10)",
    ),
    Option(
        "loss.memory",
        0,
        whole(0),
        "projections of earlier batches that serve as further negatives, a multiple of the batch, "
        "with nt_xent and dcl; 65536 in SimCLR v2; 0: none",
    ),
    Option(
        "loss.memory_decay",
        0.999,
        number(0, 1),
        "decay of the moving average of the weights, which makes the projections of loss.memory "
        "(SimCLR v2, section 2)",
    ),
    Option(
        "loss.implementation",
        "auto",
        one_of("auto", "dense", "chunked"),
        'how the loss is computed; "dense": one matrix of similarities; "chunked": in tiles, for '
        'large batches; "auto": whichever suits the size',
        resumable=True,
    ),
)

__all__ = ["LOSSES", "OPTIONS", "Loss", "count_negatives", "dcl", "nt_xent", "nt_xent_chunked"]


def count_negatives(images: int, negatives: str) -> int:
    """Returns how many negatives an anchor has in a batch of B images, by the option loss.negatives."""
    return 2 * images - 2 if negatives == "both_views" else images - 1
