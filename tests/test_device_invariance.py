"""One step gives the same numbers on any mesh, and the checker that says so rejects broken steps.

Everything is compared with the same step on one device, and the loss there with Algorithm 1 of the
paper in float64. The encoder is one residual block: every kind of layer of a ResNet, and a sixth of
the time to compile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RESNET
from flax import linen as nn
from invariance import (
    CLASSES,
    TOLERANCE,
    batch,
    check,
    first_state,
    for_one_step,
    job_with_gradient,
    step_of,
    step_on,
)
from test_losses import algorithm_1

from simclr_jax import assemble, config
from simclr_jax.encoders import ENCODERS
from simclr_jax.encoders.norm import batch_norm
from simclr_jax.encoders.resnet import Conv, ResidualBlock
from simclr_jax.encoders.sk_resnet import SkBlock
from simclr_jax.losses import nt_xent
from simclr_jax.losses.contract import normalize
from simclr_jax.losses.health import with_health
from simclr_jax.mesh import make_mesh


class OneBlock(nn.Module):
    """The stem of a ResNet and a block with stride, written as somebody else's encoder would be."""

    dtype: jnp.dtype
    norm_momentum: float
    norm_group: int
    remat: bool
    block: Any = ResidualBlock
    bottleneck: bool = False
    width = 16

    def describe(self):
        return "one block"

    def check_image_size(self, size):
        del size

    def as_baseline(self):
        return self

    @nn.compact
    def __call__(self, x, train):
        norm = batch_norm(train, self.dtype, self.norm_momentum, self.norm_group)
        x = nn.relu(norm(name="stem_norm")(Conv(8, 3, 2, self.dtype, name="stem")(x)))
        block_type = nn.remat(self.block, static_argnums=(2,)) if self.remat else self.block
        block = block_type(
            features=self.width // (4 if self.bottleneck else 1),
            stride=2,
            bottleneck=self.bottleneck,
            project=False,
            dtype=self.dtype,
            norm_momentum=self.norm_momentum,
            norm_group=self.norm_group,
            zero_init_residual=not self.bottleneck,
            name="block",
        )
        return jnp.mean(block(x, train), axis=(1, 2), dtype=jnp.float32)


def use_one_block(config, monkeypatch, name="one_block", *block):
    """A row is all that an encoder needs. Jobs of equal options are shared, so another block has another name."""

    def build(options):
        return OneBlock(
            jnp.dtype(options["dtype"]),
            options["norm_momentum"],
            options["norm_group"],
            options["remat"],
            *block,
        )

    monkeypatch.setitem(ENCODERS, name, build)
    config.model.name = name


@pytest.fixture
def small(tiny, monkeypatch):
    use_one_block(tiny, monkeypatch)
    return for_one_step(tiny)


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
    kernel = state.params["encoder"]["stem"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_the_loss_is_algorithm_1_in_float64(small, start, expected):
    networks = assemble.networks(small, CLASSES, make_mesh(jax.devices()[:1]))
    views = batch(small.data.batch_size)["views"].astype(np.float32) / 255

    @jax.jit
    def project(x):
        for part in ("encoder", "head"):
            variables = {"params": start.params[part], "batch_stats": start.batch_stats[part]}
            network = getattr(networks, part)
            x = network.apply(variables, x, train=True, mutable=["batch_stats"])[0]
        return x[-1]

    z = project(views.reshape(-1, 12, 12, 3))
    loss, top1, top5, entropy = algorithm_1(z, small.loss.temperature)
    metrics = expected["metrics"]
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["contrastive_top1"], top1)
    np.testing.assert_allclose(metrics["contrastive_top5"], top5)
    np.testing.assert_allclose(metrics["contrastive_entropy"], entropy, rtol=1e-5)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


# (4, 1) is the first choice of `four_devices` below.
@pytest.mark.parametrize(
    ("devices", "fsdp"),
    [(8, 1), (8, 2), pytest.param(2, 1, marks=pytest.mark.whole), slow(2, 2), slow(4, 2)],
)
def test_a_step_is_equal_on_any_mesh(small, start, expected, devices, fsdp, monkeypatch):
    small.mesh.fsdp = fsdp
    check(step_of(small, jax.devices()[:devices], start, monkeypatch), expected)


