"""No accuracy and no count depends on how classes are numbered, or on images without a label."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import encoder_checkpoint, random_images
from PIL import Image

from simclr_jax import assemble, config
from simclr_jax.data import forget_opened, open_source
from simclr_jax.data.labels import read_labels
from simclr_jax.data.subsets import few_labels, share_of_labels
from simclr_jax.errors import UserError
from simclr_jax.evals import classifiers
from simclr_jax.evals.evaluate import evaluate_features
from simclr_jax.evals.subjects import without_labels
from simclr_jax.training.workdir import check_data

TRAIN, TEST = 60, 30
NAMES = {0: 500, 1: 10_985, 2: 7}


def class_images(labels):
    """Images of 12 px that are brighter in one place for each class, and noisy."""
    images = random_images(len(labels), 12, 12).astype(int) // 4
    for i, label in enumerate(labels):
        if label >= 0:
            images[i, 4 * label : 4 * label + 4] += 60
    return images.astype(np.uint8)


def stored(renamed=False, unlabelled=False, kind=int):
    """The arrays of an .npz file of three classes; with `unlabelled` every third image has no label."""
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("train", TRAIN), ("test", TEST)):
        labels = np.arange(count) % 3
        images = class_images(labels)
        if renamed:
            labels = np.vectorize(NAMES.get)(labels)
        labels = labels.astype(kind)
        if unlabelled:
            places = np.arange(0, count, 2)
            images = np.insert(images, places, random_images(len(places), 12, 12), axis=0)
            labels = np.insert(labels, places, "" if kind is str else -1)
        arrays |= {f"{part}_images": images, f"{part}_labels": labels}
    return arrays


@pytest.fixture
def rows_on(tiny, tmp_path):
    """(arrays, how): evaluates one encoder on arrays; returns the rows and the counts."""
    tiny.eval.labels_per_class, tiny.eval.seeds, tiny.eval.baselines = (2,), 2, False
    tiny.eval.max_iterations, tiny.eval.l2 = 50, (1e-3, 1e-1)
    tiny.finetune.label_fractions, tiny.finetune.epochs = (0.2,), (1.0,)
    tiny.finetune.batch_size = 8
    workdir = str(encoder_checkpoint(tiny, tmp_path / "w"))

    def rows_on(arrays, how):
        tiny.data.path = str(tmp_path / "other.npz")
        np.savez(tiny.data.path, **arrays)
        found = how(tiny, workdir)
        rows = [{k: r[k] for k in ("labels_per_class", "accuracy", "std")} for r in found["rows"]]
        return rows, found["train_images"], found["test_images"]

    return rows_on


@pytest.mark.whole
@pytest.mark.parametrize("evaluation", ["probe", "knn", "finetune"])
def test_renamed_classes_and_added_images_change_nothing(rows_on, evaluation):
    def how(options, workdir):
        if evaluation == "finetune":
            return classifiers.finetune(options, workdir)
        return evaluate_features(evaluation, options, workdir)

    plain = rows_on(stored(), how)
    assert plain[1:] == ((TRAIN - 6, TEST) if evaluation == "finetune" else (TRAIN, TEST))
    others = [
        rows_on(stored(renamed=True), how),
        rows_on(stored(renamed=True, unlabelled=True), how),
        rows_on(stored(unlabelled=True, kind=str), how),
    ]
    for rows, *counts in others:
        assert tuple(counts) == plain[1:]
        for row, expected in zip(rows, plain[0], strict=True):
            assert row == pytest.approx(expected, abs=1e-6)


def test_classes_are_those_that_occur(tmp_path):
    np.savez(tmp_path / "x.npz", **stored(renamed=True))
    data = open_source(
        config.default().data.to_dict()
        | {"source": "arrays", "path": f"{tmp_path}/x.npz", "seed": 0}
    )
    assert data.train.classes == ("7", "500", "10985")
    assert set(data.train.all_labels()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ({"train_labels": np.full(TRAIN, 0.5)}, "train_labels are float64: expected whole numbers"),
        ({"train_labels": np.full(TRAIN, np.nan)}, "train_labels are float64: expected whole"),
        (
            {"test_labels": np.full(TEST, 3)},
            "test_labels has the classes 3, which the training images do not have",
        ),
    ],
)
def test_labels_that_are_none_are_refused(tmp_path, labels, says):
    np.savez(tmp_path / "x.npz", **(stored() | labels))
    options = {"source": "arrays", "path": f"{tmp_path}/x.npz", "seed": 0}
    with pytest.raises(UserError, match=says):
        open_source(config.default().data.to_dict() | options)


def test_a_share_of_the_labels_is_one_of_each_class():
    y = np.repeat([0, 1, -1], [360, 40, 100])
    assert np.bincount(y[share_of_labels(y, 0.1, seed=0)]).tolist() == [36, 4]
    assert np.bincount(y[share_of_labels(y, 0.001, seed=0)]).tolist() == [1, 1]


def test_another_numbering_draws_the_same_images():
    y = np.random.default_rng(0).integers(-1, 4, 200)
    renamed = np.asarray([9, 2, 7, 0, -1])[y]
    np.testing.assert_array_equal(few_labels(y, 5, 3), few_labels(renamed, 5, 3))
    np.testing.assert_array_equal(share_of_labels(y, 0.1, 3), share_of_labels(renamed, 0.1, 3))


class PartlyLabelled(tfds.core.GeneratorBasedBuilder):
    """30 images of differing sizes; the first 10 have no label, in the test split none has."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        label = tfds.features.ClassLabel(num_classes=3)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(30)}

    def _generate_examples(self, first):
        for i in range(30):
            yield (
                i,
                {"image": random_images(1, 4 + i % 3, 5)[0], "label": i % 3 if i >= first else -1},
            )


