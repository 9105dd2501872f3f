"""DCL, decoupled contrastive learning (Yeh et al. 2022, arXiv 2110.06848, equation 6).

NT-Xent with the positive left out of the denominator. An anchor whose positive is already near then
keeps its gradient, which helps most in small batches. The loss may go below zero.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from simclr_jax.losses.contract import (
    MASKED,
    Loss,
    SoftmaxTerms,
    contrastive_metrics,
    only_other_view,
    positives,
    similarities,
)
from simclr_jax.losses.nt_xent_tiles import build_softmax


def build(options: Mapping[str, Any], mesh: Mesh, batch_size: int) -> Loss:
    """Returns DCL, dense or in tiles. The arguments are those of `nt_xent_dense.build`."""
    return build_softmax("DCL", terms, (options, mesh, batch_size), positive_in_sum=False)


def dcl(z, temperature, *, normalized: bool = True, other_view: bool = False):
    """Computes DCL over all pairs of the batch; in tiles: `nt_xent_tiles.terms_in_tiles`.

    Args:
      z: projections [2B, D]; rows 2i and 2i + 1 are the two views of image i. Not normalised.
      temperature: tau, the divisor of the cosine similarities, above 0.
      normalized, other_view: see `nt_xent`.

    Returns:
      loss, a float32 scalar: the mean over all 2B anchors of
        -s(i, j) / tau + log( sum over k != i, j of exp(s(i, k) / tau) ), j the partner of i;
      metrics, see `contract.contrastive_metrics`: over all 2B - 1 candidates, as for NT-Xent.
    """
    return terms(z, temperature, normalized=normalized, other_view=other_view).loss()


def terms(z, temperature, *, normalized: bool = True, other_view: bool = False) -> SoftmaxTerms:
    """Computes the terms of `dcl`."""
    logits, is_partner = similarities(z, temperature, normalized)
    positive = positives(logits, is_partner)
    candidates = only_other_view(logits) if other_view else logits
    log_normalizer = jax.nn.logsumexp(jnp.where(is_partner, MASKED, candidates), axis=1)
    return SoftmaxTerms(log_normalizer, positive, contrastive_metrics(logits, positive))
