"""The index of a folder, what is said about it, and the settings that follow."""

import contextlib
import io
import os
import pathlib
import shutil
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from PIL import Image

from simclr_jax import assemble, config
from simclr_jax.config import suggest
from simclr_jax.config.overrides import load
from simclr_jax.data import index, measure, pixels, summary
from simclr_jax.data.broken import Broken, Images
from simclr_jax.data.folder import open_split
from simclr_jax.errors import UserError
from simclr_jax.mesh import make_mesh
from simclr_jax.modes.oddities import oddities
from simclr_jax.modes.pretrain import describe_choices, pretrain


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three folders of 2 x 3 px images, last changed an hour ago; an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "photos"
    for where in ("a", "b/deep", "b/other"):
        (root / where).mkdir(parents=True)
        for name in ("1.png", "2.PNG"):
            Image.new("RGB", (2, 3)).save(root / where / name)
    (root / "b" / "notes.txt").write_text("no image")
    (root / "b" / "._1.png").write_text("a shadow of macOS")
    settle(root)
    return root


def settle(root):
    """As if nothing had changed for an hour."""
    for where, _, names in os.walk(root):
        for path in (where, *(os.path.join(where, name) for name in names)):
            os.utime(path, (time.time() - 3600,) * 2)


def folders_read(monkeypatch):
    """Notes the folders that are read from here on."""
    read, scan = [], os.scandir

    def noted(path):
        read.append(pathlib.Path(path).name)
        return scan(path)

    monkeypatch.setattr(index.os, "scandir", noted)
    return read


def test_the_index_is_of_every_image_file(photos):
    found = index.list_images(photos)
    expected = [
        f"{where}/{name}" for where in ("a", "b/deep", "b/other") for name in ("1.png", "2.PNG")
    ]
    assert found.paths == expected
    assert found.sizes.tolist() == [(photos / path).stat().st_size for path in expected]
    assert found.passed_over == {".txt": 1, "hidden": 1}


@pytest.mark.parametrize("written", [".", "./photos", "photos/../photos", "photos/"])
def test_the_fingerprint_does_not_depend_on_how_the_path_is_written(photos, monkeypatch, written):
    monkeypatch.chdir(photos if written == "." else photos.parent)
    expected = open_split(str(photos), True).fingerprint()
    assert open_split(written.replace("photos", photos.name), True).fingerprint() == expected


def test_hidden_files_and_what_services_make_are_no_images(photos):
    before = index.list_images(photos).paths
    for where in (".ipynb_checkpoints", ".Trash-1000/files", "@eaDir", "__MACOSX/a", "a/@eaDir"):
        (photos / where).mkdir(parents=True)
        Image.new("RGB", (2, 3)).save(photos / where / "1.png")
    Image.new("RGB", (2, 3)).save(photos / "a" / ".hidden.png")
    (photos / "a" / "Thumbs.db").write_text("no image")
    assert index.list_images(photos).paths == before


def test_a_link_does_not_take_the_name_of_a_class_away(photos):
    (photos / "0_latest").symlink_to(photos / "a", target_is_directory=True)
    (photos / "zz_latest").symlink_to(photos / "b", target_is_directory=True)
    assert {path.partition("/")[0] for path in index.list_images(photos).paths} == {"a", "b"}


def test_a_workdir_below_the_data_is_none_of_them(photos):
    before = index.list_images(photos).paths
    (photos / "runs" / "w" / "checkpoints").mkdir(parents=True)
    (photos / "runs" / "w" / "config.json").write_text("{}")
    Image.new("RGB", (2, 3)).save(photos / "runs" / "w" / "neighbours.png")
    for _ in range(2):  # also from the cache
        assert index.list_images(photos).paths == before
        said = summary.summary_lines(summary.summarize(photos))[-1]
        assert said == "left out, with all images below, as workdirs of runs: runs/w"
        settle(photos)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError(13, "Permission denied"), "allow"),
        (OSError(5, "Input/output error"), "repair"),
    ],
)
def test_a_folder_that_cannot_be_read_is_an_error(photos, monkeypatch, error, remedy):
    scan = os.scandir

    def guarded(path):
        if pathlib.Path(path).name == "deep":
            raise error
        return scan(path)

    monkeypatch.setattr(index.os, "scandir", guarded)
    says = rf"cannot read the folder .*b/deep: {error.strerror}; {remedy} it"
    with pytest.raises(UserError, match=says):
        index.list_images(photos)


