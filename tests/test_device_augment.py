"""Views made on the device against those made on the host: each operation, whole views, and what
is drawn.
"""

import subprocess
import sys

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import tensorflow as tf

from simclr_jax import assemble
from simclr_jax.data import device_augment as da
from simclr_jax.data import distortion as d
from simclr_jax.data import host_augment as ha
from simclr_jax.data import resident
from simclr_jax.data.distortion import Distortion
from simclr_jax.data.sources import IndexedSplit, Share
from simclr_jax.errors import UserError
from simclr_jax.mesh import make_mesh

WHOLE = {"crop_area": (1.0, 1.0), "crop_aspect": (1.0, 1.0)}  # of a square image: all of it
OFF = {"flip": False, "color_strength": 0.0, "grey_probability": 0.0, "blur_probability": 0.0}


def images(count=24, size=40, channels=3):
    """Smooth colours with noise, like photographs: pure noise has no hue to speak of."""
    rng = np.random.default_rng(1)
    coarse = rng.uniform(0, 255, (count, 5, 5, channels))
    smooth = scipy.ndimage.zoom(coarse, (1, size / 5, size / 5, 1), order=1)
    noise = rng.normal(0, 8, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def host_and_device(x, kind, size=40, **drawn):
    """Views of x [n, H, W, C] as integers, from the same draws; `drawn` replaces some of them."""
    zero = np.zeros(len(x), int)
    numbers = np.arange(len(x))
    _, draws = ha.of_each(x, 0, zero, numbers, ha.two_crops, size, kind)
    draws = draws.numpy()
    for name, value in drawn.items():
        d.named(draws)[name][...] = value  # views into the array
    host = np.stack(
        [ha.two_views(tf.constant(i), u, size, kind) for i, u in zip(x, draws, strict=True)]
    )
    crops = np.stack(
        [ha.two_crops(tf.constant(i), u, size, kind) for i, u in zip(x, draws, strict=True)]
    )
    device = jax.jit(da.recolor, static_argnums=2)(crops, draws, kind)
    assert device.shape == host.shape
    return host.astype(int), np.round(255 * np.asarray(device)).astype(int)


ORDERS = {"hue first": [0.9, 0.8, 0.7, 0.1], "as listed": [0.1, 0.2, 0.3, 0.4]}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "operation",
    [
        {"flip": True},
        {"color_strength": 1.0, "jitter_probability": 1.0},
        {"color_strength": 1.0, "jitter_probability": 1.0, "brightness": "multiplicative"},
        {"color_strength": 0.5, "jitter_probability": 0.8},
        {"grey_probability": 0.5},
        {"blur_probability": 0.5},
    ],
)
def test_each_operation_is_the_hosts_to_one_grey_level(operation, channels):
    kind = Distortion(**(WHOLE | OFF | operation))
    host, device = host_and_device(images(channels=channels), kind)
    assert np.max(np.abs(host - device)) <= 1
    assert np.mean(host != device) < 0.01  # rounded the other way


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("turned", range(4), ids=["brightness", "contrast", "saturation", "hue"])
def test_one_part_of_the_jitter_alone(turned, order):
    factors = np.full(4, 0.5)  # neutral
    factors[turned] = 0.8
    kind = Distortion(**(WHOLE | OFF | {"color_strength": 1.0}))
    host, device = host_and_device(images(6), kind, jitter=0.0, factors=factors, order=order)
    assert np.max(np.abs(host - device)) <= 1
    assert np.mean(np.abs(host - images(6)[:, np.newaxis])) > 1  # something was done


def test_whole_views_are_the_hosts():
    host, device = host_and_device(images(), Distortion(), size=24)
    # The crop is rounded to uint8 in between, which contrast and saturation then multiply.
    assert np.mean(np.abs(host - device)) < 0.3
    assert np.mean(np.abs(host - device) > 3) < 0.01


def test_a_crop_is_the_hosts():
    x, kind = images(4), Distortion()
    draws = np.asarray(da.draw(3, 1, 2))
    host = ha.two_crops(tf.constant(x[0]), draws, 24, kind).numpy().astype(int)
    device = np.stack([da.crop(x[0], u, 24, kind) for u in draws]).astype(int)
    assert np.max(np.abs(host - device)) <= 1


