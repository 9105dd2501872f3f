"""Every export, read again by a process that does not have this package."""

import ast
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import encoder_checkpoint, random_images
from etils import epath
from safetensors.numpy import load_file, save_file

import simclr_jax
from simclr_jax import assemble, config
from simclr_jax.encoders import init_encoder
from simclr_jax.encoders.classified import Classified
from simclr_jax.encoders.heads import LinearClassifier, ProjectionHead
from simclr_jax.encoders.resnet import ResNet
from simclr_jax.errors import UserError
from simclr_jax.modes.export import export
from simclr_jax.modes.hub import write_repository
from simclr_jax.pretrained import read_head_variables
from simclr_jax.training import saved
from simclr_jax.training.checkpoint import save_once
from simclr_jax.training.record import about_classifier
from simclr_jax.training.state import TrainState
from simclr_jax.views.crop import EvaluationView
from simclr_jax.weights.torch_head import head_loading
from simclr_jax.weights.torchvision import pytorch_loading, torchvision_weights

ROOT = pathlib.Path(__file__).parent.parent


def small(**model):
    c = config.default()
    c.data.source, c.data.image_size = "synthetic", 24
    c.model.depth, c.model.width, c.model.stem = 10, 0.125, "strided"
    for name, value in model.items():
        c.model[name] = value
    return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return encoder_checkpoint(small(), tmp_path_factory.mktemp("small"))


def read_by(program: str, forbidden: str, tmp_path, images) -> np.ndarray:
    """What `program` makes of `images` where nothing called `forbidden` can be imported."""
    np.save(tmp_path / "images.npy", images)
    lines = [
        "import sys, numpy as np",
        *(f"sys.modules[{name!r}] = None" for name in forbidden.split()),
        f"images = np.load({str(tmp_path / 'images.npy')!r})",
        program,
        f"np.save({str(tmp_path / 'h.npy')!r}, np.asarray(h))",
    ]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return np.load(tmp_path / "h.npy")


def in_pytorch(loading: str, result: str) -> str:
    """The program `loading` with PyTorch before it and `result`, what it computes, as h after it."""
    lines = [
        "from benchmarks import peers; torch = peers.torch()",
        "images = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())",
        loading,
        f"h = {result}.detach()",
    ]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("format", "forbidden"),
    [("stablehlo", "simclr_jax flax tensorflow"), ("savedmodel", "simclr_jax jax flax")],
)
@pytest.mark.whole
def test_programs_are_loaded_without_this_package(format, forbidden, workdir, tmp_path, capsys):
    output = tmp_path / "deep" / "encoder"
    export(small(), str(workdir), format, str(output))
    said = capsys.readouterr().out
    loading = said[said.index("import") : said.index("\nImages are")]
    images = random_images(5, 24, 24).astype(np.float32) / 255
    h = read_by(loading, forbidden, tmp_path, images)
    # Other fusions, and convolutions that are not in blocks: sums in another order.
    np.testing.assert_allclose(h, simclr_jax.load_encoder(workdir)(images), rtol=2e-5, atol=1e-5)


def test_what_tensorflow_cannot_run_leaves_the_output_as_it_was(tmp_path, monkeypatch):
    """TensorFlow may be older than what JAX writes."""
    from jax.experimental import jax2tf
    from tensorflow.compiler.tf2xla.python import xla

    def convert(function, **options):
        how = {"version": 9, "platforms": ["CPU"], "Sout": [[None, 1]], "Tout": ["float32"]}
        later = b"ML\xefR of a later version"
        return lambda variables, images: xla.call_module([images], module=later, **how)[0]

    monkeypatch.setattr(jax2tf, "convert", convert)
    c = small()
    folder = encoder_checkpoint(c, tmp_path / "w")
    output = tmp_path / "output"
    output.mkdir()
    (output / "mine").write_text("not of this program")
    with pytest.raises(UserError, match="cannot run what JAX"):
        export(c, str(folder), "savedmodel", str(output))
    assert [path.name for path in output.iterdir()] == ["mine"]


