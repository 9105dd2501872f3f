"""Parameter counts, shapes, numeric types and the start of the encoders."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import assemble, config
from simclr_jax.encoders import init_encoder
from simclr_jax.encoders.heads import LinearClassifier, ProjectionHead
from simclr_jax.encoders.resnet import STEMS, ResNet
from simclr_jax.encoders.sk_resnet import SkBlock, SkResNet
from simclr_jax.training.state import count_parameters

# torchvision's models without their last layer (its counts less 1000 x (D + 1)).
TORCHVISION = {18: 11_176_512, 34: 21_284_672, 50: 23_508_032, 101: 42_500_160, 152: 58_143_808}


def start(network, size):
    return init_encoder(network, size, jax.random.key(0))


@functools.cache
def abstract(network, size=224):
    return jax.eval_shape(functools.partial(start, network, size))


def is_kernel(path):
    return path[-1].key == "kernel"


@functools.cache
def variables_of(network, size):
    """The variables as they start, but for kernels, which NumPy draws: to run the network's own start
    takes JAX seconds to compile.
    """
    rng = np.random.default_rng(0)

    @jax.jit
    def all_but_kernels():
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.zeros(()) if is_kernel(path) else x, start(network, size)
        )

    def drawn(path, shape, x):
        if not is_kernel(path):
            return x
        deviation = np.prod(shape.shape[:-1]) ** -0.5
        return rng.normal(size=shape.shape, scale=deviation).astype(np.float32)

    return jax.tree_util.tree_map_with_path(drawn, abstract(network, size), all_but_kernels())


def look(network, variables, images, train):
    """Returns h and {"batch_stats", "intermediates"}."""
    return network.apply(
        variables,
        images,
        train=train,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=True,
    )


@pytest.mark.parametrize("depth", TORCHVISION)
def test_parameter_counts_equal_torchvisions(depth):
    assert count_parameters(abstract(ResNet(depth))["params"]) == TORCHVISION[depth]


@pytest.mark.parametrize(("factor", "millions"), [(1, 24), (2, 94), (4, 375)])
def test_parameter_counts_equal_the_papers(factor, millions):
    """Paper, table 6: of the encoder alone."""
    count = count_parameters(abstract(ResNet(50, factor))["params"])
    assert round(count / 1e6) == millions


def test_depth_200_has_its_blocks():
    params = abstract(ResNet(200))["params"]
    convolutions = sum("Conv_" in k for block in params.values() for k in block)
    assert convolutions == 3 * (3 + 24 + 36 + 3)  # 198 layers in blocks, with the stem and g: 200


@pytest.mark.parametrize(
    ("depth", "factor", "expected"), [(18, 1, 512), (50, 1, 2048), (50, 2, 4096), (10, 0.25, 128)]
)
def test_width_of_h(depth, factor, expected):
    network = ResNet(depth, factor)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    apply = functools.partial(network.apply, train=False)
    h = jax.eval_shape(apply, abstract(network), images)
    assert h.shape == (2, expected)
    assert network.width == expected


@pytest.mark.parametrize(("stem", "expected"), [("cifar", 32), ("strided", 16), ("imagenet", 8)])
def test_stems_reduce_by_1_2_and_4(stem, expected):
    network = ResNet(10, 0.125, stem)
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    _, seen = jax.eval_shape(
        lambda v, x: look(network, v, x, train=False), abstract(network, 32), images
    )
    block = seen["intermediates"]["stage1_block1"]["__call__"][0]
    assert block.shape[1:3] == (expected, expected)


def test_blocks_start_as_their_shortcut():
    network = ResNet(18, 0.125, "cifar")
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))

    @jax.jit
    def blocks(variables, images):
        seen = look(network, variables, images, train=False)[1]["intermediates"]
        return [seen[f"stage1_block{i}"]["__call__"][0] for i in (1, 2)]

    first, second = blocks(variables_of(network, 16), images)
    # The second has an identity shortcut, and its input is already positive.
    assert np.any(first > 0)
    np.testing.assert_array_equal(second, first)


def test_bfloat16_computes_in_bfloat16_and_keeps_statistics_in_float32():
    half, full = (ResNet(10, 0.125, "strided", dtype) for dtype in (jnp.bfloat16, jnp.float32))
    images = jax.random.uniform(jax.random.key(1), (8, 16, 16, 3))
    variables = variables_of(full, 16)
    assert abstract(half, 16) == abstract(full, 16)
    assert {x.dtype for x in jax.tree.leaves(abstract(half, 16))} == {jnp.dtype("float32")}

    @jax.jit
    def both(variables, images):
        h, seen = look(half, variables, images, train=True)
        block = seen["intermediates"]["stage2_block1"]["__call__"][0]
        return h, block, seen["batch_stats"], look(full, variables, images, train=True)[0]

    h, block, statistics, expected = both(variables, images)
    assert block.dtype == jnp.bfloat16
    assert h.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(statistics)} == {jnp.dtype("float32")}
    assert np.any(h != expected)
    np.testing.assert_allclose(h, expected, atol=0.05 * float(jnp.max(expected)))


def test_batch_norm_statistics_are_the_batches():
    network = ResNet(10, 0.125, "cifar")
    images = jax.random.uniform(jax.random.key(1), (8, 8, 8, 3))

    @jax.jit
    def stem_and_its_statistics(variables, images):
        _, seen = look(network, variables, images, train=True)
        return seen["intermediates"]["stem"]["__call__"][0], seen["batch_stats"]["stem_norm"]

    stem, running = stem_and_its_statistics(variables_of(network, 8), images)
    stem = np.asarray(stem, np.float64)
    np.testing.assert_allclose(running["mean"], 0.1 * stem.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * stem.var((0, 1, 2)), rtol=1e-5)


HEADS = {
    ("none", 2): [32],
    ("linear", 2): [32, 8],
    ("nonlinear", 2): [32, 32, 8],
    ("nonlinear", 3): [32, 32, 32, 8],
}
H = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)


@functools.cache
def outputs_of_heads():
    """{(kind, layers): every layer's output}, by one program."""

    def outputs(kind, layers):
        head = ProjectionHead(kind, layers, out_width=8)
        variables = head.init(jax.random.key(1), H, train=False)
        return head.apply(variables, H, train=True, mutable=["batch_stats"])[0]

    return jax.jit(lambda: {key: outputs(*key) for key in HEADS})()


@pytest.mark.parametrize(("kind", "layers"), HEADS)
def test_projection_head_returns_every_layer(kind, layers):
    outputs = outputs_of_heads()[kind, layers]
    assert [x.shape[1] for x in outputs] == HEADS[kind, layers]
    np.testing.assert_array_equal(outputs[0], H)
    for hidden in outputs[1:-1]:
        assert np.all(hidden >= 0)
    if kind != "none":
        assert np.any(outputs[-1] < 0)
        np.testing.assert_allclose(np.mean(outputs[-1], axis=0), 0, atol=1e-5)


def test_kernels_start_as_published():
    """Variance 1 / fan-in, cut off at two deviations; dense kernels N(0, 0.01)."""
    start = jax.jit(lambda: init_encoder(ResNet(10, 0.5, "cifar"), 8, jax.random.key(0)))
    kernel = start()["params"]["stage4_block1"]["Conv_1"]["kernel"]
    assert float(jnp.std(kernel)) == pytest.approx(np.prod(kernel.shape[:3]) ** -0.5, rel=0.02)
    assert float(jnp.abs(kernel).max() / jnp.std(kernel)) < 2.4
    h = np.ones((2, 64), np.float32)
    for network, arguments in ((ProjectionHead(), (h, False)), (LinearClassifier(10), (h,))):
        params = network.init(jax.random.key(0), *arguments)["params"]
        for kernel in (x for x in jax.tree.leaves(params) if x.ndim == 2):
            assert float(kernel.std()) == pytest.approx(0.01, rel=0.1)


def test_a_block_of_selective_kernels_starts_as_its_shortcut():
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 16))
    block = SkBlock(4, 1, True, False, jnp.float32, 0.9, 0, True)

    @jax.jit
    def start(x):
        return block.apply(block.init(jax.random.key(0), x, train=False), x, train=False)

    np.testing.assert_array_equal(start(x), np.maximum(x, 0))


