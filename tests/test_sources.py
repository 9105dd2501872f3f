"""Every kind of source: what it holds, in which order, shared by processes, and what it refuses.

The kinds whose order is tested: record files of TFDS and row groups of Parquet files, which are
streamed; arrays; and a source of two methods, as somebody would add it.
"""

import errno
import importlib.util
import io
import itertools
import json
import os
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import random_images
from PIL import Image

import simclr_jax
from simclr_jax import assemble, config
from simclr_jax.config.overrides import load
from simclr_jax.data import kind_of, open_source, order, pixels, say_not_read, streamed
from simclr_jax.data import tfds as tfds_source
from simclr_jax.data.arrays import in_memory
from simclr_jax.data.broken import Broken, Images
from simclr_jax.data.digits import Digits
from simclr_jax.data.folder import open_split
from simclr_jax.data.indexed import IndexedSplit
from simclr_jax.data.order import Order, Share
from simclr_jax.data.pictures import pictures_of
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.source import Example, Source, in_order
from simclr_jax.data.split import BROKEN, DataSet
from simclr_jax.data.streamed import StreamedSplit
from simclr_jax.errors import Unavailable, UserError
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.views import pipeline
from simclr_jax.views.crop import EvaluationView

COUNT = 60
STREAMED = ["files", "row_groups"]

# One step meets nearly all images, as a broken one that is met makes a new pipeline of TensorFlow's.
STREAMING = {
    "data.placement": "host",
    "data.color_on": "device",
    "data.batch_size": 48,
    "data.max_broken": 0.2,
    "train.online_classifier": False,  # one program for data with labels and without
    "train.steps": 3,
}


def picture(i):
    return random_images(1, 4 + i % 3, 5)[0]


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def opened(**options):
    return open_source(config.default().data.to_dict() | {"seed": 0} | options)


class Streamed(tfds.core.GeneratorBasedBuilder):
    """60 images of differing sizes, written into several files."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=COUNT),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(COUNT), "test": self._generate_examples(7)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": picture(i), "label": i}


class OfATelephone(tfds.core.GeneratorBasedBuilder):
    """Two JPEGs that lie on their side, as their EXIF data say."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"image": image})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "test": self._generate_examples()}

    def _generate_examples(self):
        exif = Image.Exif()
        exif[0x0112] = 6  # a quarter turn
        for i in range(2):
            file = io.BytesIO()
            Image.new("RGB", (24, 16)).save(file, "jpeg", exif=exif)
            file.seek(0)
            yield i, {"image": file}


def test_images_of_tfds_are_turned_nowhere(tmp_path):
    OfATelephone(data_dir=tmp_path).download_and_prepare()
    streamed = opened(name="of_a_telephone", path=str(tmp_path), test_split="").train
    assert isinstance(streamed, StreamedSplit)
    some = streamed.subset(np.asarray([1]))
    (example,) = in_order(streamed.once(Share()).take(1)).as_numpy_iterator()
    encoded = example["image"]
    assert pixels.read(encoded).shape == (24, 16, 3)  # a file of one's own is turned
    for split in (streamed, some, some.subset(np.asarray([0]))):
        assert split.decode(tf.constant(encoded)).shape == (16, 24, 3)
        (found, *_) = pictures_of(split, 1, ReadOptions())
        assert found.image.shape == (16, 24, 3)


class Drawn(Source):
    """60 images of differing sizes, as pixels and as image files. The images `lost` cannot be read."""

    def __init__(self, lost=(), classes=None):
        self.lost, self.classes = lost, classes

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index in self.lost:
            raise OSError(5, "the drawer jams")
        image = picture(index)
        label = index % len(self.classes) if self.classes else index
        return Example(png(image) if index % 2 else image, label)


def prepared(folder, file_format=None):
    """The training split of `Streamed`, in six files, prepared in `folder`."""
    builder = Streamed(data_dir=folder, file_format=file_format)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=6))
    return opened(name="streamed", path=str(folder)).train


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="module")
def array_records(tmp_path_factory):
    return prepared(tmp_path_factory.mktemp("array_record"), "array_record")


@pytest.fixture(scope="module")
def row_groups(tmp_path_factory):
    """Three files of two row groups each, of differing lengths."""
    folder = tmp_path_factory.mktemp("parquet")
    for i, first in enumerate((0, 17, 42)):
        numbers = range(first, (17, 42, COUNT)[i])
        rows = [{"image": {"bytes": png(picture(n)), "path": None}, "label": n} for n in numbers]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{i}.parquet", row_group_size=13)
    return opened(source="parquet", path=str(folder)).train


@pytest.fixture(scope="module")
def drawn():
    return IndexedSplit(Drawn(classes=tuple(f"{i:02}" for i in range(COUNT))))


