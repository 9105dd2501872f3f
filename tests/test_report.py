"""The pages about runs: what they say, that they show it, and that no file name can break them."""

import base64
import dataclasses
import importlib.util
import json
import re
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
import tensorflow as tf
from conftest import random_images, tiny_config
from PIL import Image

from simclr_jax import assemble, config
from simclr_jax.data.arrays import in_memory
from simclr_jax.data.folder import open_split
from simclr_jax.data.pictures import pictures_of
from simclr_jax.data.pixels import ReadOptions
from simclr_jax.errors import UserError
from simclr_jax.evals import results
from simclr_jax.evals.scores import Score
from simclr_jax.main import main
from simclr_jax.mesh import make_mesh
from simclr_jax.modes.pretrain import pretrain, pretrain_and_evaluate
from simclr_jax.modes.report import report, views
from simclr_jax.report import learned, run_page
from simclr_jax.report.curves import PANELS, draw_curves
from simclr_jax.report.page import in_words
from simclr_jax.report.run_files import read_run_files
from simclr_jax.report.sheet import name_of_image, sheet_of
from simclr_jax.report.thumbnails import data_url, tile
from simclr_jax.views import host, make_distortion
from simclr_jax.views.sample import sample_views

# What was drawn for a view


OPERATIONS: dict[str, dict] = {
    "flip": {"flip": True},
    "jitter": {"color_strength": 1.0, "jitter_probability": 0.5},
    "grey": {"grey_probability": 0.5},
    "blur": {"blur_probability": 0.5},
    "solarize": {"solarize_probability": 0.5, "solarize_threshold": 0.5},
}
NOTHING: dict = {
    "crop_area": (1.0, 1.0),
    "crop_aspect": (1.0, 1.0),
    "flip": False,
    "color_strength": 0.0,
    "grey_probability": 0.0,
    "blur_probability": 0.0,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_said_where_it_changes_the_view(name):
    """Of 20 draws of each: views that are no longer the image are those with a line beside the crop's."""
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    distortion = make_distortion(NOTHING | OPERATIONS[name], views=1)
    changed, said = [], []
    for index in range(20):
        seed, epoch, place = (tf.constant(k, tf.int64) for k in (0, 0, index))
        draws = host.draw(seed, epoch, place, distortion)
        view = host.make_views(tf.constant(image), draws, 40, distortion).numpy()[0]
        changed.append(not np.array_equal(view, image))
        said.append(len(distortion.describe(image.shape, draws.numpy()[0])) == 2)
    if name == "blur":  # one of a small sigma rounds to nothing
        assert all(told or not differs for told, differs in zip(said, changed, strict=True))
    else:
        assert changed == said
    assert 2 < sum(changed) < 18


def test_a_crop_is_said_as_it_was_taken():
    distortion = make_distortion({"crop_area": (0.25, 0.25), "crop_aspect": (1.0, 1.0)})
    draws = np.full(distortion.draws, 0.99)
    assert distortion.describe((64, 64, 3), draws)[0] == "crop 25%, 32 x 32 px"


def test_the_jitter_says_its_factors_in_their_order():
    distortion = make_distortion({"color_strength": 0.5, "crop_area": (1, 1)})
    jitter = distortion.operations[1]
    drawn = {"jitter": [0.0], "factors": [0.0, 0.5, 1.0, 1.0], "order": [0.3, 0.2, 0.1, 0.0]}
    u = {name: np.asarray(numbers) for name, numbers in drawn.items()}
    assert jitter.describe(u, 3) == "hue +36°, saturation x 1.40, contrast x 1.00, brightness -0.40"
    assert jitter.describe(u, 1) == "contrast x 1.00, brightness -0.40"
    assert jitter.describe(u | {"jitter": np.asarray([0.9])}, 3) == ""


@pytest.mark.parametrize("options", [{}, {"data.color_on": "device"}, {"data.placement": "device"}])
def test_the_sheet_shows_the_views_that_training_sees(tiny, options):
    config.set_options(tiny, {"data.placement": "host", "views.color_strength": 1.0} | options)
    mesh = make_mesh(jax.devices()[:1])
    train, views = assemble.data_set(tiny).train, assemble.views(tiny, mesh)
    batches = views.batches(assemble.images_of(tiny, train), 0)
    batch = next(batches)
    batches.close()
    placed = views.placer(train)(batch)
    seen = np.asarray(jax.jit(lambda b: views.views(views.fetch(b)))(placed))
    index = int(batch["index"][3])
    sampled = sample_views(views, train.source[index].image, index, 1)
    for view, wanted in zip(sampled, seen[3], strict=True):
        assert np.abs(view.image - 255 * wanted).max() < 1.01
        assert view.drawn[0].startswith("crop ")


@pytest.mark.parametrize("path", ["./pictures", "~/pictures", "pictures/"])
def test_an_image_is_named_below_its_folder_however_that_was_typed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures/a").mkdir(parents=True)
    for name in ("a/1.png", "a/2.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / name)
    split = open_split(path, labels=False)
    assert name_of_image(split, 1) == "a/2.png"
    assert name_of_image(split.subset(np.asarray([1])), 0) == "a/2.png"


def test_pictures_of_a_split_are_evenly_spaced(small_split):
    found = list(pictures_of(small_split, 4, ReadOptions()))
    assert [picture.place for picture in found] == [0, 12, 24, 36]
    for picture in found:
        np.testing.assert_array_equal(picture.image, small_split.source[picture.place].image)


# What an encoder makes of images


def embedded(h, labels=None):
    labels = np.full(len(h), -1) if labels is None else labels
    return learned.Embedded(h, [], np.arange(len(h)), labels)


def test_neighbours_pairs_and_strays_are_those_of_loops():
    rng = np.random.default_rng(0)
    h = rng.normal(size=(300, 8)).astype(np.float32)
    h[:, 0] += 4
    h[17] = h[230] * 2  # a copy, by angle
    h[99] = -h.mean(0)  # unlike all
    some = embedded(h)
    near = learned.nearest_of_each(some)
    unit = h.astype(np.float64) / np.linalg.norm(h, axis=1, keepdims=True)
    for i in (0, 17, 255, 256, 299):
        similar = {j: unit[i] @ unit[j] for j in range(300) if j != i}
        best = sorted(similar.values(), reverse=True)[:10]
        np.testing.assert_allclose(near.similarities[i], best, atol=1e-6)
        np.testing.assert_allclose([similar[j] for j in near.indices[i]], best, atol=1e-6)
    first, second, cosine = learned.most_alike(near, 3)[0]
    assert (first, second) == (17, 230)
    assert cosine == pytest.approx(1, abs=1e-5)
    pairs = learned.most_alike(near, 50)
    assert len({i for pair in pairs for i in pair[:2]}) == 100  # each image once
    assert [pair[2] for pair in pairs] == sorted((pair[2] for pair in pairs), reverse=True)
    assert learned.most_isolated(near, 5)[0] == 99


def test_the_map_keeps_groups_together_and_is_the_same_each_time():
    rng = np.random.default_rng(0)
    groups = np.arange(60) % 3
    h = (np.eye(3)[groups] + 0.05 * rng.normal(size=(60, 3))).astype(np.float32)
    places = learned.map_of(h)
    np.testing.assert_array_equal(places, learned.map_of(h))
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1e9 * np.eye(60)
    assert np.all(groups[apart.argmin(1)] == groups)
    assert learned.map_of(h[:3]).shape == (3, 2)


def test_confusions_count_true_classes_by_row():
    corners = np.eye(3, dtype=np.float32)
    train = embedded(np.repeat(corners, 10, 0), np.repeat(np.arange(3), 10))
    test = embedded(corners[[0, 1, 1, 2]], np.asarray([0, 1, 2, -1]))
    counts = learned.confusions(train, test)
    assert counts == {(0, 0): 1, (1, 1): 1, (2, 1): 1}
    assert learned.most_confused(counts, 8) == [(2, 1, 1)]


def test_pictures_are_small_and_what_they_were(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (300, 200, 3)).astype(np.uint8)
    assert not tile(image, 96, "a", [])["small"]
    assert tile(image[:8, :8], 96, "a", [])["small"]
    for side, size in ((96, (64, 96)), (400, (200, 300))):
        kind, _, content = data_url(image, side).partition(";base64,")
        assert kind in ("data:image/jpeg", "data:image/png")
        file = tmp_path / "x"
        file.write_bytes(base64.b64decode(content))
        assert Image.open(file).size == size


def test_a_sample_leaves_out_what_cannot_be_read(tmp_path):
    for i in range(6):
        Image.new("RGB", (5, 4), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"no image")
    from simclr_jax.data.folder import open_split

    found = list(pictures_of(open_split(str(tmp_path), False), 100, ReadOptions()))
    assert [picture.place for picture in found] == [0, 1, 2, 4, 5]
    assert [int(picture.image[0, 0, 0]) for picture in found] == [0, 1, 2, 4, 5]


# The pages


HOSTILE = [
    "<script>alert(1)<!--.png",
    "\"'&lt;b&gt;.png",
    "😀 é ${x} {{ 7 * 7 }}.png",
    "</script>.png",
]


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A run on a folder whose names would break a page that does not escape them."""
    folder = tmp_path_factory.mktemp("hostile")
    root = folder / "<b>pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(24):
        name = HOSTILE[i].replace("/", "∕") if i < len(HOSTILE) else f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (14, 12, 3)).astype(np.uint8)).save(root / name)
    c = tiny_config(folder)
    options = {"data.source": "folder", "data.path": str(root), "data.placement": "host"}
    config.set_options(c, options | {"train.steps": 2, "data.batch_size": 8})
    pretrain(c, str(folder / "run"))
    return c, folder / "run"


def text_of(page):
    """The page without scripts, styles and pictures."""
    page = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.S)
    return re.sub(r"data:image/[^\"]*", "", page)


@pytest.mark.whole
def test_no_name_of_a_file_can_break_the_page(hostile):
    options, workdir = hostile
    page = report(options, str(workdir)).read_text()
    text = text_of(page)
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7 * 7 }}" in text  # shown, not computed
    assert "😀" in text
    assert len(page.encode()) < 5e6
    assert not re.search(r"(src|href)=\"(http|//)", text)
    for heading in ("Curves", "Views", "Nearest neighbours", "Map", "Most alike", "Configuration"):
        assert f"<h2>{heading}</h2>" in page
    assert "What is taken for what" not in page  # no labels


@pytest.mark.whole
def test_a_run_without_data_or_checkpoint_still_has_a_page(tiny, tmp_path, capsys):
    workdir = tmp_path / "w"
    pretrain(tiny, str(workdir))
    shutil.rmtree(workdir / "checkpoints")
    page = report(tiny, str(workdir)).read_text()
    assert "No pictures: " in page
    assert "<h2>Views</h2>" in page
    assert "pictures    No pictures: " in capsys.readouterr().out  # in the terminal, too
    tiny.data.path = str(tmp_path / "moved.npz")
    page = text_of(report(tiny, str(workdir)).read_text())
    assert "<h2>Views</h2>" not in page
    assert "<h2>Curves</h2>" in page


def test_a_run_whose_features_are_not_finite_still_has_a_page(hostile, monkeypatch):
    options, workdir = hostile
    embedded = learned.embed_sample

    def diverged(*arguments):
        some = embedded(*arguments)
        return dataclasses.replace(some, h=np.full_like(some.h, np.nan))

    monkeypatch.setattr(learned, "embed_sample", diverged)
    page = text_of(report(options, str(workdir)).read_text())
    assert "features hold numbers that are not finite." in page
    assert "<h2>Curves</h2>" in page


def test_a_page_says_of_how_many_images_it_is(monkeypatch):
    split = in_memory(np.zeros((6, 4, 4, 3), np.uint8))
    assert run_page._sample(6, split) == "the 6 training images"
    assert run_page._sample(4, split) == "4 of the 6 training images; 2 cannot be read"
    monkeypatch.setattr(run_page, "_EMBEDDED", 3)
    assert run_page._sample(3, split) == "3 training images (evenly spaced of 6)"
    assert run_page._sample(2, split) == "2 training images (evenly spaced of 6; 1 cannot be read)"


def test_a_map_needs_five_images():
    few = learned.Embedded(np.eye(4), [], np.arange(4), np.zeros(4, int))
    assert run_page._map(few, ["a", "b", "c", "d"], None) == {
        "map_note": "None: there are fewer than five images."
    }


@pytest.mark.parametrize(("name", "unit"), [("nt_xent", "nats"), ("margin_semihard", "")])
def test_a_loss_has_the_unit_that_it_is_in(tmp_path, name, unit):
    c = config.default()
    c.loss.name = name
    line = json.dumps({"step": 1, "loss": 2.0}) + "\n"
    folder = write_run(tmp_path / "w", line, about={"config": c.to_dict()})
    (figure,) = draw_curves([read_run_files(str(folder))], {})
    assert figure.title.text == (f"Loss, {unit}" if unit else "Loss")


@pytest.mark.whole
def test_a_labelled_run_ends_with_its_page(tiny, tmp_path, capsys):
    config.set_options(tiny, {"train.report": True, "eval.after_training": "knn"})
    pretrain_and_evaluate(tiny, str(tmp_path / "w"))
    assert "report      " in capsys.readouterr().out
    page = text_of((tmp_path / "w/report.html").read_text())
    assert "What is taken for what" in page
    assert "<h3>knn</h3>" in page
    verdict = json.loads((tmp_path / "w/health.json").read_text())
    assert verdict["name"] in page
    shown = re.search(r"(\d+) options, of which (\d+) differ", page)
    assert shown
    assert int(shown[1]) == len(config.flatten(tiny))
    assert 10 < int(shown[2]) < 40
    assert re.search(r"train\.steps</b></td><td class=\"text\">8</td>", page)


def write_run(folder, lines, steps=4, about=None, **files):
    folder.mkdir(parents=True)
    record = {
        "config": config.default().to_dict(),
        "plan": {"steps": steps, "warmup_steps": 0, "learning_rate": 0.1},
        "training_images": 8192,
        "classes": None,
        "data_fingerprint": "f",
        "versions": {"jax": "1"},
        "commit": None,
        "command": ["x"],
        "time": "2026-01-01T00:00:00+00:00",
        "devices": ["cpu:0"],
        "processes": 1,
    } | (about or {})
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text(lines)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_run_of_an_encoder_that_is_not_there_is_judged_by_its_record(tmp_path):
    """Its encoder was added by a configuration file, which the page of all runs does not read."""
    line = '{"step": 2, "loss": 1.5, "z_std": 1e-6}\n'
    model = config.default().to_dict()
    model["model"]["name"] = "mine"
    references = {"images": 8, "width": 16, "settled_after": 0, "temperature": None}
    about = {"config": model, "references": references}
    run = read_run_files(str(write_run(tmp_path / "a", line, about=about)))
    assert run.verdict()["name"] == "collapsed"


def test_a_record_says_how_far_its_run_is(tmp_path):
    line = '{"step": 2, "loss": 1.5}\n'
    going = read_run_files(str(write_run(tmp_path / "a", line + '{"step": 4, "lo')))
    assert (going.state, going.series("loss"), going.last("none")) == (
        "at step 2 of 4",
        ([2], [1.5]),
        None,
    )
    assert not going.verdict()["is_bad"]
    failed = read_run_files(str(write_run(tmp_path / "b", line, not_finite_step_3={"step": 3})))
    assert failed.verdict()["is_bad"]
    assert failed.state == "failed after step 2 of 4"
    last = '{"step": 4, "loss": 1.5, "other_view_top1": 0.5}\n'
    kinds = {"encoder": 0.5, "untrained encoder": 0.6}
    rows = [{"features": k, "labels_per_class": None, "accuracy": x} for k, x in kinds.items()]
    for name, found in (("knn", "no better than untrained"), ("finetune", "sound")):
        files = {"health": {"name": "sound", "because": "z"}, name: {"rows": rows, "step": 4}}
        later = write_run(tmp_path / f"d {name}", last, 4, **files)
        assert read_run_files(str(later)).verdict()["name"] == found
    files["knn"] = {"rows": rows, "step": 2}  # of an earlier checkpoint
    stale = write_run(tmp_path / "e", last, 4, **files)
    assert read_run_files(str(stale)).verdict()["name"] == "sound"
    rows[1]["accuracy"] = 0.4
    files = {"health": {"name": "not judged", "because": "z"}, "knn": {"rows": rows, "step": 4}}
    better = write_run(tmp_path / "f", last, 4, **files)
    assert read_run_files(str(better)).verdict()["name"] == "sound"
    sick = write_run(tmp_path / "c", line, 2, health={"name": "collapsed", "because": "z"})
    assert read_run_files(str(sick)).verdict()["is_bad"]
    with pytest.raises(UserError, match="no run in"):
        read_run_files(str(tmp_path))


def test_a_distillation_is_not_held_against_the_bounds_of_another_loss(tiny, tmp_path):
    tiny.data.path = str(tmp_path / "moved.npz")
    rows = [
        results.row("teacher", None, [Score(0.75)]),
        results.row("student", None, [Score(0.625)]),
    ]
    line = '{"step": 4, "loss": 0.5, "teacher_agreement": 0.9}\n'
    about, distill = {"mode": "distill"}, {"step": 4, "rows": rows, "test_images": 8}
    student = write_run(tmp_path / "runs/student", line, about=about, distill=distill)
    page = report(tiny, str(student)).read_text()
    assert "by chance" not in page
    assert re.search(r"student</td>\s*<td[^>]*>62.5%", page)
    assert "finished" in page
    assert "nothing is reported yet" not in page
    contrastive = write_run(tmp_path / "runs/contrastive", '{"step": 4, "loss": 8.0}\n')
    assert "by chance" in report(tiny, str(contrastive)).read_text()
    assert "62.5%" in report(None, str(tmp_path), runs=f"{tmp_path}/runs/*").read_text()


def test_several_runs_are_one_page_to_sort(tmp_path, capsys):
    rows = [
        {"features": "encoder", "labels_per_class": None, "accuracy": 0.5, "std": 0, "seeds": 1}
    ]
    for name, loss in (("a", 1.5), ("b & <i>", 2.5)):
        line = json.dumps({"step": 4, "loss": loss}) + "\n"
        write_run(tmp_path / "runs" / name, line, probe={"step": 4, "rows": rows})
    other = json.loads((tmp_path / "runs/a/config.json").read_text())
    other["config"]["loss"]["temperature"] = 0.25
    (tmp_path / "runs/a/config.json").write_text(json.dumps(other))
    (tmp_path / "runs/a/report.html").write_text("")
    (tmp_path / "runs/no run").mkdir()
    main(["--mode=report", f"--workdir={tmp_path}", f"--runs={tmp_path}/runs/*"])
    page = text_of((tmp_path / "runs.html").read_text())
    assert '<a href="runs/a/report.html">a</a>' in page
    assert "b &amp; &lt;i&gt;" in page
    assert 'data-value="1.5"' in page
    assert "50.0%" in page
    assert re.search(r"loss\.temperature</td><td>0\.25</td><td>0\.1", page)
    assert page.count("<td>seed</td>") == 0
    assert "no run" in page
    with pytest.raises(UserError, match="expected workdirs"):
        main(["--mode=report", f"--workdir={tmp_path}", f"--runs={tmp_path}/none*"])


def test_views_can_be_looked_at_before_training(tiny, tmp_path):
    views(tiny, str(tmp_path / "w"))
    page = (tmp_path / "w/views.html").read_text()
    assert page.count("crop ") >= 8 * 6
    assert page.count("<img") == 8 * 7
    assert [page.count(f"epoch {n}<") for n in (1, 2, 3, 4)] == [8, 8, 8, 0]


def test_views_of_images_that_cannot_be_read_are_told(tiny, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"no image")
    tiny.data.source, tiny.data.path, tiny.data.folder_labels = "folder", str(folder), False
    split = assemble.data_set(tiny).train
    with pytest.raises(UserError, match=r"none of 3 images can be read, such as .*0\.png \(not an"):
        sheet_of(tiny, split)
    Image.fromarray(random_images(1, 12, 12)[0]).save(folder / "1.png")
    (row,) = sheet_of(tiny, assemble.data_set(tiny).train)
    assert row["original"]["lines"][0] == "1.png"
    assert "views       of 1 images: 2 of 3 cannot be read" in capsys.readouterr().out


class Seen:
    """An encoder that looks at what it is given."""

    width = 2

    def preprocess(self, image):
        assert image.shape[-1] == 3
        return image

    def __call__(self, images):
        return images.reshape(len(images), -1)[:, :2].astype(np.float32)


def test_a_sample_of_a_stream_and_of_grey_images_is_embedded(tmp_path):
    """A Parquet file of which one row is no image."""
    rows = []
    for i in range(5):
        file = tmp_path / f"{i}.png"
        Image.new("L", (4, 4), 10 * i + 5).save(file)
        rows.append(b"" if i == 3 else file.read_bytes())
    table = pyarrow.table({"image": rows, "label": [0, 1, 0, 1, 1]})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    c = config.default()
    config.set_options(c, {"data.source": "parquet", "data.path": str(tmp_path / "x.parquet")})
    split = assemble.data_set(c).train
    some = learned.embed_sample(Seen(), split, 100, ReadOptions())
    assert some.h[:, 0].tolist() == [5, 15, 25, 45]
    assert some.labels.tolist() == [0, 1, 0, 1]
    assert [thumbnail.shape for thumbnail in some.thumbnails] == [(4, 4, 3)] * 4
    arrays = in_memory(np.full((3, 4, 4, 1), 7, np.uint8), np.asarray([0, 1, -1]), ("a", "b"))
    some = learned.embed_sample(Seen(), arrays, 100, ReadOptions())
    assert some.labels.tolist() == [0, 1, -1]
    np.testing.assert_array_equal(some.h, np.full((3, 2), 7, np.float32))


@pytest.mark.whole
def test_runs_of_many_lines_stay_small_and_are_named_apart(tmp_path):
    line = {"loss": 0.5} | {name: 0.5 for panel in PANELS for name in panel.metrics}
    lines = "".join(json.dumps({"step": n, **line}) + "\n" for n in range(1, 2001))
    for i in range(8):
        write_run(tmp_path / f"{i}" / "w", lines.replace("0.5", f"0.{i}"), 2000)
    with pytest.raises(UserError, match=r"--runs=Bob's/\*: No closing quotation: expected folders"):
        report(None, str(tmp_path), runs="Bob's/*")
    page = report(None, str(tmp_path), runs=f"{tmp_path}/*/w '{tmp_path}/no such'")
    content = page.read_text()
    assert len(content.encode()) < 5e6
    text = text_of(content)
    assert ">7/w<" in text
    assert "no such" in text


def test_a_run_is_finished_at_its_last_step(tmp_path):
    for step, state in ((3, "at step 3 of 4"), (4, "finished")):
        line = json.dumps({"step": step, "loss": 1.0}) + "\n"
        assert read_run_files(str(write_run(tmp_path / f"{step}", line, 4))).state == state


def test_results_of_a_former_run_in_the_folder_are_not_shown(tmp_path):
    folder = write_run(tmp_path / "a", "", probe={"rows": [], "step": 8, "run": "one"})
    about = json.loads((folder / "config.json").read_text())
    for run, shown in (("one", True), ("other", False)):
        (folder / "config.json").write_text(json.dumps(about | {"run": run}))
        assert ("probe" in read_run_files(str(folder)).results) is shown


def test_a_skipped_step_is_no_failure_and_a_sick_run_that_goes_on_is_judged(tmp_path):
    line = json.dumps({"step": 4000, "loss": 9.2, "z_std": 1e-6}) + "\n"
    folder = write_run(tmp_path / "a", line, 9000, not_finite_step_12={"step": 12})
    record = read_run_files(str(folder))
    assert not record.has_failed
    assert record.verdict()["name"] == "collapsed"
    saved = json.loads((folder / "config.json").read_text())
    saved["config"]["train"]["skip_not_finite"] = True
    (folder / "config.json").write_text(json.dumps(saved))
    for step in range(4001, 4012):
        assert not read_run_files(str(folder)).has_failed
        (folder / f"not_finite_step_{step}.json").write_text("{}")
    assert read_run_files(str(folder)).has_failed
    (folder / "not_finite_step_4005.json").unlink()
    (folder / "not_finite_step_4012.json").write_text("{}")
    assert not read_run_files(str(folder)).has_failed  # as many, but not in a row
    for step in range(3995, 4006):  # a report falls among them
        (folder / f"not_finite_step_{step}.json").write_text("{}")
    (folder / "not_finite_step_4012.json").unlink()
    for step in range(4006, 4012):
        (folder / f"not_finite_step_{step}.json").unlink()
    assert read_run_files(str(folder)).has_failed
    (folder / "metrics.jsonl").write_text(line.replace("4000", "4050"))
    assert not read_run_files(str(folder)).has_failed  # it went on


def test_an_unfinished_fine_tuning_has_empty_cells():
    rows = [results.row("encoder", n, [Score(0.5)]) for n in (1, None)]
    rows.append(results.row("untrained", 1, [Score(0.4)]))
    expected = [["encoder", "50.0%", "50.0%"], ["untrained", "40.0%", ""]]
    assert results.labels_table(rows)[1] == expected


def listen(page, problems):
    """Notes errors, dialogs and requests of a page."""
    page.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: problems.append(str(e)))
    page.on("dialog", lambda d: problems.append("a dialog"))
    inside = ("file:", "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(inside) else problems.append(r.url))


@pytest.mark.whole
@pytest.mark.skipif(
    shutil.which("chromium") is None or importlib.util.find_spec("playwright") is None,
    reason="needs Chromium and playwright",
)
def test_a_browser_shows_the_page(hostile):
    """No error in the console, no request, no scrolling sideways, and values under the pointer."""
    from playwright.sync_api import sync_playwright

    options, workdir = hostile
    page_file = report(options, str(workdir))
    with sync_playwright() as player:
        browser = player.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for width in (360, 800, 1440):
            page = browser.new_page(viewport={"width": width, "height": 900})
            problems: list[str] = []
            listen(page, problems)
            page.goto(page_file.as_uri())
            page.wait_for_timeout(1500)
            assert problems == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        plot = page.locator(".curves > div").first
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        seen = False
        for share in (0.3, 0.5, 0.7, 0.9):
            page.mouse.move(box["x"] + share * box["width"], box["y"] + 80)
            page.wait_for_timeout(300)
            seen = seen or page.locator(".bk-Tooltip").count() > 0
        assert seen
        browser.close()


def test_values_of_options_are_short():
    for value, text in {
        (0.75, 4 / 3): "(0.75, 1.33333)",
        1e-6: "1e-06",
        8: "8",
        True: "True",
        "a": "a",
        (): "()",
    }.items():
        assert in_words(value) == text


def test_the_most_isolated_image_is_far_from_all_its_neighbours():
    similarities = np.array([[0.9, 0.1], [0.55, 0.54]])
    assert learned.most_isolated(learned.Near(np.zeros((2, 2), int), similarities), 1).tolist() == [
        0
    ]
