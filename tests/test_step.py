"""What one step and its parts may and may not touch; test_device_invariance.py has the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images
from invariance import first_state, step_of
from test_device_invariance import use_one_block

from simclr_jax import assemble
from simclr_jax.encoders.images import to_float
from simclr_jax.errors import UserError
from simclr_jax.losses import LOSSES, Loss, nt_xent
from simclr_jax.mesh import make_mesh, to_global
from simclr_jax.training.gradients import Embedding
from simclr_jax.training.optimizer import make_optimizer
from simclr_jax.training.state import start_of
from simclr_jax.training.step import UpdateRule, make_step

CLASSES = 3


def batch(count):
    views = np.stack([random_images(count, 12, 12), random_images(count + 1, 12, 12)[1:]], axis=1)
    return {"views": views, "label": (np.arange(count) % CLASSES).astype(np.int32)}


def job_of(config, devices=None):
    mesh = make_mesh(devices)
    return assemble.pretraining_job(config, assemble.plan_of(config, 48), CLASSES, mesh)


def steps(config, count=3):
    """States and metrics after each of `count` steps on the same batch, on one device."""
    job = job_of(config, jax.devices()[:1])
    state = job.init()
    images = to_global(job.mesh, batch(config.data.batch_size))
    seen = [(jax.device_get(state), None)]
    for _ in range(count):
        state, metrics = job.step(state, images)
        seen.append((jax.device_get(state), jax.device_get(metrics)))
    return seen


@pytest.fixture
def small(tiny, monkeypatch):
    """A network of one block, whose steps take batches of views that are made here."""
    use_one_block(tiny, monkeypatch)
    tiny.data.placement = "host"
    tiny.optimizer.warmup_epochs = 0.0
    return tiny


@pytest.fixture(scope="module")
def once():
    return {}


@pytest.fixture
def three_steps(small, once):
    if "steps" not in once:
        once["steps"] = steps(small)
    return once["steps"]


def test_a_step_changes_every_parameter_and_statistic(three_steps):
    (before, _), *_, (after, metrics) = three_steps
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
        "other_view_top1",
        "other_view_top5",
        "other_view_entropy",
        "alignment",
        "z_std",
        "update_norm",
        "trust_ratio_min",
        "trust_ratio_median",
        "trust_ratio_max",
        "contrastive_top5",
        "contrastive_entropy",
        "classifier_loss",
        "classifier_accuracy",
        "labelled_share",
        "grad_norm",
        "learning_rate",
    }


def test_the_norms_are_those_of_the_gradient_and_of_what_the_step_adds(small, monkeypatch):
    start = first_state(small, monkeypatch)
    found = step_of(small, jax.devices()[:1], start, monkeypatch)
    added = jax.tree.map(lambda new, old: new - np.asarray(old), found["params"], start.params)
    for name, tree in (("grad_norm", found["gradient"]), ("update_norm", added)):
        norm = np.sqrt(sum(np.sum(np.float64(x) ** 2) for x in jax.tree.leaves(tree)))
        assert found["metrics"][name] == pytest.approx(norm, rel=1e-3), name
        assert norm > 0


def test_the_classifier_does_not_touch_the_encoder(small, three_steps):
    """Without a classifier the encoder and the head go the same way."""
    small.train.online_classifier = False
    for (state, metrics), (expected, expected_metrics) in zip(
        steps(small)[1:], three_steps[1:], strict=True
    ):
        assert "classifier" not in state.params
        assert metrics["loss"] == pytest.approx(expected_metrics["loss"], rel=1e-6)
        for name in ("encoder", "head"):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6),
                state.params[name],
                expected.params[name],
            )


def test_losses_fall_on_a_fixed_batch_without_transfers_or_a_second_compilation(small):
    """On eight devices; each step takes the memory of the state before it."""
    small.optimizer.name, small.optimizer.learning_rate = "adamw", 2e-3
    small.optimizer.scaling = "none"
    small.train.steps = 30
    job = job_of(small)
    state = job.init()
    old = jax.tree.leaves(state.params)
    images = to_global(job.mesh, batch(small.data.batch_size))
    state, first = job.step(state, images)
    assert all(x.is_deleted() for x in old)
    with jax.transfer_guard("disallow"):
        for _ in range(29):
            state, last = job.step(state, images)
    assert last["loss"] < 0.8 * first["loss"]
    assert last["classifier_loss"] < first["classifier_loss"]
    assert job.step._cache_size() == 1


def test_bfloat16_steps_stay_close_and_keep_a_float32_state(small, three_steps):
    small.model.dtype = "bfloat16"
    state, metrics = steps(small)[-1]
    kinds = {x.dtype for x in jax.tree.leaves((state.params, state.batch_stats, state.opt_state))}
    assert kinds <= {np.dtype("float32"), np.dtype("int32")}
    assert metrics["loss"] == pytest.approx(three_steps[-1][1]["loss"], rel=0.02)


def test_images_as_bytes_and_as_floats_are_the_same():
    images = jnp.arange(256, dtype=jnp.uint8)
    np.testing.assert_allclose(to_float(images), np.arange(256) / 255, rtol=1e-6)
    np.testing.assert_array_equal(to_float(to_float(images)), to_float(images))


def test_a_loss_is_one_row_and_gets_the_labels(small, monkeypatch):
    """Positives of one class pulled together, as a loss that is written elsewhere."""

    def build(options, mesh, batch_size):
        def apply(z, labels):
            loss, metrics = nt_xent(z, options["temperature"])
            same = jnp.repeat(labels, 2)[:, None] == jnp.repeat(labels, 2)
            return loss + 0.1 * jnp.mean(jnp.where(same, -z @ z.T, 0.0)), metrics | {
                "same": jnp.mean(same)
            }

        return Loss(apply, f"pulled, {batch_size} images on {mesh.size}", needs_labels=True)

    monkeypatch.setitem(LOSSES, "pulled", build)
    small.loss.name = "pulled"
    _, metrics = steps(small, count=1)[-1]
    labels = np.repeat(np.arange(16) % CLASSES, 2)
    assert metrics["same"] == pytest.approx(np.mean(labels[:, None] == labels))
    assert assemble.pretraining(small).loss.text == "pulled, 16 images on 8"
    with np.load(small.data.path) as file:
        np.savez(small.data.path + ".unlabelled.npz", train_images=file["train_images"])
    small.data.path += ".unlabelled.npz"
    with pytest.raises(UserError, match=r"loss\.name=pulled needs labels, and the data have none"):
        assemble.pretraining(small)


def test_supervised_training_moves_the_encoder_by_the_labels_alone(small):
    """As if f and the classifier were one network under cross-entropy; g has no gradient."""
    small.train.objective = "supervised"
    small.optimizer.name, small.optimizer.scaling = "sgd", "none"
    small.optimizer.momentum, small.optimizer.weight_decay = 0.0, 0.0
    small.optimizer.learning_rate = 1.0
    small.train.steps = 10**9  # a cosine that has not begun to fall
    (before, _), (after, metrics) = steps(small, count=1)
    networks = assemble.networks(small, CLASSES, make_mesh(jax.devices()[:1]))
    images = batch(16)
    x = images["views"].reshape(-1, 12, 12, 3).astype(np.float32) / 255
    labels = np.repeat(images["label"], 2)

    @jax.jit
    @jax.value_and_grad
    def cross_entropy(params):
        variables = {"params": params["encoder"], "batch_stats": before.batch_stats["encoder"]}
        h, _ = networks.encoder.apply(variables, x, train=True, mutable=["batch_stats"])
        dense = params["classifier"]["dense"]
        logits = h @ dense["kernel"] + dense["bias"]
        log_p = jax.nn.log_softmax(logits)
        return -jnp.mean(log_p[jnp.arange(len(labels)), labels])

    loss, gradient = cross_entropy({k: before.params[k] for k in ("encoder", "classifier")})
    assert metrics["classifier_loss"] == pytest.approx(float(loss), rel=1e-5)
    for name in ("encoder", "classifier"):
        jax.tree.map(
            lambda a, b, g: np.testing.assert_allclose(b - a, -g, rtol=1e-3, atol=2e-6),
            before.params[name],
            after.params[name],
            gradient[name],
        )
    jax.tree.map(np.testing.assert_array_equal, before.params["head"], after.params["head"])


def test_supervised_training_by_lars_leaves_the_head(small):
    """Its gradient is 0, so that LARS's trust ratio would be coefficient / decay: 1,000."""
    small.train.objective = "supervised"
    small.optimizer.name, small.optimizer.learning_rate = "lars", 1.0
    small.optimizer.weight_decay = 1e-6
    (before, _), (after, _) = steps(small, count=1)
    jax.tree.map(np.testing.assert_array_equal, before.params["head"], after.params["head"])
    kernels = [s.params["classifier"]["dense"]["kernel"] for s in (before, after)]
    assert not np.array_equal(*kernels)