@pytest.mark.parametrize(("shape", "proportion"), [((28, 28, 1), 1.0), ((30, 41, 3), 0.875)])
def test_evaluation_views_are_the_hosts(shape, proportion):
    x = np.random.default_rng(0).integers(0, 256, (3, *shape)).astype(np.uint8)
    host = np.stack([ha.center_crop(tf.constant(i), 28, proportion) for i in x]).astype(int)
    device = np.asarray(da.center_crop(x, 28, proportion)).astype(int)
    assert np.max(np.abs(host - device)) <= 1


def test_draws_are_a_function_of_seed_epoch_and_index():
    first = da.draw(0, 0, 0)
    np.testing.assert_array_equal(first, da.draw(0, 0, 0))
    for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        assert np.all(np.abs(np.asarray(da.draw(*key)) - first) > 0)
    assert np.all(first[0] != first[1])


def test_views_are_distributed_as_the_hosts():
    """Of 2,000 views each; a two-sample Kolmogorov-Smirnov test of some summaries of a view."""
    x, kind, size = images(1000), Distortion(), 24
    zero, numbers = np.zeros(len(x), int), np.arange(len(x))
    host, _ = ha.of_each(x, 5, zero, numbers, ha.two_views, size, kind)
    views_of = jax.jit(da.views_of, static_argnums=(1, 4, 5))
    crops, draws = views_of(x, 5, zero, numbers, size, kind)
    device = np.round(255 * np.asarray(da.recolor(crops, draws, kind)))

    def summaries(views):
        v = np.asarray(views, float).reshape(-1, size, size, 3) / 255
        mean = v.mean(axis=(1, 2))
        yield from mean.T
        yield v.std(axis=(1, 2, 3))
        yield np.ptp(v, axis=-1).mean(axis=(1, 2))  # colourfulness
        yield np.abs(np.diff(v, axis=1)).mean(axis=(1, 2, 3))  # sharpness
        yield (mean @ [1, -2, 1]) / (mean.sum(axis=1) + 1e-6)  # hue

    for one, other in zip(summaries(host), summaries(device), strict=True):
        # The same images, so the two are closer than independent samples: a low bar would do too.
        assert scipy.stats.ks_2samp(one, other).pvalue > 0.01


def test_what_is_fetched_does_not_depend_on_the_devices(tiny):
    tiny.data.placement = "device"
    split = assemble.source(tiny).train
    fetch, _ = assemble.view_functions(tiny)
    batch = next(
        resident.training_batches(split, seed=0, batch_size=16, start_step=4, share=Share())
    )
    one, eight = (
        jax.jit(fetch)(assemble.feed(tiny, split, make_mesh(jax.devices()[:n]))(batch))
        for n in (1, 8)
    )
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    np.testing.assert_array_equal(one["label"], split.labels[batch["index"]])
    assert one["views"].shape == (16, 2, 12, 12, 3)


def test_images_that_are_not_in_memory_cannot_be_placed():
    split = IndexedSplit(np.array(["a.png"]), np.array([-1], np.int32))
    with pytest.raises(UserError, match=r"data\.placement=host"):
        resident.in_memory(split)


PROGRAM = """
import sys

sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None  # importing them fails
from simclr_jax.main import main

images, workdir = sys.argv[1:]
size = ["data.image_size=12", "data.batch_size=16", "data.eval_crop=1.0", "eval.batch_size=16"]
model = ["model.depth=10", "model.width=0.125", "model.stem=strided", "model.head_width=8"]
run = ["train.steps=3", "eval.labels_per_class=(1,)", "eval.label_fraction=0.0", "eval.seeds=1"]
data = ["data.source=arrays", f"data.path={images}", "data.placement=device"]
options = [f"--config.{option}" for option in size + model + run + data]
main(["--config=configs/cifar10.py", f"--workdir={workdir}", *options])
assert "tensorflow.python" not in sys.modules
"""


def test_training_and_probing_need_no_tensorflow(tiny, tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny.data.path, str(tmp_path / "w")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "w/probe.json").exists()