def test_a_tfds_split_may_be_labelled_in_part(tmp_path):
    PartlyLabelled(data_dir=tmp_path).download_and_prepare()
    options = {"name": "partly_labelled", "path": str(tmp_path), "seed": 0}
    data = open_source(config.default().data.to_dict() | options)
    labels = data.train.all_labels()
    assert data.train.classes == ("0", "1", "2")
    assert [np.sum(labels == c) for c in (-1, 0, 1, 2)] == [10, 6, 7, 7]
    assert data.test.classes is None


def test_a_run_records_its_classes(tiny, tmp_path):
    from simclr_jax.modes.pretrain import pretrain

    tiny.train.steps = 1
    np.savez(tiny.data.path, **stored(renamed=True))
    pretrain(tiny, str(tmp_path / "w"))
    record = json.loads((tmp_path / "w/config.json").read_text())
    assert record["classes"] == list(assemble.data_set(tiny).train.classes)


def test_one_labelled_image_is_too_few_to_evaluate(tiny, tmp_path):
    with np.load(tiny.data.path) as file:
        arrays = dict(file)
    arrays["train_labels"][1:] = -1
    arrays["test_labels"][:] = 0
    np.savez(tiny.data.path, **arrays)
    workdir = str(encoder_checkpoint(tiny, tmp_path / "w"))
    for name in ("probe", "knn", "transfer"):
        with pytest.raises(UserError, match=r"^1 labelled training image.*expected two or more"):
            evaluate_features(name, tiny, workdir)


def test_test_images_are_held_out_of_one_folder(tiny, tmp_path):
    """The same ones for every seed, none of them among the training images."""
    for i, image in enumerate(random_images(40, 12, 12)):
        path = tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    options: dict = {"data.source": "folder", "data.path": f"{tmp_path}/photos"}
    options |= {"data.folder_labels": True, "data.test_fraction": 0.25, "data.placement": "host"}
    config.set_options(tiny, options)
    data = assemble.data_set(tiny)
    train, test = (set(split.source.names.to_pylist()) for split in (data.train, data.test))
    assert (len(train), len(test), len(train | test)) == (30, 10, 40)
    assert data.test.classes == data.train.classes == ("cat", "dog")
    tiny.seed = 1
    assert set(assemble.data_set(tiny).test.source.names.to_pylist()) == test
    workdir = str(encoder_checkpoint(tiny, tmp_path / "w"))
    assert evaluate_features("knn", tiny, workdir)["test_images"] == 10
    tiny.data.test_path = f"{tmp_path}/photos"
    with pytest.raises(UserError, match=r"data\.test_fraction=0\.25 holds out .*there is a test"):
        assemble.data_set(tiny)


def labelled_by(tmp_path, text, **options):
    """The data set of a folder of five images whose labels are in a file with this text."""
    for i, image in enumerate(random_images(5, 12, 12)):
        path = tmp_path / "photos" / f"{i // 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    found = config.default().data.to_dict() | {"seed": 0, "source": "folder"}
    found |= {"path": f"{tmp_path}/photos", "labels_file": f"{tmp_path}/labels.csv"}
    return open_source(found | options)