def test_supervised_training_needs_labels(small):
    small.train.objective = "supervised"
    assert assemble.pretraining(small).loss.text.startswith("cross-entropy of the labels; only")
    small.train.online_classifier = False
    with pytest.raises(UserError, match=r"train\.objective=supervised needs one label an image"):
        assemble.pretraining(small)


def test_a_step_has_the_rate_and_the_weights_before_it():
    """The metric is the rate that the step took, and weight decay is of the weights, not of their gradient."""

    def objective(params, batch_stats, batch):
        return Embedding(0 * params["encoder"]["kernel"] * batch["x"], jnp.zeros(()), {}, {})

    def schedule(step):
        return 0.5 / (step + 1)

    optimizer = make_optimizer(
        "sgd", schedule, weight_decay=0.1, momentum=0.0, trust_coefficient=0.0
    )
    step = make_step(objective, lambda z, _: (jnp.mean(z), {}), UpdateRule(optimizer, schedule))
    state = start_of({"encoder": {"kernel": jnp.full((2, 2), 3.0)}}, {}, optimizer)
    batch = {"x": np.ones((2, 2), np.float32), "label": np.zeros(2, np.int32)}
    state, metrics = step(state, batch)
    assert metrics["learning_rate"] == 0.5
    np.testing.assert_allclose(state.params["encoder"]["kernel"], 3 * (1 - 0.5 * 0.1), rtol=1e-6)


