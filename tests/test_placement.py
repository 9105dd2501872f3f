"""Batches of views, by each way of making them: reproducible, the same for any number of processes
and devices, complete, and shaped as announced.
"""

import contextlib
import dataclasses
import itertools
import subprocess
import sys
import time
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
from conftest import random_images
from PIL import Image

from simclr_jax.data.arrays import in_memory
from simclr_jax.data.broken import Broken, Images
from simclr_jax.data.encoded import Encoded
from simclr_jax.data.folder import open_split
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Order, Share, batch_positions
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.errors import UserError
from simclr_jax.mesh import batch_sharded, make_mesh
from simclr_jax.views import device, pipeline
from simclr_jax.views.color import Flip, Grey
from simclr_jax.views.crop import Crop, EvaluationView
from simclr_jax.views.distortion import Distortion
from simclr_jax.views.placement import HostCrops, HostViews, Resident, ViewSettings, stream
from simclr_jax.views.solarize import Solarize

WAYS = {"host": HostViews, "host but for the colour": HostCrops, "device": Resident}
EACH = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
STEPS, SIZE = 10, 8  # 2 epochs of 37 images


@dataclasses.dataclass(frozen=True)
class Window(Crop):
    """A crop of any size and place. TensorFlow compiles each pipeline anew: this in no time."""

    DRAWS: ClassVar = {"length": 2, "position": 2}

    def window(self, xp: Any, height: Any, width: Any, u: dict[str, Any]) -> tuple:
        length, position = u["length"], u["position"]
        rows, columns = xp.floor(length[0] * height) + 1.0, xp.floor(length[1] * width) + 1.0
        top = xp.floor(position[0] * (height - rows + 1))
        left = xp.floor(position[1] * (width - columns + 1))
        return top, left, rows, columns


# Every training view is solarized, so that an evaluation view would show it.
DISTORTION = Distortion(Window(), (Flip(), Grey(0.2), Solarize(1.0, 0.3)))


def split_of(count=37):
    """Random images of 12 x 10 px in three classes."""
    return in_memory(random_images(count), np.arange(count) % 3, ("a", "b", "c"))


SPLIT = split_of()


def images(split=SPLIT):
    return Images(split, Broken(split, 1.0))


def views_of(way, share=Share(), size=SIZE, devices=8, batch_size=8):
    mesh = make_mesh(jax.devices()[:devices])
    return way(ViewSettings(Order(1, batch_size, share), DISTORTION, EvaluationView(size), mesh))


def batches(way, steps=STEPS, start=0, share=Share()):
    with contextlib.closing(views_of(way, share).batches(images(), start)) as found:
        return list(itertools.islice(found, steps))


