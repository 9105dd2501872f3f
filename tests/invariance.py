"""The checker that one step computes the same on any mesh, for the tests that hold steps against it.

Every array must agree to 1e-5 of its largest entry: float32 rounds at 6e-8, and sums of some thousand
terms in another order differ by some 1e-6 of the largest term.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from conftest import random_images

from simclr_jax import assemble
from simclr_jax.mesh import make_mesh, to_global

CLASSES = 3
TOLERANCE = 1e-5  # measured: 1.5e-6


def batch(images, size=12):
    """Views that resemble each other, so that losses and their gradients are of some size."""
    rng = np.random.default_rng(1)
    first = random_images(images, size, size)
    second = np.clip(first + rng.normal(scale=30, size=first.shape), 0, 255).astype(np.uint8)
    label = (np.arange(images) % CLASSES).astype(np.int32)
    return {"views": np.stack([first, second], axis=1), "label": label}


def _keep_gradient():
    """An optimizer's first link that keeps the gradient it is given."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda gradient, _, params=None: (gradient, gradient),
    )


def job_with_gradient(config, devices, monkeypatch):
    """(mesh, job) of pretraining, with the gradient of each step kept in front of the optimizer's state."""
    mesh = make_mesh(devices, config.mesh.fsdp)
    original = assemble.pretraining_optimizer

    def with_gradient_kept(*args):
        optimizer, schedule = original(*args)
        return optax.chain(_keep_gradient(), optimizer), schedule

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "pretraining_optimizer", with_gradient_kept)
        return mesh, assemble.pretraining_job(config, assemble.plan_of(config, 48), CLASSES, mesh)


def step_of(config, devices, start, monkeypatch):
    """All that one step from the state `start` computes: {"group": tree of numpy arrays}."""
    job = job_with_gradient(config, devices, monkeypatch)
    return step_on(job, start, batch(config.data.batch_size, config.data.image_size))


def step_on(mesh_and_job, start, views):
    """The same, of a job that is there."""
    mesh, job = mesh_and_job
    state = jax.device_put(start, jax.tree.map(lambda x: x.sharding, job.abstract_state))
    state, metrics = job.step(state, to_global(mesh, views))
    gradient, momentum = state.opt_state
    return jax.device_get(
        {
            "metrics": metrics,
            "gradient": gradient,
            "momentum": momentum,
            "batch_stats": state.batch_stats,
            "params": state.params,
        }
    )


def check(found, expected, tolerance=TOLERANCE):
    """Raises an AssertionError that names the arrays that differ, each with by how much."""
    structure: Any = jax.tree.structure(found)
    assert structure == jax.tree.structure(expected)
    differ = {}
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        name = jax.tree_util.keystr(path)
        # What passes no gradient on leaves nothing but rounding: a block whose last scale is zero;
        # the bias of an attention's keys, which adds one number to all scores of a query.
        least = 1e-3 if name.endswith("['attention']['key']['bias']") else 1e-6
        difference = np.abs(x - y).max() / max(np.abs(y).max(), least)
        if not difference <= tolerance:
            differ[name] = float(difference)
    if differ:
        raise AssertionError("; ".join(f"{name} by {by:.1e}" for name, by in differ.items()))


def for_one_step(config):
    """The configuration with views that are given, and a first step of LARS that moves."""
    config.data.placement = "host"
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.weight_decay = 1e-4
    config.loss.temperature = 0.2
    return config


def first_state(config, monkeypatch):
    """The state before the first step, as numpy arrays."""
    _, job = job_with_gradient(config, jax.devices()[:1], monkeypatch)
    return jax.device_get(job.init())