def test_the_columns_of_labels_may_begin_with_capitals_and_have_tabs(tmp_path):
    data = labelled_by(tmp_path, "Image\tLabel \n1/3.png\tdog\n0/0.png\tcat, grey\n")
    assert data.train.classes == ("cat, grey", "dog")
    data = labelled_by(tmp_path / "b", 'label, image\n"cat, grey", 0/0.png\ndog, 1/3.png\n')
    assert data.train.classes == ("cat, grey", "dog")
    data = labelled_by(tmp_path / "c", "image,label,Label\n0/0.png,cat,3\n")  # a name and a number
    assert data.train.classes == ("cat",)


def test_labels_of_a_folder_come_from_a_csv_file(tmp_path):
    """By the path below the folder, in any order, quoted or not; what is not named has no label."""
    text = '\ufefflabel,image,by\r\ndog,1/3.png,me\r\n"cat, grey",0/0.png,\r\n,0/1.png,\r\ndog,0/2.png,\r\n'
    split = labelled_by(tmp_path, text).train
    assert split.classes == ("cat, grey", "dog")
    assert split.all_labels().tolist() == [0, -1, 1, 1, -1]


def test_labels_may_be_as_a_table_program_writes_them(tmp_path):
    """With semicolons where the comma is a decimal point, and blanks after commas."""
    (tmp_path / "l.csv").write_text("\ufeffimage;label\na, b.png;cat\nc.png; dog \n")
    assert read_labels(str(tmp_path / "l.csv")) == {"a, b.png": "cat", "c.png": "dog"}
    (tmp_path / "l.csv").write_text("image,label\na.png, cat\nb.png,cat\n")
    assert read_labels(str(tmp_path / "l.csv")) == {"a.png": "cat", "b.png": "cat"}


def test_labels_that_are_numbers_are_classes_in_the_order_of_their_values(tmp_path):
    """As in arrays and Parquet files, where -1 is no label, too."""
    text = "image,label\n0/0.png,10\n0/1.png,2\n0/2.png,-1\n1/3.png, 2 \n"
    split = labelled_by(tmp_path, text).train
    assert split.classes == ("2", "10")
    assert split.all_labels().tolist() == [1, 0, -1, 0, -1]
    labels = np.asarray(["10", "2", "-1", ""])
    np.savez(tmp_path / "x.npz", train_images=random_images(4), train_labels=labels)
    options = {"source": "arrays", "path": f"{tmp_path}/x.npz", "seed": 0}
    split = open_source(config.default().data.to_dict() | options).train
    assert split.classes == ("2", "10")
    assert split.all_labels().tolist() == [1, 0, -1, -1]


def test_names_of_images_are_found_however_accents_and_blanks_are_written(tmp_path):
    """macOS writes an accented letter as two characters, table programs as one."""
    composed, decomposed = "caf\u00e9.png", "cafe\u0301.png"
    for on_disk, in_table in ((composed, decomposed), (decomposed, composed)):
        where = tmp_path / f"{len(on_disk)}"
        labelled_by(where, "image,label\n0/0.png,x\n")
        Image.fromarray(random_images(1)[0]).save(where / "photos" / on_disk)
        forget_opened()
        split = labelled_by(where, f"image,label\n{in_table} ,a\n ./0/0.png,b\n").train
        assert split.classes == ("a", "b")
        by_name = dict(
            zip(split.source.names.to_pylist(), split.all_labels().tolist(), strict=True)
        )
        assert by_name[on_disk] == 0
        assert by_name["0/0.png"] == 1


def test_two_names_of_one_image_with_different_labels_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"labels '0/0\.png' twice, cat and dog"):
        labelled_by(tmp_path, "image,label\n0/0.png,cat\n./0/0.png,dog\n")


def test_rows_without_an_image_are_passed_over(tmp_path):
    (tmp_path / "l.csv").write_text("label,image\ncat,a.png\ndog\n,b.png\n")
    assert read_labels(str(tmp_path / "l.csv")) == {"a.png": "cat"}


def test_images_that_a_csv_file_names_and_are_not_there_are_counted(tmp_path, capsys):
    labelled_by(tmp_path, "image,label\n0/0.png,cat\n0/9.png,dog\n8.png,cat\n")
    assert "2 of 3 images in " in (said := capsys.readouterr().out)
    assert "labels.csv are not there, such as 0/9.png" in said