# What torchvision.models.resnet50().state_dict() names, less the last layer and the counters of
# batches, in short.
TORCHVISION_50 = {"conv1.weight"} | {
    name
    for stage, count in enumerate((3, 4, 6, 3), 1)
    for block in range(count)
    for layer in (
        *(f"conv{i}.weight" for i in (1, 2, 3)),
        *(f"bn{i}" for i in (1, 2, 3)),
        *(("downsample.0.weight", "downsample.1") if block == 0 else ()),
    )
    for name in (
        [f"layer{stage}.{block}.{layer}"]
        if layer.endswith("weight")
        else [
            f"layer{stage}.{block}.{layer}.{part}"
            for part in ("weight", "bias", "running_mean", "running_var")
        ]
    )
}


def test_weights_have_torchvisions_names_and_shapes():
    network = ResNet(50)
    abstract = jax.eval_shape(lambda: init_encoder(network, 64, jax.random.key(0)))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    weights = torchvision_weights(zeros)
    stem = {f"bn1.{part}" for part in ("weight", "bias", "running_mean", "running_var")}
    assert set(weights) == TORCHVISION_50 | stem
    assert weights["conv1.weight"].shape == (64, 3, 7, 7)
    assert weights["layer2.0.conv2.weight"].shape == (128, 128, 3, 3)
    assert weights["layer4.0.downsample.0.weight"].shape == (2048, 1024, 1, 1)


def test_what_pytorch_computes_in_another_precision_is_said():
    loading = pytorch_loading(ResNet(50, dtype=jnp.dtype("bfloat16")), 64, "x")
    assert loading.startswith("# Trained in bfloat16: here h is computed in float32")
    assert pytorch_loading(ResNet(50), 64, "x").startswith("import torch")


def test_options_of_another_model_are_refused_and_another_size_is_taken(workdir, tmp_path):
    with pytest.raises(UserError, match=r"model\.depth: 10 -> 18"):
        export(small(depth=18), str(workdir), "stablehlo", str(tmp_path / "x"))
    c = small()
    c.data.image_size = 32
    export(c, str(workdir), "stablehlo", str(tmp_path / "x"))
    program = jax.export.deserialize((tmp_path / "x").read_bytes())
    assert program.in_avals[0].shape[1:] == (32, 32, 3)
    images = random_images(3, 32, 32).astype(np.float32) / 255
    expected = simclr_jax.load_encoder(workdir)(images)
    np.testing.assert_allclose(program.call(images), expected, rtol=2e-5, atol=1e-5)


def test_the_program_that_loads_an_export_takes_any_path(workdir, tmp_path, capsys):
    folder = tmp_path / 'a "new" one\\s'
    export(small(), str(workdir), "stablehlo", str(folder / "x"))
    said = capsys.readouterr().out
    program = said[said.index("import jax.export") : said.index("Images are")]
    size = small().data.image_size
    names = {"images": np.zeros((2, size, size, 3), np.float32)}
    exec(program, names)
    assert np.isfinite(names["h"]).all()
    for written in (pytorch_loading(ResNet(18), 16, folder), head_loading({}, folder, True)):
        (line,) = [line for line in written.splitlines() if "load_file(" in line]
        (text,) = re.findall(r"load_file\((.*)\)\)", line)
        assert ast.literal_eval(text) == str(folder)


