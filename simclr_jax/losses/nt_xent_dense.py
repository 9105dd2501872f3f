"""NT-Xent, the normalised temperature-scaled cross-entropy (SimCLR paper, equation 1, Algorithm 1)."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from simclr_jax.losses.contract import (
    Loss,
    contrastive_metrics,
    implementation_of,
    positives,
    similarities,
)
from simclr_jax.losses.nt_xent_tiles import nt_xent_chunked


def build(options: Mapping[str, Any], mesh: Mesh, batch_size: int) -> Loss:
    """Returns NT-Xent, dense or in tiles.

    Args:
      options: "temperature" and "implementation".
      mesh: devices over which the rows of z are divided.
      batch_size: B, images of the global batch.
    """
    name = implementation_of(options["implementation"], batch_size, mesh)
    chosen = " for this size" if options["implementation"] == "auto" else ""
    loss = nt_xent
    if name == "chunked":
        loss = functools.partial(nt_xent_chunked, mesh=mesh if mesh.size > 1 else None)
    temperature = options["temperature"]
    return Loss(
        lambda z, labels: loss(z, temperature), f"NT-Xent, {name}{chosen}, tau {temperature:g}"
    )


def nt_xent(z, temperature):
    """Computes NT-Xent over all pairs of the batch.

    Args:
      z: projections [2B, D]; rows 2i and 2i + 1 are the two views of image i. Not normalised.
      temperature: tau, the divisor of the cosine similarities, above 0.

    Returns:
      loss, a float32 scalar: the mean over all 2B anchors of
        -log( exp(s(i, j) / tau) / sum over k != i of exp(s(i, k) / tau) ), j the partner of i;
      metrics, see `contract.contrastive_metrics`.
    """
    logits, is_partner = similarities(z, temperature)
    positive = positives(logits, is_partner)
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)
    return loss, contrastive_metrics(logits, positive)
