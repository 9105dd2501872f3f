"""Features to files: every image once, whatever interrupts it; and the neighbours in them."""

import errno
import json
import os
import pickle
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow as tf
from conftest import encoder_checkpoint, random_images, tiny_config
from PIL import Image

import simclr_jax
from simclr_jax.config import default, set_options
from simclr_jax.data import decode
from simclr_jax.errors import UserError
from simclr_jax.evals import subjects
from simclr_jax.main import main
from simclr_jax.mesh import make_mesh
from simclr_jax.modes import feature_file, neighbours
from simclr_jax.modes.embed import embed, open_input
from simclr_jax.training.saved import checkpoint_folder, find, read_newest, read_record
from simclr_jax.views import host

COUNT = 40


@pytest.fixture
def run(tiny, tmp_path, monkeypatch):
    """A configuration, a workdir with an encoder, and a folder of 40 images, two of them broken."""
    return begin(tiny, tmp_path, monkeypatch)


def begin(config, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, "_PART", 16)
    root = tmp_path / "photos"
    for i, image in enumerate(random_images(COUNT, 12, 12)):
        (root / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / f"class{i % 2}" / f"{i:02}.png")
    for i in (4, 21):
        (root / f"class{i % 2}" / f"{i:02}.png").write_bytes(b"\x89PNG, or so it seems")
    config.data.max_broken = 0.1
    config.data.folder_labels = True
    return config, str(encoder_checkpoint(config, tmp_path / "w")), root


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """A run, and the folder where its images are embedded with z, as f.npz and f.parquet, and in the batches of
    `cut_off`, as batches_of_16.npz: programs for other batches need not agree to the bit.
    """
    folder = tmp_path_factory.mktemp("embedded")
    with pytest.MonkeyPatch.context() as patch:
        config, workdir, root = begin(tiny_config(folder), folder, patch)
        for suffix in feature_file.OUTPUT_SUFFIXES:
            embed(config, workdir, str(root), str(folder / f"f{suffix}"), with_z=True)
        patch.setattr(subjects, "_LEAST_OF_A_DEVICE", 1)
        embed(config, workdir, str(root), str(folder / "batches_of_16.npz"))
    return (config, workdir, root), folder


def expected_rows(root):
    """Names, labels and pixels of the images that are whole, in the order of their paths."""
    paths = sorted(p for p in root.rglob("*.png") if p.stem not in ("04", "21"))
    names = [str(p.relative_to(root)) for p in paths]
    pixels = np.stack([np.asarray(Image.open(p)) for p in paths])
    return names, [int(p.parent.name[-1]) for p in paths], pixels


def read(path):
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files if name != "about"}
    table = pq.read_table(path)
    rows = {name: table[name].to_pylist() for name in table.column_names}
    return {name: np.asarray(values) for name, values in rows.items()}


@pytest.mark.parametrize("suffix", [".parquet", ".npz"])
def test_a_row_for_every_whole_image(embedded, suffix):
    (config, workdir, root), folder = embedded
    names, labels, pixels = expected_rows(root)
    rows = read(folder / f"f{suffix}")
    assert rows["image"].tolist() == names
    assert rows["label"].tolist() == labels
    # On eight devices here, on one there, and both divide sums differently.
    h = simclr_jax.load_encoder(workdir)(pixels)
    np.testing.assert_allclose(rows["h"], h, rtol=1e-4, atol=1e-5)
    assert rows["z"].shape == (len(names), config.model.head_width)
    assert rows["z"].std(axis=0).min() > 0
    assert not list(folder.glob("*.parts"))
    broken = (folder / f"f{suffix}.broken_images.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"].rpartition("/")[2] for line in broken] == ["04.png", "21.png"]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_a_file_that_embed_did_not_write_is_not_replaced(embedded, tmp_path, suffix):
    """Such as the images themselves."""
    (config, workdir, _), _ = embedded
    images = tmp_path / f"images{suffix}"
    if suffix == ".npz":
        np.savez(images, train_images=random_images(8, 12, 12))
    else:
        pq.write_table(pa.table({"image": [b"", b""]}), images)
    content = images.read_bytes()
    with pytest.raises(
        UserError, match=r"would replace what --mode=embed did not write \(.*does not say by which"
    ):
        embed(config, workdir, "train", str(images))
    assert images.read_bytes() == content
    with pytest.raises(
        UserError, match=r"is not what --mode=embed wrote: it does not say by which encoder"
    ):
        neighbours.neighbours(config, workdir, str(images), None)


