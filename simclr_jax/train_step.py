"""One step of SimCLR: a pure function of the state and the global batch."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from simclr_jax.gradients import Embedding, cached_gradient, whole_gradient
from simclr_jax.losses import cross_entropy, nt_xent
from simclr_jax.train_state import Networks, TrainState


def to_float(images):
    """uint8 images to float32 in [0, 1]; float images pass. Not standardised further: the published
    code feeds [0, 1], and BatchNorm follows.
    """
    return images.astype(jnp.float32) / 255.0 if images.dtype == jnp.uint8 else images


def make_train_step(
    networks: Networks,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    temperature: float,
    contrastive_loss: Callable = nt_xent,
    microbatches: int = 1,
    gather: Callable = lambda params: params,
    skip_not_finite: bool = False,
    fetch: Callable = lambda batch: batch,
    make_views: Callable = lambda batch: to_float(batch["views"]),
) -> Callable:
    """Makes step(state, batch) -> (state, metrics), to be jitted over any mesh.

    The batch is {"views": [B, 2, H, W, 3] uint8 or float in [0, 1], "label": int [B]}, or whatever
    `fetch` and `make_views` take. Nothing in the step knows about devices: over a sharded batch, BatchNorm's means and the loss's
    similarities are still the whole batch's, and the compiler adds the communication.

    Args:
      networks: f, g and the online classifier.
      optimizer, schedule: the optimizer, and the learning rate it follows, for the metrics.
      temperature: tau.
      contrastive_loss: `losses.nt_xent` or one of its contract.
      microbatches: above 1, the gradient is computed by `gradients.cached_gradient`. BatchNorm
        then takes its statistics over a microbatch, and the running statistics follow their mean.
      skip_not_finite: a step whose loss or gradient is not finite changes nothing but its number.
      fetch: the batch to one whose every array is [B, ...], "label" among them.
      make_views: what `fetch` gives, or a microbatch of it, to float views [b, 2, H, W, 3].
      gather: makes a sharded tree like the parameters whole on every device.

    Metrics are float32 scalars: loss (NT-Xent), those of the loss, grad_norm, learning_rate, and,
    with a classifier, classifier_loss and classifier_accuracy (training views, all of the batch);
    with `skip_not_finite`, skipped_steps, 0 or 1.
    """

    def embed(batch_stats, params, batch) -> Embedding:
        views = make_views(batch)
        # [B, 2, ...] -> [2B, ...] with partners adjacent: a reshape, local on every device, where
        # stacking view 0 on view 1 would move half the images between devices.
        x = views.reshape(-1, *views.shape[2:])
        h, encoder_stats = networks.encoder.apply(
            {"params": params["encoder"], "batch_stats": batch_stats["encoder"]},
            x,
            train=True,
            mutable=["batch_stats"],
        )
        outputs, head_stats = networks.head.apply(
            {"params": params["head"], "batch_stats": batch_stats["head"]},
            h,
            train=True,
            mutable=["batch_stats"],
        )
        batch_stats = {
            "encoder": encoder_stats["batch_stats"],
            "head": head_stats.get("batch_stats", {}),
        }
        if networks.classifier is None:
            return Embedding(outputs[-1], jnp.zeros(()), ({}, batch_stats))
        # A probe that trains along: no gradient of it reaches the encoder.
        logits = networks.classifier.apply(
            {"params": params["classifier"]}, jax.lax.stop_gradient(h)
        )
        classifier_loss, accuracy = cross_entropy(logits, jnp.repeat(batch["label"], 2))
        metrics = {"classifier_loss": classifier_loss, "classifier_accuracy": accuracy}
        return Embedding(outputs[-1], classifier_loss, (metrics, batch_stats))

    gradient = (
        whole_gradient
        if microbatches == 1
        else functools.partial(cached_gradient, microbatches=microbatches)
    )

    def step(state: TrainState, batch) -> tuple[TrainState, dict[str, jax.Array]]:
        grads, (loss, metrics, (classifier_metrics, batch_stats)) = gradient(
            functools.partial(embed, state.batch_stats),
            lambda z: contrastive_loss(z, temperature),
            gather(state.params),
            fetch(batch),
        )
        # Whole before the optimizer takes its shard of them: left to itself, the TPU compiler
        # computes the gradients of divided kernels in windows, with three times the memory.
        grads = gather(grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {"loss": loss} | metrics | classifier_metrics
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = jnp.asarray(schedule(state.step), jnp.float32)
        new_state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=batch_stats,
            opt_state=opt_state,
        )
        if skip_not_finite:
            finite = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            metrics["skipped_steps"] = 1.0 - finite
            kept = dataclasses.replace(state, step=new_state.step)
            new_state = jax.tree.map(functools.partial(jnp.where, finite), new_state, kept)
        return new_state, metrics

    return step