def test_what_torchvision_cannot_compute_is_not_exported(tiny, tmp_path):
    vit = encoder_checkpoint(tiny, tmp_path / "vit")
    with pytest.raises(
        UserError, match=r"torchvision and timm have no ViT with 1 layers.*format=stablehlo"
    ):
        export(tiny, str(vit), "safetensors", str(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("format", ["safetensors", "stablehlo"])
def test_what_export_did_not_write_is_not_replaced(workdir, tmp_path, format):
    notes = tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(UserError, match=r"which --mode=export --format=.* did not write"):
        export(small(), str(workdir), format, str(notes))
    assert notes.read_text() == "mine"
    own = tmp_path / "x.bin"
    for _ in range(2):
        export(small(), str(workdir), format, str(own))
    other = tmp_path / "other.safetensors"
    save_file({"w": np.zeros(3)}, str(other), {"format": "pt"})
    with pytest.raises(UserError, match=r"which --mode=export --format=.* did not write"):
        export(small(), str(workdir), "safetensors", str(other))
    other.rename(tmp_path / "y.head.safetensors")
    with pytest.raises(UserError, match=r"would replace .*y\.head\.safetensors, which"):
        export(small(), str(workdir), "safetensors", str(tmp_path / "y.safetensors"))


def test_an_output_that_cannot_be_written_is_one_line(workdir, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        export(small(), str(workdir), "stablehlo", str(tmp_path / "file" / "encoder"))
    with pytest.raises(UserError, match="cannot write") as caught:
        export(small(), str(workdir), "savedmodel", str(tmp_path / "file"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("model", "size"),
    [
        # All of torchvision's depths would take minutes; these have both kinds of block.
        ({"depth": 18, "stem": "imagenet"}, 64),  # an even max-pool, (0, 1)
        ({"depth": 18, "stem": "imagenet"}, 66),  # an odd one, (1, 1)
        ({"depth": 18, "stem": "imagenet", "pool_padding": "symmetric"}, 64),
        ({"depth": 50, "stem": "imagenet"}, 64),
        ({"depth": 10, "stem": "cifar"}, 32),
        ({"depth": 10, "stem": "strided"}, 32),
        ({"depth": 10, "stem": "strided", "width": 0.5}, 32),  # of configs/folder.py
        ({"depth": 50, "stem": "imagenet", "width": 0.125}, 64),
        ({"depth": 18, "stem": "imagenet", "width": 2}, 64),
        ({"depth": 10, "stem": "cifar", "width": 0.5, "standardize": "imagenet"}, 32),
        ({"depth": 10, "stem": "cifar", "width": 0.5, "project_shortcuts": True}, 32),
    ],
)
def test_pytorch_computes_the_same(model, size, tmp_path, capsys):
    """Needs PyTorch, see benchmarks/requirements.txt."""
    pytest.importorskip("torch")
    c = small(**{"width": 1.0} | model)
    c.data.image_size = size
    workdir = encoder_checkpoint(c, tmp_path)
    export(c, str(workdir), "safetensors", str(tmp_path / "encoder.safetensors"))
    said = capsys.readouterr().out
    loading = said[said.index("import") : said.index("\nImages are")]
    images = random_images(4, size, size).astype(np.float32) / 255
    expected = simclr_jax.load_encoder(workdir)(images)
    program = in_pytorch(loading, "h")
    h = read_by(program, "tensorflow", tmp_path, images)
    assert expected.std() > 0.01
    np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-4)
    z = read_by(in_pytorch(loading, "z"), "tensorflow", tmp_path, images)
    np.testing.assert_allclose(z, projections(c, workdir, images), rtol=1e-3, atol=1e-3)
    if "pool_padding" not in model and size == 64:
        other = "\n".join(line for line in program.split("\n") if "ceil_mode" not in line)
        wrong = read_by(other, "tensorflow", tmp_path, images)
        assert np.abs(wrong - expected).max() > 1e-3  # the line is needed


def projections(c, workdir, images):
    """z of images, in evaluation."""
    checkpoint = saved.find(str(workdir), None)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    head = read_head_variables(c, assemble.encoder(c), checkpoint, here)
    h = simclr_jax.load_encoder(workdir)(images)
    return assemble.head(c).apply(head, jnp.asarray(h), False)[-1]


def sequential(weights, h):
    """What PyTorch's Linear, BatchNorm1d and ReLU with these weights make of h, in float64."""
    x = np.asarray(h, np.float64)
    places = sorted(int(name.split(".")[0]) for name, w in weights.items() if w.ndim == 2)
    for place in places:
        x = x @ weights[f"{place}.weight"].T.astype(np.float64)
        if f"{place + 1}.running_mean" not in weights:
            return x + weights[f"{place}.bias"]
        norm = {
            name: weights[f"{place + 1}.{name}"]
            for name in ("weight", "bias", "running_mean", "running_var")
        }
        x = (x - norm["running_mean"]) / np.sqrt(norm["running_var"] + 1e-5)
        x = x * norm["weight"] + norm["bias"]
        if place != places[-1] or f"{place + 3}.weight" in weights:
            x = np.maximum(x, 0)
    return x


@pytest.mark.parametrize("layers", [2, 3])
def test_the_projection_head_lies_beside_the_encoder(layers, tmp_path, capsys):
    c = small(head_layers=layers)
    workdir = encoder_checkpoint(c, tmp_path)
    export(c, str(workdir), "safetensors", str(tmp_path / "f.safetensors"))
    said = capsys.readouterr().out
    images = random_images(3, 24, 24).astype(np.float32) / 255
    weights = load_file(tmp_path / "f.head.safetensors")
    found = sequential(weights, simclr_jax.load_encoder(workdir)(images))
    expected = projections(c, workdir, images)
    assert expected.shape == (3, 128)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert said.count("torch.nn.ReLU()") == layers - 1
    assert "z = head.eval()(h)" in said
    assert (
        "They have 24 px: the middle 87.5% of each side of the centred square, resized: simclr_jax"
        in said
    )
    # An encoder without a head leaves no head of an earlier export beside it.
    c = small(head="none")
    export(
        c,
        str(encoder_checkpoint(c, tmp_path / "none")),
        "safetensors",
        str(tmp_path / "f.safetensors"),
    )
    assert not (tmp_path / "f.head.safetensors").exists()


def test_a_classifier_on_a_layer_of_the_head_is_written_with_the_layers_below(tmp_path, capsys):
    c = small(head_layers=3)
    workdir = classifier_workdir(c, tmp_path, layer=2)
    export(c, workdir, "safetensors", str(tmp_path / "f.safetensors"))
    said = capsys.readouterr().out
    images = random_images(3, 24, 24).astype(np.float32) / 255
    h = simclr_jax.load_encoder(tmp_path / "encoder")(images)
    found = sequential(load_file(tmp_path / "f.head.safetensors"), h)
    expected = simclr_jax.load_classifier(workdir)(images)
    assert expected.shape == (3, 7)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    assert said.count("torch.nn.ReLU()") == 2
    assert "logits = head.eval()(h)" in said
    assert "fc.weight" not in load_file(tmp_path / "f.safetensors")
    with pytest.raises(UserError, match="reads layer 2 of the projection head, which timm's"):
        export(c, workdir, "huggingface", str(tmp_path / "hub"))


def classifier_workdir(c, folder, classes=7, layer=0):
    """A classifier on h, or on a layer of the head, of an encoder with random BatchNorm parameters and statistics."""
    workdir = encoder_checkpoint(c, folder / "encoder")
    encoder = simclr_jax.load_encoder(workdir)
    head: dict = {"params": {}, "batch_stats": {}}
    if c.model.head != "none":
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        checkpoint = saved.find(str(workdir), None)
        head = read_head_variables(c, encoder.network, checkpoint, here)
    dense = jax.random.normal(jax.random.key(1), (encoder.width, classes))
    params = {"encoder": encoder.variables["params"], "head": head["params"]}
    params["classifier"] = {"dense": {"kernel": dense, "bias": jnp.arange(float(classes))}}
    statistics = {"encoder": encoder.variables["batch_stats"], "head": head["batch_stats"]}
    state = TrainState(jnp.zeros((), jnp.int32), params, statistics, ())
    names = [f"class {i}" for i in range(classes)]
    about = about_classifier(layer, classes, names)
    save_once(str(folder / "c"), 9, state, {"config": c.to_dict(), "classifier": about})
    return str(folder / "c")


def of_timm():
    c = small(depth=18, width=1.0, stem="imagenet", pool_padding="symmetric", head="none")
    c.data.image_size = 64
    return c


def test_a_repository_says_how_it_is_loaded(tmp_path):
    network = ResNet(18, pool_padding="symmetric")
    shapes = jax.eval_shape(lambda: init_encoder(network, 64, jax.random.key(0)))
    encoder = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    dense = {"kernel": np.zeros((512, 7)), "bias": np.zeros(7)}
    variables = {kind: {"encoder": encoder[kind]} for kind in encoder}
    variables["params"]["classifier"] = {"dense": dense}
    classified = Classified(network, ProjectionHead("none"), 0, LinearClassifier(7), False)
    names = [f"class {i}" for i in range(7)]
    classifier = simclr_jax.Classifier(classified, variables, EvaluationView(64), 9, classes=names)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match="is not of a repository, and would be replaced"):
        write_repository(classifier, epath.Path(tmp_path / "run"))
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    with pytest.raises(UserError, match=r"README.md is not of a repository"):
        write_repository(classifier, epath.Path(tmp_path / "project"))
    loading = write_repository(classifier, epath.Path(tmp_path / "hub"))
    with (tmp_path / "hub" / "README.md").open("a") as card:
        card.write("Trained on my photos.")
    (tmp_path / "hub" / "model.safetensors").unlink()
    loading = write_repository(classifier, epath.Path(tmp_path / "hub"))  # its own are replaced
    assert (tmp_path / "hub" / "README.md").read_text().endswith("Trained on my photos.")
    settings = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert (settings["architecture"], settings["num_classes"]) == ("resnet18", 7)
    assert settings["label_names"][2] == "class 2"
    assert settings["pretrained_cfg"]["mean"] == [0.0, 0.0, 0.0]
    assert settings["pretrained_cfg"]["input_size"] == [3, 64, 64]
    weights = load_file(tmp_path / "hub" / "model.safetensors")
    assert weights["fc.weight"].shape == (7, 512)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert 'timm.create_model("resnet18", num_classes=7' in loading
    assert loading in card
    assert "Trained for 9 steps at 64 px" in card


def test_what_timm_cannot_compute_is_refused(workdir, tmp_path):
    with pytest.raises(UserError, match=r"timm has no ResNet with this model.stem, model.pool_pa"):
        export(small(), str(workdir), "huggingface", str(tmp_path / "hub"))
    assert not (tmp_path / "hub").exists()


@pytest.mark.whole
def test_a_classifier_is_exported_as_a_program(tmp_path, capsys):
    c = small(head="none")
    workdir = classifier_workdir(c, tmp_path)
    export(c, workdir, "stablehlo", str(tmp_path / "program"))
    assert "logits = classifier.call(images)" in capsys.readouterr().out
    images = random_images(3, 24, 24).astype(np.float32) / 255
    program = jax.export.deserialize((tmp_path / "program").read_bytes())
    expected = simclr_jax.load_classifier(workdir)(images)
    assert expected.shape == (3, 7)
    np.testing.assert_allclose(program.call(images), expected, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("standardize", ["none", "imagenet"])
def test_timm_computes_the_same(standardize, tmp_path, capsys):
    """Needs PyTorch and timm, see benchmarks/requirements.txt."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    c = of_timm()
    c.model.standardize = standardize
    workdir = classifier_workdir(c, tmp_path)
    export(c, workdir, "huggingface", str(tmp_path / "hub"))
    said = capsys.readouterr().out
    loading = said[said.index("import timm") :]
    images = random_images(4, 64, 64).astype(np.float32) / 255
    settings = json.loads((tmp_path / "hub" / "config.json").read_text())["pretrained_cfg"]
    standardised = (images - np.float32(settings["mean"])) / np.float32(settings["std"])
    logits = read_by(in_pytorch(loading, "logits"), "tensorflow", tmp_path, standardised)
    expected = simclr_jax.load_classifier(workdir)(images)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