def test_labels_of_other_classes_than_the_runs_are_told(embedded, tmp_path, capsys, monkeypatch):
    (config, workdir, _), _ = embedded
    trained = subjects.trained

    def of_two_classes(*args, **named):
        found = trained(*args, **named)
        return found._replace(record=found.record | {"classes": ["a", "b"]})

    monkeypatch.setattr(subjects, "trained", of_two_classes)
    other = tmp_path / "other.npz"
    np.savez(other, train_images=random_images(8, 12, 12), train_labels=np.arange(8) % 2 + 5)
    embed(config, workdir, str(other), str(tmp_path / "f.npz"))
    with np.load(tmp_path / "f.npz") as file:
        labels, classes = file["label"], json.loads(str(file["about"]))["classes"]
    assert classes == ["a", "b", "5", "6"]
    assert labels.tolist() == [2, 3] * 4
    said = "the run's classes, followed by those that only the input has: 2 is '5', 3 is '6'"
    assert said in capsys.readouterr().out


def test_neighbours_replace_no_image_and_no_other_table(embedded, tmp_path):
    (config, workdir, root), folder = embedded
    image, table = root / "class0" / "02.png", tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": [b"", b""]}), table)
    (tmp_path / "parts.parquet").mkdir()
    near_parts = str(tmp_path / "parts.parquet")
    with pytest.raises(UserError, match="did not write"):
        neighbours.neighbours(config, workdir, str(folder / "f.parquet"), near_parts)
    for output, why in (
        (image, "is one of the images"),
        (table, "would replace a file that --mode=neighbours did not write"),
        (folder / "f.parquet", "is the --input"),
    ):
        content = output.read_bytes()
        with pytest.raises(UserError, match=why):
            neighbours.neighbours(config, workdir, str(folder / "f.parquet"), str(output))
        assert output.read_bytes() == content
    near = str(tmp_path / "near.parquet")
    for _ in range(2):  # its own table is replaced
        neighbours.neighbours(config, workdir, str(folder / "f.parquet"), near)


def test_whole_numbers_are_refused_inside_other_code(embedded):
    """Of pixels from 0 to 255 the network would make other features than `encoder(images)`, without a word."""
    (_, workdir, root), _ = embedded
    encoder = simclr_jax.load_encoder(workdir)
    _, _, pixels = expected_rows(root)
    with pytest.raises(TypeError, match=r"images are uint8: expected floats in \[0, 1\]"):
        encoder.network.apply(encoder.variables, pixels, train=False)
    h = encoder.network.apply(encoder.variables, pixels / np.float32(255), train=False)
    np.testing.assert_allclose(h, encoder(pixels), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"an image is float64 .*; encoder\(images\) takes floats"):
        encoder.embed([pixels[0] / 255.0])


def test_a_folder_is_told_from_what_was_embedded_of_it(embedded):
    (config, workdir, root), _ = embedded
    with pytest.raises(UserError, match=r"is a folder: expected what --mode=embed --input="):
        neighbours.neighbours(config, workdir, str(root), None)


