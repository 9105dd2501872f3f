"""One step gives the same numbers on any mesh, and the checker that says so rejects broken steps.

Everything is compared with the same step on one device, and the loss there with Algorithm 1 of the
paper in float64. The ViT of `tiny` has BatchNorm in its projection head; the ResNet has it throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RESNET
from invariance import (
    CLASSES,
    TOLERANCE,
    batch,
    check,
    first_state,
    for_one_step,
    job_with_gradient,
    step_of,
)
from test_losses import algorithm_1

from simclr_jax import assemble, config
from simclr_jax.losses import Loss, nt_xent
from simclr_jax.losses.contract import normalize
from simclr_jax.mesh import make_mesh


@pytest.fixture
def small(tiny):
    return for_one_step(tiny)


@pytest.fixture
def resnet(small):
    config.set_options(small, RESNET)
    return small


@pytest.fixture(scope="module")
def once():
    """What the first test that needs it computes for all: {name: value}."""
    return {}


def cached(once, name, compute):
    if name not in once:
        once[name] = compute()
    return once[name]


@pytest.fixture
def start(small, once, monkeypatch):
    """The initial state."""
    return cached(once, "start", lambda: first_state(small, monkeypatch))


@pytest.fixture
def expected(small, start, once, monkeypatch):
    """The step on one device."""
    return cached(once, "step", lambda: step_of(small, jax.devices()[:1], start, monkeypatch))


def test_the_initial_state_is_equal_on_any_mesh(small, start, monkeypatch):
    small.mesh.fsdp = 4
    _, job = job_with_gradient(small, jax.devices(), monkeypatch)
    state = job.init()
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), start)
    # A quarter of each kernel and of its momentum lies on a device.
    kernel = state.params["encoder"]["patches"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_the_loss_is_algorithm_1_in_float64(small, start, expected):
    networks = assemble.networks(small, CLASSES, make_mesh(jax.devices()[:1]))
    views = batch(small.data.batch_size)["views"].astype(np.float32) / 255

    def apply(part, x):
        variables = {"params": start.params[part], "batch_stats": start.batch_stats[part]}
        network = getattr(networks, part)
        return network.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    z = apply("head", apply("encoder", views.reshape(-1, 12, 12, 3)))[-1]
    loss, top1, top5, entropy = algorithm_1(z, small.loss.temperature)
    metrics = expected["metrics"]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["contrastive_top1"], top1)
    np.testing.assert_allclose(metrics["contrastive_top5"], top5)
    np.testing.assert_allclose(metrics["contrastive_entropy"], entropy, rtol=1e-5)


@pytest.mark.parametrize(("devices", "fsdp"), [(2, 1), (4, 1), (8, 1), (4, 2), (8, 2)])
def test_a_step_is_equal_on_any_mesh(small, start, expected, devices, fsdp, monkeypatch):
    small.mesh.fsdp = fsdp
    check(step_of(small, jax.devices()[:devices], start, monkeypatch), expected)


@pytest.mark.parametrize(
    ("devices", "fsdp"), [(8, 2), *[pytest.param(n, 1, marks=pytest.mark.slow) for n in (2, 4, 8)]]
)
def test_a_step_of_a_resnet_is_equal_on_any_mesh(resnet, once, devices, fsdp, monkeypatch):
    begun = cached(once, "resnet start", lambda: first_state(resnet, monkeypatch))
    one = cached(
        once, "resnet step", lambda: step_of(resnet, jax.devices()[:1], begun, monkeypatch)
    )
    resnet.mesh.fsdp = fsdp
    check(step_of(resnet, jax.devices()[:devices], begun, monkeypatch), one, TOLERANCE)


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 2), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_the_loss_in_tiles_and_blocks_computed_again_give_the_same_step(
    small, start, expected, devices, fsdp, monkeypatch
):
    small.mesh.fsdp = fsdp
    small.loss.implementation = "chunked"
    small.model.remat = True
    check(step_of(small, jax.devices()[:devices], start, monkeypatch), expected)


def test_groups_of_batchnorm_do_not_depend_on_the_devices(small, start, monkeypatch):
    """Groups of 4 images on 8 devices, with 2 images each, span two devices."""
    small.model.norm_group = -1  # per device, so 4 images on four devices
    on_four = step_of(small, jax.devices()[:4], start, monkeypatch)
    small.model.norm_group = 4
    on_eight = step_of(small, jax.devices(), start, monkeypatch)
    check(on_eight, on_four)


def test_microbatches_give_the_same_step_on_any_mesh(small, start, monkeypatch):
    small.train.microbatches = 2
    one = step_of(small, jax.devices()[:1], start, monkeypatch)
    small.mesh.fsdp = 2
    check(step_of(small, jax.devices(), start, monkeypatch), one)


def gradient_cut_at_the_gather(z, temperature):
    """Every device's own anchors have a gradient, the gathered candidates have none."""
    z = normalize(z)
    logits = jnp.where(jnp.eye(len(z)), -1e9, z @ jax.lax.stop_gradient(z).T / temperature)
    return from_logits(logits, jnp.arange(len(z)) ^ 1)


def positives_off_by_one(z, temperature):
    z = normalize(z)
    logits = jnp.where(jnp.eye(len(z)), -1e9, z @ z.T / temperature)
    return from_logits(logits, ((jnp.arange(len(z)) ^ 1) + 1) % len(z))


def self_not_masked(z, temperature):
    z = normalize(z)
    return from_logits(z @ z.T / temperature, jnp.arange(len(z)) ^ 1)


def from_logits(logits, partner):
    positive = jnp.take_along_axis(logits, partner[:, None], axis=1)[:, 0]
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)
    return loss, nt_xent(jnp.eye(4), 1.0)[1]


def mean_of_the_devices_losses(z, temperature):
    """Each of four devices sees the negatives on it alone."""
    losses, metrics = jax.vmap(lambda own: nt_xent(own, temperature))(z.reshape(4, -1, z.shape[-1]))
    return jnp.mean(losses), jax.tree.map(jnp.mean, metrics)


@pytest.mark.parametrize(
    ("broken", "group"),
    [
        (gradient_cut_at_the_gather, r"\['gradient'\]"),
        (positives_off_by_one, r"\['metrics'\]\['loss'\]"),
        (self_not_masked, r"\['metrics'\]\['loss'\]"),
        (mean_of_the_devices_losses, r"\['metrics'\]\['loss'\]"),
    ],
)
def test_the_checker_rejects_broken_losses(small, start, expected, broken, group, monkeypatch):
    loss = Loss(lambda z, labels: broken(z, small.loss.temperature), "broken")
    found = step_of(small, jax.devices()[:4], start, monkeypatch, loss)
    # Whatever the broken loss says of its metrics, the loss or the gradient must give it away.
    found["metrics"] = expected["metrics"] | {"loss": found["metrics"]["loss"]}
    with pytest.raises(AssertionError, match=group):
        check(found, expected)


def test_the_checker_rejects_batchnorm_per_device(small, start, expected, monkeypatch):
    small.model.norm_group = -1
    with pytest.raises(AssertionError, match="batch_stats"):
        check(step_of(small, jax.devices()[:4], start, monkeypatch), expected)
