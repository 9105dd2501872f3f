"""Weights of other programs: the published checkpoints, torchvision's names, and what does not fit."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import encoder_checkpoint
from etils import epath
from flax import linen as nn
from safetensors.numpy import load_file, save_file

import simclr_jax
from simclr_jax import assemble, config, main, weights
from simclr_jax.encoders import ENCODERS, init_encoder
from simclr_jax.encoders.resnet import ResNet
from simclr_jax.encoders.sk_resnet import SkResNet
from simclr_jax.errors import UserError
from simclr_jax.files import locked
from simclr_jax.modes.export import export
from simclr_jax.modes.import_weights import import_weights
from simclr_jax.training.record import run_record
from simclr_jax.training.state import count_parameters
from simclr_jax.weights import contents, published, tensorflow, torchvision
from simclr_jax.weights.contents import layers_in_order

PUBLISHED = pathlib.Path(__file__).parent / "data" / "published"

CASES = {
    "tf1_sk0": ("tf1_sk0", "resnet", 50, None),
    "tf1_sk1": ("tf1_sk1", "sk_resnet", 50, None),
    "tf2_sk0": ("tf2_sk0", "resnet", 50, 10),
    "tf2_r18_savedmodel": ("tf2_r18_savedmodel", "resnet", 18, 10),
}


def golden_images(size=64):
    return np.random.RandomState(0).rand(2, size, size, 3).astype("float32")


def variables_of(case):
    return dict(tensorflow.read(PUBLISHED / case))


def features_of(found, images):
    network = ENCODERS[found.model["name"]](config.default().model.to_dict() | found.model)
    return np.asarray(network.apply(found.encoder, images, train=False))


# The published code's features in float64, written anew: NumPy, one image at a time, no Flax.


def conv(x, kernel, stride=1):
    """x [H, W, C] by kernel [k, k, C, D], padded by (k - 1) / 2 on each side."""
    k = kernel.shape[0]
    x = np.pad(x, (((k - 1) // 2,) * 2, ((k - 1) // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(0, 1))[::stride, ::stride]
    return np.einsum("hwcij,ijcd->hwd", windows, kernel)


def averages(x, stride):
    height, width, channels = x.shape
    out = np.zeros((-(-height // stride), -(-width // stride), channels))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            window = x[i * stride : i * stride + 2, j * stride : j * stride + 2]
            count = 4 if stride == 2 else window.shape[0] * window.shape[1]
            out[i, j] = window.sum((0, 1)) / count
    return out


def biggest(x):
    """3x3 maxima at stride 2, padded as TensorFlow's SAME."""
    out = [-(-n // 2) for n in x.shape[:2]]
    before = [max(0, (m - 1) * 2 + 3 - n) // 2 for m, n in zip(out, x.shape[:2], strict=True)]
    return np.array(
        [
            [
                x[
                    max(0, 2 * i - before[0]) : 2 * i - before[0] + 3,
                    max(0, 2 * j - before[1]) : 2 * j - before[1] + 3,
                ].max((0, 1))
                for j in range(out[1])
            ]
            for i in range(out[0])
        ]
    )


class Reader:
    """Hands out a TF1 checkpoint's layers in the order in which the program made them."""

    def __init__(self, variables):
        self.variables = {
            k: np.float64(v) for k, v in variables.items() if k.startswith("base_model")
        }
        self.convolutions = self.norms = 0

    def kernel(self):
        suffix = f"_{self.convolutions}" if self.convolutions else ""
        self.convolutions += 1
        return self.variables[f"base_model/conv2d{suffix}/kernel"]

    def norm(self, x):
        name = f"base_model/batch_normalization{f'_{self.norms}' if self.norms else ''}"
        self.norms += 1
        gamma, beta, mean, var = (
            self.variables[f"{name}/{part}"]
            for part in ("gamma", "beta", "moving_mean", "moving_variance")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * gamma + beta


def sk_resnet_50(variables, x):
    read = Reader(variables)

    def layer(x, stride=1):
        return np.maximum(read.norm(conv(x, read.kernel(), stride)), 0)

    for stride in (2, 1, 1):
        x = layer(x, stride)
    x = biggest(x)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            shortcut = x
            if not block:
                shortcut = read.norm(conv(averages(x, stride), read.kernel()))
            x = layer(x)
            both = layer(x, stride)
            streams = np.split(both, 2, axis=-1)
            pooled = (streams[0] + streams[1]).mean((0, 1), keepdims=True)
            scores = np.split(conv(layer(pooled), read.kernel()), 2, axis=-1)
            share = np.exp(scores) / np.exp(scores).sum(0)
            x = share[0] * streams[0] + share[1] * streams[1]
            x = np.maximum(read.norm(conv(x, read.kernel())) + shortcut, 0)
    return x.mean((0, 1))


@pytest.mark.parametrize("case", CASES)
def test_features_are_those_of_the_published_code(case):
    folder, name, depth, classes = CASES[case]
    found = weights.read(str(PUBLISHED / folder))
    assert (found.model["name"], found.model["depth"]) == (name, depth)
    assert found.model["width"] == 0.0625
    assert found.model["head_layers"] == 3
    assert found.model["head_width"] == 128
    assert (found.classifier and found.classifier["dense"]["bias"].size) == classes
    wanted = np.load(PUBLISHED / folder / "h.npy")
    np.testing.assert_allclose(
        features_of(found, golden_images()), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )


@pytest.mark.parametrize("size", [33, pytest.param(72, marks=pytest.mark.whole)])
def test_selective_kernels_on_odd_maps_equal_loops_in_float64(size):
    variables = variables_of("tf1_sk1")
    images = golden_images(size)[:1]
    wanted = sk_resnet_50(variables, np.float64(images[0]))
    found = features_of(published.convert(variables), images)[0]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_the_order_of_layers_matters():
    """A reader that takes main path and shortcut in the other order must fail."""
    variables = variables_of("tf1_sk0")
    first, second = "base_model/conv2d_1/kernel", "base_model/conv2d_2/kernel"
    swapped = variables | {first: variables[second], second: variables[first]}
    with pytest.raises(UserError, match="has shape"):
        published.convert(swapped)
    norms = [f"base_model/batch_normalization_{i}/gamma" for i in (2, 3)]
    swapped = variables | {norms[0]: variables[norms[1]], norms[1]: variables[norms[0]]}
    wanted = np.load(PUBLISHED / "tf1_sk0" / "h.npy")
    assert np.abs(features_of(published.convert(swapped), golden_images()) - wanted).max() > 1e-3


def test_numbers_may_start_anywhere():
    """Layers made before the encoder push its numbers up."""
    import re

    def later(name):
        pattern = r"(conv2d|batch_normalization)(?:_(\d+))?/(kernel|gamma|beta|moving)"
        return re.sub(pattern, lambda m: f"{m[1]}_{int(m[2] or 0) + 7}/{m[3]}", name)

    variables = variables_of("tf2_sk0")
    moved = {later(name) if name.startswith("resnet") else name: x for name, x in variables.items()}
    assert set(moved) != set(variables)
    found, wanted = published.convert(moved), published.convert(variables)
    jax.tree.map(np.testing.assert_array_equal, found.encoder, wanted.encoder)


def test_sync_batch_normalization_is_a_batch_norm():
    variables = variables_of("tf2_sk0")
    renamed = {
        name.replace("/batch_normalization", "/sync_batch_normalization"): x
        for name, x in variables.items()
    }
    found, wanted = published.convert(renamed), published.convert(variables)
    jax.tree.map(np.testing.assert_array_equal, found.encoder, wanted.encoder)
    jax.tree.map(np.testing.assert_array_equal, found.head, wanted.head)


def test_what_is_not_of_the_encoder_is_counted():
    variables = variables_of("tf1_sk0")
    more = {f"ema_model/{name}": x + 1 for name, x in variables.items()}
    more |= {f"{name}/Momentum": x + 2 for name, x in variables.items()}
    found = published.convert(variables | more | {"global_step": np.int64(250228)})
    count = len(variables)
    assert found.skipped == {"ema_model": count, "momentum": count, "counters": 1}
    jax.tree.map(np.testing.assert_array_equal, found.encoder, published.convert(variables).encoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v | {"base_model/extra/kernel": np.zeros(3)}, "base_model/extra/kernel"),
        (lambda v: without(v, "base_model/conv2d_9/kernel"), "52 convolutions"),
        (
            lambda v: without(v, "base_model/batch_normalization_4/beta"),
            "no variable for params/stage1_block1/BatchNorm_2/bias",
        ),
        (
            lambda v: v | {"base_model/conv2d_5/kernel": np.zeros((1, 1, 16, 5))},
            "base_model/conv2d_5/kernel has shape",
        ),
        (
            lambda v: v | {"head_contrastive/nl_2/batch_normalization/beta": np.zeros(128)},
            "nl_2/batch_normalization/beta is one variable too many",
        ),
        (lambda v: without(v, "head_contrastive/nl_1/dense/kernel"), "one variable too many"),
        (lambda v: {}, "no convolution of an encoder"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(UserError, match=message) as error:
        published.convert(change(variables_of("tf1_sk0")))
    assert "\n" not in str(error.value)


def without(variables, name):
    return {k: v for k, v in variables.items() if k != name}


# The published table (SimCLR v2, README of google-research/simclr), millions of parameters.
@pytest.mark.parametrize(
    ("depth", "width", "kernels", "exact"),
    [
        (50, 1, False, 23_508_032),
        (50, 1, True, 35_215_584),
        (50, 2, True, 140e6),
        (101, 1, True, 65e6),
        (101, 2, True, 257e6),
        (152, 1, True, 89e6),
        (152, 2, True, 354e6),
        (152, 3, True, 795e6),
    ],
)
def test_sizes_are_the_published_ones(depth, width, kernels, exact):
    network = (SkResNet if kernels else ResNet)(depth=depth, channel_factor=width)
    shapes = jax.eval_shape(lambda key: init_encoder(network, 224, key), jax.random.key(0))
    found = count_parameters(shapes["params"])
    if isinstance(exact, int):
        assert found == exact
    else:
        assert abs(found - exact) <= 0.7e6  # the table is in whole millions


def test_selective_kernels_need_bottlenecks():
    with pytest.raises(UserError, match=r"model.depth=18 has no bottleneck"):
        ENCODERS["sk_resnet"](config.default().model.to_dict() | {"depth": 18})


def test_every_layer_has_its_place_in_the_order():
    for network in (
        SkResNet(depth=50, channel_factor=0.0625),
        ResNet(depth=18, project_shortcuts=True),
    ):
        shapes = jax.eval_shape(lambda key, n=network: init_encoder(n, 64, key), jax.random.key(0))
        convolutions, norms = layers_in_order(shapes["params"])
        flat = [
            tuple(k.key for k in path)
            for path, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])
        ]
        assert sorted(convolutions) == sorted(p[:-1] for p in flat if p[-1] == "kernel")
        assert sorted(norms) == sorted(p[:-1] for p in flat if p[-1] == "scale")


# torchvision's names


@pytest.mark.parametrize("project", [False, True])
def test_an_export_comes_back(project, tmp_path):
    network = ResNet(10, 0.25, "strided", project_shortcuts=project)
    variables = jax.device_get(init_encoder(network, 16, jax.random.key(1)))
    file = tmp_path / "w.safetensors"
    save_file(torchvision.torchvision_weights(variables), file, torchvision.architecture(network))
    found = weights.read(str(file))
    jax.tree.map(np.testing.assert_array_equal, found.encoder, variables)
    assert found.model == {
        "name": "resnet",
        "depth": 10,
        "width": 0.25,
        "stem": "strided",
        "standardize": "none",
        "pool_padding": "same",
        "project_shortcuts": project,
        "head": "none",
    }


def torchvision_file(path, **more):
    network = ResNet(18, 0.125, pool_padding="symmetric")
    variables = jax.device_get(init_encoder(network, 16, jax.random.key(1)))
    arrays = torchvision.torchvision_weights(variables)
    arrays |= {"bn1.num_batches_tracked": np.array(3)} | more
    save_file(arrays, path)
    return variables


def test_torchvisions_weights_get_torchvisions_pixels_and_padding(tmp_path):
    rng = np.random.default_rng(0)
    classifier = {
        "fc.weight": rng.normal(size=(7, 64)).astype("float32"),
        "fc.bias": rng.normal(size=7).astype("float32"),
    }
    torchvision_file(tmp_path / "w.safetensors", **classifier)
    found = weights.read(str(tmp_path / "w.safetensors"))
    assert found.model["standardize"] == "imagenet"
    assert found.model["pool_padding"] == "symmetric"
    np.testing.assert_array_equal(found.classifier["dense"]["kernel"], classifier["fc.weight"].T)
    images = golden_images()
    plain = ResNet(18, 0.125, pool_padding="symmetric")
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    wanted = plain.apply(found.encoder, (images - mean) / deviation, train=False)
    np.testing.assert_allclose(features_of(found, images), wanted, rtol=0, atol=1e-5)
    unstandardised = np.asarray(plain.apply(found.encoder, images, train=False))
    assert np.abs(unstandardised - wanted).max() > 1e-3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"layer1.0.conv9.weight": np.zeros((1, 1, 1, 1))},
            "layer1.0.conv9.weight is one variable",
        ),
        ({"layer1.7.conv1.weight": np.zeros((8, 8, 3, 3))}, "blocks in the stages"),
        ({"bn1.weight": np.zeros(3)}, "bn1.weight has shape"),
        ({"fc.weight": np.zeros((7, 3))}, "fc.weight and fc.bias"),
        ({"fc.weight": np.zeros(7), "fc.bias": np.zeros(7)}, "fc.weight and fc.bias"),
        ({"fc.weight": np.zeros((7, 64)), "fc.bias": np.zeros(5)}, "fc.weight and fc.bias"),
        ({"conv1.weight": np.zeros((8, 3, 7))}, "4 dimensions of a 2-D kernel"),
        (
            {"bn1.bias": np.array([0, np.nan, 0, np.inf, 0, 0, 0, 0], np.float32)},
            "is damaged: of encoder/params/stem_norm/bias, 2 numbers are not finite",
        ),
    ],
)
def test_other_networks_of_torchvision_are_refused(more, message, tmp_path):
    torchvision_file(tmp_path / "w.safetensors", **more)
    with pytest.raises(UserError, match=message):
        weights.read(str(tmp_path / "w.safetensors"))


