"""The cached gradient of a batch in microbatches is the gradient of the batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images
from flax import linen as nn

from simclr_jax.encoders.heads import LinearClassifier, ProjectionHead
from simclr_jax.losses import nt_xent
from simclr_jax.training.gradients import Embedding, cached_gradient, whole_gradient
from simclr_jax.training.objectives import contrastive, distilled, no_loss
from simclr_jax.training.state import Networks


def setup(images=12):
    """(objective, params, batch) of a network of two layers without BatchNorm."""
    views = np.stack([random_images(images, 6, 6), random_images(images + 1, 6, 6)[1:]], axis=1)
    batch = {"views": views / np.float32(255), "label": np.arange(images) % 3}
    rng = np.random.default_rng(0)
    params = {
        name: rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        for name, shape in {"f": (108, 32), "g": (32, 8), "classifier": (32, 3)}.items()
    }

    def objective(params, batch_stats, batch):
        x = batch["views"].reshape(-1, 108)
        h = jnp.tanh(x @ params["f"])
        log_p = jax.nn.log_softmax(h @ params["classifier"])
        loss = -jnp.mean(log_p[jnp.arange(len(h)), jnp.repeat(batch["label"], 2)])
        metrics = {"mean": jnp.mean(h)}
        return Embedding(h @ params["g"], loss, metrics, batch_stats + jnp.mean(x))

    return objective, params, batch


def loss(z, labels):
    value, metrics = nt_xent(z, 0.1)
    return value, metrics | {"labels": jnp.mean(labels, dtype=jnp.float32)}


def gradient(objective, params, batch, microbatches=1, loss=loss, batch_stats=1.0):
    return computed(objective, microbatches, loss)(params, batch_stats, batch)


@functools.cache
def computed(objective, microbatches, loss):
    def compute(params, batch_stats, batch):
        if microbatches == 1:
            return whole_gradient(objective, loss, params, batch_stats, batch)
        return cached_gradient(objective, loss, params, batch_stats, batch, microbatches)

    return jax.jit(compute)


def worst(found, expected):
    return max(
        float(np.abs(x - y).max() / np.abs(y).max())
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    )


@pytest.mark.parametrize("microbatches", [2, 3, 12])
def test_the_gradient_is_the_whole_batchs(microbatches):
    objective, params, batch = setup()
    expected = gradient(objective, params, batch)
    found = gradient(objective, params, batch, microbatches)
    assert worst(found.grads, expected.grads) < 1e-5
    # The loss, its metrics, those of the embeddings, and the statistics.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), found[1:], expected[1:])


class Flat(nn.Module):
    """An encoder of one layer."""

    @nn.compact
    def __call__(self, x, train):
        return jnp.tanh(nn.Dense(8)(x.reshape(len(x), -1)))


@functools.cache
def objective_with_labels(name):
    """(objective, loss over z, params, batch_stats) of the package's own objectives, on a network of two layers."""
    encoder, classifier, key = Flat(), LinearClassifier(3), jax.random.key(0)
    params = {
        "encoder": encoder.init(key, jnp.zeros((1, 6, 6, 3)), False)["params"],
        "classifier": classifier.init(key, jnp.zeros((1, 8)))["params"],
    }

    def views(batch):
        return batch["views"]

    def classify(params, x):
        h = encoder.apply({"params": params["encoder"]}, x, False)
        return classifier.apply({"params": params["classifier"]}, h)

    if name == "distilled":
        params |= {"teacher": jax.tree.map(lambda x: 2 * x, params)}

        def student(params, batch_stats, x):
            return classify(params, x), {}

        def teacher(variables, x):
            return classify(variables["params"], x)

        return distilled(student, teacher, views, 0.5, 0.3), no_loss, params, {"teacher": {}}
    params["head"] = {}
    networks = Networks(encoder, ProjectionHead("none"), classifier)
    made = contrastive(networks, views, by_labels=name == "supervised")
    return made, loss, params, {"encoder": {}, "head": {}}


@pytest.mark.parametrize("name", ["contrastive", "supervised", "distilled"])
@pytest.mark.parametrize("microbatches", [2, 3])
@pytest.mark.parametrize("labelled", [[0, 6], [0, 1, 3, 4, 7], []])
def test_the_gradient_is_the_whole_batchs_wherever_the_labels_are(name, microbatches, labelled):
    """Images 0 and 6 are in the first microbatch of 2 and of 3, so that the others have no label."""
    _, _, batch = setup()
    batch["label"] = np.where(np.isin(np.arange(12), labelled), batch["label"], -1)
    objective, of_z, params, batch_stats = objective_with_labels(name)
    whole, parts = (
        gradient(objective, params, batch, count, of_z, batch_stats) for count in (1, microbatches)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), parts, whole)


def test_a_mean_over_the_losses_of_microbatches_is_rejected():
    """What accumulating gradients gives: fewer negatives, another gradient."""
    objective, params, batch = setup()
    expected = gradient(objective, params, batch).grads
    halves = [jax.tree.map(lambda x, h=h: x[h * 6 : h * 6 + 6], batch) for h in (0, 1)]
    grads = (gradient(objective, params, half).grads for half in halves)
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *grads)
    assert worst(mean, expected) > 0.01
