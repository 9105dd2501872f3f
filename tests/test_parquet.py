"""Parquet files as a source: which columns, which files, which classes, and what is refused.

How their images are ordered, shared and replaced is tested with the other streams in test_sources.py.
"""

import contextlib
import io
import itertools
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_sources import STREAMING, labels_once, opened, picture, png

from simclr_jax import config
from simclr_jax.data import parquet_files
from simclr_jax.data.broken import Broken, Images
from simclr_jax.data.order import Order, Share
from simclr_jax.data.parquet import RowGroups
from simclr_jax.data.parquet_files import Columns
from simclr_jax.data.parquet_paths import list_files, open_parquet
from simclr_jax.data.pictures import pictures_of, places_of
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.data.source import ShardedSource
from simclr_jax.data.split import BROKEN
from simclr_jax.errors import Unavailable, UserError
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.views import make_distortion, pipeline
from simclr_jax.views.crop import EvaluationView
from simclr_jax.views.pipeline import evaluation_batches

PNG = png(picture(0))
IMAGE_LABEL = Columns("image", "label")


def write(path, labels=None, images=None, names=None, rows_of_a_group=5, column="label"):
    """A Parquet file of images, by default as bytes, and labels, with Hugging Face's `names`."""
    columns = {"image": images or [png(picture(i)) for i in range(len(labels))]}
    if labels is not None:
        columns[column] = labels
    table = pa.table(columns)
    if names:
        features = {column: {"names": names, "_type": "ClassLabel"}}
        about = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": about})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_of_a_group)
    return str(path)


def train_on(path, **options):
    return opened(source="parquet", path=str(path), **options)


def as_structs(images):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": x, "path": f"{i}.png"} for i, x in enumerate(images)]
    return pa.array([*rows[:-1], rows[-1] if images[-1] else None], kind)


@pytest.mark.parametrize("kind", ["bytes", "large bytes", "structs"])
def test_images_are_bytes_or_structs_of_bytes_and_path(tmp_path, kind):
    contents = [PNG, None, b"", b"ends in zeros\0\0", None]
    images = {
        "bytes": pa.array(contents, pa.binary()),
        "large bytes": pa.array(contents, pa.large_binary()),
        "structs": as_structs(contents),
    }[kind]
    source = RowGroups(write(tmp_path / "a.parquet", [0] * 5, images), IMAGE_LABEL)
    assert source.read(0)[0].tolist() == [content or b"" for content in contents]


@pytest.mark.parametrize(
    ("labels", "names", "classes", "codes"),
    [
        ([10, 9, 10, 2], None, ("2", "9", "10"), [2, 1, 2, 0]),  # numbers in their order
        ([1, 0, 1, 0], ["cat", "ant", "bee"], ("cat", "ant", "bee"), [1, 0, 1, 0]),
        ([1, 0, 1, 0], ["1", "0"], ("1", "0"), [1, 0, 1, 0]),  # names that are numbers
        (["cat", "ant", "cat", "bee"], None, ("ant", "bee", "cat"), [2, 0, 2, 1]),
        ([1, None, -1, 0], None, ("0", "1"), [1, -1, -1, 0]),
        ([1, None, -1, 0], ["cat", "ant"], ("cat", "ant"), [1, -1, -1, 0]),
        (["b", None, "", "a"], None, ("a", "b"), [1, -1, -1, 0]),
        (pa.array(["b", "a", None, "a"]).dictionary_encode(), None, ("a", "b"), [1, 0, -1, 0]),
        ([None] * 4, ["cat", "ant"], None, [-1] * 4),
        ([-1] * 4, ["cat", "ant"], None, [-1] * 4),  # how Hugging Face writes a test split
    ],
)
def test_labels_are_numbers_or_texts_or_not_there(tmp_path, labels, names, classes, codes):
    path = write(tmp_path / "a.parquet", labels, names=names, rows_of_a_group=3)
    source = RowGroups(path, IMAGE_LABEL)
    assert source.classes == classes
    assert np.concatenate([source.read(group)[1] for group in range(2)]).tolist() == codes
    everything = np.arange(2)
    assert source.labels(everything).tolist() == codes
    assert ShardedSource.labels(source, everything).tolist() == codes  # by reading all