def assert_equal(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def whole():
    """The first batches of each way."""
    return {way: batches(way) for way in WAYS.values()}


# What a batch is


@EACH
def test_a_batch_says_which_images_it_holds_in_the_order_of_the_run(whole, way):
    expected = itertools.islice(batch_positions(Order(1, 8), 37, 0), STEPS)
    for batch, (epochs, indices) in zip(whole[way], expected, strict=True):
        assert batch["epoch"].dtype == batch["index"].dtype == np.int64
        np.testing.assert_array_equal(batch["epoch"], epochs)
        np.testing.assert_array_equal(batch["index"], indices)


@EACH
def test_the_global_batch_lies_over_the_mesh_and_every_array_has_a_row_for_each_image(whole, way):
    views = views_of(way)
    sharding = batch_sharded(views.settings.mesh)
    put = views.placer(SPLIT)
    batch = whole[way][3]
    if way is Resident:
        with pytest.raises(UserError, match=r"data\.color_on=device"):
            views.abstract()
    else:
        placed, expected = put(batch), views.abstract()
        assert placed.keys() == expected.keys()
        for name, x in placed.items():
            assert (x.shape, x.dtype) == (expected[name].shape, expected[name].dtype)
            assert x.sharding.is_equivalent_to(expected[name].sharding, x.ndim)
            assert expected[name].sharding == sharding
            np.testing.assert_array_equal(x, batch[name])

    fetched = jax.jit(views.fetch)(put(batch))
    assert all(len(x) == 8 for x in fetched.values())
    np.testing.assert_array_equal(fetched["label"], SPLIT.source.labels[batch["index"]])

    made = jax.jit(views.views)
    all_views, half = made(fetched), made(jax.tree.map(lambda x: x[4:], fetched))
    assert all_views.shape == (8, 2, SIZE, SIZE, 3)
    assert all_views.dtype == np.float32
    assert np.min(all_views) >= 0
    assert np.max(all_views) <= 1
    np.testing.assert_allclose(all_views[4:], half, atol=1e-6)
    assert np.max(all_views) < 0.71  # all solarized


def test_crops_made_on_the_host_become_the_hosts_views(whole):
    """The same seed, the same numbers: the two ways differ in where the colour is done."""
    finish = jax.jit(views_of(HostCrops).views)
    for step in range(3):
        expected, crops = whole[HostViews][step], whole[HostCrops][step]
        found = np.round(255 * np.asarray(finish(crops))).astype(int)
        # The crop was rounded in between.
        assert np.max(np.abs(found - expected["views"])) <= 1
        np.testing.assert_array_equal(expected["label"], crops["label"])
        assert expected["views"].dtype == crops["views"].dtype == np.uint8


def test_views_on_the_device_are_those_of_the_images_that_the_host_names(whole):
    views = views_of(Resident)
    for batch in whole[Resident][3:6]:  # into the second epoch
        fetched = jax.jit(views.fetch)(views.placer(SPLIT)(batch))
        for row in (0, 7):
            epoch, index = (int(batch[name][row]) for name in ("epoch", "index"))
            draws = device.draw(1, epoch, index, DISTORTION)
            np.testing.assert_allclose(fetched["draws"][row], draws, atol=1e-6)
            crop = jax.jit(device.crop, static_argnums=(2, 3))
            image = SPLIT.source.arrays[index]
            expected = np.stack([crop(image, u, SIZE, DISTORTION) for u in draws]).astype(int)
            found = np.asarray(fetched["views"][row]).astype(int)
            assert np.max(np.abs(found - expected)) <= 1


def test_what_is_fetched_does_not_depend_on_the_devices(whole):
    fetched = []
    for devices in (1, 8):
        views = views_of(Resident, devices=devices)
        fetched.append(jax.jit(views.fetch)(views.placer(SPLIT)(whole[Resident][4])))
    jax.tree.map(np.testing.assert_array_equal, *fetched)
    assert fetched[0]["views"].shape == (8, 2, SIZE, SIZE, 3)


# Which batches come


@EACH
def test_batches_are_repeatable_and_can_be_entered_anywhere(whole, way):
    assert_equal(whole[way][6:], batches(way, 4, start=6))


def test_batches_do_not_depend_on_threads_prefetching_or_timing(whole, monkeypatch):
    monkeypatch.setattr(pipeline, "CORES", 1)
    monkeypatch.setattr(pipeline, "_PREFETCH_BATCHES", 1)
    with contextlib.closing(views_of(HostViews).batches(images(), 0)) as found:
        for one, other in zip(whole[HostViews][:8], found, strict=False):
            time.sleep(0.05)
            assert_equal([one], [other])


def test_images_taken_one_by_one_have_the_views_of_batches(whole, monkeypatch):
    """Small images are taken a batch at once, all others one by one."""
    monkeypatch.setattr(pipeline, "_are_small", lambda split: False)
    assert_equal(whole[HostViews][2:6], batches(HostViews, 4, start=2))


@pytest.mark.parametrize("way", [HostCrops, Resident], ids=["host", "device"])
def test_the_content_of_a_batch_does_not_depend_on_the_number_of_processes(whole, way):
    parts = [batches(way, 6, share=Share(p, 4)) for p in range(4)]
    together = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in parts[0][step]}
        for step in range(6)
    ]
    assert_equal(whole[way][:6], together)


