"""One training step: a pure function of the state and the global batch."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from simclr_jax.training.gradients import (
    BatchLoss,
    Objective,
    cached_gradient,
    in_microbatches,
    whole_gradient,
)
from simclr_jax.training.memory import Memory, MemoryRule, advance, stored_in
from simclr_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
Step = Callable[[TrainState, Any], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class UpdateRule:
    """How a gradient becomes the next state.

    Attributes:
      optimizer: makes updates of gradients.
      schedule: step -> the learning rate that the optimizer follows, for the metrics.
      microbatches: above 1, the gradient is computed by `gradients.cached_gradient`.
      skip_not_finite: a step whose loss, gradient, update or running statistics are not finite changes nothing but its
        number, which the learning rate follows.
      more: (params, gradients) -> metrics of the update; None: none.
      memory: how the memory of negatives goes on; None: the state has none.
    """

    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    microbatches: int = 1
    skip_not_finite: bool = False
    more: Callable[[Any, Any], Metrics] | None = None
    memory: MemoryRule | None = None


def _as_it_is(x: Any) -> Any:
    return x


def make_step(
    objective: Objective,
    loss: BatchLoss,
    rule: UpdateRule,
    fetch: Callable[[Any], Any] = _as_it_is,
    gather: Callable[[Any], Any] = _as_it_is,
) -> Step:
    """Makes step(state, batch) -> (state, metrics), to be jitted over any mesh.

    Nothing in the step knows about devices: over a sharded batch, BatchNorm's means and the loss's
    similarities are still the whole batch's, and the compiler adds the communication.

    Args:
      objective: embeds a batch, or a microbatch.
      loss: computes the loss from all embeddings of the batch: `losses.Loss.apply`, or `objectives.no_loss`.
      rule: how the gradient becomes an update.
      fetch: turns the global batch into one whose every array is [B, ...], "label" among them.
      gather: makes a sharded tree like the parameters whole on every device.

    Returns:
      the step. Its metrics are float32 scalars: loss, those of the loss and of the objective,
      grad_norm, update_norm, learning_rate, those of `rule.more` and, with `rule.skip_not_finite`, skipped_steps (0 or 1).
    """
    gradient: Callable = whole_gradient
    if rule.microbatches > 1:
        gradient = functools.partial(cached_gradient, microbatches=rule.microbatches)

    def step(state: TrainState, batch) -> tuple[TrainState, Metrics]:
        images = fetch(batch)
        found = gradient(
            objective,
            _beside(loss, state.memory),
            gather(state.params),
            state.batch_stats,
            images,
        )
        # Gather the gradients before the optimizer takes its shard of them. Otherwise the TPU compiler
        # computes the gradients of divided kernels in windows, with three times the memory.
        grads = gather(found.grads)
        updates, opt_state = rule.optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": found.loss} | found.metrics
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["update_norm"] = optax.tree.norm(updates)
        if rule.more is not None:
            metrics |= rule.more(state.params, grads)
        metrics["learning_rate"] = jnp.asarray(rule.schedule(state.step), jnp.float32)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=state.batch_stats | found.batch_stats,
            opt_state=opt_state,
        )
        if rule.memory is not None and state.memory is not None:
            project = functools.partial(
                rule.memory.project, gather(state.memory.params), state.batch_stats
            )
            keys = in_microbatches(project, images, rule.microbatches)
            new_memory = advance(state.memory, new_state.params, keys, rule.memory.decay)
            new_state = dataclasses.replace(new_state, memory=new_memory)
        if rule.skip_not_finite:
            numbers = (metrics["loss"], metrics["grad_norm"], metrics["update_norm"])
            finite = all_finite((numbers, found.batch_stats))
            metrics["skipped_steps"] = 1.0 - finite
            kept = dataclasses.replace(
                state,
                step=new_state.step,
                opt_state=_with_schedule(state.opt_state, new_state.opt_state),
            )
            new_state = jax.tree.map(functools.partial(jnp.where, finite), new_state, kept)
        return new_state, metrics

    return step


def all_finite(tree: Any) -> jax.Array:
    """Returns whether all numbers of a tree of arrays are finite. One that is not stays in running statistics for ever."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _with_schedule(kept: optax.OptState, stepped: optax.OptState) -> optax.OptState:
    """Returns the state `kept` of an optimizer, with the step number of its schedule from the state `stepped`."""

    def is_schedule(x: Any) -> bool:
        return isinstance(x, optax.ScaleByScheduleState)

    return jax.tree.map(lambda k, s: s if is_schedule(k) else k, kept, stepped, is_leaf=is_schedule)


def _beside(loss: BatchLoss, memory: Memory | None) -> BatchLoss:
    """Returns the loss with the negatives of a memory beside those of the batch."""
    if memory is None:
        return loss
    stored = stored_in(memory)
    return lambda z, labels: loss(z, labels, stored)