def test_no_label_column_and_one_that_is_not_wanted(tmp_path):
    bare = write(tmp_path / "a.parquet", images=[PNG] * 4)
    labelled = write(tmp_path / "b.parquet", [0, 1, 2, 3])
    for path, columns in ((bare, IMAGE_LABEL), (labelled, Columns("image", ""))):
        source = RowGroups(path, columns)
        assert source.classes is None
        assert source.read(0)[1].tolist() == [-1] * 4
        assert source.labels(np.arange(1)).tolist() == [-1] * 4


def test_columns_may_have_other_names(tmp_path):
    table = pa.table({"img": [PNG, PNG], "fine_label": ["x", "y"]})
    pq.write_table(table, tmp_path / "a.parquet")
    c = config.default()
    c.data.parquet.image_column, c.data.parquet.label_column = "img", "fine_label"
    split = train_on(tmp_path, parquet=c.data.parquet.to_dict()).train
    assert labels_once(split) == [0, 1]


def test_files_may_name_their_classes_in_other_orders_or_have_no_labels(tmp_path):
    write(tmp_path / "1.parquet", [0, 1], names=["cat", "dog"])
    write(tmp_path / "2.parquet", [0, 1], names=["dog", "cat"])
    write(tmp_path / "3.parquet", images=[PNG] * 2)
    split = train_on(tmp_path).train
    assert split.classes == ("cat", "dog")
    assert labels_once(split) == split.all_labels().tolist() == [0, 1, 1, 0, -1, -1]


def test_files_that_number_classes_beside_files_that_name_them_are_refused(tmp_path):
    """They would become twice as many classes."""
    write(tmp_path / "1.parquet", [0, 1], names=["cat", "dog"])
    write(tmp_path / "2.parquet", [0, 1])
    write(tmp_path / "0.parquet", [-1, -1])  # no label: that file is of either kind
    with pytest.raises(UserError, match=r"2\.parquet numbers its classes, and .*1\.parquet names"):
        train_on(tmp_path)


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (["cat", "dog"], ["cat", "bird"], ("bird", "cat", "dog")),  # texts tell which they are
        (["cat", "dog"], ["cat", "2001"], ("2001", "cat", "dog")),
        (["0", "1", "2"], [2, 0], ("0", "1", "2")),  # and numbers where names are numbers
        (["1", "2"], ["1", "2"], ("1", "2")),
        (["cat", "dog"], None, ("cat", "dog")),
    ],
)
def test_files_may_name_classes_in_two_ways(tmp_path, names, labels, classes):
    write(tmp_path / "1.parquet", [0, 1], names=names)
    write(tmp_path / "2.parquet", labels, images=[PNG] * 2)
    assert train_on(tmp_path).train.classes == classes