@pytest.mark.parametrize(("devices", "fsdp"), [(8, 2), slow(1, 1)])
def test_the_loss_in_tiles_and_blocks_computed_again_give_the_same_step(
    small, start, expected, devices, fsdp, monkeypatch
):
    small.mesh.fsdp = fsdp
    small.loss.implementation = "chunked"
    small.model.remat = True
    check(step_of(small, jax.devices()[:devices], start, monkeypatch), expected)


@pytest.fixture
def group_of_a_device(small, start, once, monkeypatch):
    """The step on four devices with BatchNorm on each for itself."""
    small.model.norm_group = -1
    return cached(once, "groups", lambda: step_of(small, jax.devices()[:4], start, monkeypatch))


def test_groups_of_batchnorm_do_not_depend_on_the_devices(
    small, start, group_of_a_device, monkeypatch
):
    """Groups of 4 images on 8 devices, with 2 images each, span two devices.

    Their statistics are of 8 views: one kind of CPU rounds gradients apart by 1.2e-5.
    """
    assert assemble.images_of_a_norm(small, make_mesh(jax.devices()[:4])) == 4
    small.model.norm_group = 4
    on_eight = step_of(small, jax.devices(), start, monkeypatch)
    check(on_eight, group_of_a_device, 2 * TOLERANCE)


def test_the_checker_rejects_batchnorm_per_device(expected, group_of_a_device):
    with pytest.raises(AssertionError, match="batch_stats"):
        check(group_of_a_device, expected)


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
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)


def mean_of_the_devices_losses(z, temperature):
    """Each of four devices sees the negatives on it alone."""
    own = z.reshape(4, -1, z.shape[-1])
    return jnp.mean(jax.vmap(lambda z: nt_xent(z, temperature)[0])(own))


BROKEN = {
    gradient_cut_at_the_gather: r"\['gradient'\]",
    positives_off_by_one: r"\['metrics'\]\['loss'\]",
    self_not_masked: r"\['metrics'\]\['loss'\]",
    mean_of_the_devices_losses: r"\['metrics'\]\['loss'\]",
}


@pytest.fixture
def four_devices(small, start, once, monkeypatch):
    """[the step on four devices, the same with each of the broken losses], by one program.

    The step runs `chosen`, a loss that finds in the batch which of the losses it is to be.
    """
    mesh = make_mesh(jax.devices()[:4])
    right = with_health(assemble.contrastive_loss(small, mesh)).apply
    tau = small.loss.temperature
    make_step = assemble.make_step

    def choosing(objective, loss, *rest, **more):
        def step(state, batch):
            def chosen(z, labels):
                _, metrics = right(z, labels)
                losses = [lambda z: right(z, labels)[0]]
                losses += [functools.partial(broken, temperature=tau) for broken in BROKEN]
                return jax.lax.switch(batch["which"][0], losses, z), metrics

            return make_step(objective, chosen, *rest, **more)(state, batch)

        return step

    def compute():
        with monkeypatch.context() as patch:
            patch.setattr(assemble, "make_step", choosing)
            which = range(len(BROKEN) + 1)
            job = job_with_gradient(small, jax.devices()[:4], monkeypatch)
            views = batch(small.data.batch_size)
            return [
                step_on(job, start, views | {"which": np.full_like(views["label"], index)})
                for index in which
            ]

    return cached(once, "four", compute)


def test_a_step_with_a_choice_of_losses_is_equal_on_four_devices(four_devices, expected):
    check(four_devices[0], expected)


@pytest.mark.parametrize("broken", BROKEN)
def test_the_checker_rejects_broken_losses(four_devices, expected, broken):
    found = four_devices[1 + list(BROKEN).index(broken)]
    with pytest.raises(AssertionError, match=BROKEN[broken]):
        check(found, expected)


@pytest.fixture
def selective(tiny, monkeypatch):
    """A block with selective kernels, whose last scale starts at one so that gradients pass."""
    use_one_block(tiny, monkeypatch, "one_sk_block", SkBlock, True)
    return for_one_step(tiny)