def test_only_folders_that_changed_are_read_again(photos, monkeypatch):
    first = index.list_images(photos)
    read = folders_read(monkeypatch)
    again = index.list_images(photos)
    assert read == []
    assert again.paths == first.paths
    np.testing.assert_array_equal(again.sizes, first.sizes)
    Image.new("RGB", (2, 3)).save(photos / "b" / "deep" / "3.png")
    (photos / "a" / "1.png").unlink()
    assert index.list_images(photos).paths == [
        "a/2.PNG",
        *(f"b/deep/{name}" for name in ("1.png", "2.PNG", "3.png")),
        *(f"b/other/{name}" for name in ("1.png", "2.PNG")),
    ]
    assert sorted(read) == ["a", "deep"]


def test_a_folder_that_changed_just_now_is_not_trusted(photos, monkeypatch):
    Image.new("RGB", (2, 3)).save(photos / "a" / "3.png")
    index.list_images(photos)
    read = folders_read(monkeypatch)
    index.list_images(photos)
    assert read == ["a"]


def test_a_file_that_is_still_written_is_looked_at_again(photos):
    with (photos / "a" / "1.png").open("ab") as file:  # changes no folder
        file.write(b"more")
        file.flush()
        before = index.list_images(photos).sizes[0]
        file.write(b"and more")
    assert index.list_images(photos).sizes[0] == before + 8


def test_a_folder_whose_time_was_set_back_is_read_again(photos):
    times = (os.stat(photos / "a").st_mtime_ns,) * 2
    index.list_images(photos)
    Image.new("RGB", (2, 3)).save(photos / "a" / "3.png")
    os.utime(photos / "a" / "3.png", ns=times)
    os.utime(photos / "a", ns=times)
    assert len(index.list_images(photos).paths) == 7


def test_where_folders_keep_their_time_they_are_read_at_each_start(photos, monkeypatch):
    """As of buckets that mount-s3 mounts."""
    line = "36 35 {}:{} / /mnt rw,noatime master:1 - {} rw,user_id=0"
    device = os.stat(photos).st_dev
    numbers = os.major(device), os.minor(device)

    def mounted(kind):
        read = index.pathlib.Path.read_bytes
        said = line.format(*numbers, kind).encode() + b" \xff"
        monkeypatch.setattr(
            index.pathlib.Path,
            "read_bytes",
            lambda self: said if str(self).endswith("mountinfo") else read(self),
        )
        return index._devices_without_times()

    assert mounted("fuse.rclone remote:") == mounted("fuse mountpoint-s3") == {device}
    assert (
        mounted("fuseblk /dev/sda1") == mounted("fuse.sshfs host:") == mounted("ext4 s3fs") == set()
    )
    status = os.stat
    monkeypatch.setattr(index, "_SETTLED", -1.0)

    def without_times(path, **how):
        found = list(status(path, **how))
        return os.stat_result(found, {"st_mtime_ns": 1, "st_ctime_ns": 1})

    monkeypatch.setattr(index.os, "stat", without_times)
    before = index.list_images(photos).paths
    Image.new("RGB", (2, 3)).save(photos / "a" / "30.png")
    assert index.list_images(photos).paths == before
    mounted("fuse mountpoint-s3")
    assert len(index.list_images(photos).paths) == len(before) + 1


def test_a_header_may_be_damaged_in_any_way(photos, monkeypatch):
    """Pillow raises RuntimeError for AVIF, MemoryError for JPEG 2000."""

    def opened(path):
        raise RuntimeError("Failed to decode image")

    monkeypatch.setattr(summary.Image, "open", opened)
    found = summary.summarize(photos)
    assert set(found.unreadable.values()) == {"Failed to decode image"}
    assert found.short_side == 224


def test_a_link_to_what_comes_later_is_followed_then(photos, tmp_path):
    (photos / "drive").symlink_to(tmp_path / "drive", target_is_directory=True)
    os.utime(photos, (time.time() - 3600,) * 2)
    assert len(index.list_images(photos).paths) == 6
    (tmp_path / "drive").mkdir()
    Image.new("RGB", (2, 3)).save(tmp_path / "drive" / "4.png")
    assert index.list_images(photos).paths[-1] == "drive/4.png"


