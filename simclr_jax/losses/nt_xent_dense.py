"""NT-Xent, the normalised temperature-scaled cross-entropy (SimCLR paper, equation 1, Algorithm 1)."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from simclr_jax.losses.contract import (
    Loss,
    SoftmaxTerms,
    contrastive_metrics,
    only_other_view,
    positives,
    similarities,
)
from simclr_jax.losses.nt_xent_tiles import build_softmax


def build(options: Mapping[str, Any], mesh: Mesh, batch_size: int) -> Loss:
    """Returns NT-Xent, dense or in tiles.

    Args:
      options: "temperature", "implementation", "normalize", "negatives" and "memory".
      mesh: devices over which the rows of z are divided.
      batch_size: B, images of the global batch.
    """
    return build_softmax("NT-Xent", terms, (options, mesh, batch_size), positive_in_sum=True)


def nt_xent(z, temperature, *, normalized: bool = True, other_view: bool = False):
    """Computes NT-Xent over all pairs of the batch.

    Args:
      z: projections [2B, D]; rows 2i and 2i + 1 are the two views of image i. Not normalised.
      temperature: tau, the divisor of the cosine similarities, above 0.
      normalized: see `similarities`.
      other_view: the candidates k are only the B second views if i is a first view, and vice versa.

    Returns:
      loss, a float32 scalar: the mean over all 2B anchors of
        -log( exp(s(i, j) / tau) / sum over k != i of exp(s(i, k) / tau) ), j the partner of i;
      metrics, see `contract.contrastive_metrics`.

    Raises:
      ValueError: the number of rows is odd, or 0.
    """
    return terms(z, temperature, normalized=normalized, other_view=other_view).loss()


def terms(z, temperature, *, normalized: bool = True, other_view: bool = False) -> SoftmaxTerms:
    """Computes the terms of `nt_xent`."""
    logits, is_partner = similarities(z, temperature, normalized)
    positive = positives(logits, is_partner)
    candidates = only_other_view(logits) if other_view else logits
    log_normalizer = jax.nn.logsumexp(candidates, axis=1)
    return SoftmaxTerms(log_normalizer, positive, contrastive_metrics(logits, positive))