def test_load_encoder_embeds_files_as_embed_does(embedded):
    """By path, as PIL images and as arrays; more images than there are in a batch."""
    (_, workdir, root), folder = embedded
    names, _, pixels = expected_rows(root)
    encoder = simclr_jax.load_encoder(workdir)
    expected = read(folder / "f.npz")["h"]
    paths = [root / name for name in names]
    for images in (paths, map(str, paths), map(Image.open, paths), pixels):
        np.testing.assert_allclose(encoder.embed(images), expected, rtol=1e-4, atol=1e-5)
    many = encoder.embed(pixels[i % len(pixels)] for i in range(300))
    np.testing.assert_allclose(many[290], expected[290 % len(pixels)], rtol=1e-4, atol=1e-5)
    assert encoder.embed([]).shape == (0, encoder.width)


def test_preprocess_is_the_view_of_evaluation(embedded, tmp_path):
    """Of large, grey, transparent and turned images too: what the file decoder and the graph make."""
    (_, workdir, _), _ = embedded
    rng = np.random.default_rng(0)
    shapes = {"RGB": (40, 31, 3), "L": (25, 50), "RGBA": (30, 30, 4)}
    encoder = simclr_jax.load_encoder(workdir)
    for mode, shape in shapes.items():
        image = Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8))
        assert image.mode == mode
        exif = image.getexif()
        exif[0x0112] = 6  # orientation: a quarter turn
        path = tmp_path / f"{mode}.png"
        image.save(path, exif=exif)
        decoded = decode.decode(tf.constant(path.read_bytes()))
        expected = host.center_crop(decoded, encoder.view)
        expected = np.broadcast_to(expected, (12, 12, 3))
        for given in (path, Image.open(path)):
            found = encoder.preprocess(given)
            assert found.dtype == np.uint8
            np.testing.assert_allclose(found, np.asarray(expected), atol=1)
    grey = rng.integers(0, 256, (25, 50)).astype(np.uint8)
    colour = np.repeat(grey[..., None], 3, axis=-1)
    np.testing.assert_array_equal(encoder.preprocess(grey), encoder.preprocess(colour))
    for wrong in (grey / 255, colour[None], colour[..., :2]):
        with pytest.raises(ValueError, match=r"expected uint8 \[H, W, 3\]"):
            encoder.preprocess(wrong)
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    for prepared in (lambda: encoder.preprocess(text), lambda: encoder.embed([path, str(text)])):
        with pytest.raises(ValueError, match=re.escape(f"{text}: not an image")):
            prepared()
    with pytest.raises(ValueError, match="is a folder: expected an image file; --mode=embed takes"):
        encoder.embed([tmp_path])


def test_embed_refuses_one_image_where_it_expects_several(embedded, tmp_path):
    """A path is a sequence of letters, and an array [H, W, 3] one of H grey images."""
    (_, workdir, _), _ = embedded
    encoder = simclr_jax.load_encoder(workdir)
    image = random_images(1, 12, 12)[0]
    path = tmp_path / "a.png"
    Image.fromarray(image).save(path)
    for one in (path, str(path), Image.open(path), image, image[..., 0], jnp.asarray(image)):
        with pytest.raises(ValueError, match=r"single image: expected several, such as \[image\]"):
            encoder.embed(one)
        assert encoder.embed([one]).shape == (1, encoder.width)
    for several in (np.asarray([str(path)] * 2), np.asarray([path] * 2, object)):
        np.testing.assert_array_equal(encoder.embed(several), encoder.embed([path, path]))
    assert encoder.embed(jnp.asarray(image)[None]).shape == (1, encoder.width)


def test_few_sizes_of_batches_are_compiled(embedded, monkeypatch):
    """Powers of 2 and multiples of 32, or the largest before."""
    (_, workdir, _), _ = embedded
    encoder = simclr_jax.load_encoder(workdir)
    sizes = []

    def apply(variables, images):
        sizes.append(len(images))
        return np.asarray(images[:, 0, 0, :1], np.float32) * np.ones(encoder.width)

    encoder.__dict__["_apply"] = apply
    side = encoder.image_size
    for count, expected in (
        (1, [1]),
        (5, [8]),
        (7, [8]),
        (33, [64]),
        (65, [96]),
        (257, [256, 256]),
        (0, []),
    ):
        sizes.clear()
        images = (
            random_images(count, side, side) if count else np.zeros((0, side, side, 3), "uint8")
        )
        np.testing.assert_array_equal(encoder(images)[:, -1], images[:, 0, 0, 0])
        assert sizes == expected
        sizes.clear()
        np.testing.assert_array_equal(encoder.embed(images)[:, 0], images[:, 0, 0, 0])
        assert sizes == expected


