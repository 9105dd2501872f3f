"""One step gives the same numbers on any mesh, and the checker that says so rejects broken steps.

Everything is compared with the same step on one device, and the loss there with Algorithm 1 of the
paper in float64. Every array must agree to 1e-5 of its largest entry: float32 rounds at 6e-8, and
sums of some thousand terms in another order differ by some 1e-6 of the largest term.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import random_images
from test_losses import algorithm_1

from simclr_jax import assemble, train
from simclr_jax import config as config_lib
from simclr_jax.losses import normalize, nt_xent
from simclr_jax.mesh import make_mesh, to_global

CLASSES = 3
TOLERANCE = 1e-5  # measured: 1.5e-6


def batch(images):
    """Views that resemble each other, so that losses and their gradients are of some size."""
    rng = np.random.default_rng(1)
    first = random_images(images, 12, 12)
    second = np.clip(first + rng.normal(scale=30, size=first.shape), 0, 255).astype(np.uint8)
    label = (np.arange(images) % CLASSES).astype(np.int32)
    return {"views": np.stack([first, second], axis=1), "label": label}


def keep_gradient():
    """An optimizer's first link that keeps the gradient it is given."""
    return optax.GradientTransformation(
        init=lambda params: jax.tree.map(jnp.zeros_like, params),
        update=lambda gradient, _, params=None: (gradient, gradient),
    )


def make_job(config, devices, monkeypatch, contrastive_loss=None):
    """The job, with the gradient of each step kept in front of the optimizer's state."""
    mesh = make_mesh(devices, config.mesh.fsdp)
    original = assemble.optimizer

    def with_gradient_kept(*args):
        optimizer, schedule = original(*args)
        return optax.chain(keep_gradient(), optimizer), schedule

    with monkeypatch.context() as patch:
        patch.setattr(assemble, "optimizer", with_gradient_kept)
        if contrastive_loss is not None:
            patch.setattr(assemble, "contrastive_loss", lambda *_: ("broken", contrastive_loss))
        return mesh, train.make_job(config, config_lib.plan(config, 48), CLASSES, mesh)


def step_of(config, devices, start, monkeypatch, contrastive_loss=None):
    """All that one LARS step from the state `start` computes: {"group": tree of numpy arrays}."""
    mesh, job = make_job(config, devices, monkeypatch, contrastive_loss)
    state = jax.device_put(start, jax.tree.map(lambda x: x.sharding, job.abstract_state))
    state, metrics = job.step(state, to_global(mesh, batch(config.data.batch_size)))
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
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    differ = {}
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        # A block whose last scale is zero passes no gradient on: nothing but rounding is left.
        difference = np.abs(x - y).max() / max(np.abs(y).max(), 1e-6)
        if not difference <= tolerance:
            differ[jax.tree_util.keystr(path)] = float(difference)
    if differ:
        raise AssertionError("; ".join(f"{name} by {by:.1e}" for name, by in differ.items()))


@pytest.fixture
def tiny(tiny):
    """Its steps take batches of views that are made here."""
    tiny.data.placement = "host"
    return tiny


@pytest.fixture
def lars(tiny):
    tiny.optimizer.warmup_epochs = 0.0  # so that the first step moves
    tiny.optimizer.weight_decay = 1e-4
    tiny.loss.temperature = 0.2
    return tiny


@pytest.fixture(scope="module")
def once():
    """What the first test that needs it computes for all."""
    return {}


@pytest.fixture
def start(lars, once, monkeypatch):
    """The initial state."""
    if "start" not in once:
        _, job = make_job(lars, jax.devices()[:1], monkeypatch)
        once["start"] = jax.device_get(job.init(jax.random.key(0)))
    return once["start"]


@pytest.fixture
def expected(lars, start, once, monkeypatch):
    """The step on one device."""
    if "step" not in once:
        once["step"] = step_of(lars, jax.devices()[:1], start, monkeypatch)
    return once["step"]


def test_the_initial_state_is_equal_on_any_mesh(lars, start, monkeypatch):
    lars.mesh.fsdp = 4
    _, job = make_job(lars, jax.devices(), monkeypatch)
    state = job.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), start)
    # A quarter of each kernel and of its momentum lies on a device.
    kernel = state.params["encoder"]["stem"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_the_loss_is_algorithm_1_in_float64(lars, start, expected):
    mesh = make_mesh(jax.devices()[:1])
    networks = assemble.networks(lars, CLASSES, mesh)
    views = batch(lars.data.batch_size)["views"].astype(np.float32) / 255

    def apply(part, x):
        variables = {"params": start.params[part], "batch_stats": start.batch_stats[part]}
        network = getattr(networks, part)
        return network.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    z = apply("head", apply("encoder", views.reshape(-1, 12, 12, 3)))[-1]
    loss, top1, top5, entropy = algorithm_1(z, lars.loss.temperature)
    metrics = expected["metrics"]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["contrastive_top1"], top1)
    np.testing.assert_allclose(metrics["contrastive_top5"], top5)
    np.testing.assert_allclose(metrics["contrastive_entropy"], entropy, rtol=1e-5)


MESHES = [(2, 1), (4, 1), (8, 1), (8, 2)]
MESHES += [pytest.param(n, 2, marks=pytest.mark.slow) for n in (2, 4)]


@pytest.mark.parametrize(("devices", "fsdp"), MESHES)
def test_a_step_is_equal_on_any_mesh(lars, start, expected, devices, fsdp, monkeypatch):
    lars.mesh.fsdp = fsdp
    check(step_of(lars, jax.devices()[:devices], start, monkeypatch), expected)


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 2), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_the_loss_in_tiles_and_blocks_computed_again_give_the_same_step(
    lars, start, expected, devices, fsdp, monkeypatch
):
    lars.mesh.fsdp = fsdp
    lars.loss.implementation = "chunked"
    lars.model.remat = True
    check(step_of(lars, jax.devices()[:devices], start, monkeypatch), expected)


@pytest.mark.parametrize("option", [{"norm_group": 4}, {"norm_group": -1}])
def test_groups_of_batchnorm_do_not_depend_on_the_devices(lars, start, option, monkeypatch):
    """Groups of 4 images on 8 devices, with 2 images each, span two devices.

    Their statistics are of 8 views: one kind of CPU rounds gradients apart by 1.2e-5.
    """
    lars.model.update(option)
    on_four = step_of(lars, jax.devices()[:4], start, monkeypatch)
    lars.model.norm_group = 4  # what -1 means on four devices
    on_eight = step_of(lars, jax.devices(), start, monkeypatch)
    check(on_eight, on_four, 2 * TOLERANCE)


def test_microbatches_give_the_same_step_on_any_mesh(lars, start, monkeypatch):
    lars.train.microbatches = 2
    one = step_of(lars, jax.devices()[:1], start, monkeypatch)
    lars.mesh.fsdp = 2
    check(step_of(lars, jax.devices(), start, monkeypatch), one)


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
def test_the_checker_rejects_broken_losses(lars, start, expected, broken, group, monkeypatch):
    found = step_of(lars, jax.devices()[:4], start, monkeypatch, broken)
    # Whatever the broken loss says of its metrics, the loss or the gradient must give it away.
    found["metrics"] = expected["metrics"] | {"loss": found["metrics"]["loss"]}
    with pytest.raises(AssertionError, match=group):
        check(found, expected)


def test_the_checker_rejects_batchnorm_per_device(lars, start, expected, monkeypatch):
    lars.model.norm_group = -1
    with pytest.raises(AssertionError, match="batch_stats"):
        check(step_of(lars, jax.devices()[:4], start, monkeypatch), expected)
