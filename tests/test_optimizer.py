"""LARS against the published code's trajectory; schedules and masks against their definitions."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax.training.optimizer import (
    adapted,
    as_matrices,
    make_classifier_optimizer,
    make_optimizer,
    scaled_learning_rate,
    warmup_cosine,
)

SETTINGS = {"weight_decay": 1e-4, "momentum": 0.9, "trust_coefficient": 0.001}


def trajectory(optimizer, params, grads):
    state, path = optimizer.init(params), []
    for g in grads:
        updates, state = optimizer.update(g, state, params)
        params = optax.apply_updates(params, updates)
        path.append(params)
    return path


def test_lars_follows_the_published_codes_trajectory(golden):
    params = {"dense": {"kernel": golden["lars_w0"], "bias": golden["lars_b0"]}}
    grads = [
        {"dense": {"kernel": w, "bias": b}}
        for w, b in zip(golden["lars_gw"], golden["lars_gb"], strict=True)
    ]
    path = trajectory(make_optimizer("lars", 0.3, **SETTINGS), params, grads)
    for step, reached in enumerate(path):
        np.testing.assert_allclose(
            reached["dense"]["kernel"], golden["lars_default_w"][step], rtol=1e-6, atol=1e-7
        )
        np.testing.assert_allclose(
            reached["dense"]["bias"], golden["lars_default_b"][step], rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("other", ["nesterov", "popular"])
def test_the_trajectory_tells_lars_variants_apart(golden, other):
    assert not np.allclose(golden["lars_default_w"], golden[f"lars_{other}_w"], rtol=1e-5)


def test_only_kernels_outside_the_classifier_are_adapted():
    params = {
        "encoder": {"stem": {"kernel": 1.0}, "stem_norm": {"scale": 1.0, "bias": 1.0}},
        "head": {"dense1": {"kernel": 1.0}, "norm1": {"scale": 1.0}},
        "classifier": {"dense": {"kernel": 1.0, "bias": 1.0}},
    }
    assert adapted(params) == {
        "encoder": {"stem": {"kernel": True}, "stem_norm": {"scale": False, "bias": False}},
        "head": {"dense1": {"kernel": True}, "norm1": {"scale": False}},
        "classifier": {"dense": {"kernel": False, "bias": False}},
    }


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_without_a_gradient_only_adapted_parameters_move(name):
    params = {
        "encoder": {"a": {"kernel": jnp.ones((3, 2)), "scale": jnp.ones(3)}},
        "classifier": {"dense": {"kernel": jnp.ones((3, 2))}},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    settings = SETTINGS | {"weight_decay": 0.1}
    (after,) = trajectory(make_optimizer(name, 0.5, **settings), params, [zeros])
    assert np.all(after["encoder"]["a"]["kernel"] < 1)
    assert np.all(after["encoder"]["a"]["scale"] == 1)
    assert np.all(after["classifier"]["dense"]["kernel"] == 1)


def test_a_kernel_is_a_matrix_of_inputs_by_outputs():
    params = {
        "encoder": {
            "conv": {"kernel": jnp.ones((3, 3, 4, 8))},
            "attention": {
                "key": {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))},
                "out": {"kernel": jnp.ones((2, 3, 6))},
            },
        },
        "classifier": {"dense": {"kernel": jnp.ones((6, 5))}},
    }
    assert as_matrices(params) == {
        "encoder": {
            "conv": {"kernel": ((0, 1, 2), (3,))},
            "attention": {
                "key": {"kernel": ((0,), (1, 2)), "bias": None},
                "out": {"kernel": ((0, 1), (2,))},
            },
        },
        "classifier": {"dense": {"kernel": None}},
    }


def orthogonal(matrix):
    """Jordan's polynomial, three times, of each singular value of the matrix divided by its norm."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(3):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return u * s @ v


def muon_in_float64(start, gradients, rate, decay, momentum):
    """The kernel [inputs, outputs] after each step, its average and the update corrected as Adam's."""
    kernel, average, path = start.astype(np.float64), 0.0, []
    for step, gradient in enumerate(gradients, 1):
        average = momentum * average + (1 - momentum) * gradient
        ahead = momentum * average / (1 - momentum ** (step + 1))
        ahead = ahead + (1 - momentum) * gradient / (1 - momentum**step)
        update = 0.2 * math.sqrt(max(kernel.shape)) * orthogonal(ahead)
        kernel = kernel - rate * (update + decay * kernel)
        path.append(kernel)
    return path


def test_muon_makes_the_kernels_update_orthogonal_and_leaves_the_others_to_adam():
    rng = np.random.default_rng(0)
    start = {
        "encoder": {"conv": {"kernel": rng.normal(size=(3, 3, 4, 8)), "bias": rng.normal(size=8)}},
        "head": {"wide": {"kernel": rng.normal(size=(4, 12))}},
        "classifier": {"dense": {"kernel": rng.normal(size=(8, 3))}},
    }
    start = jax.tree.map(np.float32, start)
    gradients = [
        jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), start) for _ in range(3)
    ]
    settings = SETTINGS | {"weight_decay": 0.1, "momentum": 0.8}
    path = trajectory(make_optimizer("muon", 0.02, **settings), start, gradients)
    others = trajectory(optax.nadam(0.02), start, gradients)

    for part, layer, shape in (("encoder", "conv", (36, 8)), ("head", "wide", (4, 12))):
        expected = muon_in_float64(
            start[part][layer]["kernel"].reshape(shape),
            [g[part][layer]["kernel"].reshape(shape) for g in gradients],
            *(0.02, 0.1, 0.8),
        )
        for reached, kernel in zip(path, expected, strict=True):
            # Float32 products, of which the polynomial's slope enlarges rounding by up to 3.4445 ** 3 = 41.
            np.testing.assert_allclose(
                reached[part][layer]["kernel"].reshape(shape), kernel, rtol=1e-4, atol=1e-4
            )
    for reached, wanted in zip(path, others, strict=True):
        np.testing.assert_allclose(
            reached["encoder"]["conv"]["bias"], wanted["encoder"]["conv"]["bias"], rtol=1e-6
        )
        np.testing.assert_allclose(
            reached["classifier"]["dense"]["kernel"],
            wanted["classifier"]["dense"]["kernel"],
            rtol=1e-6,
        )


