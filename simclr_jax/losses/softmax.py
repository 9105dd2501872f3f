"""Softmax losses over all pairs of the batch: NT-Xent and DCL.

NT-Xent is the normalised temperature-scaled cross-entropy (SimCLR paper, equation 1, Algorithm 1). DCL, decoupled
contrastive learning (Yeh et al. 2022, arXiv 2110.06848, equation 6), leaves the positive out of the denominator. An
anchor whose positive is already near then keeps its gradient, which helps most in small batches.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from simclr_jax.losses.contract import (
    MASKED,
    Loss,
    SoftmaxTerms,
    contrastive_metrics,
    described,
    implementation_of,
    only_other_view,
    positives,
    similarities,
)
from simclr_jax.losses.softmax_tiles import terms_in_tiles
from simclr_jax.losses.stored import Stored, log_sum_of


def build(
    options: Mapping[str, Any], mesh: Mesh, batch_size: int, *, name: str, positive_in_sum: bool
) -> Loss:
    """Returns a softmax loss, dense or in tiles.

    Args:
      options: "temperature", "implementation", "normalize", "negatives" and "memory".
      mesh: devices over which the rows of z are divided.
      batch_size: B, images of the global batch.
      name: the loss's name, for messages.
      positive_in_sum: see `dense_terms`.
    """
    implementation = implementation_of(options["implementation"], batch_size, mesh)
    terms: Callable = dense_terms
    if implementation == "chunked":
        terms = functools.partial(terms_in_tiles, mesh=mesh)
    temperature, normalized = options["temperature"], options["normalize"]
    how = {
        "normalized": normalized,
        "other_view": options["negatives"] == "other_view",
        "positive_in_sum": positive_in_sum,
    }

    def apply(z, labels, stored: Stored | None = None):
        del labels
        found = terms(z, temperature, **how)
        if stored is not None:  # negatives that the metrics never count
            log_normalizer = log_sum_of(
                stored, z, temperature, found.log_normalizer, normalized=normalized, mesh=mesh
            )
            found = found._replace(log_normalizer=log_normalizer)
        return found.loss()

    more = [f"tau {temperature:g}"]
    if options["memory"]:
        more.append(f"{options['memory']:,} negatives of earlier batches")
    return Loss(apply, described(name, implementation, options, *more), takes_stored=True)


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
      ValueError: the number of rows is odd, or 0; or tau is not above 0.
    """
    return dense_terms(z, temperature, normalized=normalized, other_view=other_view).loss()


def dcl(z, temperature, *, normalized: bool = True, other_view: bool = False):
    """Computes DCL over all pairs of the batch. It may go below zero.

    Args:
      z, temperature, normalized, other_view: see `nt_xent`.

    Returns:
      loss, a float32 scalar: the mean over all 2B anchors of
        -s(i, j) / tau + log( sum over k != i, j of exp(s(i, k) / tau) ), j the partner of i;
      metrics, see `contract.contrastive_metrics`: over all 2B - 1 candidates, as for NT-Xent.

    Raises:
      ValueError: the number of rows is odd, or 0; or tau is not above 0.
    """
    terms = dense_terms(
        z, temperature, normalized=normalized, other_view=other_view, positive_in_sum=False
    )
    return terms.loss()


def dense_terms(
    z,
    temperature,
    *,
    normalized: bool = True,
    other_view: bool = False,
    positive_in_sum: bool = True,
) -> SoftmaxTerms:
    """Computes the terms of a softmax loss from the matrix of all similarities; `terms_in_tiles` does without it.

    Args:
      z, temperature, normalized, other_view: see `nt_xent`.
      positive_in_sum: the normaliser counts the positive (NT-Xent), or only the negatives (DCL).
    """
    logits, is_partner = similarities(z, temperature, normalized)
    positive = positives(logits, is_partner)
    candidates = only_other_view(logits) if other_view else logits
    if not positive_in_sum:
        candidates = jnp.where(is_partner, MASKED, candidates)
    log_normalizer = jax.nn.logsumexp(candidates, axis=1)
    return SoftmaxTerms(log_normalizer, positive, contrastive_metrics(logits, positive))