def test_an_image_has_other_views_in_another_epoch(whole):
    """Two views of each of 37 images in two epochs: all differ."""
    rows: dict = {}
    for batch in whole[HostViews]:
        rows |= {
            (epoch, index): pair.reshape(2, -1)
            for epoch, index, pair in zip(
                batch["epoch"], batch["index"], batch["views"], strict=True
            )
            if epoch < 2
        }
    assert len(rows) == 74
    assert len(np.unique(np.concatenate(list(rows.values())), axis=0)) == 4 * 37


@EACH
def test_a_stream_pairs_the_global_batch_with_the_names_of_its_images(whole, way, monkeypatch):
    closed = []

    def served(self, images, start):
        try:
            yield from whole[way][start:]
        finally:
            closed.append(start)

    monkeypatch.setattr(way, "batches", served)
    following = stream(views_of(way), images())(2)
    placed, names = next(following)
    assert names.keys() == {"epoch", "index"}
    np.testing.assert_array_equal(names["index"], whole[way][2]["index"])
    of_all = placed["index"] if way is Resident else placed["views"]
    np.testing.assert_array_equal(of_all, whole[way][2]["index" if way is Resident else "views"])
    following.close()
    assert closed == [2]


# Evaluation


EVALUATED = pytest.mark.parametrize("way", [HostViews, Resident], ids=["host", "device"])


def evaluated(way, batch_size, split=SPLIT, start=0, share=Share(), **view):
    views = views_of(way, share, size=10)
    settings = dataclasses.replace(views.settings, evaluation=EvaluationView(10, **view))
    views = dataclasses.replace(views, settings=settings)
    return list(views.evaluation_batches(images(split), batch_size, start))


@EVALUATED
@pytest.mark.parametrize("batch_size", [1, 10, 37, 50])
def test_evaluation_gives_every_image_once_in_order_and_not_distorted(way, batch_size):
    found = evaluated(way, batch_size)
    pictures = np.concatenate([b["image"] for b in found])
    labels = np.concatenate([b["label"] for b in found])
    # The centred square of 12 x 10 px: no crop that is drawn, no flip, no colour.
    np.testing.assert_array_equal(pictures, SPLIT.source.arrays[:, 1:11])
    np.testing.assert_array_equal(labels, SPLIT.source.labels)
    assert pictures.dtype == np.uint8
    assert labels.dtype == np.int32
    assert [len(b["label"]) for b in found[:-1]] == [batch_size] * (len(found) - 1)
    assert_equal(found[1:], evaluated(way, batch_size, start=1))


@EVALUATED
@pytest.mark.parametrize("antialias", [False, True])
def test_evaluation_crops_and_averages_as_the_options_say(way, antialias):
    large = in_memory(random_images(5, 40, 36), np.arange(5) % 3, ("a", "b", "c"))
    (found,) = evaluated(way, 5, large, proportion=0.8, antialias=antialias)
    view = EvaluationView(10, 0.8, antialias)
    expected = [view.of(image) for image in large.source.arrays]
    assert np.max(np.abs(found["image"].astype(int) - np.asarray(expected, int))) <= 1
    assert not np.allclose(
        expected, [view._replace(proportion=1.0).of(x) for x in large.source.arrays], atol=9
    )


