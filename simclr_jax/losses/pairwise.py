"""Losses beside NT-Xent: the paper's logistic and triplet losses (Table 2), and SupCon.

Every view is an anchor, and the loss is the mean over all 2B anchors. The paper's
two average or sum the terms of an anchor's negatives (`loss.over_negatives`); the logistic loss adds the
positive's term. Semi-hard mining (Schroff et al. 2015; paper, section 5.1) keeps one negative
an anchor: the nearest that is farther than the positive, for the triplet loss by less than the margin.
The choice has no gradient. Where no negative qualifies, the triplet loss of the anchor is 0, and the
logistic loss is its positive term.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from simclr_jax.losses.by_rows import CHUNK, Candidates, RowLoss, Rows, over_rows
from simclr_jax.losses.contract import MASKED, Loss, described, implementation_of


def nt_logistic(rows: Rows, *, temperature: float, semihard: bool, total: bool) -> jax.Array:
    """Computes NT-Logistic of each anchor (Table 2):
    -log sigmoid(s+ / tau) and, over its negatives, the mean of -log sigmoid(-s- / tau).

    Args:
      rows: similarities.
      temperature: tau.
      semihard: only the nearest negative that is farther than the positive.
      total: the sum over the negatives instead of their mean.

    Returns:
      float32 [n].
    """
    negatives = rows.is_candidate & ~rows.is_partner
    if semihard:
        negatives = nearest(rows, negatives & (rows.similarity < rows.positive))
    terms = jax.nn.softplus(rows.similarity / temperature)
    of_positive = jax.nn.softplus(-rows.positive[:, 0] / temperature)
    return of_positive + over_negatives(terms, negatives, total)


def margin(rows: Rows, *, margin: float, semihard: bool, total: bool) -> jax.Array:
    """Computes the margin triplet loss of each anchor (Table 2): over its negatives, the mean of
    max(s- - s+ + m, 0).

    Args:
      rows: similarities.
      margin: m.
      semihard: only the nearest negative that is farther than the positive, by less than m.
      total: the sum over the negatives instead of their mean.

    Returns:
      float32 [n].
    """
    negatives = rows.is_candidate & ~rows.is_partner
    if semihard:
        farther = rows.similarity < rows.positive
        negatives = nearest(rows, negatives & farther & (rows.similarity > rows.positive - margin))
    terms = jax.nn.relu(rows.similarity - rows.positive + margin)
    return over_negatives(terms, negatives, total)


def supcon(rows: Rows, *, temperature: float) -> jax.Array:
    """Computes the supervised contrastive loss of each anchor (Khosla et al. 2020, arXiv 2004.11362,
    equation 2, "L_out"): the mean over its positives of NT-Xent's term. The positives are its partner and all
    candidates of its label; an image without a label has its partner alone.

    Returns:
      float32 [n].
    """
    logits = jnp.where(rows.is_candidate, rows.similarity / temperature, MASKED)
    log_p = jax.nn.log_softmax(logits, axis=1)
    positives = rows.is_partner | rows.same_label
    return -jnp.sum(jnp.where(positives, log_p, 0.0), axis=1) / jnp.sum(positives, axis=1)


def nearest(rows: Rows, among) -> jax.Array:
    """Marks the most similar of the columns `among`, bool [n, 2B], in each row: one of them if several are equally
    similar, none if there are no such columns.
    """
    similarity = jnp.where(among, jax.lax.stop_gradient(rows.similarity), MASKED)
    column = jax.lax.broadcasted_iota(jnp.int32, similarity.shape, 1)
    return (column == jnp.argmax(similarity, axis=1)[:, None]) & among


def over_negatives(terms, negatives, total: bool) -> jax.Array:
    """Returns [n], the mean of terms [n, 2B] over the negatives, or their sum; 0 where there are none."""
    found = jnp.sum(jnp.where(negatives, terms, 0.0), axis=1)
    return found if total else found / jnp.maximum(jnp.sum(negatives, axis=1), 1)


def build_nt_logistic(
    options: Mapping[str, Any], mesh: Mesh, batch_size: int, semihard: bool
) -> Loss:
    """Returns NT-Logistic. The arguments are those of `softmax.build`; `semihard`: keep one negative an
    anchor, see the module.
    """
    temperature = options["temperature"]
    total = options["over_negatives"] == "sum"
    loss = functools.partial(nt_logistic, temperature=temperature, semihard=semihard, total=total)
    about = f"tau {temperature:g}", _mining(semihard, total)
    return _built("NT-Logistic", loss, about, (options, mesh, batch_size))


def build_margin(options: Mapping[str, Any], mesh: Mesh, batch_size: int, semihard: bool) -> Loss:
    """Returns the triplet loss. The arguments are those of `softmax.build`; `semihard`: keep one negative
    an anchor, see the module.
    """
    total = options["over_negatives"] == "sum"
    loss = functools.partial(margin, margin=options["margin"], semihard=semihard, total=total)
    about = f"margin {options['margin']:g}", _mining(semihard, total)
    return _built("margin triplet", loss, about, (options, mesh, batch_size))


def build_supcon(options: Mapping[str, Any], mesh: Mesh, batch_size: int) -> Loss:
    """Returns SupCon, which needs labels. The arguments are those of `softmax.build`."""
    temperature = options["temperature"]
    loss = functools.partial(supcon, temperature=temperature)
    found = _built("SupCon", loss, (f"tau {temperature:g}",), (options, mesh, batch_size))
    return found._replace(needs_labels=True)


def _mining(semihard: bool, total: bool) -> str:
    return "semi-hard negatives" if semihard else f"{'sum' if total else 'mean'} over negatives"


def _built(name: str, loss: RowLoss, about: tuple[str, ...], of: tuple) -> Loss:
    options, mesh, batch_size = of
    implementation = implementation_of(options["implementation"], batch_size, mesh)
    candidates = Candidates(
        options["normalize"], options["negatives"] == "other_view", options["temperature"]
    )
    how: dict[str, Any] = {}
    if implementation == "chunked":
        how = {"mesh": mesh, "chunk": CHUNK}
    apply: Callable = functools.partial(over_rows, loss=loss, candidates=candidates, **how)
    return Loss(apply, described(name, implementation, options, *about))