def test_stems_are_the_published_ones():
    """(size, stride of the first convolution, max-pool); "strided" is ours."""
    assert STEMS == {"imagenet": (7, 2, True), "cifar": (3, 1, False), "strided": (3, 2, False)}


@pytest.mark.parametrize("zero", [False, True])
def test_the_option_of_the_last_scale_reaches_the_encoder(zero):
    c = config.default()
    c.model.zero_init_residual = zero
    assert assemble.encoder(c).zero_init_residual == zero


@pytest.mark.parametrize(
    "network",
    [
        ResNet(10, 0.0625, "cifar", norm_group=4, zero_init_residual=False),
        SkResNet(50, 0.0625, "cifar", norm_group=4, zero_init_residual=False),
        ProjectionHead(norm_group=4),
    ],
    ids=["resnet", "sk_resnet", "head"],
)
def test_groups_reach_every_batchnorm(network):
    """Of two groups, the second changes nothing of what becomes of the first."""
    shape = (8, 16) if isinstance(network, ProjectionHead) else (8, 8, 8, 3)
    x = jax.random.uniform(jax.random.key(0), shape)
    variables = jax.jit(lambda: network.init(jax.random.key(1), x, train=False))()

    @jax.jit
    def represent(x):
        found, _ = network.apply(variables, x, train=True, mutable=["batch_stats"])
        return found[-1] if isinstance(found, list | tuple) else found

    one, other = represent(x), represent(x.at[4:].multiply(x[4:]))
    np.testing.assert_allclose(one[:4], other[:4], rtol=1e-5, atol=1e-6)
    assert np.abs(one[4:] - other[4:]).max() > 1e-4
