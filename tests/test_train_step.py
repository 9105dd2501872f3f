"""What one step and its parts may and may not touch; test_device_invariance.py has the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images

from simclr_jax import config as config_lib
from simclr_jax.mesh import make_mesh, to_global
from simclr_jax.train import make_job
from simclr_jax.train_step import to_float

CLASSES = 3


def batch(count):
    views = np.stack([random_images(count, 12, 12), random_images(count + 1, 12, 12)[1:]], axis=1)
    return {"views": views, "label": (np.arange(count) % CLASSES).astype(np.int32)}


def steps(config, devices, count=3):
    """States and metrics after each of `count` steps on the same batch."""
    mesh = make_mesh(devices)
    job = make_job(config, config_lib.plan(config, 48), CLASSES, mesh)
    state = job.init(jax.random.key(0))
    images = to_global(mesh, batch(config.data.batch_size))
    seen = [(jax.device_get(state), None)]
    for _ in range(count):
        state, metrics = job.step(state, images)
        seen.append((jax.device_get(state), jax.device_get(metrics)))
    return seen


@pytest.fixture
def tiny(tiny):
    """Its steps take batches of views that are made here."""
    tiny.data.placement = "host"
    return tiny


@pytest.fixture
def one_device(tiny):
    tiny.optimizer.warmup_epochs = 0.0
    return steps(tiny, jax.devices()[:1])


def test_a_step_changes_every_parameter_and_statistic(one_device):
    (before, _), *_, (after, metrics) = one_device
    assert after.step == 3
    # Behind a block's last BatchNorm, whose scale starts at zero, the first step sees no gradient.
    for path, changed in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda x, y: not np.array_equal(x, y), before.params, after.params)
    ):
        assert changed, jax.tree_util.keystr(path)
    for path, changed in jax.tree_util.tree_leaves_with_path(
        jax.tree.map(lambda x, y: not np.array_equal(x, y), before.batch_stats, after.batch_stats)
    ):
        assert changed, jax.tree_util.keystr(path)
    assert set(metrics) == {
        "loss",
        "contrastive_top1",
        "contrastive_top5",
        "contrastive_entropy",
        "classifier_loss",
        "classifier_accuracy",
        "grad_norm",
        "learning_rate",
    }


def test_the_classifier_does_not_touch_the_encoder(tiny, one_device):
    """Without a classifier the encoder and the head go the same way."""
    tiny.train.online_classifier = False
    for (state, metrics), (expected, expected_metrics) in zip(
        steps(tiny, jax.devices()[:1])[1:], one_device[1:], strict=True
    ):
        assert "classifier" not in state.params
        assert metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=1e-6)
        for name in ("encoder", "head"):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
                state.params[name],
                expected.params[name],
            )


def test_losses_fall_on_a_fixed_batch(tiny):
    tiny.optimizer.name, tiny.optimizer.learning_rate = "adamw", 2e-3
    tiny.optimizer.scaling, tiny.optimizer.warmup_epochs = "none", 0.0
    tiny.train.steps = 30
    seen = steps(tiny, jax.devices()[:1], count=30)
    first, last = seen[1][1], seen[-1][1]
    assert last["loss"] < 0.8 * first["loss"]
    assert last["classifier_loss"] < first["classifier_loss"]


def test_a_step_needs_no_transfer_and_no_second_compilation(tiny):
    mesh = make_mesh()
    job = make_job(tiny, config_lib.plan(tiny, 48), CLASSES, mesh)
    state = job.init(jax.random.key(0))
    images = to_global(mesh, batch(16))
    state, metrics = job.step(state, images)
    with jax.transfer_guard("disallow"):
        for _ in range(2):
            state, metrics = job.step(state, images)
    jax.block_until_ready(metrics)
    assert job.step._cache_size() == 1


def test_the_state_is_donated(tiny):
    mesh = make_mesh()
    job = make_job(tiny, config_lib.plan(tiny, 48), CLASSES, mesh)
    state = job.init(jax.random.key(0))
    old = jax.tree.leaves(state.params)
    job.step(state, to_global(mesh, batch(16)))
    assert all(x.is_deleted() for x in old)


def test_bfloat16_steps_stay_close_and_keep_a_float32_state(tiny, one_device):
    tiny.model.dtype = "bfloat16"
    seen = steps(tiny, jax.devices()[:1])
    state, metrics = seen[-1]
    kinds = {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats, state.opt_state))}
    assert kinds <= {np.dtype("float32"), np.dtype("int32")}
    assert metrics["loss"] == pytest.approx(one_device[-1][1]["loss"], rel=0.02)


def test_images_as_bytes_and_as_floats_are_the_same():
    images = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_allclose(to_float(images), np.arange(256) / 255, rtol=1e-6)
    np.testing.assert_array_equal(to_float(to_float(images)), to_float(images))
