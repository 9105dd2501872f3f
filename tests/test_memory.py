"""Negatives of earlier batches: the loss against loops, the memory against what it is said to hold."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import CLASSES, batch, check, for_one_step
from test_device_invariance import use_one_block
from test_losses import random_pairs

from simclr_jax import assemble, config
from simclr_jax.errors import Stopped, UserError
from simclr_jax.losses import LOSSES, stored
from simclr_jax.losses.contract import MASKED
from simclr_jax.losses.stored import Stored
from simclr_jax.mesh import batch_sharded, make_mesh, to_global
from simclr_jax.modes import warm_start
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.training import memory

PAIRS, BATCHES, WIDTH = 16, 3, 16


def loops(name, z, keys, tau, normalize=True):
    """NT-Xent and DCL with further negatives, anchor by anchor in float64."""
    z, keys = (np.asarray(x, np.float64) for x in (z, keys))
    if normalize:
        z, keys = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (z, keys))
    losses = []
    for i, anchor in enumerate(z):
        j = i ^ 1
        left_out = (i, j) if name == "dcl" else (i,)
        exponents = [anchor @ z[k] / tau for k in range(len(z)) if k not in left_out]
        exponents += [anchor @ key / tau for key in keys]
        losses.append(np.log(np.sum(np.exp(exponents))) - anchor @ z[j] / tau)
    return np.mean(losses)


def slope(function, z, places, step=1e-4):
    """Central differences of a function of float64 at some places of z."""
    found = []
    for place in places:
        moved = np.zeros_like(z)
        moved[place] = step
        found.append((function(z + moved) - function(z - moved)) / (2 * step))
    return np.array(found)


def some_keys():
    rng = np.random.default_rng(5)
    return rng.normal(size=(BATCHES, PAIRS, WIDTH)).astype(np.float32)


@functools.cache
def of_library(name, implementation, devices, normalize=True):
    """(z, Stored) -> (loss, metrics), jitted with its gradient."""
    c = config.default()
    c.loss.temperature, c.loss.implementation = 0.2, implementation
    c.loss.normalize = normalize
    mesh = make_mesh(jax.devices()[:devices])
    loss = LOSSES[name](c.loss.to_dict(), mesh, PAIRS)
    place = functools.partial(jax.device_put, device=batch_sharded(mesh))

    @jax.jit
    def both(z, labels, *stored):
        return jax.value_and_grad(loss.apply, has_aux=True)(z, labels, *stored)

    return lambda z, *stored: both(place(z), place(np.zeros(PAIRS, np.int32)), *stored)


@pytest.mark.parametrize("filled", [0, 1, 3])
@pytest.mark.parametrize(
    ("name", "implementation", "devices"),
    [
        ("nt_xent", "dense", 1),
        ("nt_xent", "chunked", 8),
        ("dcl", "chunked", 1),
        ("dcl", "dense", 8),
    ],
)
def test_value_and_gradient_equal_loops(name, implementation, devices, filled, monkeypatch):
    monkeypatch.setattr(stored, "_CHUNK", 6)  # several tiles, the last one not full
    z, keys = random_pairs(PAIRS, WIDTH), some_keys()
    loss = of_library(name, implementation, devices)
    (value, metrics), gradient = loss(z, Stored(keys, np.int32(filled)))
    held = keys[:filled].reshape(-1, WIDTH)
    np.testing.assert_allclose(value, loops(name, z, held, 0.2), rtol=2e-6)
    places = [(0, 0), (1, 5), (14, 3), (31, 15)]
    expected = slope(lambda z: loops(name, z, held, 0.2), z.astype(np.float64), places)
    found = np.array([gradient[place] for place in places])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(gradient).max())
    # The metrics are of the batch's own candidates, with any memory.
    (_, without), _ = loss(z)
    for key, value in without.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-6, err_msg=key)


def test_dot_products_may_be_compared_with_stored_negatives():
    z, keys = random_pairs(PAIRS, WIDTH) / 8, some_keys() / 8
    (value, _), _ = of_library("nt_xent", "dense", 1, normalize=False)(z, Stored(keys, np.int32(3)))
    expected = loops("nt_xent", z, keys.reshape(-1, WIDTH), 0.2, normalize=False)
    np.testing.assert_allclose(value, expected, rtol=2e-6)


def test_nothing_stored_is_minus_infinity_and_keys_have_no_gradient():
    z, keys = random_pairs(PAIRS, WIDTH), some_keys()
    nothing = stored.log_sum_of(Stored(keys, np.int32(0)), z, 0.2)
    np.testing.assert_array_equal(nothing, np.full(2 * PAIRS, MASKED, np.float32))

    def total(keys):
        return jnp.sum(stored.log_sum_of(Stored(keys, np.int32(3)), z, 0.2))

    assert not np.any(jax.grad(total)(jnp.asarray(keys)))


def test_64_bit_numbers_change_no_contract():
    params: dict = {"encoder": {}, "head": {}}
    z, keys = random_pairs(PAIRS, WIDTH), some_keys()
    with jax.enable_x64(True):
        held = memory.begin(params, BATCHES, PAIRS, WIDTH)
        for batch_keys in keys:
            held = memory.advance(held, params, jnp.asarray(batch_keys), 0.9)
        found = jax.grad(lambda z: jnp.sum(stored.log_sum_of(memory.stored_in(held), z, 0.2)))(z)
    expected = jax.grad(
        lambda z: jnp.sum(stored.log_sum_of(Stored(keys, np.int32(BATCHES)), z, 0.2))
    )(z)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_memory_of_65536_negatives_takes_a_tile():
    """A twentieth of the similarities, which are 134 MB."""
    z = jax.ShapeDtypeStruct((512, 128), jnp.float32)
    keys = jax.ShapeDtypeStruct((256, 256, 128), jnp.float32)

    def total(z, keys):
        return jnp.sum(stored.log_sum_of(Stored(keys, jnp.int32(256)), z, 0.1))

    program = jax.jit(jax.grad(total)).lower(z, keys).compile()
    assert program.memory_analysis().temp_size_in_bytes < 512 * 65536 * 4 / 20


@pytest.fixture
def small(tiny, monkeypatch):
    """A network of one block with BatchNorm, and a memory of 3 batches of 16."""
    use_one_block(tiny, monkeypatch, "one_block_remembered")
    tiny.loss.memory, tiny.loss.memory_decay = 48, 0.75
    return for_one_step(tiny)


def job_on(c, devices, fsdp=1):
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    return assemble.pretraining_job(c, assemble.plan_of(c, 48), CLASSES, mesh)


def start_of(c):
    """The state before the first step, as numpy arrays."""
    return jax.device_get(job_on(c, 1).init())


def trained(c, start, steps, devices=1, fsdp=1):
    """States and metrics of steps from a state, on batches that differ."""
    job = job_on(c, devices, fsdp)
    state = jax.device_put(start, jax.tree.map(lambda x: x.sharding, job.abstract_state))
    seen = []
    for number in range(steps):
        images = batch(c.data.batch_size)
        images["views"] = np.roll(images["views"], number, axis=2)
        state, metrics = job.step(state, to_global(job.mesh, images))
        seen.append(jax.device_get((state, metrics)))
    return seen


def test_a_memory_holds_the_last_batches_as_the_averaged_network_saw_them(small):
    start = start_of(small)
    states = [start, *(state for state, _ in trained(small, start, 5))]
    parts = assemble.networks(small, CLASSES, make_mesh(jax.devices()[:1]))
    expected = {}
    average = {name: start.params[name] for name in ("encoder", "head")}
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        images = np.roll(batch(16)["views"], number, axis=2)[:, 1].astype(np.float32) / 255
        x = images
        for name in ("encoder", "head"):
            variables = {"params": average[name], "batch_stats": before.batch_stats[name]}
            network = getattr(parts, name).clone(norm_group=0)
            x = network.apply(variables, x, train=True, mutable=["batch_stats"])[0]
        expected[number % 3] = x[-1]
        average = jax.tree.map(
            lambda m, p: 0.75 * np.float64(m) + 0.25 * p,
            average,
            {name: after.params[name] for name in average},
        )
        held = after.memory
        assert held.written == number + 1
        for place, keys in expected.items():
            np.testing.assert_allclose(held.keys[place], keys, atol=1e-4)
        for place in range(len(expected), 3):
            assert not np.any(held.keys[place])
        jax.tree.map(
            lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7),
            held.params,
            average,
        )
    assert memory.stored_in(states[2].memory).filled == 2
    assert memory.stored_in(states[5].memory).filled == 3


def test_steps_are_equal_on_any_mesh_and_differ_without_a_memory(small):
    """The third step counts the negatives of two earlier ones."""
    start = start_of(small)
    one = trained(small, start, 3)
    eight = trained(small, start, 3, devices=8, fsdp=2)
    for (state, metrics), (expected, expected_metrics) in zip(eight, one, strict=True):
        compared = [
            {"params": s.params, "statistics": s.batch_stats, "keys": s.memory.keys, "metrics": m}
            for s, m in ((state, metrics), (expected, expected_metrics))
        ]
        check(*compared, tolerance=1e-4)
    without = dataclasses.replace(start, memory=None)
    small.loss.memory = 0
    alone = trained(small, without, 3)
    assert alone[0][1]["loss"] == pytest.approx(one[0][1]["loss"], rel=1e-6)
    assert one[1][1]["loss"] > alone[1][1]["loss"] + 0.1


def test_a_divided_memory_lies_on_all_devices(small):
    job = job_on(small, 8, 2)
    keys = job.init().memory.keys
    assert {shard.data.shape for shard in keys.addressable_shards} == {(3, 2, 16)}


def test_microbatches_store_the_same_projections(tiny):
    """Of a ViT without a head, whose images do not see each other."""
    tiny.loss.memory, tiny.model.head = 32, "none"
    c = for_one_step(tiny)
    start = start_of(c)
    (once, _), (twice, _) = trained(c, start, 2)
    c.train.microbatches = 2
    (once_in_parts, _), (twice_in_parts, _) = trained(c, start, 2, devices=2)
    for whole, parts in ((once, once_in_parts), (twice, twice_in_parts)):
        check(parts.memory.keys, whole.memory.keys, tolerance=1e-4)


def test_a_step_that_is_skipped_leaves_the_memory(tiny):
    tiny.loss.memory, tiny.train.skip_not_finite = 32, True
    c = for_one_step(tiny)
    start = start_of(c)
    broken = start.params["head"]["dense1"]["kernel"].copy()
    broken[0, 0] = np.nan
    start.params["head"]["dense1"]["kernel"] = broken
    ((state, metrics),) = trained(c, start, 1)
    assert metrics["skipped_steps"] == 1
    jax.tree.map(np.testing.assert_array_equal, state.memory, start.memory)


@pytest.mark.whole
def test_a_run_with_a_memory_is_resumed_bit_for_bit(tiny, tmp_path, monkeypatch):
    tiny.loss.memory = 48
    alone = make_mesh(jax.devices()[:1])
    monkeypatch.setattr(assemble, "make_mesh", lambda fsdp: alone)
    pretrain(tiny, str(tmp_path / "whole"))
    step = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr("simclr_jax.training.stopping.Stop.now", lambda self: next(step) == 5)
        with pytest.raises(Stopped):
            pretrain(tiny, str(tmp_path / "parts"))
    pretrain(tiny, str(tmp_path / "parts"))
    whole, parts = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")
    )
    losses = [
        [line.partition('"loss":')[2].partition(",")[0] for line in lines if '"loss":' in line]
        for lines in (whole, parts)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


def test_a_warm_start_is_the_memorys_start_too(tiny):
    tiny.loss.memory = 16
    job = job_on(for_one_step(tiny), 2)
    start = jax.device_get(job.init())
    shifted = jax.tree.map(lambda x: np.asarray(x) + 1, start.params["encoder"])
    parts = {"encoder": {"params": shifted, "batch_stats": start.batch_stats["encoder"]}}
    begun = warm_start.begun_with(warm_start.Start(parts, {"path": "W"}, []), job).init()
    jax.tree.map(np.testing.assert_array_equal, begun.memory.params["encoder"], shifted)
    jax.tree.map(np.testing.assert_array_equal, begun.params["encoder"], shifted)
    # A step gives its state's memory away: none of it may be there twice.
    job.step(begun, to_global(job.mesh, batch(16)))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("margin", 32, r"loss\.memory=32: expected loss\.name=nt_xent or dcl, or loss\.memory=0"),
        (
            "nt_xent",
            40,
            r"loss\.memory=40 is not a multiple of data\.batch_size=16: use for example 32",
        ),
        (
            "nt_xent",
            3,
            r"loss\.memory=3 is not a multiple of data\.batch_size=16: use for example 16",
        ),
    ],
)
def test_a_memory_that_cannot_be_is_refused(tiny, name, size, message):
    tiny.loss.name, tiny.loss.memory = name, size
    with pytest.raises(UserError, match=message):
        assemble.pretraining(tiny)


def test_a_memory_of_groups_of_one_image_is_refused(tiny):
    """BatchNorm over one row makes each projection 0."""
    tiny.loss.memory, tiny.model.norm_group = 32, 1
    with pytest.raises(UserError, match=r"model\.norm_group of 2 images or more"):
        assemble.pretraining(tiny)


def test_a_run_says_how_many_negatives_it_remembers(tiny):
    tiny.loss.memory = 4096
    assert assemble.pretraining(tiny).loss.text.endswith("4,096 negatives of earlier batches")
