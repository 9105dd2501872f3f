"""Measures how a batch's projections are spread, and gives NT-Xent's value at best and by chance."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from simclr_jax.losses.contract import Loss, normalize


def with_health(loss: Loss) -> Loss:
    """Returns the loss with the metrics of `spread_of` added to its own."""

    def apply(z: Any, labels: Any, *stored: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        value, metrics = loss.apply(z, labels, *stored)
        return value, metrics | spread_of(z)

    return loss._replace(apply=apply)


def spread_of(z) -> dict[str, jax.Array]:
    """Computes how the normalised projections lie on the sphere. No gradient.

    Args:
      z: projections [2B, D]; rows 2i and 2i + 1 are the two views of image i. Not normalised.

    Returns:
      float32 scalars:
        alignment: mean |z_i - z_j|^2 of partners (Wang and Isola 2020, arXiv 2005.10242), 0 to 4;
        z_std: the standard deviation over the batch, mean over the dimensions: 1 / sqrt(D) where the z are
          spread evenly, 0 where all are one point (Chen and He 2021, arXiv 2011.10566, section 4.1).
    """
    z = normalize(jax.lax.stop_gradient(z))
    pairs = z.reshape(-1, 2, z.shape[1])
    alignment = jnp.mean(jnp.sum((pairs[:, 0] - pairs[:, 1]) ** 2, axis=1))
    return {"alignment": alignment, "z_std": jnp.mean(jnp.std(z, axis=0))}


def chance(images: int) -> float:
    """Returns NT-Xent of a batch of B `images` if all similarities are equal: ln(2B - 1), nats."""
    return math.log(2 * images - 1)


def lower_bound(images: int, temperature: float) -> float:
    """Returns a lower bound of NT-Xent over cosines and both views, for B `images` (2 or more), nats.

    The bound is ln(1 + (2B - 2) exp(-(1 + 1 / (B - 1)) / tau)). It follows from Jensen's inequality over an anchor's
    negatives, and because the norm of the sum of all z is at least 0. A simplex with partners on one corner
    attains it.
    """
    margin = (1 + 1 / (images - 1)) / temperature
    return math.log1p((2 * images - 2) * math.exp(-margin))