def test_a_description_of_no_network_is_refused():
    weights = torchvision.torchvision_weights(init_encoder(ResNet(18), 32, jax.random.key(0)))
    with pytest.raises(UserError, match="stem=wide: expected imagenet or cifar or strided"):
        torchvision.convert(weights, {"stem": "wide"})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.safetensors", None, "cannot be read"),
        ("bad.safetensors", b"no", "cannot be read"),
        ("model.pth", b"\x80\x04.", "a pickle can run any program"),
        ("missing", None, "does not exist"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(name, content, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        weights.read(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_the_current_folder_is_a_source_like_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="expected"):
        weights.read(".")
    (tmp_path / "m-3.index").write_bytes(b"")
    found = tensorflow.prefix_of(epath.Path("."))
    assert str(found) == str(tmp_path / "m-3")


def test_an_import_waits_for_no_other_program(tmp_path):
    torchvision_file(tmp_path / "w.safetensors")
    (tmp_path / "w").mkdir()
    with locked(tmp_path / "w", ""), pytest.raises(UserError, match="another program"):
        import_weights(config.default(), str(tmp_path / "w"), str(tmp_path / "w.safetensors"))


def test_a_workdir_needs_no_import(tmp_path):
    (tmp_path / "w" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        UserError, match="is a workdir, which needs no import: give it as --workdir"
    ):
        weights.read(str(tmp_path / "w"))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    shutil.copytree(PUBLISHED / "tf1_sk0", tmp_path / "w")
    (data,) = (tmp_path / "w").glob("*.data-*")
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        weights.read(str(tmp_path / "w"))


# --mode=import, and what can be done with it


def run(*arguments):
    main.main([*arguments])


def test_an_imported_workdir_serves(tmp_path, capsys):
    workdir = str(tmp_path / "w")
    run("--mode=import", f"--input={PUBLISHED / 'tf2_r18_savedmodel'}", f"--workdir={workdir}")
    said = capsys.readouterr().out
    assert "ResNet-18 x0.0625" in said
    assert "classifier  of 10 classes" in said
    encoder = simclr_jax.load_encoder(workdir)
    wanted = np.load(PUBLISHED / "tf2_r18_savedmodel" / "h.npy")
    np.testing.assert_allclose(
        encoder(golden_images()), wanted, rtol=0, atol=1e-5 * np.abs(wanted).max()
    )
    record = json.loads((tmp_path / "w" / "config.json").read_text())
    assert record["imported"]["kind"] == "google-research/simclr"
    run("--mode=export", "--format=safetensors", f"--workdir={workdir}")
    assert "layer1.0.downsample.0.weight" in load_file(tmp_path / "w" / "encoder.safetensors")
    with pytest.raises(UserError, match="holds checkpoints already"):
        run("--mode=import", f"--input={PUBLISHED / 'tf1_sk0'}", f"--workdir={workdir}")
    with pytest.raises(UserError, match="holds imported weights"):
        run(f"--workdir={workdir}", "--config=configs/digits.py")


def test_a_classifier_on_a_layer_that_the_file_lacks_is_refused(tmp_path):
    classifier = {"fc.weight": np.ones((7, 64), np.float32), "fc.bias": np.ones(7, np.float32)}
    torchvision_file(tmp_path / "w.safetensors", **classifier)
    with pytest.raises(UserError, match="from_layer=1: the projection head has 0 layers"):
        run(
            "--mode=import",
            f"--input={tmp_path / 'w.safetensors'}",
            f"--workdir={tmp_path / 'w'}",
            "--config.finetune.from_layer=1",
        )
    assert not (tmp_path / "w").exists()


def test_an_encoder_alone_is_imported_whatever_layer_is_to_be_fine_tuned(tmp_path, capsys):
    """As by the options of configs/imagenet_v2.py."""
    torchvision_file(tmp_path / "w.safetensors")
    workdir = tmp_path / "w"
    run(
        "--mode=import",
        f"--input={tmp_path / 'w.safetensors'}",
        f"--workdir={workdir}",
        "--config.finetune.from_layer=1",
    )
    assert "finetune.from_layer=0, as the file has no projection head" in capsys.readouterr().out
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["finetune"]["from_layer"] == 0


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('["a", "b"]', ["a", "b"]),
        ('["a"]', None),
        ("{", None),
        ("null", None),
    ],
)
def test_the_names_of_classes_come_back(tmp_path, written, read):
    arrays = torchvision.torchvision_weights(
        jax.device_get(init_encoder(ResNet(18, 0.125), 16, jax.random.key(1)))
    )
    arrays |= {"fc.weight": np.ones((2, 64), np.float32), "fc.bias": np.ones(2, np.float32)}
    assert torchvision.convert(arrays, {"classes": written}).classes == read
    assert torchvision.convert(arrays, {}).classes is None


