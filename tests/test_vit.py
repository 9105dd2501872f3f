"""The ViT against a forward pass in NumPy, and everything that must work without BatchNorm."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import simclr_jax
from simclr_jax import assemble, config
from simclr_jax.encoders import init_encoder
from simclr_jax.encoders.vit import ViT, positions
from simclr_jax.errors import UserError
from simclr_jax.modes.export import export
from simclr_jax.training.checkpoint import Checkpoints, Saving
from simclr_jax.training.state import count_parameters

SMALL = ViT(patch_size=4, layers=2, width=16, heads=2)


def abstract(network, size):
    return jax.eval_shape(lambda: init_encoder(network, size, jax.random.key(0)))


def variables_of(network, size):
    """Random numbers in every parameter, so that none is at a value that hides a mistake."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.5, x.shape).astype(np.float32), abstract(network, size)
    )


def apply(network, variables, images, train=False):
    return jax.jit(lambda v, x: network.apply(v, x, train=train))(variables, images)


def layer_norm(x, p):
    mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    """The approximation by tanh, Flax's default."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def forward(images, params, network):
    """h [N, D] in float64, image by image, head by head (Dosovitskiy et al. 2021, equations 1 to 4)."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    size, width = network.patch_size, network.width
    found = []
    for image in np.asarray(images, np.float64):
        rows, columns = image.shape[0] // size, image.shape[1] // size
        tokens = []
        for r in range(rows):
            for c in range(columns):
                patch = image[r * size : (r + 1) * size, c * size : (c + 1) * size]
                kernel = params["patches"]["kernel"]
                tokens.append(np.tensordot(patch, kernel, 3) + params["patches"]["bias"])
        x = np.asarray(tokens)
        for t in range(rows * columns):
            for k in range(width // 4):
                rate = 10_000 ** (-k / (width // 4))
                r, c = divmod(t, columns)
                for place, value in enumerate(
                    (math.sin(r * rate), math.cos(r * rate), math.sin(c * rate), math.cos(c * rate))
                ):
                    x[t, place * (width // 4) + k] += value
        for layer in range(network.layers):
            p = params[f"block{layer + 1}"]
            y = layer_norm(x, p["attention_norm"])
            a, heads = p["attention"], 0.0
            for head in range(network.heads):
                q, k, v = (
                    y @ a[name]["kernel"][:, head] + a[name]["bias"][head]
                    for name in ("query", "key", "value")
                )
                scores = q @ k.T / math.sqrt(width / network.heads)
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                heads = heads + weights @ v @ a["out"]["kernel"][head]
            x = x + heads + a["out"]["bias"]
            y = layer_norm(x, p["mlp_norm"])
            y = gelu(y @ p["mlp_in"]["kernel"] + p["mlp_in"]["bias"])
            x = x + y @ p["mlp_out"]["kernel"] + p["mlp_out"]["bias"]
        found.append(layer_norm(x, params["norm"]).mean(axis=0))
    return np.asarray(found)


def test_the_forward_pass_equals_loops_also_for_images_of_another_size():
    variables = variables_of(SMALL, 8)
    for height, width in ((8, 8), (12, 8)):
        images = np.random.default_rng(1).uniform(size=(3, height, width, 3)).astype(np.float32)
        h = apply(SMALL, variables, images)
        assert h.dtype == jnp.float32
        assert h.shape == (3, SMALL.width)
        np.testing.assert_allclose(h, forward(images, variables["params"], SMALL), atol=1e-5)


def test_the_attentions_softmax_is_float32_also_with_bfloat16():
    network = ViT(patch_size=4, layers=2, width=16, heads=2, dtype=jnp.bfloat16)
    variables, images = variables_of(network, 8), jnp.zeros((2, 8, 8, 3))
    program = jax.make_jaxpr(lambda v, x: network.apply(v, x, train=False))(variables, images)
    exponents = [x for name, x in operations(program.jaxpr) if name == "exp"]
    assert [x.shape for x in exponents] == network.layers * [(2, 2, 4, 4)]
    assert {x.dtype for x in exponents} == {jnp.dtype("float32")}


def operations(jaxpr):
    """The name of every operation and what it returns first, those within others too."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name, equation.outvars[0].aval
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "jaxpr"):
                yield from operations(inner.jaxpr)


def test_positions_tell_rows_from_columns():
    found = positions(3, 4, 8).reshape(3, 4, 8)
    assert len(np.unique(found.reshape(12, 8), axis=0)) == 12
    np.testing.assert_array_equal(found[0, 1, :4], found[0, 3, :4])
    np.testing.assert_array_equal(found[1, 2, 4:], found[2, 2, 4:])


def test_parameters_of_vit_s_are_those_published_less_what_it_does_not_have():
    """timm's vit_small_patch16_224 has 22,050,664: with 1000 classes (385,000), a class token (384)
    and learned positions of 197 tokens (75,648).
    """
    network = ViT(patch_size=16, layers=12, width=384, heads=6)
    count = count_parameters(abstract(network, 224)["params"])
    assert count == 22_050_664 - 385_000 - 384 - 75_648


def test_there_are_no_statistics_and_training_is_evaluation():
    variables = variables_of(SMALL, 8)
    assert variables["batch_stats"] == {}
    images = np.random.default_rng(1).uniform(size=(2, 8, 8, 3)).astype(np.float32)
    evaluated = apply(SMALL, variables, images)
    np.testing.assert_array_equal(apply(SMALL, variables, images, train=True), evaluated)
    assert SMALL.as_baseline() is SMALL


def test_bfloat16_stays_close_and_keeps_float32_parameters():
    variables = variables_of(SMALL, 8)
    half = SMALL.clone(dtype=jnp.bfloat16)
    images = np.random.default_rng(1).uniform(size=(4, 8, 8, 3)).astype(np.float32)
    kinds = {x.dtype for x in jax.tree.leaves(abstract(half, 8))}
    assert kinds == {jnp.dtype("float32")}
    found, exact = (apply(network, variables, images) for network in (half, SMALL))
    assert found.dtype == jnp.float32
    assert not np.array_equal(found, exact)
    np.testing.assert_allclose(found, exact, atol=0.05 * float(np.abs(exact).max()))


def test_blocks_computed_again_give_the_same_gradient():
    variables = variables_of(SMALL, 8)
    images = np.random.default_rng(1).uniform(size=(2, 8, 8, 3)).astype(np.float32)

    def gradient(network):
        def value(v):
            return jnp.sum(network.apply(v, images, train=True) ** 2)

        return jax.jit(jax.grad(value))(variables)

    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5),
        gradient(SMALL.clone(remat=True)),
        gradient(SMALL),
    )


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model.vit.patch_size": 5}, "patch_size=5 does not divide data.image_size=12"),
        ({"model.vit.heads": 3}, "width=16: expected a multiple of 3"),
        ({"model.vit.width": 18, "model.vit.heads": 1}, "width=18: expected a multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(tiny, options, says):
    config.set_options(tiny, options)
    with pytest.raises(UserError, match=says):
        assemble.encoder(tiny)


@pytest.mark.whole
def test_without_any_batchnorm_a_run_is_saved_restored_loaded_and_evaluated(tiny, tmp_path, capsys):
    tiny.model.head = "none"  # else the head has BatchNorm
    tiny.train.steps = 4
    workdir = str(tmp_path / "w")
    assert simclr_jax.pretrain(tiny, workdir)
    assert "BatchNorm" not in capsys.readouterr().out
    abstract = assemble.pretraining(tiny).job.abstract_state
    with Checkpoints(workdir, Saving(every_steps=4)) as checkpoints:
        state, options = checkpoints.restore_newest(abstract)
    assert state is not None
    assert options["step"] == state.step == 4
    assert state.batch_stats == abstract.batch_stats == {"encoder": {}, "head": {}}
    encoder = simclr_jax.load_encoder(workdir)
    assert encoder.variables["batch_stats"] == {}
    jax.tree.map(
        np.testing.assert_array_equal, encoder.variables["params"], state.params["encoder"]
    )
    assert encoder(np.zeros((2, 12, 12, 3), np.uint8)).shape == (2, 16)
    for shape in ((2, 14, 12, 3), (2, 12, 14, 3), (2, 3, 3, 3)):  # patches have 4 px
        with pytest.raises(
            ValueError, match=r"patch_size=4 does not divide data.image_size=(14|3)$"
        ):
            encoder(np.zeros(shape, np.uint8))
    tiny.data.image_size = 14
    with pytest.raises(UserError, match="does not divide data"):
        export(tiny, workdir, "stablehlo")
    assert not (tmp_path / "w" / "encoder.stablehlo").exists()
    result = simclr_jax.evaluate("knn", workdir)
    assert result is not None
    kinds = [row["features"] for row in result["rows"]]
    assert kinds == ["raw pixels", "untrained encoder", "encoder"]