def test_floats_below_0_are_refused(embedded):
    (_, workdir, _), _ = embedded
    encoder = simclr_jax.load_encoder(workdir)
    images = np.full((1, encoder.image_size, encoder.image_size, 3), -0.5, np.float32)
    with pytest.raises(ValueError, match=r"from -0\.5 to -0\.5: expected floats"):
        encoder(images)


def test_images_may_be_bfloat16(embedded):
    (_, workdir, _), _ = embedded
    encoder = simclr_jax.load_encoder(workdir)
    side = encoder.image_size
    images = jnp.linspace(0, 1, 2 * side * side * 3).reshape(2, side, side, 3).astype(jnp.bfloat16)
    np.testing.assert_allclose(
        encoder(images), encoder(images.astype(np.float32)), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(ValueError, match="images are bfloat16 from 2 to 2: expected floats"):
        encoder(np.full((1, side, side, 3), 2, jnp.bfloat16))


def test_images_of_another_size_than_the_encoders_are_warned_of(embedded):
    """They are taken as they are; `embed` resizes."""
    (_, workdir, _), _ = embedded
    encoder = simclr_jax.load_encoder(workdir)
    other = encoder.image_size + 4
    with pytest.warns(
        UserWarning, match=rf"images of {other} x {other} px: the encoder was trained"
    ):
        encoder(np.zeros((1, other, other, 3), np.uint8))


def test_an_encoder_pickles_and_refuses_floats_that_are_standardised(embedded):
    (_, workdir, root), _ = embedded
    _, _, pixels = expected_rows(root)
    encoder = simclr_jax.load_encoder(workdir)
    expected = encoder(pixels)
    said = (
        f"<Encoder of images of 12 px, {encoder.width} features, trained for {encoder.step} steps>"
    )
    assert repr(encoder) == said
    copy = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(copy(pixels), expected)
    assert (copy.width, copy.step) == (encoder.width, encoder.step)
    np.testing.assert_allclose(encoder(pixels / np.float32(255)), expected, rtol=1e-5, atol=1e-5)
    standardised = (pixels - pixels.mean()) / pixels.std()
    for wrong in (standardised, pixels.astype(np.float32), np.full((1, 12, 12, 3), np.nan)):
        with pytest.raises(ValueError, match=r"expected floats in \[0, 1\], or uint8"):
            encoder(wrong)


def test_labels_are_numbered_as_in_the_run(tiny, tmp_path):
    for name in ("ant", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.fromarray(random_images(1, 12, 12)[0]).save(tmp_path / "photos" / name / "1.png")
    tiny.data.folder_labels = True
    workdir = str(encoder_checkpoint(tiny, tmp_path / "w", classes=["cat", "dog"]))
    embed(tiny, workdir, str(tmp_path / "photos"), str(tmp_path / "f.npz"))
    rows = read(tmp_path / "f.npz")
    assert dict(zip(rows["image"].tolist(), rows["label"].tolist(), strict=True)) == {
        "ant/1.png": 2,
        "dog/1.png": 1,
    }
    about = feature_file.read_feature_file(str(tmp_path / "f.npz")).about
    assert about["classes"] == ["cat", "dog", "ant"]


def test_z_is_the_heads_projection_of_h(embedded):
    (config, workdir, _), folder = embedded
    rows = read(folder / "f.npz")
    head = subjects.trained(config, workdir, make_mesh(), head=True).head
    assert head is not None
    # The paper's head: dense, BatchNorm with running statistics, ReLU, dense, BatchNorm.
    x = rows["h"].astype(np.float64)
    for layer in (1, 2):
        dense, norm = head["params"][f"dense{layer}"], head["params"][f"norm{layer}"]
        seen = head["batch_stats"][f"norm{layer}"]
        x = x @ np.asarray(dense["kernel"], np.float64)
        x = (x - seen["mean"]) / np.sqrt(np.asarray(seen["var"], np.float64) + 1e-5)
        x = x * norm["scale"] + norm.get("bias", 0.0)
        x = np.maximum(x, 0) if layer == 1 else x
    np.testing.assert_allclose(rows["z"], x, rtol=1e-4, atol=1e-5)
    assert config.model.head_layers == 2


def cut_off(monkeypatch, method, parts):
    """Has Parts.add or Parts.join end the program once so many parts are there."""
    original = getattr(feature_file.Parts, method)
    monkeypatch.setattr(subjects, "_LEAST_OF_A_DEVICE", 1)  # batches of 16 on the 8 devices

    def ends(self, *args):
        if len(list(self.folder.glob("*.npz"))) == parts:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(feature_file.Parts, method, ends)
    return lambda: monkeypatch.setattr(feature_file.Parts, method, original)


def assert_same_rows(output, whole):
    rows, expected = read(output), read(whole)
    for name in ("image", "label", "h"):
        np.testing.assert_array_equal(rows[name], expected[name])


@pytest.mark.parametrize(("method", "parts", "images"), [("add", 2, 32), ("join", 3, 40)])
def test_what_was_cut_off_goes_on(embedded, tmp_path, monkeypatch, capsys, method, parts, images):
    (config, workdir, root), whole = embedded
    monkeypatch.setattr(feature_file, "_PART", 16)
    restore = cut_off(monkeypatch, method, parts)
    output = tmp_path / "f.npz"
    with pytest.raises(KeyboardInterrupt):
        embed(config, workdir, str(root), str(output))
    restore()
    assert not output.exists()
    with pytest.raises(UserError, match="begun with another z: remove that folder"):
        embed(config, workdir, str(root), str(output), with_z=True)
    as_stored = config.copy_and_resolve_references()
    as_stored.data.upright = False
    with pytest.raises(UserError, match="begun with another upright: remove that folder"):
        embed(as_stored, workdir, str(root), str(output))
    about = tmp_path / "f.npz.parts/about.json"
    said = json.loads(about.read_text())
    assert said.pop("upright")
    about.write_text(json.dumps(said))  # of an earlier version, which did not say
    capsys.readouterr()
    embed(config, workdir, str(root), str(output))
    assert f"resuming after {images} of 40 images" in capsys.readouterr().out
    assert_same_rows(output, whole / "batches_of_16.npz")


def test_parts_of_a_join_that_was_cut_off_are_not_used_again(embedded, tmp_path, monkeypatch):
    (config, workdir, root), whole = embedded
    monkeypatch.setattr(feature_file, "_PART", 16)
    output = tmp_path / "f.npz"
    shutil.copy(whole / "f.npz", output)
    earlier = output.read_bytes()
    restore = cut_off(monkeypatch, "join", 3)
    with pytest.raises(KeyboardInterrupt):
        embed(config, workdir, str(root), str(output))
    restore()
    assert output.read_bytes() == earlier
    # What a kill amid the removal leaves, and a part lost besides.
    (tmp_path / "f.npz.parts" / "about.json").unlink()
    (tmp_path / "f.npz.parts" / "00000001.npz").unlink()
    embed(config, workdir, str(root), str(output))
    assert_same_rows(output, whole / "batches_of_16.npz")


def test_the_folder_of_parts_is_removed_where_open_files_stay_in_their_folder(
    run, tmp_path, monkeypatch
):
    """As on NFS, which renames an open file that is removed."""
    config, workdir, root = run
    parts, removed = tmp_path / "f.npz.parts", os.rmdir

    def rmdir(path, **options):
        if any(
            os.path.realpath(f"/proc/self/fd/{n}").startswith(str(parts))
            for n in os.listdir("/proc/self/fd")
        ):
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        removed(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    embed(config, workdir, str(root), str(tmp_path / "f.npz"))
    assert not parts.exists()
    restore = cut_off(monkeypatch, "join", 3)
    with pytest.raises(KeyboardInterrupt):
        embed(config, workdir, str(root), str(tmp_path / "f.npz"))
    assert parts.exists()
    restore()
    embed(config, workdir, str(root), str(tmp_path / "f.npz"))
    assert not parts.exists()


def test_two_programs_do_not_write_one_file(run, tmp_path):
    config, workdir, _ = run
    output, parts = tmp_path / "f.npz", tmp_path / "f.npz.parts"
    with (
        feature_file.alone(parts),
        pytest.raises(UserError, match=r"another program is writing into .* give another --output"),
    ):
        embed(config, workdir, "test", str(output))
    assert not parts.exists()  # nothing lay there
    embed(config, workdir, "test", str(output))


def test_the_runs_own_splits_and_tfds(run, tmp_path):
    config, workdir, _ = run
    embed(config, workdir, "test", str(tmp_path / "f.npz"))
    rows = read(tmp_path / "f.npz")
    assert rows["image"].tolist() == [str(i) for i in range(21)]
    assert rows["label"].tolist() == [i % 3 for i in range(21)]
    config.data.test_fraction = 0.1  # of the run's data, not of what is named
    source = open_input(config, "digits:test")
    assert source.split.count == 360
    assert source.names(5, 2).tolist() == ["5", "6"]


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_images_of_a_file_that_the_run_does_not_know(run, tmp_path, suffix, monkeypatch):
    """All of them, with the labels that the file has; and their neighbours can be shown, from another folder."""
    config, workdir, root = run
    _, labels, pixels = expected_rows(root)
    classes = [f"class{label}" for label in labels]
    path = tmp_path / f"new{suffix}"
    if suffix == ".npz":
        np.savez(path, train_images=pixels, train_labels=classes, test_images=pixels[:5])
    else:
        files = [p.read_bytes() for p in sorted(root.rglob("*.png")) if p.stem not in ("04", "21")]
        pq.write_table(pa.table({"picture": files, "label": classes}), path, row_group_size=7)
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "f.npz"
    embed(config, workdir, path.name, str(output))
    rows = read(output)
    assert rows["image"].tolist() == [str(i) for i in range(len(pixels))]
    with np.load(output) as file:
        names = json.loads(str(file["about"]))["classes"]
    assert [names[label] for label in rows["label"]] == classes
    h = simclr_jax.load_encoder(workdir)(pixels)
    np.testing.assert_allclose(rows["h"], h, rtol=1e-4, atol=1e-5)
    monkeypatch.chdir("/")
    neighbours.neighbours(config, workdir, str(output), str(tmp_path / "n.png"))
    with Image.open(tmp_path / "n.png") as drawn:
        assert drawn.width > 500


@pytest.mark.parametrize("held_out", [True, False])
def test_test_images_are_named_below_their_own_folder(run, tmp_path, held_out):
    """Whether they are some of data.path, or data.test_path."""
    config, _, root = run
    options = {"data.source": "folder", "data.path": str(root), "data.placement": "host"}
    shutil.copytree(root, tmp_path / "other")
    (tmp_path / "other/class0/00.png").unlink()
    own = {"data.test_fraction": 0.25} if held_out else {"data.test_path": str(tmp_path / "other")}
    set_options(config, options | own)
    source = open_input(config, "test")
    below = {f"class{i % 2}/{i:02}.png" for i in range(COUNT)}
    assert set(source.names(0, source.split.count)) <= below


@pytest.mark.parametrize(
    ("input", "output", "says"),
    [
        ("nowhere", "f.npz", "no folder 'nowhere' below /.*: expected --input=FOLDER"),
        ("test", "f.csv", r"ends in \.parquet or \.npz"),
        ("test", "w/config/x/f.npz", "cannot write"),
    ],
)
def test_mistakes(run, tmp_path, input, output, says):
    config, workdir, _ = run
    (tmp_path / "w" / "config").write_text("a file")
    with pytest.raises(UserError, match=says):
        embed(config, workdir, input, str(tmp_path / output))


def test_a_copied_checkpoint_folder_is_enough(run, tmp_path):
    _, workdir, _ = run
    shutil.copytree(find(workdir, None), tmp_path / "copy")
    shutil.rmtree(workdir)
    output = tmp_path / "f.npz"
    main(["--mode=embed", f"--workdir={tmp_path / 'copy'}", "--input=test", f"--output={output}"])
    assert len(read(output)["h"]) == 21


def test_a_checkpoint_that_training_deletes_while_it_is_read(run, tmp_path):
    _, workdir, _ = run
    newer = checkpoint_folder(workdir) / "2"
    tried = []

    def read_slowly(folder):
        tried.append(folder.name)
        if folder.name == "1":  # training saves step 2, and keeps only the newest
            shutil.copytree(folder, newer)
            shutil.rmtree(folder)
        return read_record(folder)

    assert read_newest(workdir, read_slowly)["step"] == 1  # a copy
    assert tried == ["1", "2"]
    (newer / "encoder").rename(newer / "gone")
    shutil.rmtree(newer / "config")
    with pytest.raises(UserError, match="cannot be read"):
        read_newest(workdir, read_record)


def test_the_nearest_are_those_of_largest_cosine(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, "_BLOCK", 7)
    h = np.random.default_rng(0).normal(size=(50, 5)).astype(np.float32)
    path = tmp_path / "f.npz"
    np.savez(path, image=np.arange(50).astype(str), h=h, about=np.asarray('{"input": "train"}'))
    features = feature_file.read_feature_file(str(path))
    found, similar = neighbours.nearest(features.blocks, np.asarray([3, 49, 8]), 4)
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    for row, q in enumerate((3, 49, 8)):
        expected = np.argsort(-(unit @ unit[q]))[1:5]  # the first is the query
        np.testing.assert_array_equal(found[row], expected)
        np.testing.assert_allclose(similar[row], unit[expected] @ unit[q], rtol=1e-5)


def test_a_table_of_the_nearest_of_every_image(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(feature_file, "_BLOCK", 7)
    monkeypatch.setattr(neighbours, "_TOGETHER", 8)  # 3 parts, the last of 4
    h = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    h[11] = 2 * h[4]  # equally near to all others: the first of them comes first
    path, output = tmp_path / "f.npz", tmp_path / "near.parquet"
    names = np.asarray([f"{i:02}.png" if i else "a, b.png" for i in range(20)])
    np.savez(path, image=names, h=h, about=np.asarray('{"input": "train"}'))
    neighbours.neighbours(default(), str(tmp_path), str(path), str(output), k=6)
    assert "20 images and the 6 nearest of each, of 20" in capsys.readouterr().out
    table = pq.read_table(output)
    assert table.column_names == ["image", "neighbours", "similarities"]
    assert table["image"].to_pylist() == names.tolist()
    unit = h / np.linalg.norm(h, axis=1, keepdims=True)
    similar = unit.astype(np.float64) @ unit.T
    similar[11], similar[:, 11] = similar[4], similar[:, 4]
    similar[4, 11] = similar[11, 4] = 1
    np.fill_diagonal(similar, -np.inf)
    for i in range(20):
        expected = np.argsort(-similar[i], kind="stable")[:6]
        assert table["neighbours"][i].as_py() == names[expected].tolist()
        found = table["similarities"][i].as_py()
        np.testing.assert_allclose(found, similar[i, expected], atol=1e-6)
    # Some of them, and more neighbours than there are.
    neighbours.neighbours(default(), "", str(path), str(output), "03.png,19.png", k=100)
    table = pq.read_table(output)
    assert table["image"].to_pylist() == ["03.png", "19.png"]
    assert [len(set(near)) for near in table["neighbours"].to_pylist()] == [19, 19]
    for query, asked in (
        ("a, b.png", ["a, b.png"]),
        ('03.png,"a, b.png"', ["03.png", "a, b.png"]),
    ):
        neighbours.neighbours(default(), "", str(path), str(output), query)
        assert pq.read_table(output)["image"].to_pylist() == asked
    with pytest.raises(UserError, match="which would be overwritten"):
        neighbours.neighbours(default(), "", str(path), str(path))
    with pytest.raises(UserError, match="expected 1 or more"):
        neighbours.neighbours(default(), "", str(path), str(output), k=0)
    with pytest.raises(UserError, match=r"a picture shows at most 40"):
        neighbours.neighbours(default(), str(tmp_path), str(path), k=41)


def test_a_picture_of_neighbours(run, tmp_path, capsys):
    config, workdir, root = run
    features = tmp_path / "f.parquet"
    # A copy of an image is its nearest neighbour.
    (root / "class0" / "zz.png").write_bytes((root / "class0" / "02.png").read_bytes())
    embed(config, workdir, str(root), str(features))
    picture = tmp_path / "grid.png"
    queries = "class0/02.png,class1/01.png"
    neighbours.neighbours(config, workdir, str(features), str(picture), queries)
    grid = np.asarray(Image.open(picture))
    tile, gap = neighbours._TILE, neighbours._TILE // 4
    assert grid.shape == ((tile + neighbours._LINE) * 2, tile * 9 + gap, 3)
    np.testing.assert_array_equal(grid[:90, :90], grid[:90, tile + gap : tile + gap + 90])
    table = tmp_path / "near.parquet"
    flags = [f"--input={features}", f"--output={table}", "--k=3"]
    main([f"--workdir={workdir}", "--mode=neighbours", *flags])
    rows = {row["image"]: row["neighbours"] for row in pq.read_table(table).to_pylist()}
    assert len(rows) == COUNT - 1  # two are broken, one was added
    assert rows["class0/02.png"][0] == "class0/zz.png"
    with pytest.raises(UserError, match="--k: 0: expected a whole number of 1 or more"):
        main([f"--workdir={workdir}", "--mode=neighbours", f"--input={features}", "--k=0"])
    with pytest.raises(UserError, match="no image 'x'"):
        neighbours.neighbours(config, workdir, str(features), str(picture), "x")
    for other in (picture, tmp_path / "empty.npz"):
        other.touch()
        with pytest.raises(UserError, match="is not what --mode=embed wrote"):
            neighbours.neighbours(config, workdir, str(other), None)
    root.rename(tmp_path / "moved")
    with pytest.raises(
        UserError, match=r"made of are not there any more .*: put them back, or run"
    ):
        neighbours.neighbours(config, workdir, str(features), str(picture), queries)
    (tmp_path / "moved").rename(root)
    (root / "class0" / "zz.png").unlink()
    capsys.readouterr()
    embed(config, workdir, str(root), str(tmp_path / "copy.parquet"))
    assert "replaces" not in capsys.readouterr().out
    shutil.copy(features, tmp_path / "copy.parquet")
    embed(config, workdir, str(root), str(tmp_path / "copy.parquet"))
    assert "copy.parquet, made of other images" in capsys.readouterr().out
    embed(config, workdir, str(root), str(tmp_path / "copy.parquet"), with_z=True)
    assert "copy.parquet, made with another --with_z" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"photos' holds other images than .* run --mode=embed again"
    ):
        neighbours.neighbours(config, workdir, str(features), str(picture), queries)