@pytest.mark.parametrize(
    ("format", "depth", "width"),
    [("safetensors", 10, 0.125), pytest.param("huggingface", 18, 1.0, marks=pytest.mark.whole)],
)
def test_an_export_that_is_imported_takes_images_as_before(tmp_path, capsys, format, depth, width):
    c, options = config.default(), config.default()
    c.data.source = options.data.source = "synthetic"
    c.model.depth, c.model.width, c.model.head, c.model.pool_padding = (
        depth,
        width,
        "none",
        "symmetric",
    )
    c.data.image_size, c.data.eval_crop, c.views.antialias, c.data.sample_bits = 32, 0.75, True, 12
    workdir, again = encoder_checkpoint(c, tmp_path / "w"), str(tmp_path / "again")
    file = tmp_path / "model.safetensors"
    export(c, workdir, format, str(file if format == "safetensors" else tmp_path))
    capsys.readouterr()
    import_weights(options, again, str(file))
    assert "images      32 px: the middle 75.0% of each side" in capsys.readouterr().out
    assert simclr_jax.load_encoder(again).view == assemble.evaluation_view(c)
    if format == "huggingface":
        export(config.from_dict(run_record(again)["config"]), again, format, str(tmp_path / "hub"))
        card = (tmp_path / "hub" / "README.md").read_text()
        assert "Imported, not trained, by simclr_jax, for images of 32 px." in card
        assert "simclr\n" not in card