def test_a_step_that_ends_running_statistics_is_skipped():
    """They are moving averages: one that is infinite stays so."""

    def objective(params, batch_stats, batch):
        z = batch["x"] * params["encoder"]["kernel"]
        return Embedding(
            z, jnp.zeros(()), {}, {"variance": jnp.mean(1e30 * jnp.asarray(batch["x"]) ** 2)}
        )

    optimizer = make_optimizer("sgd", 0.1, weight_decay=0.0, momentum=0.0, trust_coefficient=0.0)
    params = {"encoder": {"kernel": jnp.ones(())}}
    rule = UpdateRule(optimizer, lambda step: 0.1, skip_not_finite=True)
    step = make_step(objective, lambda z, _: (jnp.mean(z), {}), rule)
    state = start_of(params, {"variance": jnp.ones(())}, optimizer)
    for size, skipped in ((1.0, 0), (1e10, 1)):
        batch = {"x": np.full((2, 1), size, np.float32), "label": np.zeros(2, np.int32)}
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"] + metrics["grad_norm"] + metrics["update_norm"])
        assert metrics["skipped_steps"] == skipped
    assert state.batch_stats["variance"] == np.float32(1e30)


def test_a_step_whose_gradient_alone_is_not_finite_is_skipped():
    """The root at 0 is finite, and its slope is not."""

    def loss(z, _):
        return jnp.mean(z), {}

    def objective(params, batch_stats, batch):
        z = jnp.sqrt(batch["x"] * params["encoder"]["kernel"])
        return Embedding(z, jnp.zeros(()), {}, batch_stats)

    optimizer = make_optimizer("sgd", 0.1, weight_decay=0.0, momentum=0.0, trust_coefficient=0.0)
    params = {"encoder": {"kernel": jnp.zeros(())}}
    rule = UpdateRule(optimizer, lambda step: 0.1, skip_not_finite=True)
    batch = {"x": np.ones((2, 1), np.float32), "label": np.zeros(2, np.int32)}
    state, metrics = make_step(objective, loss, rule)(start_of(params, {}, optimizer), batch)
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert metrics["skipped_steps"] == 1
    assert state.params["encoder"]["kernel"] == 0