def test_sgd_is_nesterov():
    (first, second) = trajectory(
        make_optimizer("sgd", 0.1, weight_decay=0.0, momentum=0.9, trust_coefficient=0.0),
        {"kernel": jnp.zeros(())},
        [{"kernel": jnp.ones(())}] * 2,
    )
    # velocity 1, then 1.9; Nesterov steps by lr * (g + 0.9 velocity).
    np.testing.assert_allclose(first["kernel"], -0.19, rtol=1e-6)
    np.testing.assert_allclose(second["kernel"], -0.19 - 0.271, rtol=1e-6)


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (0, 7), (3, 6), (1, 1)])
def test_schedule_is_step_exact(warmup, total):
    schedule = warmup_cosine(2.0, warmup, total)
    for step in range(total + 1):
        if step < warmup:
            expected = 2.0 * step / warmup
        else:
            done = min(1.0, (step - warmup) / max(1, total - warmup))
            expected = 1.0 + math.cos(math.pi * done)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-6)


def test_learning_rate_scaling():
    assert scaled_learning_rate(0.3, "linear", 4096) == pytest.approx(4.8)
    assert scaled_learning_rate(0.075, "sqrt", 4096) == pytest.approx(4.8)
    assert scaled_learning_rate(0.3, "none", 4096) == pytest.approx(0.3)


def test_the_classifiers_optimizer_moves_and_remembers_trained_parts_only():
    """Nesterov momentum and decay on kernels, as a loop; the frozen part has no momentum at all."""
    optimizer, schedule = make_classifier_optimizer(0.5, 4, 0.1, 0.9, frozenset({"classifier"}))
    start = {
        "encoder": {"kernel": jnp.ones(3)},
        "classifier": {"kernel": jnp.ones(3), "bias": jnp.ones(3)},
    }
    grads = [
        {k: {n: (i + 1.0) * x for n, x in v.items()} for k, v in start.items()} for i in (0, 1)
    ]
    path = trajectory(optimizer, start, grads)
    kernel, bias, velocity = 1.0, 1.0, [0.0, 0.0]
    for step, reached in enumerate(path):
        rate = 0.25 * (1 + math.cos(math.pi * step / 4))
        assert schedule(step) == pytest.approx(rate)
        gradients = (step + 1 + 0.1 * kernel, step + 1)
        velocity = [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
        kernel, bias = (
            x - rate * (g + 0.9 * v)
            for x, g, v in zip((kernel, bias), gradients, velocity, strict=True)
        )
        np.testing.assert_allclose(reached["classifier"]["kernel"], kernel, rtol=1e-5)
        np.testing.assert_allclose(reached["classifier"]["bias"], bias, rtol=1e-5)
        np.testing.assert_array_equal(reached["encoder"]["kernel"], 1.0)
    momenta = [x for x in jax.tree.leaves(optimizer.init(start)) if x.shape == (3,)]
    assert len(momenta) == 2


def test_fine_tuning_by_lars_equals_a_loop():
    """The trust ratio on the encoder's kernel alone; its bias and the classifier have plain momentum."""
    optimizer, _schedule = make_classifier_optimizer(
        0.5, 4, 0.1, 0.9, frozenset({"encoder", "classifier"}), "lars"
    )
    start = {
        "encoder": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.ones(2)},
        "classifier": {"kernel": jnp.ones(2), "bias": jnp.ones(2)},
    }
    grads = [jax.tree.map(lambda x, i=i: (i + 1.0) * x, start) for i in (0, 1)]
    kernel, plain = np.array([3.0, 4.0]), 1.0
    velocity, own = np.zeros(2), 0.0
    for step, reached in enumerate(trajectory(optimizer, start, grads)):
        rate = 0.25 * (1 + math.cos(math.pi * step / 4))
        gradient = (step + 1) * np.array([3.0, 4.0]) + 0.1 * kernel
        ratio = 1e-3 * np.linalg.norm(kernel) / np.linalg.norm(gradient)
        # The learning rate is inside the momentum.
        velocity = 0.9 * velocity + rate * ratio * gradient
        own = 0.9 * own + rate * (step + 1)
        kernel, plain = kernel - velocity, plain - own
        np.testing.assert_allclose(reached["encoder"]["kernel"], kernel, rtol=1e-5)
        for part, name in (("encoder", "bias"), ("classifier", "kernel"), ("classifier", "bias")):
            np.testing.assert_allclose(reached[part][name], plain, rtol=1e-5)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_the_heads_of_a_transformer_are_columns_of_one_matrix(name):
    params = {"encoder": {"attention": {name: {"kernel": jnp.zeros((8, 2, 4))}}}}
    assert as_matrices(params)["encoder"]["attention"][name]["kernel"] == ((0,), (1, 2))