def test_a_name_that_is_not_utf8_is_shown(photos):
    os.rename(photos / "a" / "1.png", os.path.join(os.fsencode(photos / "a"), b"caf\xe9.png"))
    with pytest.raises(UserError, match=r"1 files .* not UTF-8, such as b'a/caf\\xe9.png': rename"):
        open_split(str(photos), labels=False)


def test_a_folder_whose_own_name_is_not_utf8_is_refused_in_one_line(photos):
    """Python shows such a name with surrogates, which no file of results could hold."""
    root = photos.with_name(os.fsdecode(b"caf\xe9"))
    photos.rename(root)
    with pytest.raises(UserError, match="not UTF-8") as caught:
        open_split(str(root), labels=False)
    assert "\n" not in str(caught.value)
    str(caught.value).encode()  # can be printed


def test_folders_that_are_gone_and_links_in_circles(photos):
    (photos / "a" / "up").symlink_to(photos, target_is_directory=True)
    (photos / "dead").symlink_to(photos / "nowhere")
    assert len(index.list_images(photos).paths) == 6
    for path in (photos / "b" / "deep").iterdir():
        path.unlink()
    (photos / "b" / "deep").rmdir()
    assert len(index.list_images(photos).paths) == 4


def test_a_link_to_a_folder_above_is_not_followed(photos):
    """It would take in whatever lies beside the folder, such as the test images."""
    above = photos.parent / "beside"
    above.mkdir()
    Image.new("RGB", (2, 3)).save(above / "test.png")
    before = index.list_images(photos).paths
    for name, target in (("loop", photos.parent), ("root", "/")):
        (photos / "a" / name).symlink_to(target, target_is_directory=True)
    assert index.list_images(photos).paths == before
    (photos / "a" / "beside").symlink_to(above, target_is_directory=True)
    assert index.list_images(photos).paths == sorted([*before, "a/beside/test.png"])


def test_a_dead_link_is_not_an_empty_file(photos):
    (photos / "gone.png").symlink_to(photos / "nowhere.png")
    said = "\n".join(summary.summary_lines(summary.summarize(photos)))
    assert (
        "1 of 7 looked at cannot be read, such as gone.png: No such file or directory; 0 of all"
        in said
    )


def test_a_link_that_cannot_be_followed_costs_nothing_but_itself(photos):
    """In a circle: a name without a suffix is counted, one of an image is an image that cannot be read."""
    (photos / "a" / "loop").symlink_to("loop")
    (photos / "x.png").symlink_to("x.png")
    found = summary.summarize(photos)
    assert found.images == 7
    assert found.passed_over == {".txt": 1, "hidden": 1, "": 1}
    assert found.unreadable.keys() == {"x.png"}


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"": {"changed": 1}}'])
def test_a_damaged_cache_is_read_anew(photos, content):
    expected = index.list_images(photos).paths
    (file,) = index._cache_file(photos).parent.iterdir()
    file.write_bytes(content)
    assert index.list_images(photos).paths == expected