def test_a_column_is_found_beside_one_of_nearly_its_name(tmp_path):
    table = pa.table({"image": [PNG] * 2, "image.bytes": [None, b""]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert train_on(tmp_path).train.count == 2


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([PNG])] * 2, names=["image", "image"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has several columns 'image': expected one"):
        train_on(tmp_path)


@pytest.fixture
def three(tmp_path):
    """A folder of three files, one deeper, of 4 + 3 + 2 rows in groups of 2."""
    for i, (name, rows) in enumerate((("a-0", 4), ("a-1", 3), ("deep/b", 2))):
        write(tmp_path / f"data/{name}.parquet", [i] * rows, rows_of_a_group=2)
    (tmp_path / "data/README.md").write_text("no data")
    return tmp_path / "data"


@pytest.mark.parametrize("count", [1, 3, 8, 9, 20, 37, 38, 100])
def test_a_sample_of_a_stream_is_spread_over_it(tmp_path, count):
    """Files sorted by class would otherwise show one class alone."""
    write(tmp_path / "a.parquet", list(range(37)), rows_of_a_group=5)
    split = train_on(tmp_path / "a.parquet").train
    places = places_of(split, count)
    assert len(set(places)) == len(places) == min(count, 37)
    found = list(pictures_of(split, count, ReadOptions()))
    assert [(one.place, one.label) for one in found] == [(i, i) for i in places]
    if count >= 8:
        assert max(np.diff([*places, 37])) <= 37 / 8 + 1


@pytest.mark.parametrize(
    ("where", "rows"),
    [("", 9), ("a-1.parquet", 3), ("a-*.parquet", 7), ("**/*.parquet", 9), ("a-[1].parquet", 3)],
)
@pytest.mark.parametrize("address", ["{}", "file://{}", "memory:/{}"])
def test_a_folder_a_file_a_glob_and_an_address(three, where, rows, address):
    if "://" in address.format(three):
        fsspec = pytest.importorskip("fsspec")
        fsspec.filesystem("memory").put(f"{three}/", f"{three}/", recursive=True)
    split = train_on(address.format(three / where)).train
    assert split.count == rows == len(labels_once(split))
    assert split.source.lengths.max() == 2
    assert split.name_of(0).endswith("a-1.parquet, row 0" if rows == 3 else "a-0.parquet, row 0")
    if rows == 9:
        assert split.name_of(6).endswith("a-1.parquet, row 2")
        assert labels_once(split) == [0] * 4 + [1] * 3 + [2] * 2


def test_the_name_of_a_folder_may_have_brackets(three):
    folder = three.rename(three.with_name("run[1]"))
    _, paths = list_files(f"{folder}/*.parquet")
    assert paths == [f"{folder}/a-0.parquet", f"{folder}/a-1.parquet"]


def test_a_file_system_that_does_not_answer_is_no_mistake(three, monkeypatch):
    """Also where TensorFlow reads: a launcher may run the command again."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(f"{three}/", "/away/", recursive=True)
    split = train_on("memory://away").train
    images = Images(split, Broken(split, 0.5))

    def away(*_, **__):
        raise ConnectionError("Connection to host timed out")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "_open", away)
        says = r"cannot read /away/.*\.parquet: Connection to host timed out"
        with pytest.raises(Unavailable, match=f"^the images cannot be read: {says}"):
            list(evaluation_batches(images, 4, Share(), EvaluationView(8)))
        with (
            pytest.raises(Unavailable, match=says),
            open_parquet(memory, "/away/a-0.parquet"),
        ):
            pass
    with (
        pytest.raises(UserError) as caught,
        open_parquet(memory, "/away/none.parquet"),
    ):
        pass
    assert not isinstance(caught.value, Unavailable)


@pytest.mark.parametrize("where", ["", "**/*.parquet"])
def test_links_show_no_file_twice(three, tmp_path, where):
    write(tmp_path / "elsewhere/c.parquet", [3])
    (three / "deep/up").symlink_to("..")
    (three / "deep/loop").symlink_to("loop")
    (three / "again.parquet").symlink_to("a-0.parquet")
    (three / "drive").symlink_to(tmp_path / "elsewhere")
    _, paths = list_files(f"{three}/{where}")
    names = ("a-0.parquet", "a-1.parquet", "deep/b.parquet", "drive/c.parquet")
    assert paths == [f"{three}/{name}" for name in names]


def test_the_index_is_kept_and_only_what_changed_is_looked_at_again(three, monkeypatch):
    looked, look = [], parquet_files._look

    def noted(system, path, *rest):
        looked.append(os.path.basename(path))
        return look(system, path, *rest)

    monkeypatch.setattr(parquet_files, "_look", noted)

    def count(path=three):
        looked.clear()
        return RowGroups(str(path), IMAGE_LABEL).lengths.sum()

    assert count() == 9
    assert sorted(looked) == ["a-0.parquet", "a-1.parquet", "b.parquet"]
    assert count() == 9
    assert looked == []
    write(three / "a-1.parquet", [7] * 6)
    assert count() == 12
    assert looked == ["a-1.parquet"]
    write(three / "a-2.parquet", [7])
    (three / "deep/b.parquet").unlink()
    assert count() == 11
    assert looked == ["a-2.parquet"]
    RowGroups(str(three), Columns("image", ""))  # other columns, other questions
    assert len(looked) == 4
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(f"{three}/", "/index/", recursive=True)
    for expected in (3, 0):
        assert count("memory://index") == 11
        assert len(looked) == expected
    data = memory.cat("/index/a-2.parquet")
    memory.pipe("/index/a-2.parquet", data)  # written again
    assert count("memory://index") == 11
    assert looked == ["a-2.parquet"]


@pytest.mark.parametrize("content", ["", "{", "[1]", "[{}]", '[["a"]]', '[["a", "", 1, 2, 3, 4]]'])
def test_a_damaged_index_is_made_anew(three, content, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        assert RowGroups(str(three), IMAGE_LABEL).lengths.sum() == 9
        (file,) = (tmp_path / "cache/simclr_jax/parquet").iterdir()
        file.write_text(content)


def test_without_room_for_an_index_files_are_looked_at(three, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert RowGroups(str(three), IMAGE_LABEL).lengths.sum() == 9


def test_a_test_split_has_the_classes_of_training(tmp_path):
    train = write(tmp_path / "train.parquet", [0, 1, 2], names=["cat", "ant", "bee"])
    same = write(tmp_path / "test.parquet", [1, 0], names=["bee", "cat"])
    texts = write(tmp_path / "texts.parquet", ["ant", "bee"])
    assert labels_once(train_on(train, test_path=same).test) == [0, 2]
    assert labels_once(train_on(train, test_path=texts).test) == [1, 2]
    more = write(tmp_path / "more.parquet", [0, 1], names=["cat", "dog"])
    with pytest.raises(
        UserError, match="has the classes dog, which the training images do not have"
    ):
        train_on(train, test_path=more)
    bare = write(tmp_path / "bare.parquet", images=[PNG])
    assert train_on(bare, test_path=same).test.classes is None
    assert train_on(train, test_path=bare).test.classes is None


def test_images_of_one_size_are_no_reason_to_take_two_files_for_one(tmp_path):
    """Their fingerprints, which know sizes, are equal."""

    def bmps(first):
        images = []
        for i in range(first, first + 20):
            content = io.BytesIO()
            Image.fromarray(picture(i)).convert("RGB").resize((8, 8)).save(content, "BMP")
            images.append(content.getvalue())
        return images

    one, two = (write(tmp_path / f"{i}.parquet", images=bmps(i)) for i in (0, 20))
    found = train_on(one, test_path=two)
    assert found.train.fingerprint() == found.test.fingerprint()
    assert train_on(one, test_fraction=0.5).test.count == 10
    copy = str(shutil.copy(one, tmp_path / "copy.parquet"))
    with pytest.raises(UserError, match="the test images are the training images"):
        train_on(one, test_path=copy)


def test_test_files_among_the_training_files_are_refused(tmp_path):
    """As by DATA/*.parquet where DATA has train-* and test-*, as Hugging Face writes them."""
    write(tmp_path / "train-0.parquet", [0, 1, 2])
    write(tmp_path / "test-0.parquet", [2, 1])
    with pytest.raises(UserError, match=r"1 of the 1 Parquet files of data\.test_path are among"):
        train_on(tmp_path / "*.parquet", test_path=f"{tmp_path}/test*.parquet")
    found = train_on(tmp_path / "train*.parquet", test_path=f"{tmp_path}/test*.parquet")
    assert (found.train.count, found.test.count) == (3, 2)


def test_a_column_that_may_hold_labels_is_proposed(tmp_path):
    path = write(tmp_path / "a.parquet", [0, 1], column="fine_label")
    with pytest.raises(UserError, match="label_column, such as to 'fine_label'"):
        train_on(path, parquet={"image_column": "image", "label_column": "labels"})


def lists(path):
    pq.write_table(pa.table({"image": [PNG], "label": [[1, 2]]}), path)


def texts(path):
    pq.write_table(pa.table({"image": ["a path"], "label": [1]}), path)


def paths_only(path):
    pq.write_table(pa.table({"image": [{"path": "x.png"}], "label": [1]}), path)


def bytes_elsewhere(path):
    image = pa.array(
        [{"bytes": None, "path": "x.png"}] * 2,
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(pa.table({"image": image, "label": [1, 1]}), path)


def no_bytes(path):
    pq.write_table(pa.table({"image": pa.array([None, None], pa.binary())}), path)


def no_images(path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), path)


def other_names(path):
    pq.write_table(pa.table({"img": [PNG], "label": [1]}), path)


def no_parquet(path):
    path.write_text("image,label\n")


def cut_off(path):
    write(path, [1])
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def no_rows(path):
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lists, r"column 'label' of .* is list<.*>: expected whole numbers or texts"),
        (texts, r"column 'image' of .* is string: expected bytes, or {bytes, path}"),
        (paths_only, r"column 'image' of .* is struct<.*>: expected bytes, or {bytes, path}"),
        (bytes_elsewhere, r"column 'image' of .*a\.parquet has no bytes in any row: expected"),
        (no_bytes, r"column 'image' of .*a\.parquet has no bytes in any row: expected"),
        (no_images, r"no column 'image': it has text, label; none of them holds images"),
        (
            other_names,
            r"has no column 'image': it has img, label; set data.parquet.image_column, such as to 'img'",
        ),
        (no_parquet, r"cannot read .*a\.parquet: .*; expected a Parquet file"),
        (cut_off, r"cannot read .*a\.parquet: .*; expected a Parquet file"),
        (empty, r"cannot read .*a\.parquet: .*; expected a Parquet file"),
        (no_rows, r"no image in .*: the Parquet files have no rows"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_in_one_line(tmp_path, make, says):
    make(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=says) as caught:
        RowGroups(str(tmp_path), IMAGE_LABEL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nowhere", "no Parquet file '/nowhere': expected a file, a folder .*, or a glob"),
        ("/tmp/no*thing", "no Parquet file"),
        ("memory://nowhere.parquet", "cannot read /nowhere.parquet: "),
        ("nosuch://x", "cannot open nosuch://x: Protocol not known"),
    ],
)
def test_files_that_are_not_there_are_refused_in_one_line(path, says):
    if "://" in path:
        pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=says) as caught:
        RowGroups(path, IMAGE_LABEL)
    assert "\n" not in str(caught.value)


def test_a_label_column_that_is_named_and_not_there_is_refused(tmp_path):
    path = write(tmp_path / "a.parquet", [0])
    with pytest.raises(UserError, match=r"no column 'lable': it has image, label; .*label_column"):
        RowGroups(path, Columns("image", "lable"))


@pytest.mark.parametrize(
    ("rows_of_a_group", "says"),
    [
        (
            20,
            "sorted by class: of its 10 row groups.* the 9 to train on .* 1 of 10 classes, such as '4': shuffle",
        ),
        (10, "the 2 held out hold no image of 8 of 10 classes, such as '0': shuffle"),
        (1, None),
    ],
)
def test_rows_sorted_by_class_are_not_held_out_by_row_groups(tmp_path, rows_of_a_group, says):
    labels = [i // 20 for i in range(200)]
    write(tmp_path / "a.parquet", labels, [PNG] * 200, rows_of_a_group=rows_of_a_group)
    if says is None:
        data = train_on(tmp_path, test_fraction=0.1)
        assert (data.train.count, data.test.count) == (180, 20)
        return
    with pytest.raises(UserError, match=says) as caught:
        train_on(tmp_path, test_fraction=0.1)
    assert "\n" not in str(caught.value)


def test_labelled_rows_that_lie_together_are_not_held_out_all(tmp_path):
    labels = [i % 2 if i < 50 else -1 for i in range(100)]
    path = write(tmp_path / "a.parquet", labels, [PNG] * 100, rows_of_a_group=50)
    with pytest.raises(UserError, match="hold no image of 2 of 2 classes"):
        train_on(path, test_fraction=0.5)


def test_a_row_group_that_memory_cannot_hold_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", [0] * 9)
    monkeypatch.setattr(parquet_files, "memory", lambda: 1000)
    with pytest.raises(UserError, match=r"row group of .* GB.*: write the file with row groups of"):
        RowGroups(path, IMAGE_LABEL)


def test_a_file_that_changes_under_a_run_stops_it_in_one_line(tmp_path):
    split = train_on(write(tmp_path / "a.parquet", [0] * 9)).train
    (tmp_path / "a.parquet").write_text("something else")
    images = Images(split, Broken(split, 0.1))
    with pytest.raises(
        UserError, match=r"cannot read .*a\.parquet: .*expected a Parquet"
    ) as caught:
        next(pipeline.evaluation_batches(images, 4, Share(), EvaluationView(4, 1.0)))
    assert "\n" not in str(caught.value)


def test_columns_of_classes_are_named_where_there_is_no_label_column(tmp_path, capsys):
    path = write(tmp_path / "a.parquet", [0, 1], names=["cat", "dog"], column="fine_label")
    assert train_on(path).train.classes is None
    said = capsys.readouterr().out
    assert "no column 'label', but fine_label with classes; --config.data.parquet.label_col" in said
    assert (
        opened(
            source="parquet", path=path, parquet={"image_column": "image", "label_column": ""}
        ).train.classes
        is None
    )
    labelled = opened(
        source="parquet", path=path, parquet={"image_column": "image", "label_column": "fine_label"}
    )
    assert labelled.train.classes == ("cat", "dog")
    assert capsys.readouterr().out == ""


def test_fingerprints_are_of_the_content_not_of_the_place(tmp_path):
    options = {"labels": [0, 1] * 4, "rows_of_a_group": 4}
    one, two, *others = (
        train_on(write(tmp_path / f"{name}.parquet", **(options | changed))).train
        for name, changed in {
            "one": {},
            "two": {},
            "other": {"images": [PNG * 2] * 8},
            "relabelled": {"labels": [0, 2] * 4},
            "exchanged": {"labels": [1, 0] * 4},
            "exchanged in a row group": {"labels": [0, 1] * 3 + [1, 0]},
        }.items()
    )
    assert one.fingerprint() == two.fingerprint()
    assert len({split.fingerprint() for split in (one, *others)}) == 5


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """(path, {row: image}): 60 rows in groups of 7, three classes, three images that cannot be read."""
    images = [png(picture(i)) for i in range(60)]
    bad = {11: b"", 12: PNG[:40], 40: None}
    for i, content in bad.items():
        images[i] = content
    path = tmp_path_factory.mktemp("damaged") / "a.parquet"
    labels = [i % 3 for i in range(60)]
    return write(path, labels, as_structs(images), ["a", "b", "c"], rows_of_a_group=7), bad


def test_what_is_not_asked_for_is_not_read(damaged, monkeypatch):
    split, read = train_on(damaged[0]).train, []
    table = split.source._table

    def noted(shard, columns):
        read.append((int(shard), tuple(columns)))
        return table(shard, columns)

    monkeypatch.setattr(split.source, "_table", noted)
    assert split.problems([40, 41, 12, 39]).keys() == {12, 40}
    assert [shard for shard, _ in read] == [1, 5]
    read.clear()
    assert labels_once(split, Share(1, 2), start=25) == [i % 3 for i in range(51, 60, 2)]
    assert {shard for shard, _ in read} == {7, 8}
    read.clear()
    split.all_labels()
    assert {columns for _, columns in read} == {("label",)}


def test_evaluation_leaves_broken_images_out(damaged):
    path, bad = damaged
    split = train_on(path).train
    images = Images(split, Broken(split, 0.1))
    found = pipeline.evaluation_batches(images, 30, Share(), EvaluationView(4, 1.0))
    labels = np.concatenate([batch["label"] for batch in found])
    assert labels.tolist() == [BROKEN if i in bad else i % 3 for i in range(60)]


def test_what_comes_does_not_depend_on_when_a_broken_image_is_met(damaged):
    split = train_on(damaged[0]).train
    work = pipeline.HostWork(12, make_distortion({}), whole=False)

    def batches(broken, steps, start):
        stream = pipeline.training_batches(Images(split, broken), Order(1, 48), start, work)
        with contextlib.closing(stream):
            return list(itertools.islice(stream, steps))

    known = Broken(split, 0.1)
    known.find(range(60))
    whole, late = batches(known, 2, 0), batches(Broken(split, 0.1), 1, 1)
    assert not set(damaged[1]).intersection(*(batch["index"].tolist() for batch in whole))
    for key in ("views", "draws", "label", "index", "epoch"):
        np.testing.assert_array_equal(late[0][key], whole[1][key])


@pytest.mark.whole
def test_a_run_skips_counts_and_names_broken_images(damaged, tiny, tmp_path, capsys):
    path, bad = damaged
    config.set_options(tiny, STREAMING | {"data.source": "parquet", "data.path": path})
    pretrain(tiny, str(tmp_path / "w"))
    assert "3 images that cannot be read" in capsys.readouterr().out
    lines = (tmp_path / "w/broken_images.jsonl").read_text().splitlines()
    named = {line["index"]: line["image"] for line in map(json.loads, lines)}
    assert named == {i: f"{path}, row {i}" for i in bad}
