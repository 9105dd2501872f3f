"""The cached gradient of a batch in microbatches is the gradient of the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images

from simclr_jax.gradients import Embedding, cached_gradient, whole_gradient
from simclr_jax.heads import ProjectionHead
from simclr_jax.losses import nt_xent
from simclr_jax.resnet import ResNet

ENCODER, HEAD = ResNet(10, 0.125, "strided"), ProjectionHead(out_width=16)


def setup(images=12):
    """(embed, params, batch) of a network whose BatchNorm statistics are given."""
    views = np.stack([random_images(images, 12, 12), random_images(images + 1, 12, 12)[1:]], axis=1)
    batch = {"views": views / np.float32(255), "label": np.arange(images) % 3}
    f = ENCODER.init(jax.random.key(0), batch["views"][:, 0], train=False)
    g = HEAD.init(jax.random.key(1), jnp.zeros((1, ENCODER.width_of_h)), train=False)

    def embed(params, batch):
        x = batch["views"].reshape(-1, 12, 12, 3)
        h = ENCODER.apply({"params": params["f"], "batch_stats": f["batch_stats"]}, x, train=False)
        z = HEAD.apply({"params": params["g"], "batch_stats": g["batch_stats"]}, h, train=False)[-1]
        logits = h @ params["classifier"]
        log_p = jax.nn.log_softmax(logits)[jnp.arange(len(h)), jnp.repeat(batch["label"], 2)]
        return Embedding(z, -jnp.mean(log_p), {"mean": jnp.mean(h)})

    classifier = jax.random.normal(jax.random.key(2), (ENCODER.width_of_h, 3))
    return embed, {"f": f["params"], "g": g["params"], "classifier": classifier}, batch


def loss(z):
    return nt_xent(z, 0.1)


def worst(found, expected):
    return max(
        float(np.abs(x - y).max() / np.abs(y).max())
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        if np.any(y)
    )


@pytest.mark.parametrize(
    "microbatches", [pytest.param(n, marks=pytest.mark.slow) for n in (2, 3, 12)]
)
def test_the_gradient_is_the_whole_batchs(microbatches):
    embed, params, batch = setup()
    expected, told = jax.jit(lambda p: whole_gradient(embed, loss, p, batch))(params)
    found, told_too = jax.jit(lambda p: cached_gradient(embed, loss, p, batch, microbatches))(
        params
    )
    assert worst(found, expected) < 1e-5
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), told_too, told)


def test_a_mean_over_the_losses_of_microbatches_is_rejected():
    """What accumulating gradients gives: fewer negatives, another gradient."""
    embed, params, batch = setup()
    gradient = jax.jit(lambda params, batch: whole_gradient(embed, loss, params, batch)[0])
    expected = gradient(params, batch)
    halves = [jax.tree.map(lambda x, h=h: x[h * 6 : h * 6 + 6], batch) for h in (0, 1)]
    mean = jax.tree.map(lambda x, y: (x + y) / 2, *(gradient(params, half) for half in halves))
    assert worst(mean, expected) > 0.01