def test_without_room_for_a_cache_all_is_read(photos, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(index.list_images(photos).paths) == 6


def test_the_summary_says_what_a_person_would_ask(photos):
    (photos / "empty.jpg").write_bytes(b"")
    Image.new("L", (20, 10)).save(photos / "grey.tif")
    said = "\n".join(summary.summary_lines(summary.summarize(photos)))
    assert "8 files" in said
    assert "6 PNG, 1 JPEG, 1 TIFF" in said
    assert "2 to 20 px wide, 3 to 10 px high, median shorter side 2 px" in said
    assert "channels 6 RGB, 1 L (of 8 looked at)" in said
    assert "1 of 8 looked at cannot be read, such as empty.jpg: " in said
    assert "; 1 of all are empty" in said
    assert "passed over 2 files that are hidden or no images: 1 hidden, 1 .txt" in said


def test_files_without_a_suffix_are_named_among_what_is_passed_over():
    passed = {".a": 9, ".b": 8, ".c": 7, ".d": 6, ".e": 5, ".f": 2, "": 1}
    said = "9 .a, 8 .b, 7 .c, 6 .d, 5 .e, 1 without suffix, 2 more"
    assert index.most_common(passed) == said
    assert index.most_common({".a": 2, "": 1}) == "2 .a, 1 without suffix"


def test_the_folder_of_images_is_no_workdir(photos, tiny):
    tiny.data.source, tiny.data.path = "folder", str(photos)
    with pytest.raises(UserError, match="is where the images are: expected another folder"):
        pretrain(tiny, f"{photos}/.")
    assert not (photos / "lock").exists()


@pytest.mark.parametrize(
    ("count", "epochs", "reason"),
    [
        (300, 300, "90,000 images in all; from 10 to 300 epochs"),
        (4000, 100, "400,000 images in all, a quarter of an hour on two cores; more is better"),
        (100_000, 10, "1,000,000 images in all; from 10 to 300 epochs"),
    ],
)
def test_the_reason_for_the_epochs_is_true(count, epochs, reason):
    chosen = {c.option: c for c in suggest.suggest_settings(count, 32, False)}["train.epochs"]
    assert chosen.value == epochs
    assert chosen.reason.startswith(reason)


@pytest.mark.parametrize("accelerator", [False, True])
@pytest.mark.parametrize("short_side", [8, 32, 64, 200, 1000])
@pytest.mark.parametrize("count", [2, 40, 100, 10_000, 2_000_000])
def test_settings_are_valid_and_have_reasons(count, short_side, accelerator):
    c = config.default()
    c.data.source, c.data.path = "folder", "x"
    options = config.flatten(c)
    choices = suggest.suggest_settings(count, short_side, accelerator)
    choices += suggest.suggest_evaluation(count, accelerator)
    for option, value, reason in choices:
        assert type(value) is type(options[option])
        assert reason
        config.set_options(c, {option: value})
    config.validate(c)
    assert c.data.batch_size <= count
    assert max(c.linear.batch_size, c.finetune.batch_size) <= count
    assert 5 <= c.eval.knn_k <= 200
    for share, epochs in zip(c.finetune.label_fractions, c.finetune.epochs, strict=True):
        assert epochs * share * count / c.finetune.batch_size > 140  # steps
    assert c.data.image_size <= max(32, 1.4 * short_side)


def test_a_summary_says_what_training_will_not_show(tmp_path):
    """Frames behind the first, the ends of long images, and what cannot be read in any case."""
    frames = [Image.new("L", (20, 20), i) for i in range(3)]
    frames[0].save(tmp_path / "a.tiff", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "b.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (90, 20)).save(tmp_path / "c.png")
    Image.new("RGB", (20, 80)).save(tmp_path / "d.png")
    Image.new("F", (20, 20)).save(tmp_path / "e.tiff")
    said = "\n".join(summary.summary_lines(summary.summarize(tmp_path)))
    assert "2 of 5 looked at hold several frames: of each file the first is taken" in said
    assert "1 of 5 looked at: more than 4 times as long as wide" in said
    assert "1 of 5 looked at cannot be read, such as e.tiff: 32 bits a sample (mode F)" in said
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    Image.new("RGB", (20, 20)).save(tmp_path / "c.png")
    said = "\n".join(summary.summary_lines(summary.summarize(tmp_path)))
    assert "frames" not in said
    assert "long" not in said


def test_images_of_16_bits_get_one_scale(tmp_path, capsys):
    """That of the brightest; a dim frame of a camera stays dim, in training, evaluation and from Python."""
    rng = np.random.default_rng(0)
    for i, top in enumerate([200, 900, 3000, 1000]):
        x = rng.integers(0, top, (20, 20)).astype(np.uint16)
        Image.fromarray(x).save(tmp_path / f"{i}.{'tiff' if i % 2 else 'png'}")
    c = load(f"folder:{tmp_path}", [])
    assert c.data.sample_bits == 12
    describe_choices(c, labelled=False)
    assert "data.sample_bits=12  (one scale for all images of 16 bits" in capsys.readouterr().out
    dim = np.asarray(Image.open(tmp_path / "0.png")) >> 4
    split = assemble.data_set(c).train
    view = assemble.evaluation_view(c)
    for some in (split, split.subset(np.asarray([0]))):
        content = some.source.encoded(0)
        np.testing.assert_array_equal(some.decode(content, view.read)[..., 0], dim)
        np.testing.assert_array_equal(some.source.pixels(content, view.read)[..., 0], dim)
    of_path = pixels.of_anything(tmp_path / "0.png", view.read)
    np.testing.assert_array_equal(of_path[..., 0], dim)
    c.data.batch_size, c.views.jitter_probability = 4, 0.0
    views = assemble.views(c, make_mesh())
    images = Images(split, Broken(split, 0.0))
    with contextlib.closing(views.batches(images, 0)) as batches:
        batch = next(batches)
    (seen,) = batch["views"][batch["index"] == 0]
    assert 0 < seen.max() <= dim.max() + 2  # the bicubic crop overshoots a little
    assert load(f"folder:{tmp_path}", ["--config.data.sample_bits=0"]).data.sample_bits == 0


def test_hot_pixels_and_two_cameras_do_not_make_images_black(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(8):
        x = rng.integers(0, 4096, (40, 40)).astype(np.uint16)
        x[0, 0] = 65535
        Image.fromarray(x).save(tmp_path / f"{i}.png")
    assert summary.summarize(tmp_path).sample_bits == 12
    for i in range(8, 12):  # of another camera
        Image.fromarray(rng.integers(0, 65536, (40, 40)).astype(np.uint16)).save(
            tmp_path / f"{i}.tiff"
        )
    found = summary.summarize(tmp_path)
    assert (found.bits, found.sample_bits) == ({12: 8, 16: 4}, 0)
    said = "\n".join(summary.summary_lines(found))
    assert (
        "of 12 grey ones looked at 8 use 12 bits, 4 use 16 bits: each is scaled by the bits" in said
    )
    for bits in (0, 12):
        seen = pixels.of_anything(tmp_path / "0.png", pixels.ReadOptions(sample_bits=bits))
        assert 100 < np.median(seen) < 150


def test_colours_of_16_bits_are_not_scaled_by_the_grey_images(tmp_path):
    """In colour most PNGs of 16 bits use them all: at 12 bits nearly all of one would be white."""
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 4096, (9, 9)).astype(np.uint16)).save(tmp_path / f"{i}.png")
    assert summary.summarize(tmp_path).sample_bits == 12
    colour = rng.integers(0, 65536, (9, 9, 3)).astype(np.uint16)
    (tmp_path / "c.png").write_bytes(tf.io.encode_png(colour).numpy())
    assert summary.summarize(tmp_path).sample_bits == 0


def test_a_part_may_be_held_out_of_a_small_folder():
    """The batch is chosen before it is known how many images data.test_fraction leaves."""
    chosen = {c.option: c.value for c in suggest.suggest_settings(64, 32, False)}
    assert chosen["data.batch_size"] <= 64 * 2 // 3


def test_large_photographs_on_an_accelerator_get_the_papers_settings():
    chosen = {c.option: c.value for c in suggest.suggest_settings(1_281_167, 375, True)}
    assert chosen["data.image_size"] == 224
    assert chosen["model.stem"] == "imagenet"
    assert chosen["model.depth"] == 50
    assert chosen["train.epochs"] == 100.0
    assert "views.blur_probability" not in chosen
    assert "model.zero_init_residual" not in chosen
    assert (chosen["optimizer.scaling"], chosen["optimizer.learning_rate"]) == ("sqrt", 0.075)
    assert "optimizer.name" not in chosen  # the default, LARS
    chosen = {c.option: c.value for c in suggest.suggest_evaluation(1_281_167, True)}
    assert chosen == {"eval.knn_k": 200, "linear.batch_size": 4096, "finetune.batch_size": 4096}
    # The paper's grid, as everywhere by default.
    assert suggest.suggest_transfer_finetune(1_281_167, True) == {}


def test_fine_tuning_for_transfer_takes_minutes_on_a_cpu():
    """A part of the paper's grid, whose settings all are the default's too, and 30 epochs."""
    default = config.flatten(config.default())
    chosen = suggest.suggest_transfer_finetune(20_000, False)
    steps, batch = chosen["transfer_finetune.steps"], chosen["transfer_finetune.batch_size"]
    assert steps * batch == pytest.approx(30 * 20_000, rel=0.01)
    trainings = {}
    for kind in ("", "untrained_"):
        grid = [chosen[f"transfer_finetune.{kind}{n}"] for n in ("learning_rate", "weight_decay")]
        trainings[kind] = len(grid[0]) * len(grid[1])
        for name, values in zip(("learning_rate", "weight_decay"), grid, strict=True):
            assert set(values) <= set(default[f"transfer_finetune.{kind}{name}"])
    assert trainings == {"": 4, "untrained_": 4}
    assert suggest.suggest_transfer_finetune(500, False)["transfer_finetune.steps"] == 1000


@pytest.mark.parametrize("accelerator", [False, True])
def test_what_is_suggested_is_not_called_unusual(accelerator):
    """LARS at a small batch is."""
    for count, side in ((3_000, 72), (50_000, 32), (90_000, 400), (1_281_167, 375)):
        c = config.default()
        config.set_options(c, suggest.suggest_options(count, side, accelerator))
        assert oddities(c, assemble.plan_of(c, count), count) == []


def test_the_configuration_chooses_from_parquet_and_arrays(tmp_path, capsys):
    """40 images of 300 x 200 px in each."""
    images = np.random.default_rng(0).integers(0, 256, (40, 200, 300, 3)).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(images[0]).save(content, "PNG")
    pq.write_table(pa.table({"image": [content.getvalue()] * 40}), tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", train_images=images)
    file = f"{pathlib.Path(__file__).parent.parent}/configs/folder.py"
    for source, path in (("parquet", "*.parquet"), ("arrays", "a.npz")):
        c = load(f"{file}:{tmp_path}/{path}", [])
        assert (c.data.source, c.data.path) == (source, f"{tmp_path}/{path}")
        data = c.data.to_dict() | {"seed": 0}
        assert measure(data) == (40, 200, 0)
        assert measure(data | {"test_fraction": 0.5}) == (40, 200, 0)  # as before it is given
        assert c.data.batch_size == suggest.suggest_options(40, 200, False)["data.batch_size"]
        describe_choices(c, labelled=False)
        said = capsys.readouterr().out
        assert "data.image_size=32  (the median image's shorter side has 200 px" in said
        assert "the images suggest" not in said
        c.data.image_size = 224
        describe_choices(c, labelled=False)
        # What was chosen for 32 px is held against the size that was given.
        said = capsys.readouterr().out
        assert "data.image_size=224  (as configured; the images suggest 32)" in said
        assert "views.blur_probability=0.0  (chosen for 32 px; for 224 px it would be 0.5)" in said
        assert "model.stem=strided  (chosen for 32 px; for 224 px it would be imagenet)" in said
        assert "optimizer.name=muon  (needs no large batch" in said
    with pytest.raises(UserError, match=r"a\.npz"):
        load(f"{file}:{tmp_path}/b/a.npz", [])


def test_the_configuration_finds_the_image_column(tmp_path):
    """Whether it is named on the command line or not; of two columns of bytes it is not guessed."""
    content = io.BytesIO()
    Image.new("RGB", (3, 2)).save(content, "PNG")
    columns = {"img": [content.getvalue()] * 8, "name": ["x"] * 8}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    spec = f"{pathlib.Path(__file__).parent.parent}/configs/folder.py:{tmp_path}/a.parquet"
    for flags in ([], ["--config.data.parquet.image_column=img"]):
        assert load(spec, flags).data.parquet.image_column == "img"
    pq.write_table(pa.table(columns | {"mask": columns["img"]}), tmp_path / "a.parquet")
    assert load(spec, flags).data.parquet.image_column == "img"  # of two it is given
    with pytest.raises(UserError, match="has no column 'image': it has img, name, mask"):
        assemble.data_set(load(spec, []))


def test_the_configuration_chooses_from_the_folder(photos):
    spec = f"{pathlib.Path(__file__).parent.parent}/configs/folder.py:{photos}"
    c = load(spec, ["--config.data.batch_size=16"])
    assert (c.data.image_size, c.data.batch_size, c.model.depth) == (32, 16, 10)
    with pytest.raises(UserError, match="which images"):
        load(spec.partition(":")[0], [])