def test_images_are_turned_upright_only_where_the_option_says_so(tmp_path):
    """By the orientation in their EXIF data: a quarter turn."""
    half = np.zeros((10, 10, 3), np.uint8)
    half[:, 5:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(half).save(tmp_path / "a.jpg", quality=100, exif=exif)
    split = open_split(str(tmp_path), labels=False)
    bright = {}
    for upright in (True, False):
        (found,) = evaluated(HostViews, 1, split, read=ReadOptions(upright))
        bright[upright] = found["image"][0, :, :, 0] > 127
    np.testing.assert_array_equal(bright[False], half[:, :, 0] > 127)
    np.testing.assert_array_equal(bright[True], np.rot90(half[:, :, 0], -1) > 127)


@EVALUATED
def test_processes_take_images_in_turns_in_evaluation(way):
    """Image i of process p of P is image p + i P, in batches of a P-th of the batch size."""
    for p in range(3):
        found = evaluated(way, 12, share=Share(p, 3))
        assert [len(b["label"]) for b in found[:-1]] == [4] * (len(found) - 1)
        pictures = np.concatenate([b["image"] for b in found])
        np.testing.assert_array_equal(pictures, SPLIT.source.arrays[p::3, 1:11])
        assert_equal(found[2:], evaluated(way, 12, start=2, share=Share(p, 3)))


@EVALUATED
def test_evaluation_makes_three_channels_of_one(way):
    grey = in_memory(random_images(5, channels=1), np.arange(5) % 3, ("a", "b", "c"))
    (found,) = evaluated(way, 5, grey)
    np.testing.assert_array_equal(found["image"], grey.source.arrays[:, 1:11].repeat(3, axis=-1))


# What is refused


def test_an_unreadable_image_is_named(tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    split = open_split(str(tmp_path), labels=False)
    with pytest.raises(UserError, match=r"none of 1 images .*broken\.png") as caught:
        next(views_of(HostViews).batches(images(split), 0))
    assert "\n" not in str(caught.value)


def test_images_that_are_not_in_memory_cannot_be_placed():
    split = IndexedSplit(Encoded([b""], np.array([-1], np.int32)))
    views = views_of(Resident)
    for refused in (
        lambda: views.placer(split),
        lambda: next(views.batches(images(split), 0)),
        lambda: next(views.evaluation_batches(images(split), 1)),
    ):
        with pytest.raises(UserError, match=r"data\.placement=host"):
            refused()


CONFIG = """
from simclr_jax import config

def get_config(argument=""):
    c = config.default()
    config.set_options(c, {options!r})
    return c
"""

PROGRAM = """
import sys

sys.modules["tensorflow"] = sys.modules["tensorflow_datasets"] = None  # importing them fails
import jax
import numpy as np
import simclr_jax
import simclr_jax.bench.step, simclr_jax.evals.classifiers
import simclr_jax.modes.embed, simclr_jax.modes.export
from simclr_jax.main import main
from simclr_jax.views import device, make_distortion

config, workdir = sys.argv[1:]
main([f"--config={config}", f"--workdir={workdir}"])

encoder = simclr_jax.load_encoder(workdir, step=4)
h = encoder(np.zeros((3, 12, 12, 3), np.uint8))
assert h.shape == (3, encoder.width) and h.dtype == np.float32
assert encoder.step == 4

# Traced only: each operation takes seconds to compile.
names = "blur", "solarize", "sobel", "noise", "rotation", "cutout", "recrop"
kind = make_distortion({f"{name}_probability": 0.5 for name in names})
assert len(kind.chain) == len(kind.operations)
crops = jax.ShapeDtypeStruct((4, 2, 24, 24, 3), "uint8")
draws = jax.ShapeDtypeStruct((4, 2, kind.draws), "float32")
jax.eval_shape(lambda *of: device.distort(*of, kind), crops, draws)
assert "tensorflow.python" not in sys.modules
"""


@pytest.mark.whole
def test_training_probing_and_loading_the_encoder_need_no_tensorflow(tiny, tmp_path):
    tiny.eval.labels_per_class = ()
    options = {
        f"{group}.{name}": value
        for group in ("data", "model", "views", "loss", "optimizer", "train", "checkpoint", "eval")
        for name, value in tiny[group].items()
        if not isinstance(value, type(tiny))
    }
    options |= {f"model.vit.{name}": value for name, value in tiny.model.vit.items()}
    config = tmp_path / "tiny.py"
    config.write_text(CONFIG.format(options=options))
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(config), str(tmp_path / "w")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "w/probe.json").exists()
