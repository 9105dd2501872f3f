"""Parameter counts, shapes, numeric types and the start of the encoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.heads import ProjectionHead
from simclr_jax.resnet import ResNet
from simclr_jax.train_state import count_parameters, init_encoder

# torchvision's models without their last layer (its counts less 1000 x (D + 1)).
TORCHVISION = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032, 101: 42_500_160, 152: 58_143_808}


def abstract(network, size=224):
    return jax.eval_shape(lambda: init_encoder(network, size, jax.random.key(0)))


def train_and_look(network, variables, images):
    """h in training mode, and {"batch_stats", "intermediates"}."""
    return network.apply(
        variables,
        images,
        train=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )


@pytest.mark.parametrize("depth", TORCHVISION)
def test_parameter_counts_equal_torchvisions(depth):
    assert count_parameters(abstract(ResNet(depth))["params"]) == TORCHVISION[depth]


@pytest.mark.parametrize(("width", "millions"), [(1, 24), (2, 94), (4, 375)])
def test_parameter_counts_equal_the_papers(width, millions):
    """Paper, table 6: of the encoder alone."""
    count = count_parameters(abstract(ResNet(50, width))["params"])
    assert round(count / 1e6) == millions


def test_depth_200_has_its_blocks():
    params = abstract(ResNet(200))["params"]
    convolutions = sum("Conv_" in k for block in params.values() for k in block)
    assert convolutions == 3 * (3 + 24 + 36 + 3)  # 198 layers in blocks, with the stem and g: 200


@pytest.mark.parametrize(
    ("depth", "width", "expected"), [(18, 1, 512), (50, 1, 2048), (50, 2, 4096), (10, 0.25, 128)]
)
def test_width_of_h(depth, width, expected):
    network = ResNet(depth, width)
    variables = abstract(network, 64)
    h = jax.eval_shape(
        lambda v: network.apply(v, jnp.zeros((2, 64, 64, 3)), train=False), variables
    )
    assert h.shape == (2, expected)
    assert network.width_of_h == expected


@pytest.mark.parametrize(("stem", "expected"), [("cifar", 32), ("strided", 16), ("imagenet", 8)])
def test_stems_reduce_by_1_2_and_4(stem, expected):
    network = ResNet(10, 0.125, stem)
    images = jnp.zeros((1, 32, 32, 3))
    variables = network.init(jax.random.key(0), images, train=False)
    _, seen = network.apply(variables, images, train=False, capture_intermediates=True)
    block = seen["intermediates"]["stage1_block1"]["__call__"][0]
    assert block.shape[1:3] == (expected, expected)


def test_blocks_start_as_their_shortcut():
    network = ResNet(18, 0.125, "cifar")
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    variables = network.init(jax.random.key(0), images, train=False)
    _, seen = network.apply(variables, images, train=False, capture_intermediates=True)
    seen = seen["intermediates"]
    # A block with an identity shortcut, on an input that is already positive.
    np.testing.assert_array_equal(
        seen["stage1_block2"]["__call__"][0], seen["stage1_block1"]["__call__"][0]
    )


def test_bfloat16_computes_in_bfloat16_and_keeps_statistics_in_float32():
    network = ResNet(10, 0.25, "strided", jnp.bfloat16)
    images = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    variables = network.init(jax.random.key(0), images, train=False)
    h, updated = train_and_look(network, variables, images)
    assert updated["intermediates"]["stage2_block1"]["__call__"][0].dtype == jnp.bfloat16
    assert h.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(updated["batch_stats"])} == {jnp.dtype("float32")}
    assert {x.dtype for x in jax.tree.leaves(variables["params"])} == {jnp.dtype("float32")}
    full = ResNet(10, 0.25, "strided").apply(variables, images, train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(h, full[0], atol=0.05 * float(jnp.max(full[0])))


def test_batch_norm_statistics_are_the_batches():
    network = ResNet(10, 0.125, "cifar")
    images = jax.random.uniform(jax.random.key(1), (8, 8, 8, 3))
    variables = network.init(jax.random.key(0), images, train=False)
    _, updated = train_and_look(network, variables, images)
    stem = np.asarray(updated["intermediates"]["stem"]["__call__"][0], np.float64)
    running = updated["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(running["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layers", "widths"),
    [
        ("none", 2, [32]),
        ("linear", 2, [32, 8]),
        ("nonlinear", 2, [32, 32, 8]),
        ("nonlinear", 3, [32, 32, 32, 8]),
    ],
)
def test_projection_head_returns_every_layer(kind, layers, widths):
    head = ProjectionHead(kind, layers, out_width=8)
    h = jax.random.normal(jax.random.key(0), (16, 32))
    variables = head.init(jax.random.key(1), h, train=False)
    outputs, _ = head.apply(variables, h, train=True, mutable=["batch_stats"])
    assert [x.shape[1] for x in outputs] == widths
    np.testing.assert_array_equal(outputs[0], h)
    for hidden in outputs[1:-1]:
        assert np.all(hidden >= 0)
    if kind != "none":
        assert np.any(outputs[-1] < 0)
        np.testing.assert_allclose(np.mean(outputs[-1], axis=0), 0, atol=1e-5)
