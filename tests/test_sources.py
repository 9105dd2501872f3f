"""Every kind of source: what it holds, in which order, shared by processes, and what it refuses."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from conftest import random_images

from simclr_jax.data import sources
from simclr_jax.data.sources import FilesSplit, Share, in_memory, open_source
from simclr_jax.errors import UserError


class Streamed(tfds.core.GeneratorBasedBuilder):
    """60 images of differing sizes, written into several files."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=60),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(60), "test": self._generate_examples(7)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": random_images(1, 4 + i % 3, 5)[0], "label": i}


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    builder = Streamed(data_dir=folder)
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=6))
    return folder


@pytest.fixture
def files(streamed):
    split = open_source("tfds", name="streamed", path=str(streamed)).train
    assert isinstance(split, FilesSplit)
    return split


def stream(split, steps, batch_size=10, start=0, share=Share(), seed=5):
    """(epoch, index, label) of every example, [n, 3]."""
    examples = split.training(seed, batch_size, start, share)
    take = steps * (batch_size // share.count)
    return np.array([[int(x[k]) for k in ("epoch", "index", "label")] for x in examples.take(take)])


def test_arrays_stream_every_image_once_an_epoch(small_split):
    seen = stream(small_split, steps=8)
    for epoch in range(2):
        np.testing.assert_array_equal(np.sort(seen[seen[:, 0] == epoch][:, 1]), np.arange(37))
    np.testing.assert_array_equal(seen[:, 2], seen[:, 1] % 3)


def test_arrays_give_the_image_of_the_index(small_split):
    for example in small_split.training(0, 10, 0, Share()).take(20).as_numpy_iterator():
        np.testing.assert_array_equal(example["image"], small_split.images[example["index"]])


def test_files_stream_every_image_once_an_epoch_in_a_new_order(files):
    seen = stream(files, steps=18)
    orders = [seen[seen[:, 0] == epoch][:, 2] for epoch in range(3)]
    for order in orders:
        np.testing.assert_array_equal(np.sort(order), np.arange(60))
    assert np.mean(orders[0] == orders[1]) < 0.2
    # An index names one image for ever: it keys the views.
    pairs = {(index, label) for _, index, label in seen}
    assert len(pairs) == 60


@pytest.mark.parametrize("kind", ["files", "small_split"])
def test_the_order_repeats_and_can_be_entered_anywhere(kind, request):
    split = request.getfixturevalue(kind)
    whole = stream(split, steps=15)
    np.testing.assert_array_equal(stream(split, steps=15), whole)
    for start in (1, 6, 9):
        np.testing.assert_array_equal(stream(split, 15 - start, start=start), whole[start * 10 :])
    assert not np.array_equal(stream(split, steps=15, seed=6), whole)


def test_processes_share_files_without_overlap(files):
    seen = [stream(files, steps=6, share=Share(p, 2)) for p in range(2)]
    first = [part[part[:, 0] == 0][:, 1] for part in seen]
    np.testing.assert_array_equal(np.sort(np.concatenate(first)), np.arange(60))


def test_more_processes_than_files_is_refused(files):
    with pytest.raises(UserError, match="6 files, fewer than the 7 processes"):
        files.training(0, 14, 0, Share(0, 7))


@pytest.mark.parametrize("kind", ["files", "small_split"])
@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_sees_every_image_once(kind, processes, request):
    split = request.getfixturevalue(kind)
    parts = [[int(x["label"]) for x in split.once(Share(p, processes))] for p in range(processes)]
    # Process p holds images p, p + P, ...
    whole = [int(x["label"]) for x in split.once(Share())]
    assert len(whole) == split.count
    assert [whole[p::processes] for p in range(processes)] == parts


def test_files_decode_to_their_images(files):
    example = next(iter(files.once(Share())))
    image = files.decode(example["image"]).numpy()
    i = int(example["label"])
    np.testing.assert_array_equal(image, random_images(1, 4 + i % 3, 5)[0])


def test_digits_are_scikit_learns(tmp_path):
    from sklearn.datasets import load_digits

    source = open_source("tfds", name="digits", path=str(tmp_path))
    images = np.concatenate([source.train.images, source.test.images])
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert len(source.test.images) == 360
    assert source.train.classes == tuple("0123456789")
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert sorted(x.tobytes() for x in images) == sorted(x.tobytes() for x in expected)
    np.testing.assert_allclose(np.bincount(source.test.labels), 36, atol=1)


def write(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    encode = tf.io.encode_png if path.suffix == ".png" else tf.io.encode_jpeg
    path.write_bytes(encode(image).numpy())


def test_a_folder_without_labels(tmp_path):
    for name in ("b/deep/2.png", "a/1.JPG", "0.jpeg"):
        write(tmp_path / name, random_images(1, 9, 7)[0])
    write(tmp_path / "grey.png", random_images(1, 9, 7, channels=1)[0])
    (tmp_path / "notes.txt").write_text("no image")
    split = open_source("folder", path=str(tmp_path)).train
    assert [p.removeprefix(f"{tmp_path}/") for p in split.images] == [
        "0.jpeg",
        "a/1.JPG",
        "b/deep/2.png",
        "grey.png",
    ]
    assert split.classes is None
    for path in split.images:
        assert split.decode(tf.constant(path)).shape == (9, 7, 3)


def test_a_folder_with_labels_takes_the_first_folder(tmp_path):
    for name in ("cat/1.png", "dog/x/2.png", "dog/3.png"):
        write(tmp_path / name, random_images(1)[0])
    split = open_source("folder", path=str(tmp_path), folder_labels=True).train
    assert split.classes == ("cat", "dog")
    np.testing.assert_array_equal(split.labels, [0, 1, 1])
    write(tmp_path / "loose.png", random_images(1)[0])
    with pytest.raises(UserError, match=r"1 images lie in no class folder, such as .*loose\.png"):
        sources.folder(str(tmp_path), labels=True)


def test_a_test_folder_has_the_classes_of_the_training_folder(tmp_path):
    for name in ("train/cat/1.png", "train/dog/2.png", "test/dog/3.png"):
        write(tmp_path / name, random_images(1)[0])
    options = {"path": str(tmp_path / "train"), "folder_labels": True}
    source = open_source("folder", test_path=str(tmp_path / "test"), **options)
    np.testing.assert_array_equal(source.test.labels, [1])
    write(tmp_path / "other/bird/4.png", random_images(1)[0])
    with pytest.raises(UserError, match="bird"):
        open_source("folder", test_path=str(tmp_path / "other"), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kind": "folder", "path": "/nowhere"}, "no folder '/nowhere'"),
        ({"kind": "arrays", "path": "/nowhere.npz"}, "no file '/nowhere.npz'"),
        ({"kind": "tfds", "name": "cifar11"}, "near names: cifar10"),
        (
            {"kind": "tfds", "name": "digits", "train_split": "tran"},
            "it has test, train|train, test",
        ),
    ],
)
def test_what_is_not_there_is_said_in_one_line(options, says):
    with pytest.raises(UserError, match=says) as caught:
        open_source(**options)
    assert "\n" not in str(caught.value)


def test_an_empty_folder_and_bad_arrays_are_refused(tmp_path):
    with pytest.raises(UserError, match="no image below"):
        open_source("folder", path=str(tmp_path))
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
        open_source("arrays", path=str(tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", train_images=np.array([{}], dtype=object))
    with pytest.raises(UserError, match="pickle"):
        open_source("arrays", path=str(tmp_path / "y.npz"))
    (tmp_path / "z.npz").write_text("no arrays")
    with pytest.raises(UserError, match="cannot be read"):
        open_source("arrays", path=str(tmp_path / "z.npz"))


def test_synthetic_images_have_classes():
    source = open_source("synthetic", seed=1)
    assert source.train.count == 4 * source.test.count
    assert len(source.train.classes) == 10


def test_entering_late_reads_one_window_in_vain_at_most(files, monkeypatch):
    monkeypatch.setattr(sources, "_WINDOW", 1)  # each file a window of its own
    lengths = np.asarray(files._files[1])
    read = used = 0
    for _, members, order in itertools.islice(sources._windows(5, lengths, Share(), 35), 3):
        read, used = read + lengths[members].sum(), used + len(order)
    assert 0 < read - used < lengths.max()
    whole = stream(files, steps=9)
    np.testing.assert_array_equal(np.sort(whole[:60, 1]), np.arange(60))
    np.testing.assert_array_equal(stream(files, 6, start=3), whole[30:])


def test_a_part_of_a_stream_is_a_subset_of_it(files):
    labels = files.all_labels()
    np.testing.assert_array_equal(np.sort(labels), np.arange(60))
    some = files.subset(np.asarray([40, 3, 17]))
    assert some.labels.tolist() == labels[[3, 17, 40]].tolist()  # in the stream's order
    examples = list(files.once(Share()).as_numpy_iterator())
    for i, encoded in zip((3, 17, 40), some.images, strict=True):
        whole = files.decode(tf.constant(examples[i]["image"])).numpy()
        np.testing.assert_array_equal(some.decode(tf.constant(encoded)).numpy(), whole)
    assert some.name_of(1) == "image 1"
    assert int(next(iter(some.once(Share(), 1)))["label"]) == labels[17]


def test_a_subset_of_a_stream_that_memory_cannot_hold(files, monkeypatch):
    monkeypatch.setattr(sources, "_MEMORY_FOR_SUBSETS", 1e-9)
    with pytest.raises(
        UserError, match=r"50 images of .* GB of memory.* prepare them as a data set"
    ):
        files.subset(np.arange(50))


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_a_split_is_divided_by_the_seed(kind, files, small_split):
    split = files if kind == "files" else in_memory(small_split.images, np.arange(37))
    one, two = split.divided(0.3, seed=0)
    parts = [part.all_labels() for part in (one, two)]
    assert [len(part) for part in parts] == [one.count, two.count]
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(split.count))
    assert 0.15 < two.count / split.count < 0.45
    others = [split.divided(0.3, seed)[1].all_labels().tolist() for seed in range(1, 4)]
    assert any(other != parts[1].tolist() for other in others)
    assert split.divided(0.3, 0)[1].all_labels().tolist() == parts[1].tolist()
    if kind == "files":  # which trains on its own examples only
        seen = set(stream(one, 20)[:, 2].tolist())
        assert seen == set(parts[0].tolist())


def test_a_broken_image_is_replaced_by_the_next_whole_one(small_split):
    broken = frozenset({3, 4, 36})
    plain = stream(small_split, steps=8)
    examples = small_split.training(5, 10, 0, Share(), broken).take(80)
    seen = np.array([[int(x[k]) for k in ("epoch", "index", "label")] for x in examples])
    stand_in = {3: 5, 4: 5, 36: 0}
    np.testing.assert_array_equal(seen[:, 1], [stand_in.get(i, i) for i in plain[:, 1]])
    labels = [int(x["label"]) for x in small_split.once(Share(0, 2), start=1, broken=broken)]
    expected = [sources.BROKEN if i in broken else i % 3 for i in range(2, 37, 2)]
    assert labels == expected


def test_fingerprints_tell_contents_apart(small_split, files, tmp_path):
    other = in_memory(small_split.images[::-1], small_split.labels, small_split.classes)
    relabelled = in_memory(small_split.images, small_split.labels[::-1], small_split.classes)
    same = in_memory(small_split.images.copy(), small_split.labels, small_split.classes)
    prints = [s.fingerprint() for s in (small_split, other, relabelled, files)]
    assert len(set(prints)) == 4
    assert same.fingerprint() == prints[0]
    for place in ("one", "two"):
        for i in range(3):
            write(tmp_path / place / f"{i}.png", random_images(i + 1)[0])
    one, two = (sources.folder(str(tmp_path / p), labels=False) for p in ("one", "two"))
    assert one.fingerprint() == two.fingerprint()
    write(tmp_path / "two/1.png", random_images(1, 30, 30)[0])
    assert sources.folder(str(tmp_path / "two"), False).fingerprint() != one.fingerprint()