def test_names_with_a_prefix_are_said_to_have_one():
    weights = {"module.f.conv1.weight": np.zeros(1), "module.f.layer1.0.conv1.weight": np.zeros(1)}
    with pytest.raises(UserError, match=r"names that do not begin with 'module\.f\.'"):
        torchvision.convert(weights, {})


@pytest.mark.parametrize("view", ["{", "[]", '{"size": 3}'])
def test_a_description_of_images_that_says_nothing_is_passed_over(view):
    assert torchvision._view({"view": view}) == {}


def test_the_head_of_an_import_is_the_published_one(tmp_path):
    found = weights.read(str(PUBLISHED / "tf2_sk0"))
    variables = variables_of("tf2_sk0")
    assert found.head is not None
    h = np.random.default_rng(0).normal(size=(4, 128))
    x = h
    for layer in range(3):
        kernel = next(v for k, v in variables.items() if f"nl_{layer}/" in k and "kernel" in k)
        norm = {
            k.rpartition("/")[2]: np.float64(v)
            for k, v in variables.items()
            if f"nl_{layer}/batch_norm" in k
        }
        x = x @ np.float64(kernel)
        x = (x - norm["moving_mean"]) / np.sqrt(norm["moving_variance"] + 1e-5) * norm["gamma"]
        x = x + norm["beta"] if layer < 2 else x
        x = np.maximum(x, 0) if layer < 2 else x
    from simclr_jax.encoders.heads import ProjectionHead

    head = ProjectionHead("nonlinear", 3, 128)
    z = head.apply(found.head, jnp.asarray(h, jnp.float32), train=False)[-1]
    np.testing.assert_allclose(z, x, rtol=0, atol=1e-5 * np.abs(x).max())
    assert isinstance(head, nn.Module)


def test_blocks_and_checkpoints_are_in_the_order_of_their_numbers(tmp_path):
    """ResNet-101 has 23 blocks in a stage; steps of TensorFlow's checkpoints have differing lengths."""
    names = [f"stage{s}_block{b}" for s in (1, 2) for b in range(1, 13)]
    assert contents._blocks(sorted(names)) == names
    for step in (9, 1000, 200):
        (tmp_path / f"model.ckpt-{step}.index").touch()
    assert tensorflow.prefix_of(epath.Path(tmp_path)).name == "model.ckpt-1000"