def test_a_csv_file_labels_test_images_as_test_images(tmp_path, capsys):
    """The folders photos and test have images of equal names."""
    for i, image in enumerate(random_images(7, 12, 12)):
        path = tmp_path / "test" / f"{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    options = {"test_path": f"{tmp_path}/test"}
    with pytest.raises(UserError, match=r"names 2 images .*'0/0\.png': name .* as photos/0/0\.png"):
        labelled_by(tmp_path, "image,label\n0/0.png,cat\n0/1.png,dog\n0/2.png,dog\n", **options)
    text = "image,label\nphotos/0/0.png,cat\n0/1.png,dog\ntest/0/0.png,dog\n1/5.png,cat\n"
    data = labelled_by(tmp_path, text, **options)
    assert data.train.all_labels().tolist() == [0, 1, -1, -1, -1]
    assert data.test.all_labels().tolist() == [1, -1, -1, -1, -1, -1, 0]
    assert "not there" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "file,class\n0/0.png,cat\n",
            "has the columns 'file', 'class': expected image,label in the first line",
        ),
        (
            "image,label\n9/9.png,cat\n",
            r"has no label of an image below .*: it has '9/9\.png', and the folder '0/0\.png'",
        ),
        ("image,label\n0/0.png,cat\n0/0.png,dog\n", "labels '0/0.png' twice, cat and dog"),
        ("", "is empty: expected"),
        ("file,label\n0/0.png,cat\n", "has the columns 'file', 'label': expected image,label"),
    ],
)
def test_a_file_of_labels_that_does_not_fit_is_one_line(tmp_path, text, says):
    with pytest.raises(UserError, match=says) as caught:
        labelled_by(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_a_file_of_labels_that_cannot_be_read_is_one_line(tmp_path):
    labelled_by(tmp_path, "image,label\n0/0.png,cat\n")
    with pytest.raises(
        UserError, match=r"as a CSV file of labels: No such file or directory \(data"
    ):
        read_labels(f"{tmp_path}/none.csv")
    (tmp_path / "labels.csv").write_bytes("image,label\n0/0.png,K\u00e4tzchen\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"is not in UTF-8 \(byte 21\): save it as UTF-8"):
        read_labels(f"{tmp_path}/labels.csv")


def test_images_without_a_label_are_counted(tmp_path, capsys):
    labelled_by(tmp_path, "image,label\n0/0.png,cat\n0/1.png,dog\n")
    assert (
        f"labels      2 of the 5 images below {tmp_path}/photos have one\n"
        in capsys.readouterr().out
    )
    every = "".join(f"{i // 3}/{i}.png,cat\n" for i in range(5))
    labelled_by(tmp_path, f"image,label\n{every}")
    assert capsys.readouterr().out == ""


def test_a_misspelt_folder_of_test_images_is_blamed_on_its_option(tmp_path):
    with pytest.raises(UserError, match=r"no folder .*tset'.*\(data\.test_path\)"):
        labelled_by(tmp_path, "image,label\n0/0.png,cat\n", test_path=f"{tmp_path}/tset")


def test_of_partly_labelled_images_labelled_ones_are_held_out(tmp_path):
    """Test images without a label would be of no use, and lost to training. Three of five have one."""
    rows = "".join(f"{i // 3}/{i}.png,{'cat' if i < 2 else 'dog'}\n" for i in range(3))
    data = labelled_by(tmp_path, f"image,label\n{rows}", test_fraction=0.4)
    assert (data.train.count, data.test.count) == (4, 1)
    assert data.test.all_labels().min() >= 0
    assert np.sum(data.train.all_labels() >= 0) == 2


def test_images_may_be_named_by_absolute_paths(tmp_path, capsys):
    data = labelled_by(tmp_path, f"image,label\n{tmp_path}/photos/0/0.png,cat\n0/1.png,dog\n")
    assert "are not there" not in capsys.readouterr().out
    assert data.train.all_labels().tolist()[:3] == [0, 1, -1]


def test_held_out_images_without_a_label_are_no_labelled_test_split(tmp_path):
    """One image of five has a label."""
    both = [
        labelled_by(tmp_path, f"image,label\n{i // 3}/{i}.png,cat\n", test_fraction=0.4)
        for i in range(5)
    ]
    assert [data.test.classes for data in both] == [("cat",)] * 5
    assert all(without_labels(data) for data in both)


def test_a_run_does_not_go_on_with_other_labels_and_says_so(tmp_path):
    """It may find the same labels in another file."""
    before = labelled_by(tmp_path, "image,label\n0/0.png,cat\n0/1.png,dog\n").train
    saved = {"data_fingerprint": before.fingerprint(), "training_images": 5}
    same = labelled_by(tmp_path, "label,image\ndog,0/1.png\ncat,0/0.png\n", seed=1).train
    check_data(same, same.fingerprint(), saved, "w")
    after = labelled_by(tmp_path, "image,label\n0/0.png,cat\n0/1.png,cat\n", seed=2).train
    with pytest.raises(
        UserError, match="w holds a run on other images, or on other labels of them"
    ):
        check_data(after, after.fingerprint(), saved, "w")
