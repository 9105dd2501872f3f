"""Images as they lie about on disks: read as Pillow reads them, or skipped, counted and named."""

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import tensorflow as tf
from conftest import random_images
from etils import epath
from PIL import Image
from test_sources import STREAMING

from simclr_jax import config
from simclr_jax.data.broken import Broken, Images
from simclr_jax.data.folder import open_split
from simclr_jax.data.order import Order, Share
from simclr_jax.data.split import BROKEN
from simclr_jax.errors import Unavailable, UserError
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.views import make_distortion, pipeline
from simclr_jax.views.crop import EvaluationView
from simclr_jax.views.pipeline import HostWork, evaluation_batches, training_batches


def smooth(height=24, width=20):
    """An image that JPEG keeps well."""
    y, x = np.mgrid[:height, :width]
    return np.stack([9 * y, 9 * x, 4 * (x + y)], axis=-1).astype(np.uint8)


def test_a_report_that_was_edited_is_read_as_far_as_it_goes(small_split, tmp_path):
    report = tmp_path / "broken.jsonl"
    report.write_text('[1]\n"x"\n{"image": 1}\n{"index": null}\n{"index": 3}\n{"ind')
    assert Broken(small_split, 0.1, report).indices == set()  # image 3 can be read


def test_images_that_are_all_broken_are_said_to_be(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of 3 images can be read, such as /.*0\.png"):
        Broken(open_split(str(tmp_path), False), 0.9).find(range(3))
    Image.fromarray(smooth()).save(tmp_path / "1.png")
    split = open_split(str(tmp_path), False).subset(np.arange(2))
    whole = types.SimpleNamespace(count=10)
    with pytest.raises(UserError, match=r"1 of 2 images .* the share of 0\.05 of 10 that"):
        Broken(split, 0.05, whole=whole).find([0])


def test_where_too_many_are_broken_all_are_found_at_once(tmp_path):
    """Not some more after each training that was begun anew."""
    for i in range(10):
        Image.fromarray(smooth()).save(tmp_path / f"{i}.png")
    for i in (1, 4, 8):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    split, report = open_split(str(tmp_path), False), epath.Path(tmp_path / "broken.jsonl")
    with pytest.raises(
        UserError, match=r"^3 of 10 images cannot be read.*max_broken=0\.31; .*names all"
    ):
        Broken(split, 0.05, report).find([4])
    assert len(report.read_text().splitlines()) == 3
    assert Broken(split, 0.31, report).indices == {1, 4, 8}


def good_images(where):
    """{file: what it shows, uint8 [H, W, 3]}, read back by Pillow."""
    image = Image.fromarray(smooth())
    alpha = image.copy()
    alpha.putalpha(Image.fromarray(smooth()[:, ::-1, 1]))
    see_through = image.convert("P", palette=Image.Palette.ADAPTIVE)
    see_through.info["transparency"] = 7
    one_colour, grey_one_colour = image.copy(), image.convert("L")
    one_colour.info["transparency"] = image.getpixel((3, 4))
    grey_one_colour.info["transparency"] = grey_one_colour.getpixel((3, 4))
    frames = [Image.fromarray(np.full((9, 9, 3), 80 * i, np.uint8)) for i in (1, 2)]
    sixteen = (np.arange(24 * 20, dtype=np.uint16).reshape(24, 20) * 100).astype(np.uint16)
    saved = {
        "colour.jpg": image,
        "cmyk.jpg": image.convert("CMYK"),
        "grey.jpg": image.convert("L"),
        "colour.png": image,
        "palette.png": image.convert("P", palette=Image.Palette.ADAPTIVE),
        "alpha.png": alpha,
        "grey_alpha.png": alpha.convert("LA"),
        "palette_alpha.png": see_through,
        "one_colour_alpha.png": one_colour,
        "grey_one_colour_alpha.png": grey_one_colour,
        "alpha.gif": see_through,
        "alpha.webp": alpha,
        "one_bit.png": image.convert("1"),
        "sixteen_bit.png": Image.fromarray(sixteen),
        "colour.bmp": image,
        "palette.bmp": image.convert("P", palette=Image.Palette.ADAPTIVE),
        "alpha.bmp": alpha,
        "colour.tif": image,
        "grey.tiff": image.convert("L"),
        "alpha.tif": alpha,
        "sixteen_bit.tif": Image.fromarray(sixteen),
        "colour.ppm": image,
        "colour.jp2": image,
        "colour.j2k": image,
        "colour.avif": image,
        "colour.webp": image,
        "one_pixel.png": image.crop((3, 3, 4, 4)),
        "narrow.png": Image.fromarray(random_images(1, 20000, 1)[0]),
        "WRONG_SUFFIX.png": image,
    }
    for name, picture in saved.items():
        options = {"quality": 95} if name.endswith((".jpg", "r.webp")) else {"lossless": True}
        kind = {"WRONG_SUFFIX.png": "jpeg"}.get(name)
        picture.save(where / name, format=kind, **options)
    frames[0].save(where / "animated.gif", save_all=True, append_images=frames[1:])
    shown = {}
    for name in [*saved, "animated.gif"]:
        picture = Image.open(where / name)
        if name.startswith("sixteen_bit"):
            grey = (np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8)
            shown[name] = np.repeat(grey[:, :, None], 3, axis=2)
        elif "alpha" in name:  # as on white paper
            rgba = np.asarray(picture.convert("RGBA"), np.float64)
            share = rgba[:, :, 3:] / 255
            shown[name] = np.round(rgba[:, :, :3] * share + 255 * (1 - share)).astype(np.uint8)
        else:
            shown[name] = np.asarray(picture.convert("RGB"))
    return shown


def broken_images(where):
    """Files that no one can read, or should."""
    Image.fromarray(random_images(1, 60, 60)[0]).save(where / "whole.jpg")
    data = (where / "whole.jpg").read_bytes()
    (where / "whole.jpg").unlink()
    (where / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (where / "empty.png").write_bytes(b"")
    (where / "text.jpg").write_text("not an image")
    # 49 kB that would be 1.2 GB once read.
    Image.new("1", (20000, 20000)).save(where / "bomb.png")
    Image.new("F", (9, 9)).save(where / "float.tif")  # of unknown range
    return {"truncated.jpg", "empty.png", "text.jpg", "bomb.png", "float.tif"}


def test_every_format_and_layout_is_read_as_pillow_reads_it(tmp_path):
    shown = good_images(tmp_path)
    split = open_split(str(tmp_path), labels=False)
    assert split.count == len(shown)
    for i in range(split.count):
        name = split.name_of(i).rpartition("/")[2]
        data = tf.constant(split.source[i].image)
        found = split.decode(data).numpy()
        assert found.shape == shown[name].shape, name
        # Two decoders may differ in how they enlarge the halved colour planes of a JPEG.
        difference = np.abs(found.astype(int) - shown[name]).max()
        lossy = name.endswith((".jpg", "r.webp", "SUFFIX.png"))
        # Shares of 255 are rounded once here, and by Pillow in its own way.
        assert difference <= (8 if lossy else 1 if "alpha" in name else 0), name


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """(folder, names of the broken images): 30 good images, 15 more, and 5 broken ones."""
    where = tmp_path_factory.mktemp("photos")
    good_images(where)
    for i in range(15):
        Image.fromarray(random_images(15, 24, 20)[i]).save(where / f"x{i:02}.png")
    return where, broken_images(where)


@pytest.fixture(scope="module")
def mixed(photos):
    """(split, names of its broken images)."""
    where, names = photos
    return open_split(str(where), labels=False), names


@pytest.fixture
def own(photos, tmp_path):
    """`mixed`, of files that the test may change."""
    where, names = photos
    shutil.copytree(where, tmp_path / "own")
    return open_split(str(tmp_path / "own"), labels=False), names


def indices_of(split, names):
    return [i for i in range(split.count) if split.name_of(i).rpartition("/")[2] in names]


def batches(split, broken, steps, start=0, share=Share()):
    """A broken image that is met makes a new pipeline: with 48 images a step these are few."""
    work = HostWork(16, make_distortion({}), whole=False)
    stream = training_batches(Images(split, broken), Order(1, 48, share), start, work)
    with contextlib.closing(stream):
        return list(itertools.islice(stream, steps))


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def two_epochs(mixed, tmp_path_factory):
    """(3 batches of 48 of 50 images, what is known to be broken after them)."""
    split, _ = mixed
    broken = Broken(split, 0.2, tmp_path_factory.mktemp("w") / "broken.jsonl")
    return batches(split, broken, 3), broken


def test_broken_images_are_skipped_counted_and_named(mixed, two_epochs):
    split, names = mixed
    whole, broken = two_epochs
    bad = set(indices_of(split, names))
    assert broken.indices == bad
    named = {line["image"].rpartition("/")[2]: line["problem"] for line in lines_of(broken.report)}
    assert named.keys() == names
    assert all(named.values())
    seen = np.concatenate([batch["index"] for batch in whole])
    assert set(seen) == set(range(50)) - bad


def test_what_comes_does_not_depend_on_when_a_broken_image_is_met(mixed, two_epochs):
    """Bit for bit, on 2 processes: one enters late and meets them then, one has them in its report."""
    split, _ = mixed
    whole, broken = two_epochs
    late = batches(split, Broken(split, 0.2), 2, start=1, share=Share(0, 2))
    known = batches(split, Broken(split, 0.2, broken.report), 3, share=Share(1, 2))
    for key in ("views", "draws", "index", "epoch"):
        np.testing.assert_array_equal(known[0][key], whole[0][key][24:])
        for i in (1, 2):
            both = np.concatenate([late[i - 1][key], known[i][key]])
            np.testing.assert_array_equal(both, whole[i][key])


def test_a_mended_image_is_taken_again(own, tmp_path):
    split, _ = own
    Broken(split, 0.2, tmp_path / "broken.jsonl").find(range(50))
    (index,) = indices_of(split, {"text.jpg"})
    Image.fromarray(smooth()).save(split.name_of(index))
    again = Broken(split, 0.2, tmp_path / "broken.jsonl")
    assert len(again.indices) == 4
    assert index not in again.indices


@pytest.mark.parametrize("kind", ["a link in a circle", "a folder"])
def test_what_the_system_cannot_read_is_broken_too(own, kind):
    """TensorFlow has an error of its own for each."""
    split, _ = own
    part = split.subset(np.asarray(indices_of(split, {"x00.png", "x01.png", "x02.png"})))
    os.remove(path := part.name_of(1))
    if kind == "a folder":
        os.mkdir(path)
    else:
        os.symlink("x01.png", path)
    images = Images(part, Broken(part, 0.5))
    list(evaluation_batches(images, 50, Share(), EvaluationView(8, 1.0)))
    assert images.broken.indices == {1}


@pytest.mark.parametrize("share", [Share(), Share(0, 2), Share(1, 2)])
def test_evaluation_leaves_broken_images_out(mixed, share):
    split, names = mixed
    images = Images(split, Broken(split, 0.2))
    found = list(evaluation_batches(images, 50, share, EvaluationView(8, 1.0)))
    labels = np.concatenate([batch["label"] for batch in found])
    mine = np.arange(share.index, 50, share.count)
    np.testing.assert_array_equal(labels == BROKEN, np.isin(mine, indices_of(split, names)))


def test_an_image_that_is_away_for_a_moment_is_read_again(tmp_path, monkeypatch):
    """Each of the images can be read when the batch that failed is looked at."""
    for i, image in enumerate(random_images(6, 8, 8)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    split = open_split(str(tmp_path), False)
    pauses: list[float] = []
    images = Images(split, Broken(split, 0.5))
    file, away = tmp_path / "3.png", tmp_path / "away"
    file.rename(away)
    find, sleep = Broken.find, pauses.append

    def found_again(self, indices):
        away.rename(file)
        try:
            return find(self, indices)
        finally:
            if len(pauses) < times:
                file.rename(away)

    monkeypatch.setattr(Broken, "find", found_again)
    monkeypatch.setattr(pipeline.time, "sleep", sleep)
    times = 2
    found = list(evaluation_batches(images, 4, Share(), EvaluationView(8)))
    assert [len(batch["image"]) for batch in found] == [4, 2]
    assert len(pauses) == 3
    assert images.broken.indices == set()
    file.rename(away)
    pauses.clear()
    times = 99
    with pytest.raises(Unavailable, match=r"the images cannot be read: .*3\.png; No such file"):
        list(evaluation_batches(images, 4, Share(), EvaluationView(8)))


def test_too_many_broken_images_stop_the_run_with_examples(mixed):
    split, _ = mixed
    broken = Broken(split, 0.02)
    with pytest.raises(
        UserError, match=r"of 50 images cannot be read, .*max_broken.*such as /"
    ) as caught:
        batches(split, broken, 3)
    first = min(broken.indices)
    (problem,) = split.problems({first}).values()
    assert f"{split.name_of(first)} ({problem})" in str(caught.value)


def test_of_a_part_as_many_may_be_broken_as_of_the_whole(mixed):
    """One broken image of five that were drawn from fifty."""
    split, names = mixed
    part = split.subset(np.asarray([*range(46, 50), indices_of(split, names)[0]]))
    with pytest.raises(UserError, match="1 of 5 images cannot be read"):
        Broken(part, 0.1).find(range(5))
    broken = Broken(part, 0.1, whole=split)
    assert broken.find(range(5))
    assert broken.indices == {4}


def test_the_report_is_of_what_is_broken_now(own, tmp_path):
    split, names = own
    file = tmp_path / "broken.jsonl"
    Broken(split, 0.2, file).find(range(50))
    assert len(lines_of(file)) == len(names)
    for index in indices_of(split, names):
        Image.fromarray(smooth()).save(split.name_of(index), format="png")
    Broken(split, 0.2, file)
    assert not file.exists()


def test_five_broken_images_are_named_on_the_terminal_and_all_in_the_report(own, tmp_path, capsys):
    split, names = own
    (also,) = indices_of(split, {"x00.png"})
    with open(split.name_of(also), "w") as file:
        file.write("not an image either")
    Broken(split, 0.2, tmp_path / "broken.jsonl").find(range(50))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped")]
    assert len(said) == 6
    assert f"all are in {tmp_path}" in said[-1]
    assert len(lines_of(tmp_path / "broken.jsonl")) == len(names) + 1


@pytest.mark.whole
def test_a_run_on_such_a_folder(photos, tiny, tmp_path, capsys):
    where, names = photos
    config.set_options(tiny, STREAMING | {"data.source": "folder", "data.path": str(where)})
    pretrain(tiny, str(tmp_path / "w"))
    assert "skipped     5 images that cannot be read, see" in capsys.readouterr().out
    found = lines_of(tmp_path / "w/broken_images.jsonl")
    assert {line["image"].rpartition("/")[2] for line in found} == names


@pytest.mark.whole
def test_the_log_of_tensorflow_is_not_beside_the_line_that_names_a_broken_image(tmp_path):
    """Importing JAX sets the level of that log, so that a default of ours alone would change nothing."""
    decode = (
        "import sys; from simclr_jax.shell import call\n"
        "def command(names):\n"
        "    import tensorflow as tf\n"
        "    for name in names:\n"
        "        try: tf.io.decode_jpeg(open(name, 'rb').read())\n"
        "        except tf.errors.InvalidArgumentError: print('damaged')\n"
        "call(command, sys.argv[1:])"
    )
    damaged = tmp_path / "cut_short.jpg"
    Image.fromarray(smooth()).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:300])
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", decode, str(damaged)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "damaged\n"
    assert "jpeg_mem" not in done.stderr
    assert "local_rendezvous" not in done.stderr


def test_the_end_of_an_input_waits_for_no_thread_of_tf_datas(monkeypatch):
    """With autotuning an iterator's end waits up to a minute for a thread that sleeps: now and then, after half a
    minute of use, so that what is asked for is looked at here.
    """
    asked = []
    with_options = tf.data.Dataset.with_options

    def noted(self, options):
        asked.append(options)
        return with_options(self, options)

    monkeypatch.setattr(tf.data.Dataset, "with_options", noted)
    assert list(pipeline._run(None, tf.data.Dataset.range, None, 3)) == [0, 1, 2]
    (options,) = asked
    assert options.autotune.enabled is False
    assert options.deterministic is True