def stream(split, steps, batch_size=10, start=0, share=Share(), seed=5, broken=frozenset()):
    """(epoch, index, label) of every example, [n, 3]."""
    examples = split.training(Order(seed, batch_size, share), start, broken)
    some = examples.take(steps * (batch_size // share.count)).as_numpy_iterator()
    return np.array([[x[k] for k in ("epoch", "index", "label")] for x in some])


def labels_once(split, share=Share(), start=0, broken=frozenset()):
    return [int(x["label"]) for x in split.once(share, start, broken).as_numpy_iterator()]


@pytest.mark.parametrize("kind", ["small_split", "drawn"])
def test_images_in_any_order_come_every_one_once_an_epoch(kind, request):
    split = request.getfixturevalue(kind)
    seen = stream(split, steps=-(-2 * split.count // 10))
    for epoch in range(2):
        np.testing.assert_array_equal(np.sort(seen[seen[:, 0] == epoch][:, 1]), range(split.count))
    np.testing.assert_array_equal(seen[:, 2], seen[:, 1] % len(split.classes))


def test_arrays_give_the_image_of_the_index(small_split):
    for example in small_split.training(Order(0, 10), 0).take(20).as_numpy_iterator():
        np.testing.assert_array_equal(example["image"], small_split.source[example["index"]].image)


@pytest.mark.parametrize("kind", STREAMED)
def test_streams_come_every_image_once_an_epoch_in_a_new_order(kind, request):
    split = request.getfixturevalue(kind)
    assert isinstance(split, StreamedSplit)
    assert len(split.source.lengths) == 6
    seen = stream(split, steps=18)
    orders = [seen[seen[:, 0] == epoch][:, 2] for epoch in range(3)]
    for labels in orders:
        np.testing.assert_array_equal(np.sort(labels), np.arange(COUNT))
    assert np.mean(orders[0] == orders[1]) < 0.2
    # An index names one image for ever: it keys the views.
    pairs = {(index, label) for _, index, label in seen}
    assert len(pairs) == COUNT


@pytest.mark.parametrize("kind", [*STREAMED, "small_split", "drawn"])
def test_the_order_repeats_and_can_be_entered_anywhere(kind, request):
    split = request.getfixturevalue(kind)
    whole = stream(split, steps=15)
    np.testing.assert_array_equal(stream(split, steps=15), whole)
    for start in (1, 9):
        np.testing.assert_array_equal(stream(split, 15 - start, start=start), whole[start * 10 :])
        indices = split.batch_indices(Order(5, 10), start)
        np.testing.assert_array_equal(indices, whole[start * 10 : start * 10 + 10, 1])
    assert not np.array_equal(stream(split, steps=15, seed=6), whole)


@pytest.fixture
def lanes(request, monkeypatch):
    """Lanes of one example a batch or more, so six of them, or one lane; indexed data have none."""
    monkeypatch.setattr(order, "LEAST_OF_A_LANE", request.param)
    monkeypatch.setattr(order, "SHARDS_OF_A_LANE", 1)
    monkeypatch.setattr(order, "WINDOW", 1)  # each shard a window of its own


@pytest.mark.parametrize(
    ("kind", "lanes"),
    [
        ("row_groups", 1),
        ("files", 64),
        ("small_split", 1),
        ("drawn", 1),
        *(
            pytest.param(kind, least, marks=pytest.mark.whole)
            for kind, least in (
                ("row_groups", 64),
                ("files", 1),
                ("small_split", 64),
                ("drawn", 64),
            )
        ),
    ],
    indirect=["lanes"],
)
def test_a_batch_does_not_depend_on_the_number_of_processes(kind, request, lanes):
    """24 images on 1, 3 and 4 processes, of which 4 do not divide the six lanes: the same ones in the same rows,
    epoch after epoch, entered anywhere.
    """
    split = request.getfixturevalue(kind)
    whole = stream(split, steps=6, batch_size=24).reshape(6, 24, 3)
    for count in (3, 4):
        shares = [Share(p, count) for p in range(count)]
        parts = [stream(split, 4, 24, 2, share).reshape(4, 24 // count, 3) for share in shares]
        np.testing.assert_array_equal(np.concatenate(parts, 1), whole[2:])
    found = [split.batch_indices(Order(5, 24, Share(p, 3)), 3) for p in range(3)]
    np.testing.assert_array_equal(np.concatenate(found), whole[3, :, 1])


@pytest.mark.parametrize("shards", [100, 96, 33])
def test_lanes_stay_together(shards):
    """However many shards there are, and of differing lengths: no image comes twice before all others came, but
    for the ends of epochs, where lanes are in two of them.
    """
    lengths = np.random.default_rng(1).integers(100, 140, shards)
    shared = Order(3, 1024)
    parts = order.lanes(shared, shards)
    assert (
        len(parts) == {100: 4, 96: 4, 33: 2}[shards]
    )  # at least 16 shards each, and divisors of 1024
    size, epochs = 1024 // len(parts), 12
    streams = []
    for lane in parts:
        own = []
        for epoch, members, positions in order.windows(shared, lengths, lane, 0):
            if epoch == epochs:
                break
            own += [(epoch, int(members[0]), int(x)) for x in positions]
        streams.append(own)
    pairs = [pair for own in streams for pair in own]
    assert len(set(pairs)) == len(pairs) == epochs * lengths.sum()  # every image once an epoch
    in_two = 0
    steps = min(map(len, streams)) // size
    for step in range(steps):
        of_batch = {e for own in streams for e, _, _ in own[step * size : (step + 1) * size]}
        assert max(of_batch) - min(of_batch) <= 1
        in_two += len(of_batch) > 1
    assert in_two / steps < 2 * 1024 / lengths.sum()  # once an epoch would be half of it


def test_a_process_reads_few_lanes():
    def read(batch, processes, shards=1024):
        made = [order.lanes(Order(0, batch, Share(p, processes)), shards) for p in range(processes)]
        rows = sum(lane.stop - lane.start for lanes in made for lane in lanes)
        assert rows == batch
        return made[0][0].count, max(map(len, made))

    assert read(256, 1) == (4, 4)
    assert read(4096, 1) == (64, 64)
    assert read(4096, 64) == (64, 1)
    assert read(4096, 128) == (64, 1)  # two processes read a lane
    assert read(4098, 3) == (6, 2)
    assert read(4096, 8, shards=15) == (1, 1)


@pytest.mark.parametrize("kind", [*STREAMED, "small_split", "drawn"])
@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_sees_every_image_once(kind, processes, request):
    split = request.getfixturevalue(kind)
    parts = [labels_once(split, Share(p, processes)) for p in range(processes)]
    # Process p holds images p, p + P, ...
    whole = labels_once(split)
    assert len(whole) == split.count
    assert [whole[p::processes] for p in range(processes)] == parts
    assert labels_once(split, Share(1, 3), start=6) == whole[19::3]
    assert labels_once(split, Share(1, 3), start=20) == []
    assert split.all_labels().tolist() == whole


@pytest.mark.parametrize("kind", [*STREAMED, "drawn"])
def test_encoded_images_decode_to_what_was_written(kind, request):
    split = request.getfixturevalue(kind)
    for example in split.once(Share()).take(4).as_numpy_iterator():
        image = split.decode(tf.constant(example["image"])).numpy()
        np.testing.assert_array_equal(image, picture(int(example["label"])))


def test_array_record_is_read_as_tfrecord_is(files, array_records):
    """The default format of `tfds build`: the same images, in the same order, from anywhere."""
    np.testing.assert_array_equal(stream(array_records, steps=15), stream(files, steps=15))
    late, expected = (stream(x, steps=4, start=7) for x in (array_records, files))
    np.testing.assert_array_equal(late, expected)
    both = [x.once(Share()).as_numpy_iterator() for x in (array_records, files)]
    assert [e["image"] for e in both[0]] == [e["image"] for e in both[1]]
    assert array_records.all_labels().tolist() == files.all_labels().tolist()
    assert array_records.fingerprint() == files.fingerprint()


def test_array_record_without_its_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install array_record") as caught:
        prepared(tmp_path, "array_record")
    assert "\n" not in str(caught.value)


def test_a_data_set_that_another_process_prepares_meanwhile_is_taken(tmp_path, monkeypatch):
    prepare = Digits.download_and_prepare

    def late(builder):
        prepare(builder)
        raise OSError(39, "Directory not empty")

    monkeypatch.setattr(Digits, "download_and_prepare", late)
    assert opened(name="digits", path=str(tmp_path)).train.count == 1437
    monkeypatch.setattr(Digits, "download_and_prepare", lambda builder: 1 / 0)
    with pytest.raises(UserError, match="could not prepare the TFDS data set 'digits'"):
        opened(name="digits", path=f"{tmp_path}/other")


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_digits_are_scikit_learns(tmp_path, file_format):
    from sklearn.datasets import load_digits

    Digits(data_dir=tmp_path, file_format=file_format).download_and_prepare()
    source = opened(name="digits", path=str(tmp_path))
    train, test = source.train.source, source.test.source
    images = np.concatenate([train.arrays, test.arrays])
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert len(test) == 360
    assert train.classes == tuple("0123456789")
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in images) == sorted(x.tobytes() for x in expected)
    np.testing.assert_allclose(np.bincount(test.labels), 36, atol=1)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def test_a_folder_without_labels(tmp_path):
    for name in ("b/deep/2.png", "a/1.JPG", "0.jpeg"):
        write(tmp_path / name, random_images(1, 9, 7)[0])
    write(tmp_path / "grey.png", random_images(1, 9, 7, channels=1)[0, ..., 0])
    (tmp_path / "notes.txt").write_text("no image")
    split = opened(source="folder", path=str(tmp_path)).train
    names = [split.name_of(i).removeprefix(f"{tmp_path}/") for i in range(split.count)]
    assert names == ["0.jpeg", "a/1.JPG", "b/deep/2.png", "grey.png"]
    assert split.classes is None
    for example in split.once(Share()):
        assert split.decode(example["image"]).shape == (9, 7, 3)
        assert example["label"] == -1


def test_a_folder_with_labels_takes_the_first_folder(tmp_path):
    for name in ("cat/1.png", "dog/x/2.png", "dog/3.png"):
        write(tmp_path / name, random_images(1)[0])
    split = opened(source="folder", path=str(tmp_path), folder_labels=True).train
    assert split.classes == ("cat", "dog")
    np.testing.assert_array_equal(split.all_labels(), [0, 1, 1])
    write(tmp_path / "loose.png", random_images(1)[0])
    with pytest.raises(UserError, match=r"1 images lie in no class folder, such as .*loose\.png"):
        open_split(str(tmp_path), labels=True)
    found = open_split(str(tmp_path), labels=True, loose=True)  # as for embedding
    assert found.all_labels().tolist() == [0, 1, 1, -1]


def test_a_test_folder_has_the_classes_of_the_training_folder(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "test/dog/3.png"):
        write(tmp_path / name, random_images(1)[0])
    options = {"source": "folder", "path": str(tmp_path / "train"), "folder_labels": True}
    source = opened(test_path=str(tmp_path / "test"), **options)
    np.testing.assert_array_equal(source.test.all_labels(), [1])
    write(tmp_path / "other/bird/4.png", random_images(1)[0])
    with pytest.raises(UserError, match="bird"):
        opened(test_path=str(tmp_path / "other"), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"source": "folder", "path": "/nowhere"}, "no folder '/nowhere'"),
        ({"source": "arrays", "path": "/nowhere.npz"}, "no file '/nowhere.npz'"),
        ({"source": "tfds", "name": "cifar11"}, "near names: cifar10"),
        ({"source": "tfds", "name": "digits:9.9.9"}, r"'digits:9\.9\.9' \(data\.name\)"),
        ({"source": "folder", "path": "~nobody-of-this-name/x"}, "no folder '~nobody-of"),
        ({"source": "arrays", "path": "~nobody-of-this-name/x"}, "no file '~nobody-of"),
        (
            {"source": "tfds", "name": "digits", "train_split": "tran"},
            "it has test, train|train, test",
        ),
    ],
)
def test_what_is_not_there_is_said_in_one_line(options, says):
    with pytest.raises(UserError, match=says) as caught:
        opened(**options)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_and_bad_arrays_are_refused(tmp_path):
    with pytest.raises(UserError, match="no image below"):
        opened(source="folder", path=str(tmp_path))
    (tmp_path / "photos.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"looked for \.jpg, .*; found 1 \.zip"):
        opened(source="folder", path=str(tmp_path))
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"it holds 1 Parquet files, .*/\*\.parquet"):
        opened(source="folder", path=str(tmp_path))
    with pytest.raises(UserError, match=r"is a file: .* FILE\.npz or FILE\.parquet"):
        opened(source="folder", path=str(tmp_path / "photos.zip"))
    assert [kind_of(x) for x in ("A.NPZ", "b/*.Parquet", "c")] == ["arrays", "parquet", "folder"]
    with pytest.raises(UserError, match="expected uint8"):
        in_memory(np.zeros((3, 8, 8, 3), np.float32))
    with pytest.raises(UserError, match="expected one integer each"):
        in_memory(np.zeros((3, 8, 8, 3), np.uint8), [0, 1], ("a", "b"))
    with pytest.raises(UserError, match="expected one integer each"):
        in_memory(np.zeros((3, 8, 8, 3), np.uint8), [[0], [1], [0]], ("a", "b"))
    with pytest.raises(UserError, match="labels are 0 to 2: expected 0 to 1"):
        in_memory(np.zeros((3, 8, 8, 3), np.uint8), [0, 1, 2], ("a", "b"))
    assert in_memory(np.zeros((3, 8, 8, 3), np.uint8), [-1, -1, -1], ("a", "b")).classes is None
    with pytest.raises(UserError, match="no images"):
        in_memory(np.zeros((0, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "x.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="expected train_images"):
        opened(source="arrays", path=str(tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", train_images=np.array([{}], dtype=object))
    with pytest.raises(
        UserError, match=r"as an \.npz file: train_images is an array of Python obj"
    ):
        opened(source="arrays", path=str(tmp_path / "y.npz"))
    np.savez(tmp_path / "f.npz", train_images=np.zeros((3, 8, 8)))
    with pytest.raises(UserError, match=r"f\.npz: train_images are float64 \[3, 8, 8\]: expected"):
        opened(source="arrays", path=str(tmp_path / "f.npz"))
    cut = (tmp_path / "f.npz").read_bytes()[:-40]
    (tmp_path / "cut.npz").write_bytes(cut)
    (tmp_path / "z.npz").write_text("no arrays")
    np.save(tmp_path / "one.npy", np.zeros((3, 8, 8, 3), np.uint8))
    (tmp_path / "empty.npz").write_bytes(b"")
    np.savez_compressed(tmp_path / "damaged.npz", train_images=random_images(40))
    damaged = bytearray((tmp_path / "damaged.npz").read_bytes())
    damaged[200:260] = bytes(60)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    np.savez(tmp_path / "w.npz", train_images=random_images(3), test_labels=[0, 1])
    with pytest.raises(UserError, match="holds test_labels and no test_images"):
        opened(source="arrays", path=str(tmp_path / "w.npz"))
    for name in ("z.npz", "one.npy", "cut.npz", "empty.npz", "damaged.npz"):
        with pytest.raises(UserError, match=r"cannot be read as an .npz file: expected what"):
            opened(source="arrays", path=str(tmp_path / name))


def test_synthetic_images_have_classes():
    source = opened(source="synthetic", seed=1)
    assert source.train.count == 4 * source.test.count
    assert len(source.train.classes) == 10


def test_lanes_trade_windows_so_that_none_falls_behind():
    """Three equal shards make one window of one shard and one of two, in every epoch."""
    given = []
    for index in range(2):
        lane = order.Lane(index, 2, 0, 4)
        found = order.windows(Order(0, 8), np.full(3, 10), lane, 0)
        given.append([len(positions) for _, _, positions in itertools.islice(found, 4)])
    assert given == [[10, 20, 10, 20], [20, 10, 20, 10]]


@pytest.mark.parametrize(
    ("number", "passes"),
    [
        (errno.EMFILE, True),
        (errno.ESTALE, True),
        (errno.ENOTCONN, True),
        (errno.EHOSTDOWN, True),
        (errno.EIO, False),
    ],
)
def test_what_cannot_be_read_at_the_moment_is_no_broken_image(number, passes, drawn, monkeypatch):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(type(drawn.source), "encoded", fails)
    if passes:
        with pytest.raises(Unavailable, match="cannot be read at the moment"):
            drawn.problems([3])
    else:
        assert drawn.problems([3]) == {3: os.strerror(number)}


class Boxes(tfds.core.GeneratorBasedBuilder):
    """8 images of one shape, with features of any number, and features of their own."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "label": tfds.features.ClassLabel(num_classes=2),
            "boxes": tfds.features.Sequence(tfds.features.BBoxFeature()),
            "attributes": {"old": tf.bool, "names": tfds.features.Sequence(tf.string)},
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
        for i, image in enumerate(random_images(8, 4, 4)):
            about = {"old": True, "names": ["a"] * i}
            yield i, {"image": image, "label": i % 2, "boxes": [box] * i, "attributes": about}


@pytest.mark.parametrize("file_format", ["tfrecord", "array_record"])
def test_other_features_of_tfds_are_not_read(tmp_path, file_format):
    if file_format == "array_record":
        pytest.importorskip("array_record")
    Boxes(data_dir=tmp_path, file_format=file_format).download_and_prepare()
    data = opened(name="boxes", path=str(tmp_path), test_split="")
    assert sorted(data.train.all_labels().tolist()) == [0] * 4 + [1] * 4
    found = {image.tobytes() for image in data.train.source.arrays}
    assert found == {image.tobytes() for image in random_images(8, 4, 4)}


def test_damaged_record_files_are_one_line(tmp_path):
    split = prepared(tmp_path)
    for file in tmp_path.rglob("*train.tfrecord*"):
        content = bytearray(file.read_bytes())
        content[40:60] = bytes(20)
        file.write_bytes(content)
    says = "the files of streamed/train cannot be read .*: prepare or copy them anew"
    for read in (
        lambda: split.problems([0]),
        lambda: list(pictures_of(split, 3, ReadOptions())),
        split.all_labels,
        lambda: split.subset(np.arange(3)),
    ):
        with pytest.raises(UserError, match=says):
            read()


@pytest.mark.parametrize("most_in_memory", [2**30, 0])
def test_splits_of_tfds_are_joined(most_in_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tfds_source, "_IN_MEMORY_BYTES", most_in_memory)
    joined, single = (
        opened(name="digits", path=str(tmp_path), train_split=name, test_split=test)
        for name, test in (("train+test", ""), ("train", "test"))
    )
    with pytest.raises(
        UserError, match=r"test is in both data\.train_split=train\+test and data\.test"
    ):
        opened(name="digits", path=str(tmp_path), train_split="train+test", test_split="test")
    assert (joined.train.count, single.train.count) == (1797, 1437)
    labels = np.concatenate([single.train.all_labels(), single.test.all_labels()])
    np.testing.assert_array_equal(joined.train.all_labels(), labels)
    assert joined.train.fingerprint() != single.train.fingerprint()
    for name, says in (("train+tests", "has no split 'tests'"), ("test+test", "a split twice")):
        with pytest.raises(UserError, match=says):
            opened(name="digits", path=str(tmp_path), train_split=name)


@pytest.mark.parametrize("kind", STREAMED)
def test_entering_late_reads_one_window_in_vain_at_most(kind, request, monkeypatch):
    split = request.getfixturevalue(kind)
    monkeypatch.setattr(order, "WINDOW", 1)  # each shard a window of its own
    lengths = split.source.lengths
    read = used = 0
    entered = order.windows(Order(5, 35), lengths, order.Lane(0, 1, 0, 35), start_step=1)
    for _, members, positions in itertools.islice(entered, 3):
        read, used = read + lengths[members].sum(), used + len(positions)
    assert 0 < read - used < lengths.max()
    whole = stream(split, steps=9)
    np.testing.assert_array_equal(np.sort(whole[:COUNT, 1]), np.arange(COUNT))
    np.testing.assert_array_equal(stream(split, 6, start=3), whole[30:])


@pytest.mark.parametrize("kind", STREAMED)
def test_a_part_of_a_stream_is_a_subset_of_it(kind, request):
    split = request.getfixturevalue(kind)
    labels = split.all_labels()
    np.testing.assert_array_equal(np.sort(labels), np.arange(COUNT))
    some = split.subset(np.asarray([40, 3, 17]))
    assert some.all_labels().tolist() == labels[[3, 17, 40]].tolist()  # in the stream's order
    for example, label in zip(some.once(Share()), labels[[3, 17, 40]], strict=True):
        np.testing.assert_array_equal(some.decode(example["image"]).numpy(), picture(label))
    assert some.name_of(1) == "image 1"
    assert labels_once(some, start=1) == labels[[17, 40]].tolist()


@pytest.mark.parametrize("kind", STREAMED)
def test_a_subset_of_a_stream_that_memory_cannot_hold(kind, request, monkeypatch):
    split = request.getfixturevalue(kind)
    # Room for half of the images.
    monkeypatch.setattr(
        streamed, "_MEMORY_FOR_SUBSETS", split.source.total_bytes / streamed.memory() / 2
    )
    split.check_subset(20)
    with pytest.raises(
        UserError, match=r"50 images of .* GB of memory.* prepare them as a data set"
    ):
        split.subset(np.arange(50))


@pytest.mark.parametrize("kind", [*STREAMED, "arrays", "drawn"])
def test_a_split_is_divided_by_the_seed(kind, small_split, request):
    if kind == "arrays":
        split = in_memory(small_split.source.arrays, np.arange(37))
    else:
        split = request.getfixturevalue(kind)
    one, two = split.divided(0.3, seed=0)
    parts = [part.all_labels() for part in (one, two)]
    assert [len(part) for part in parts] == [one.count, two.count]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(split.count))
    assert 0.15 < two.count / split.count < 0.45
    others = [split.divided(0.3, seed)[1].all_labels().tolist() for seed in range(1, 4)]
    assert any(other != parts[1].tolist() for other in others)
    assert split.divided(0.3, 0)[1].all_labels().tolist() == parts[1].tolist()
    assert labels_once(one) == parts[0].tolist()
    if kind in STREAMED:  # which trains on its own examples only
        seen = stream(one, 20)
        assert set(seen[:, 2].tolist()) == set(parts[0].tolist())
        # Its images are its own from 0 on; by name they are those of the whole.
        names = [split.name_of(i) for i in split.all_labels().argsort()]
        for _, index, label in seen[:5]:
            assert parts[0][index] == label
            assert one.name_of(index) == names[label]


@pytest.mark.parametrize("kind", ["small_split", "drawn"])
def test_a_broken_image_is_replaced_by_a_whole_one_that_the_batch_lacks(kind, request):
    split = request.getfixturevalue(kind)
    last = split.count - 1
    broken = frozenset({3, 4, last})
    plain, seen = stream(split, steps=8), stream(split, steps=8, broken=broken)
    for before, after in zip(plain[:, 1].reshape(8, 10), seen[:, 1].reshape(8, 10), strict=True):
        for old, new in zip(before.tolist(), after.tolist(), strict=True):
            assert new == old if old not in broken else new not in {*broken, *before.tolist()}
    labels = labels_once(split, Share(0, 2), start=1, broken=broken)
    labelled = split.all_labels()
    assert labels == [BROKEN if i in broken else labelled[i] for i in range(2, split.count, 2)]


@pytest.mark.parametrize("kind", STREAMED)
def test_a_broken_image_of_a_stream_has_a_whole_one_in_its_place(kind, request):
    split = request.getfixturevalue(kind)
    broken = frozenset({0, 7, 8, 30, 59})
    plain, seen = stream(split, steps=12), stream(split, steps=12, broken=broken)
    bad = np.isin(plain[:, 1], list(broken))
    assert 9 <= bad.sum() <= 10
    np.testing.assert_array_equal(seen[~bad], plain[~bad])
    assert not broken.intersection(seen[:, 1].tolist())
    labels = split.all_labels()
    np.testing.assert_array_equal(seen[:, 2], labels[seen[:, 1]])
    np.testing.assert_array_equal(stream(split, 7, start=5, broken=broken), seen[50:])
    indices = split.batch_indices(Order(5, 10), 5, broken)
    np.testing.assert_array_equal(indices, seen[50:60, 1])
    found = labels_once(split, Share(0, 2), start=1, broken=broken)
    assert found == [BROKEN if i in broken else labels[i] for i in range(2, COUNT, 2)]


@pytest.mark.parametrize("kind", STREAMED)
def test_where_all_that_are_read_together_are_broken_a_white_pixel_comes(
    kind, request, monkeypatch
):
    monkeypatch.setattr(order, "WINDOW", 1)  # each shard a window of its own
    split = request.getfixturevalue(kind)
    first = frozenset(range(split.source.lengths[0]))
    examples = split.training(Order(5, 10), 0, first).take(COUNT).as_numpy_iterator()
    blank = [x for x in examples if x["label"] == BROKEN]
    assert {x["index"] for x in blank} == first
    assert np.all(split.decode(tf.constant(blank[0]["image"])).numpy() == 255)


@pytest.mark.parametrize("kind", STREAMED)
def test_streams_are_read_on_hosts_of_many_cores(kind, request, monkeypatch):
    """TensorFlow refuses more parallel calls than files that are read in turns, 16."""
    split = request.getfixturevalue(kind)
    seen = stream(split, steps=8)
    monkeypatch.setattr(streamed, "CORES", 64)
    np.testing.assert_array_equal(stream(split, steps=8), seen)
    assert len(split.batch_indices(Order(5, 10), 0)) == 10


def test_an_image_that_stands_in_has_the_shape_of_the_source(files):
    (height, width, _) = files.image_shape
    examples = files.once(Share(), 0, frozenset({0})).as_numpy_iterator()
    blank = files.decode(tf.constant(next(examples)["image"]))
    assert blank.shape[:2] == ((height, width) if height else (1, 1))


@pytest.mark.parametrize("inner", ["test", "."])
def test_test_images_below_the_training_images_are_refused(tmp_path, inner):
    for name in ("a.png", "test/b.png"):
        write(tmp_path / "pets" / name, random_images(1)[0])
    (tmp_path / "link").symlink_to(tmp_path / "pets" / inner)
    paths = [str(tmp_path / "pets"), str(tmp_path / "link")]
    says = "lies within the other" if inner == "test" else "the test images are the training images"
    for path, test_path in (paths, paths[::-1]):
        with pytest.raises(UserError, match=says):
            opened(source="folder", path=path, test_path=test_path)


def test_test_images_that_links_lead_to_are_refused(tmp_path):
    for name in ("train/a.png", "test/b.png"):
        write(tmp_path / name, random_images(1)[0])
    (tmp_path / "train" / "more").symlink_to(tmp_path / "test")
    with pytest.raises(
        UserError, match=r"/test is below both data\.path and data\.test_path, by links"
    ):
        opened(source="folder", path=str(tmp_path / "train"), test_path=str(tmp_path / "test"))


def test_windows_of_large_images_have_fewer():
    """Of 8 MB each a window of 8,192 would take 64 GB."""
    lengths, lane = np.full(100, 100), order.Lane(0, 1, 0, 64)
    for size, count in ((0.0, 10_000), (110e3, 10_000), (8e6, 100), (80e6, 100)):
        _, members, positions = next(order.windows(Order(0, 64), lengths, lane, 0, size))
        assert len(positions) == lengths[members].sum()
        assert count / 2 <= len(positions) <= 2 * count


def test_options_that_a_source_does_not_read_are_refused(tmp_path, capsys):
    saved = config.default()
    saved.data.source, saved.data.path = "arrays", str(tmp_path / "x.npz")
    for option in ("test_path=b.npz", "labels_file=b.csv", "folder_labels=True", "train_split=a"):
        name = option.partition("=")[0]
        owner = "tfds" if name == "train_split" else "folder"
        says = rf"source=arrays does not read data\.{name}: it belongs to .*{owner}"
        with pytest.raises(UserError, match=says):
            load(None, [f"--config.data.{option}"], saved.to_dict())
    says = r"TFDS would write its data: add --config\.data\.path="
    with pytest.raises(UserError, match=says):
        load(None, ["--config.data.source=tfds", "--config.data.name=cifar10"], saved.to_dict())
    with pytest.raises(UserError, match=says):
        simclr_jax.evaluate("knn", "", saved, **{"data.source": "tfds", "data.name": "cifar10"})
    np.savez(tmp_path / "x.npz", train_images=random_images(8))
    file = f"{pathlib.Path(__file__).parent.parent}/configs/folder.py:{tmp_path}/x.npz"
    with pytest.raises(UserError, match=says):
        load(file, ["--config.data.source=tfds", "--config.data.name=cifar10"])
    saved.data.test_path = "te.npz"
    say_not_read(saved.data)
    said = "ignored     data.test_path=te.npz: data.source=arrays does not read it\n"
    assert capsys.readouterr().out == said
    # What a run on a folder left is no mistake of an evaluation on other data.
    saved.data.labels_file = "b.csv"
    assert load(None, ["--config.data.path=y.npz"], saved.to_dict()).data.labels_file == "b.csv"


def test_fingerprints_tell_contents_apart(small_split, files, row_groups, drawn, tmp_path):
    images, labels = small_split.source.arrays, small_split.source.labels
    other = in_memory(images[::-1], labels, small_split.classes)
    relabelled = in_memory(images, labels[::-1], small_split.classes)
    same = in_memory(images.copy(), labels, small_split.classes)
    lost = IndexedSplit(Drawn((3,), drawn.classes))
    unlike = small_split, other, relabelled, files, row_groups, drawn, lost
    prints = [split.fingerprint() for split in unlike]
    assert len(set(prints)) == len(unlike)
    assert same.fingerprint() == prints[0]
    for place in ("one", "two"):
        for i in range(3):
            write(tmp_path / place / f"{i}.png", random_images(i + 1)[0])
    one, two = (open_split(str(tmp_path / place), labels=False) for place in ("one", "two"))
    assert one.fingerprint() == two.fingerprint()
    write(tmp_path / "two/1.png", random_images(1, 30, 30)[0])
    assert open_split(str(tmp_path / "two"), False).fingerprint() != one.fingerprint()


def test_a_source_without_classes_is_not_read_for_its_labels():
    split = IndexedSplit(Drawn(lost=range(COUNT)))
    assert split.all_labels().tolist() == [-1] * COUNT


def test_a_subset_of_a_source_of_two_methods(drawn):
    some = drawn.subset(np.asarray([40, 3, 17]))
    assert some.all_labels().tolist() == [40, 3, 17]
    assert some.name_of(1) == "image 3"
    for example, label in zip(some.once(Share()), (40, 3, 17), strict=True):
        np.testing.assert_array_equal(some.decode(example["image"]).numpy(), picture(label))
    again = IndexedSplit(Drawn(classes=drawn.classes)).subset(np.asarray([40, 3, 17]))
    assert again.fingerprint() == some.fingerprint()
    assert drawn.subset(np.asarray([3, 40, 17])).fingerprint() != some.fingerprint()


@pytest.mark.parametrize(
    "image",
    [np.zeros((2, 2, 3), np.float32), np.zeros((2, 2, 4), np.uint8), np.zeros((2, 2), np.uint8)],
)
def test_pixels_of_another_type_are_broken_and_say_so(image):
    class Odd(Source):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return Example(image)

    assert "expected bytes, or uint8 [H, W, 1 or 3]" in IndexedSplit(Odd()).problems([0])[0]


def test_a_source_of_two_methods_trains(tiny, tmp_path, monkeypatch, drawn):
    monkeypatch.setattr(assemble, "data_set", lambda config: DataSet(drawn, None))
    config.set_options(tiny, STREAMING)
    pretrain(tiny, str(tmp_path / "w"))
    lines = (tmp_path / "w/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 3
    assert not (tmp_path / "w/broken_images.jsonl").exists()


class Raw(Source):
    """60 images in a format of its own: the bytes of 16 x 24 x 3 pixels, of which image 7 lacks some."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        content = np.full((16, 24, 3), index, np.uint8).tobytes()
        return Example(content[:-1] if index == 7 else content)

    def decode(self, image, options=None):
        return tf.reshape(tf.io.decode_raw(image, tf.uint8), (16, 24, 3))


@pytest.mark.parametrize("places", [range(COUNT), (40, 7, 3)])
def test_a_source_with_a_format_of_its_own_is_decoded_by_itself(places):
    """In evaluation, in the search for what is broken, and for pictures in reports; so is a part of it."""
    split = IndexedSplit(Raw()).subset(np.asarray(places))
    images = Images(split, Broken(split, 0.5))
    found = list(pipeline.evaluation_batches(images, 16, Share(), EvaluationView(4, 1.0)))
    values = np.concatenate([batch["image"] for batch in found]).max((1, 2, 3))
    labels = np.concatenate([batch["label"] for batch in found])
    assert values[labels != BROKEN].tolist() == [i for i in places if i != 7]
    assert list(split.problems(range(len(places)))) == [list(places).index(7)]
    shown = {p.place: p.image for p in pictures_of(split, len(places), ReadOptions())}
    assert {int(x.max()) for x in shown.values()} == set(places) - {7}


def test_evaluation_leaves_out_what_a_source_of_two_methods_cannot_read():
    split = IndexedSplit(Drawn(lost=(5, 6), classes=("a", "b", "c")))
    images = Images(split, Broken(split, 0.1))
    view = EvaluationView(4, 1.0)
    found = list(pipeline.evaluation_batches(images, 16, Share(), view))
    labels = np.concatenate([batch["label"] for batch in found])
    assert labels.tolist() == [BROKEN if i in (5, 6) else i % 3 for i in range(COUNT)]
    assert split.problems(range(COUNT)) == dict.fromkeys((5, 6), "the drawer jams")