@pytest.mark.parametrize(
    ("devices", "fsdp", "options"),
    [
        pytest.param(4, 1, {"model.remat": True}, marks=pytest.mark.whole),
        (8, 2, {"loss.implementation": "chunked"}),
    ],
)
def test_a_step_of_selective_kernels_is_equal_on_any_mesh(
    selective, once, devices, fsdp, options, monkeypatch
):
    begun = cached(once, "sk start", lambda: first_state(selective, monkeypatch))
    one = cached(once, "sk", lambda: step_of(selective, jax.devices()[:1], begun, monkeypatch))
    config.set_options(selective, options | {"mesh.fsdp": fsdp})
    check(step_of(selective, jax.devices()[:devices], begun, monkeypatch), one, 2 * TOLERANCE)


@pytest.mark.whole
def test_selective_kernels_in_microbatches_are_equal_on_any_mesh(selective, once, monkeypatch):
    begun = cached(once, "sk start", lambda: first_state(selective, monkeypatch))
    selective.train.microbatches = 2
    one = step_of(selective, jax.devices()[:1], begun, monkeypatch)
    check(step_of(selective, jax.devices(), begun, monkeypatch), one, 2 * TOLERANCE)


@pytest.fixture
def by_muon(tiny, monkeypatch):
    """A block of three convolutions, whose last scale starts at one so that all kernels have gradients."""
    use_one_block(tiny, monkeypatch, "one_full_block", ResidualBlock, True)
    options = {"name": "muon", "learning_rate": 4e-3, "scaling": "none"}
    config.set_options(for_one_step(tiny), {f"optimizer.{k}": v for k, v in options.items()})
    return tiny


@pytest.mark.parametrize(("devices", "fsdp"), [pytest.param(4, 1, marks=pytest.mark.whole), (8, 2)])
def test_a_step_of_muon_is_equal_on_any_mesh(by_muon, once, devices, fsdp, monkeypatch):
    """Kernels that lie divided over devices are made orthogonal as wholes."""
    begun = cached(once, "muon start", lambda: first_state(by_muon, monkeypatch))
    one = cached(once, "muon", lambda: step_of(by_muon, jax.devices()[:1], begun, monkeypatch))
    by_muon.mesh.fsdp = fsdp
    check(step_of(by_muon, jax.devices()[:devices], begun, monkeypatch), one, 2 * TOLERANCE)


@pytest.fixture
def vit(tiny):
    """A ViT and a head without BatchNorm, which the loss DCL trains."""
    config.set_options(for_one_step(tiny), {"model.head": "none", "loss.name": "dcl"})
    return tiny


@pytest.mark.parametrize(
    ("devices", "fsdp", "options"),
    [
        (2, 1, {"model.remat": True}),
        (4, 1, {"loss.implementation": "chunked"}),
        (8, 1, {}),
        # Without BatchNorm the gradient in microbatches is that of the whole batch.
        (8, 2, {"train.microbatches": 2}),
    ],
)
def test_a_step_of_a_vit_with_dcl_is_equal_on_any_mesh(
    vit, once, devices, fsdp, options, monkeypatch
):
    begun = cached(once, "vit start", lambda: first_state(vit, monkeypatch))
    assert not jax.tree.leaves(begun.batch_stats)
    one = cached(once, "vit", lambda: step_of(vit, jax.devices()[:1], begun, monkeypatch))
    config.set_options(vit, options | {"mesh.fsdp": fsdp})
    check(step_of(vit, jax.devices()[:devices], begun, monkeypatch), one)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "fsdp"), [(2, 1), (4, 1), (8, 1), (8, 2)])
def test_a_step_of_a_whole_resnet_is_equal_on_any_mesh(tiny, once, devices, fsdp, monkeypatch):
    config.set_options(for_one_step(tiny), RESNET)
    begun = cached(once, "resnet start", lambda: first_state(tiny, monkeypatch))
    one = cached(once, "resnet", lambda: step_of(tiny, jax.devices()[:1], begun, monkeypatch))
    tiny.mesh.fsdp = fsdp
    check(step_of(tiny, jax.devices()[:devices], begun, monkeypatch), one)
