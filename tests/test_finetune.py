"""Classifiers by SGD: against a loop in float64, on any number of devices, chosen without the test."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import encoder_checkpoint, random_images

from simclr_jax import assemble
from simclr_jax.errors import UserError
from simclr_jax.evals import finetune
from simclr_jax.evals.supervised import Classified, make_optimizer, make_step
from simclr_jax.heads import LinearClassifier
from simclr_jax.mesh import make_mesh, replicated, to_global
from simclr_jax.train_state import TrainState, init_encoder, init_head

CLASSES, BATCH = 3, 16


def model_of(config, layer=0, train_encoder=True):
    return Classified(
        assemble.encoder(config),
        assemble.head(config),
        layer,
        LinearClassifier(CLASSES),
        train_encoder,
    )


def trained(config, model, steps, devices, weight_decay=0.0):
    """State after some steps on random images, what was frozen, and the losses."""
    mesh = make_mesh(devices)
    network = model.encoder
    key = jax.random.key(0)
    variables = model.start(
        init_encoder(network.clone(zero_init_residual=False), 12, key),
        init_head(model.head, network.width_of_h, key),
        key,
    )
    optimizer, schedule = make_optimizer(0.3, steps, weight_decay, 0.9)
    params = model.trained_part(variables["params"])
    state = TrainState(
        jnp.zeros((), jnp.int32), params, variables["batch_stats"], optimizer.init(params)
    )
    frozen = {k: v for k, v in variables["params"].items() if k not in params}
    state, frozen = jax.device_put((state, frozen), replicated(mesh))
    step = jax.jit(
        make_step(model, optimizer, schedule, lambda b: b, lambda b: b["views"]),
        out_shardings=replicated(mesh),
    )
    losses = []
    for number in range(steps):
        batch = to_global(mesh, batch_of(number))
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return jax.device_get((state, frozen)), losses


def batch_of(number):
    images = random_images(BATCH + number, 12, 12)[:BATCH].astype(np.float32) / 255
    return {"views": images[:, None], "label": (np.arange(BATCH) + number) % CLASSES}


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_linear_evaluation_equals_a_loop(tiny, weight_decay):
    """Nesterov momentum 0.9, half a cosine, no warm-up; f frozen, with its running statistics."""
    steps = 6
    model = model_of(tiny, train_encoder=False)
    (state, frozen), losses = trained(tiny, model, steps, jax.devices()[:1], weight_decay)
    start = model.classifier.init(jax.random.key(0), jnp.zeros((1, model.encoder.width_of_h)))
    w, b = (np.asarray(start["params"]["dense"][name], np.float64) for name in ("kernel", "bias"))
    momentum = [np.zeros_like(w), np.zeros_like(b)]
    encoder = {"params": frozen["encoder"], "batch_stats": state.batch_stats["encoder"]}
    for number in range(steps):
        batch = batch_of(number)
        h = np.asarray(model.encoder.apply(encoder, batch["views"][:, 0], train=False), np.float64)
        logits = h @ w + b
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        onehot = np.eye(CLASSES)[batch["label"]]
        assert losses[number] == pytest.approx(-np.mean(np.log(p[onehot == 1])), rel=2e-5)
        rate = 0.3 / 2 * (1 + np.cos(np.pi * number / steps))
        gradients = [h.T @ (p - onehot) / BATCH + weight_decay * w, (p - onehot).mean(axis=0)]
        momentum = [0.9 * m + g for m, g in zip(momentum, gradients, strict=True)]
        w, b = (
            x - rate * (g + 0.9 * m) for x, g, m in zip((w, b), gradients, momentum, strict=True)
        )
    # float32 against float64.
    np.testing.assert_allclose(
        state.params["classifier"]["dense"]["kernel"], w, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(state.params["classifier"]["dense"]["bias"], b, rtol=1e-4, atol=1e-5)
    assert set(state.params) == {"classifier"}


@pytest.mark.parametrize("layer", [0, 1])
def test_fine_tuning_is_the_same_on_any_devices(tiny, layer):
    (one, _), losses = trained(tiny, model_of(tiny, layer), 4, jax.devices()[:1])
    (many, _), others = trained(tiny, model_of(tiny, layer), 4, jax.devices())
    # Sums over the batch in another order; BatchNorm of 16 images passes it on, step by step.
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max() + 1e-6)


def test_a_layer_of_the_head_is_trained_and_what_follows_is_not(tiny):
    def moved(layer):
        model = model_of(tiny, layer)
        key = jax.random.key(0)
        (state, _), _ = trained(tiny, model, 2, jax.devices()[:1])
        start = init_head(model.head, model.encoder.width_of_h, key)["params"]
        return {
            name: np.abs(state.params["head"][name]["kernel"] - start[name]["kernel"]).max() > 0
            for name in ("dense1", "dense2")
        }

    assert moved(0) == {"dense1": False, "dense2": False}
    assert moved(1) == {"dense1": True, "dense2": False}
    assert moved(2) == {"dense1": True, "dense2": True}


@pytest.fixture
def run(tiny, tmp_path):
    for group in (tiny.linear, tiny.finetune):
        group.batch_size = BATCH
    tiny.linear.epochs = 6.0
    tiny.finetune.label_fractions = (0.2, 1.0)
    tiny.finetune.epochs = (2.0, 2.0)
    tiny.eval.validation_fraction = 0.25
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    return tiny, workdir


def test_fine_tuning_with_few_labels_and_all(run):
    config, workdir = run
    result = finetune.finetune(config, str(workdir))
    assert json.loads((workdir / "finetune.json").read_text())["rows"] == result["rows"]
    assert (result["train_images"], result["validation_images"], result["test_images"]) == (
        36,
        12,
        21,
    )
    rows = {(r["features"], r["label_fraction"]): r for r in result["rows"]}
    assert set(rows) == {(k, f) for k in ("untrained encoder", "encoder") for f in (0.2, 1.0)}
    for (_, fraction), row in rows.items():
        assert row["seeds"] == (2 if fraction < 1 else 1)
        # 0.2 of 48 images in three classes: 3 of each class.
        assert row["labels_per_class"] == (3 if fraction < 1 else None)
        assert {r["images"] for r in row["runs"]} == {9 if fraction < 1 else 36}
        assert 0 <= row["selected_accuracy"] <= 1


def test_selection_never_sees_the_test_split(run, tmp_path):
    config, workdir = run
    config.eval.baselines = False
    config.linear.learning_rate = (0.1, 1.6)
    with np.load(config.data.path) as file:
        arrays = {name: file[name] for name in file.files}
    runs = []
    for label in range(3):  # every test image is said to be of this class
        arrays["test_labels"] = np.full(21, label)
        config.data.path = str(tmp_path / f"{label}.npz")
        np.savez(config.data.path, **arrays)
        (row,) = finetune.linear(config, str(workdir))["rows"]
        assert row["features"] == "encoder"
        runs += row["runs"]
    for name in ("selected_step", "validation", "learning_rate", "steps"):
        assert len({run[name] for run in runs}) == 1
    # Each test image was put into one class.
    for name in ("last", "selected"):
        assert sum(run[name] for run in runs) == pytest.approx(1)


def test_without_a_validation_part_all_is_trained_on_and_nothing_chosen(run):
    config, workdir = run
    config.eval.baselines = False
    config.eval.validation_fraction = 0.0
    result = finetune.linear(config, str(workdir))
    assert (result["train_images"], result["validation_images"]) == (48, 0)
    assert "selected_accuracy" not in result["rows"][0]
    config.linear.learning_rate = (0.1, 0.2)
    with pytest.raises(UserError, match="leaves nothing to choose them on"):
        finetune.linear(config, str(workdir))


def test_mistakes(run):
    config, workdir = run
    config.linear.batch_size = 12
    with pytest.raises(UserError, match=r"linear\.batch_size=12 does not divide over 8 devices"):
        finetune.linear(config, str(workdir))
    config.model.width = 0.25
    with pytest.raises(UserError, match=r"of another model \(model\.width: 0\.125 -> 0\.25\)"):
        finetune.finetune(config, str(workdir))
