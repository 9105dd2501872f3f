"""Pretraining, from the shell and from Python: resuming, refusing, evaluating on the way."""

import json
import os
import re
import shutil
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import random_images, tiny_config
from ml_collections import ConfigDict
from PIL import Image
from test_loop import config_file, metrics_of

import simclr_jax
from simclr_jax import assemble, data, load_encoder, main, shell
from simclr_jax.config import flatten, from_dict, set_options
from simclr_jax.data.order import Order, batch_positions
from simclr_jax.errors import UserError
from simclr_jax.evals.evaluate import evaluate_features
from simclr_jax.evals.follow import follow_run
from simclr_jax.evals.on_the_way import evaluations_on_the_way
from simclr_jax.files import locked, write_json
from simclr_jax.modes import pretrain as pretraining
from simclr_jax.modes.pretrain import describe_run, pretrain
from simclr_jax.shell import settle_tensorflow
from simclr_jax.training.checkpoint import Checkpoints, Saving
from simclr_jax.training.checksums import checksum_of_record
from simclr_jax.training.plan import check_enough
from simclr_jax.training.record import write_record
from simclr_jax.training.saved import find, saved_steps
from simclr_jax.training.state import TrainState
from simclr_jax.training.workdir import check_workdir
from simclr_jax.views.placement import Resident

WATCHED = {
    "train.log_every_steps": 3,  # the checkpoint of step 4 lies within a window
    "checkpoint.every_steps": 2,
    "checkpoint.keep_last": 10,
    "eval.every_steps": 2,
    "eval.baselines": False,
    "eval.knn_k": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 8 steps that was never stopped, evaluated by kNN at every second one, on 400 test
    images: enough for the accuracy to move with each step. A test may go on with it in a copy.
    """
    folder = tmp_path_factory.mktemp("pretrained")
    c = tiny_config(folder)
    with np.load(c.data.path) as arrays:
        more = {"test_images": random_images(400, 12, 12), "test_labels": np.arange(400) % 3}
        np.savez(c.data.path, **(dict(arrays) | more))
    set_options(c, WATCHED)
    assert simclr_jax.pretrain(c, str(folder / "whole"))
    return folder / "whole"


@pytest.fixture
def watched(tiny, whole):
    """The configuration of `whole`."""
    set_options(tiny, WATCHED | {"data.path": str(whole.parent / "images.npz")})
    return tiny


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "copy")


def without(workdir, *steps):
    """Takes checkpoints away, as if the run had died before they were saved."""
    for step in steps:
        shutil.rmtree(workdir / f"checkpoints/{step}")
    return workdir


def variables_of(workdir):
    return load_encoder(workdir).variables


def assert_same_run(workdir, whole):
    """Bit for bit the same encoder and metrics."""
    jax.tree.map(np.testing.assert_array_equal, variables_of(workdir), variables_of(whole))
    assert metrics_of(workdir) == metrics_of(whole)


class Stopped(Exception):
    pass


def dying_at(step):
    """Replaces `Resident.batches`: a run dies when it asks for the batch of `step`."""
    original = Resident.batches

    def batches(self, images, start_step):
        for i, batch in enumerate(original(self, images, start_step), start_step + 1):
            if i == step:
                raise Stopped
            yield batch

    return batches


def test_a_resumed_run_is_bit_for_bit_the_run_that_was_never_stopped(
    watched, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(Resident, "batches", dying_at(6))
        with pytest.raises(Stopped):
            pretrain(watched, str(tmp_path / "w"))
    assert saved_steps(tmp_path / "w") == [2, 4]
    pretrain(watched, str(tmp_path / "w"))
    assert_same_run(tmp_path / "w", whole)
    steps = [line["step"] for line in metrics_of(whole) if "knn_accuracy" in line]
    assert steps == [2, 4, 6, 8]


HOST = {"data.placement": "host"}
EVERYTHING = HOST | {
    "data.color_on": "device",
    "train.microbatches": 2,
    "mesh.fsdp": 2,
    "loss.implementation": "chunked",
}


@pytest.mark.parametrize("options", [HOST, pytest.param(EVERYTHING, marks=pytest.mark.slow)])
@pytest.mark.whole
def test_views_of_the_host_go_on_where_they_were(tiny, tmp_path, options):
    set_options(tiny, options | {"train.log_every_steps": 3})
    pretrain(tiny, str(tmp_path / "whole"))
    workdir = without(shutil.copytree(tmp_path / "whole", tmp_path / "w"), 8)
    assert saved_steps(workdir) == [4]
    pretrain(tiny, str(workdir))
    assert_same_run(workdir, tmp_path / "whole")
    assert [line["step"] for line in metrics_of(workdir)] == [3, 6, 8]


@pytest.mark.whole
def test_another_thread_than_the_main_one_can_pretrain(watched, copy, whole):
    """Notebooks and servers do. Python delivers signals to the main thread only."""
    outcome = []
    without(copy, 6, 8)
    thread = threading.Thread(
        target=lambda: outcome.append(simclr_jax.pretrain(watched, str(copy)))
    )
    thread.start()
    thread.join(timeout=300)
    assert outcome == [True]
    assert_same_run(copy, whole)


def test_a_finished_run_is_left_as_it_is(watched, copy, capsys):
    before = (copy / "metrics.jsonl").read_text()
    pretrain(watched, str(copy))
    assert (copy / "metrics.jsonl").read_text() == before
    said = capsys.readouterr().out
    assert f"trained to step 8: {copy}/checkpoints, {copy}/metrics.jsonl" in said


def test_a_workdir_that_another_program_trains_in_is_refused(watched, copy):
    with locked(copy, ""), pytest.raises(UserError, match="another program is writing into"):
        pretrain(watched, str(copy))
    pretrain(watched, str(copy))


def test_another_configuration_is_refused_with_what_differs(watched, copy, tmp_path):
    watched.checkpoint.every_steps = 3  # may change
    watched.loss.temperature = 0.1
    with pytest.raises(UserError, match=r"loss\.temperature: 0\.5 -> 0\.1") as caught:
        pretrain(watched, str(copy))
    assert "checkpoint" not in str(caught.value)
    watched.model.head_width = 8
    with pytest.raises(UserError, match=r"head_width: 16 -> 8.*or no --config") as caught:
        evaluate_features("knn", watched, str(copy))
    assert "temperature" not in str(caught.value)  # what was learned with it is in the weights
    # Nothing was saved: nothing to protect.
    (tmp_path / "new").mkdir()
    (copy / "config.json").rename(tmp_path / "new" / "config.json")
    train = assemble.data_set(watched).train
    assert check_workdir(watched, str(tmp_path / "new"), train, train.fingerprint()) is None


def test_what_is_unusual_is_said_before_training(tiny, tmp_path, capsys):
    tiny.train.steps, tiny.optimizer.name = 1, "sgd"
    tiny.views.blur_probability = 0.0
    pretrain(tiny, str(tmp_path / "w"))
    said = capsys.readouterr().out
    assert "unusual     data.batch_size=16: 30 negatives" in said
    assert "            1 steps: enough to see that it runs, not to learn" in said


def test_batchnorm_per_device_does_not_go_on_on_other_devices(tiny_resnet, tmp_path):
    tiny_resnet.model.norm_group = -1
    train = assemble.data_set(tiny_resnet).train
    known = train, train.fingerprint()
    record = {"step": 4, "window": [], "config": tiny_resnet.to_dict()}
    record |= {"data_fingerprint": known[1]}
    for devices in (8, 4):
        workdir = str(tmp_path / f"{devices}")
        names = [f"cpu:{i}" for i in range(devices)]
        state = simple_state()
        with Checkpoints(workdir, Saving(every_steps=4)) as checkpoints:
            checkpoints.save(4, state, record | {"devices": names})
        if devices == jax.device_count():
            assert check_workdir(tiny_resnet, workdir, *known) is not None
        else:
            with pytest.raises(UserError, match="per device on 4 devices, and there are 8 now"):
                check_workdir(tiny_resnet, workdir, *known)


def simple_state():
    part = {"encoder": {"kernel": jnp.ones(3)}}
    return TrainState(jnp.zeros((), jnp.int32), part, part, (jnp.ones(3),))


def test_a_run_does_not_go_on_with_other_images(watched, copy, tmp_path):
    watched.data.path = str(tmp_path / "others.npz")
    labels = np.arange(50) % 3
    for count, says in ((50, "on 48 training images and there are 50 now"), (48, "other images")):
        images = np.zeros((count, 12, 12, 3), np.uint8)
        np.savez(watched.data.path, train_images=images, train_labels=labels[:count])
        data.forget_opened()
        with pytest.raises(UserError, match=f"holds a run {'on ' * (count == 48)}{says}"):
            pretrain(watched, str(copy))


def test_a_run_gets_another_length_only_when_told_so(watched, copy):
    """The saved run is made to one of 6 steps, so that its 8 steps are compiled already."""
    record = without(copy, 8) / "checkpoints/6/config/metadata"
    edited = json.loads(record.read_text().replace('"steps": 8', '"steps": 6'))
    edited["checksums"]["config"] = checksum_of_record(edited)
    record.write_text(json.dumps(edited))
    with pytest.raises(UserError, match=r"train\.steps: 6 -> 8.* or --extend"):
        pretrain(watched, str(copy))
    # A warm-up may follow the length, as in configs/imagenet_v2.py; alone it may not change.
    watched.optimizer.warmup_epochs *= 2
    with pytest.raises(UserError, match=r"warmup_epochs: .*train\.steps: 6 -> 8.* or --extend"):
        pretrain(watched, str(copy))
    watched.train.steps = 6
    with pytest.raises(UserError, match=r"warmup_epochs: .*the old values to go on with it$"):
        pretrain(watched, str(copy), extend=True)
    watched.train.steps = 8
    assert simclr_jax.pretrain(watched, str(copy), extend=True)
    assert saved_steps(copy) == [2, 4, 6, 8]
    watched.loss.temperature = 0.1
    with pytest.raises(UserError, match=r"temperature: 0\.5 -> 0\.1") as caught:
        pretrain(watched, str(copy), extend=True)
    assert "--extend" not in str(caught.value)


def test_from_python_a_workdir_may_be_in_the_home(tiny, tmp_path, monkeypatch):
    """And images may have changed since an earlier call."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    tiny.train.steps = 1
    before = data.open_source(tiny.data.to_dict() | {"seed": 0})
    assert simclr_jax.pretrain(tiny, "~/w")
    assert {"config.json", "checkpoints"} <= {x.name for x in (tmp_path / "home/w").iterdir()}
    assert not (tmp_path / "~").exists()
    assert data.open_source(tiny.data.to_dict() | {"seed": 0}) is not before


@pytest.mark.parametrize("name", ["run [lr=0.1]", "a\\b"])
def test_a_folder_whose_checkpoints_could_not_be_read_is_refused(tiny, tmp_path, name):
    with pytest.raises(UserError, match="could not be read again: expected a path without"):
        pretrain(tiny, str(tmp_path / name / "w"))
    with pytest.raises(UserError, match="could not be read again"):  # of a classifier, or an import
        Checkpoints(str(tmp_path / name / "w"), Saving(1))
    assert not (tmp_path / name).exists()


def test_a_run_is_not_made_shorter_than_it_is(watched, copy):
    before = (copy / "config.json").read_text()
    watched.train.steps = 6
    with pytest.raises(
        UserError, match="is at step 8 already, and 6 steps are asked for: give 8 or more"
    ):
        pretrain(watched, str(copy), extend=True)
    assert (copy / "config.json").read_text() == before


def test_the_record_holds_what_a_reader_needs(whole):
    record = json.loads((whole / "config.json").read_text())
    assert record["config"]["loss"]["temperature"] == 0.5
    assert record["plan"] == {"steps": 8, "warmup_steps": 3, "learning_rate": 0.3 * 16 / 256}
    assert record["training_images"] == 48
    assert record["versions"]["jax"] == jax.__version__
    assert len(record["devices"]) == 8
    assert list(whole.glob("events.out.tfevents.*"))


def test_what_a_configuration_comes_to_is_said(tiny_resnet, capsys):
    made = assemble.pretraining(tiny_resnet)
    describe_run(tiny_resnet, made)
    said = capsys.readouterr().out
    encoder = made.job.abstract_state.params["encoder"]
    millions = sum(x.size for x in jax.tree.leaves(encoder)) / 1e6
    assert "48 images, 3 classes; views of 12 px" in said
    assert f"ResNet-10 x0.125, {millions:.2f} M parameters; head" in said
    assert "16 images, 32 views, 30 negatives an anchor" in said
    assert "8 (2.7 epochs), of which 3 warm-up" in said
    assert "lars, peak learning rate 0.01875 (0.3 x 16 / 256), weight decay 1e-06" in said
    assert "8 x cpu; 1 process, 2 images a device" in said
    assert "NT-Xent, dense for this size, tau 0.5; BatchNorm over the batch" in said


def error_at_the_terminal(capfd, *arguments):
    """Runs the command, which must fail, in this process. Returns the one line of its error."""
    with pytest.raises(SystemExit) as caught:
        shell.call(main.main, [*arguments])
    assert "Traceback" not in "".join(capfd.readouterr())
    line = caught.value.code  # Python prints it and exits with status 1
    assert isinstance(line, str)
    assert "\n" not in line
    return line


def test_a_batch_that_does_not_divide_is_refused(tiny, tmp_path, capfd):
    file = config_file(tiny, tmp_path)
    workdir = tmp_path / "w"
    arguments = [f"--config={file}", f"--workdir={workdir}", "--config.data.batch_size=12"]
    assert error_at_the_terminal(capfd, *arguments) == (
        "error: data.batch_size=12 does not divide over 8 devices: use a multiple of 8, or let the process see 6 devices"
    )
    assert list(workdir.glob("c*")) == []


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (1, "^1 training image: expected two or more"),
        (8, "data.batch_size=16 is more than the 8 training images"),
    ],
)
def test_too_few_images_are_refused(tiny, tmp_path, images, says):
    np.savez(tiny.data.path, train_images=random_images(images, 12, 12))
    with pytest.raises(UserError, match=says):
        pretrain(tiny, str(tmp_path / "w"))


def test_a_batch_may_hold_all_images():
    check_enough(48, 48)
    with pytest.raises(UserError, match="49"):
        check_enough(49, 48)


def test_test_images_that_are_the_training_images_are_refused(tiny):
    images, labels = random_images(48, 12, 12), np.arange(48) % 3
    arrays = {"train_images": images, "train_labels": labels}
    np.savez(tiny.data.path, **arrays, test_images=images, test_labels=labels)
    with pytest.raises(UserError, match="the test images are the training images"):
        assemble.data_set(tiny)


def test_folders_with_the_same_dead_link_can_be_compared(tiny, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "0.png").symlink_to("nowhere.png")
        for i, image in enumerate(random_images(3, 12, 12)):
            Image.fromarray(image).save(tmp_path / part / f"{i + 1}.bmp")
    paths = {"data.path": str(tmp_path / "train"), "data.test_path": str(tmp_path / "test")}
    set_options(tiny, {"data.source": "folder"} | paths)
    with pytest.raises(UserError, match="the test images are the training images"):
        assemble.data_set(tiny)


def test_a_configuration_that_lacks_options_gets_their_defaults():
    made = simclr_jax._with_options(ConfigDict({"data": {"source": "synthetic"}}), {"seed": 3})
    assert (made.seed, made.train.epochs, made.data.source) == (3, 100.0, "synthetic")
    with pytest.raises(UserError, match="colour"):
        simclr_jax._with_options(ConfigDict({"colour": 1}), {})


def test_folders_of_equal_names_and_sizes_may_differ(tiny, tmp_path):
    for part in ("train", "test"):
        (tmp_path / part).mkdir()
        for i, image in enumerate(random_images(3 + (part == "test"), 12, 12)[:3]):
            Image.fromarray(image).save(tmp_path / part / f"{i}.bmp")
    paths = {"data.path": str(tmp_path / "train"), "data.test_path": str(tmp_path / "test")}
    set_options(tiny, {"data.source": "folder"} | paths)
    assert assemble.data_set(tiny).test.count == 3
    tiny.data.test_path = f"{tmp_path}/../{tmp_path.name}/train"
    with pytest.raises(UserError, match="the test images are the training images"):
        assemble.data_set(tiny)


def test_the_record_names_every_file_from_anywhere(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = (
        "data.path",
        "data.test_path",
        "data.labels_file",
        "model.init_from",
        "distill.teacher",
    )
    set_options(tiny, dict.fromkeys(paths, "below/here"))
    record = write_record(tiny, {}, "w")
    recorded = flatten(from_dict(json.loads(json.dumps(record["config"]))))
    assert {recorded[path] for path in paths} == {str(tmp_path / "below/here")}


def test_the_record_names_the_data_from_anywhere(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.data.path, tiny.train.steps = os.path.relpath(tiny.data.path), 1
    pretrain(tiny, str(tmp_path / "w"))
    recorded = from_dict(json.loads((tmp_path / "w/config.json").read_text())["config"])
    monkeypatch.chdir("/")
    assert assemble.data_set(recorded).train.count == 48


def test_a_workdir_that_cannot_be_written_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file.* must be a folder") as caught:
        pretrain(tiny, str(tmp_path / "file"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("skip", [False, True])
def test_steps_are_skipped_where_the_option_says_so(tiny, skip):
    """How they are skipped is a matter of the loop, see test_loop.py."""
    tiny.train.skip_not_finite = skip
    made = assemble.pretraining(tiny)
    batch = {name: jnp.zeros(16, jnp.int32) for name in ("epoch", "index")}
    batch |= {"images": jnp.zeros((48, 12, 12, 3), jnp.uint8), "labels": jnp.zeros(48, jnp.int32)}
    _, metrics = jax.eval_shape(made.job.step, made.job.abstract_state, batch)
    assert ("skipped_steps" in metrics) == skip


@pytest.mark.slow
def test_a_step_that_is_not_finite_can_be_skipped(tiny, tmp_path, monkeypatch):
    """The first image of the batch of step 3 has an infinite pixel."""
    epochs, indices = next(batch_positions(Order(0, 16), 48, 2))
    fetch, views = Resident.fetch, Resident.views

    def poisoned_fetch(self, batch):
        bad = (batch["epoch"] == epochs[0]) & (batch["index"] == indices[0])
        return fetch(self, batch) | {"add": jnp.where(bad, jnp.inf, 0.0)}

    def poisoned_views(self, batch):
        x = views(self, batch)
        return x.at[:, 0, 0, 0, 0].add(batch["add"])

    monkeypatch.setattr(Resident, "fetch", poisoned_fetch)
    monkeypatch.setattr(Resident, "views", poisoned_views)
    tiny.train.skip_not_finite = True
    pretrain(tiny, str(tmp_path / "w"))
    assert [line["skipped_steps"] for line in metrics_of(tmp_path / "w")] == [0, 1, 0, 0]
    for leaf in jax.tree.leaves(variables_of(tmp_path / "w")):
        assert np.all(np.isfinite(leaf))
    named = json.loads((tmp_path / "w/not_finite_step_3.json").read_text())
    assert named["epoch"] == list(epochs)
    assert named["index"] == list(indices)


def test_the_encoder_of_eight_devices_is_loaded_onto_one(whole, tmp_path):
    encoder = load_encoder(whole)
    copied = shutil.copytree(find(str(whole), None), tmp_path / "copied")
    shutil.rmtree(copied / "trainer")  # the optimizer's state: not needed
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3)).astype(np.uint8)
    h = encoder(images)
    assert h.shape == (5, encoder.width)
    assert h.dtype == np.float32
    np.testing.assert_array_equal(load_encoder(copied)(images), h)
    np.testing.assert_allclose(encoder(images / np.float32(255)), h, rtol=1e-5, atol=1e-6)
    # The 300th image is as good as the first: batches are padded, not mixed.
    many = np.concatenate([np.repeat(images[:1], 299, axis=0), images[1:2]])
    np.testing.assert_allclose(encoder(many)[-1], h[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected \\[N, H, W, 3\\]"):
        encoder(images[..., :1])
    with pytest.raises(ValueError, match="expected uint8"):
        encoder(images.astype(np.int64))


def test_an_evaluation_on_the_way_is_that_of_the_checkpoint_of_its_step(watched, copy):
    """Those of other steps differ."""
    follow_run("knn", watched, str(copy))
    followed = [json.loads(line) for line in (copy / "knn_followed.jsonl").open()]
    on_the_way = [line for line in metrics_of(copy) if "knn_accuracy" in line]
    assert on_the_way == [
        {name: x for name, x in line.items() if name not in ("settings", "run")}
        for line in followed
    ]
    values = [line["knn_accuracy"] for line in on_the_way]
    assert values[1:] != values[:-1]


@pytest.mark.whole
def test_a_probe_on_the_way_is_that_of_the_checkpoint_of_its_step(tiny, tmp_path):
    """Twice 48 images are 6 steps of 16."""
    options = {
        "eval.on_the_way": "probe",
        "eval.every_epochs": 2.0,
        "eval.l2": (1e-4, 1e-2),
        "eval.max_iterations": 20,
        "eval.baselines": False,
        "checkpoint.every_steps": 6,
    }
    set_options(tiny, options)
    pretrain(tiny, str(tmp_path / "w"))
    (line,) = (line for line in metrics_of(tmp_path / "w") if "probe_accuracy" in line)
    copied = shutil.copytree(tmp_path / "w/checkpoints/6", tmp_path / "copied")
    row = evaluate_features("probe", tiny, str(copied))["rows"][-1]
    assert row["labels_per_class"] is None
    assert line == {"step": 6, "probe_accuracy": row["accuracy"]}


def test_an_evaluation_on_the_way_is_of_the_features_that_are_asked_for(watched, copy):
    made, state = assemble.pretraining(watched), {}
    with Checkpoints(str(copy), Saving(**watched.checkpoint.to_dict())) as checkpoints:
        saved, _ = checkpoints.restore_newest(made.job.abstract_state)
    assert saved is not None
    for features in ("h", "z"):
        watched.eval.features = features
        (hook,) = evaluations_on_the_way(watched, made)
        state[features] = hook.run(8, saved)["knn_accuracy"]
        result = evaluate_features("knn", watched, str(copy))
        assert state[features] == result["rows"][-1]["accuracy"]
    assert state["h"] != state["z"]


def test_evaluations_on_the_way_are_due_after_steps_or_epochs(tiny):
    made = assemble.pretraining(tiny)
    assert evaluations_on_the_way(tiny, made) == ()
    for options, expected in (
        ({"eval.every_steps": 3}, [3, 6, 9]),
        ({"eval.every_epochs": 1.0}, [3, 6, 9]),
        ({"eval.every_epochs": 1.5}, [4, 8]),  # 4.5 steps
        ({"eval.every_epochs": 0.01}, list(range(1, 10))),
    ):
        set_options(tiny, {"eval.every_steps": 0, "eval.every_epochs": 0.0} | options)
        (hook,) = evaluations_on_the_way(tiny, made)
        assert [step for step in range(1, 10) if hook.due(step)] == expected


@pytest.mark.parametrize("labels", [True, False])
def test_evaluations_on_the_way_that_cannot_be_are_refused_with_one_line(
    tiny, tmp_path, labels, capfd
):
    tiny.eval.every_steps = 2
    says = (
        r"error: eval\.every_steps=2 and eval\.every_epochs=1: set one of them, and the other to 0"
    )
    if labels:
        tiny.eval.every_epochs = 1.0
    else:
        np.savez(tiny.data.path, train_images=np.zeros((48, 12, 12, 3), np.uint8))
        data.forget_opened()
        says = "error: the data have no labels, so there is nothing to evaluate on; see .*"
    file = config_file(tiny, tmp_path)
    line = error_at_the_terminal(capfd, f"--config={file}", f"--workdir={tmp_path}/w")
    assert re.fullmatch(says, line)
    assert saved_steps(tmp_path / "w") == []


@pytest.mark.parametrize("after", ["knn", "none"])
def test_the_command_ends_with_the_evaluation_that_is_asked_for(copy, after):
    main.main([f"--workdir={copy}", f"--config.eval.after_training={after}"])
    assert {path.name for path in copy.glob("*.json")} == {"config.json", "health.json"} | (
        {"knn.json"} if after == "knn" else set()
    )


def test_a_verdict_of_an_earlier_evaluation_does_not_stay(copy, monkeypatch):
    """As if one evaluation had found the encoder no better, and the next one finds it better."""
    file = copy / "health.json"
    of_training = json.loads(file.read_text())
    worse = {"name": "no better than untrained", "because": "accuracy 10 %"}
    write_json(file, worse)
    main.main([f"--workdir={copy}", "--config.eval.after_training=none"])
    assert json.loads(file.read_text()) == worse  # nothing speaks against it
    for trained, expected in ((0.1, worse["name"]), (0.9, of_training["name"])):
        rows = [
            {"features": kind, "labels_per_class": None, "accuracy": accuracy}
            for kind, accuracy in (("encoder", trained), ("untrained encoder", 0.5))
        ]
        monkeypatch.setattr(pretraining, "evaluate_features", lambda *_, rows=rows: {"rows": rows})
        main.main([f"--workdir={copy}", "--config.eval.after_training=knn"])
        assert json.loads(file.read_text())["name"] == expected
    assert json.loads(file.read_text()) == of_training


def test_a_bad_verdict_of_the_training_outlasts_that_of_the_evaluation(copy, monkeypatch):
    """docs/health.md: the first verdict of the table that applies. "Collapsed" stands above "no better"."""
    metrics = copy / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line | ({"z_std": 1e-9} if "loss" in line else {}) for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    collapsed = {"name": "collapsed", "because": "z_std 1e-9"}
    write_json(copy / "health.json", collapsed)
    rows = [
        {"features": kind, "labels_per_class": None, "accuracy": accuracy}
        for kind, accuracy in (("encoder", 0.1), ("untrained encoder", 0.5))
    ]
    monkeypatch.setattr(pretraining, "evaluate_features", lambda *_: {"rows": rows})
    main.main([f"--workdir={copy}", "--config.eval.after_training=knn"])
    assert json.loads((copy / "health.json").read_text()) == collapsed


def test_python_takes_a_configuration_file_and_options_by_name(watched, copy, whole, tmp_path):
    watched.train.steps, watched.checkpoint.keep_last = 99, 1
    file = str(config_file(watched, tmp_path))
    options: dict[str, Any] = {"train.steps": 8, "checkpoint.keep_last": 2}
    assert simclr_jax.pretrain(file, str(without(copy, 8)), **options)
    assert saved_steps(copy) == [6, 8]
    assert_same_run(copy, whole)


def test_python_evaluates_with_the_runs_configuration_or_another(watched, copy, tmp_path):
    result = simclr_jax.evaluate("knn", str(copy))
    assert result == {
        k: v for k, v in json.loads((copy / "knn.json").read_text()).items() if k != "config"
    }
    assert result["step"] == 8
    assert result["settings"]["k"] == 1
    before = watched.to_dict()
    for config in (
        watched,
        str(config_file(watched, tmp_path)),
        config_file(watched, tmp_path),
        None,
    ):
        found = simclr_jax.evaluate("knn", str(copy), config, **{"eval.knn_k": 5})
        assert found is not None
        assert found["settings"]["k"] == 5
    assert watched.to_dict() == before
    images: Any = np.zeros((8, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match=r"is a ndarray: expected a ConfigDict, or the path"):
        simclr_jax.pretrain(images, str(copy))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train.step": 4}, r"unknown option 'train\.step'"),
        ({"temperature": 0.1}, "unknown option 'temperature'.*loss.temperature.*docs/options.md"),
        ({"loss": 3}, "unknown option 'loss'"),
        ({"loss.temperature": -1.0}, r"loss\.temperature=-1\.0: expected a number from"),
        ({"train.steps": "4"}, r"train\.steps='4': expected a whole number"),
        ({"train.steps": 4.5}, r"train\.steps=4\.5: expected a whole number"),
        ({"train.steps": True}, r"train\.steps=True: expected a whole number"),
        ({"views.flip": 1}, r"views\.flip=1: expected True or False"),
        ({"eval.l2": ("abc",)}, r"eval\.l2=\('abc',\): expected a tuple"),
        ({"eval.l2": 0.1}, r"eval\.l2=0\.1: expected a tuple"),
        ({"model.name": None}, r"model\.name=None: expected one of"),
    ],
)
def test_python_refuses_options_that_no_run_could_use(tiny, tmp_path, options, says):
    before = tiny.to_dict()
    with pytest.raises(UserError, match=says):
        simclr_jax.pretrain(tiny, str(tmp_path / "w"), **options)
    with pytest.raises(UserError, match=says):
        simclr_jax.evaluate("knn", str(tmp_path / "w"), tiny, **options)
    assert tiny.to_dict() == before
    assert not (tmp_path / "w").exists()


def test_python_refuses_an_unknown_evaluation(tiny, tmp_path):
    expected = (
        "unknown evaluation 'nearest': expected one of probe, knn, transfer, linear, finetune"
    )
    with pytest.raises(UserError, match=expected):
        simclr_jax.evaluate("nearest", str(tmp_path), tiny)


def test_options_may_be_numbers_of_the_other_kind_and_lists(tiny, whole):
    """1 for 1.0, as in JSON, and a list for a tuple."""
    config = simclr_jax._with_options(tiny, {"loss.temperature": 1, "eval.l2": [1e-3]})
    assert config.loss.temperature == 1.0
    assert config.eval.l2 == (1e-3,)
    assert from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_command_that_is_refused_leaves_the_configuration_of_the_run(tiny, tmp_path):
    tiny.train.steps = 1
    pretrain(tiny, str(tmp_path / "w"))
    before = (tmp_path / "w/config.json").read_text()
    set_options(tiny, {"eval.every_steps": 2, "eval.every_epochs": 1.0})
    with pytest.raises(UserError, match="set one of them"):
        pretrain(tiny, str(tmp_path / "w"))
    assert (tmp_path / "w/config.json").read_text() == before


def test_python_evaluates_a_run_whose_loss_its_own_file_adds(tiny, tmp_path):
    tiny.train.steps = 1
    pretrain(tiny, str(tmp_path / "w"))
    file = tmp_path / "w/config.json"
    text = file.read_text()
    file.write_text(text.replace('"nt_xent"', '"uniformity"'))
    assert file.read_text() != text
    assert simclr_jax.evaluate("knn", str(tmp_path / "w"))["rows"]
    with pytest.raises(UserError, match=r"loss.name='other'"):
        simclr_jax.evaluate("knn", str(tmp_path / "w"), **{"loss.name": "other"})


def test_tensorflow_is_settled_from_python_as_from_the_shell():
    """So that both compute the same views, and TensorFlow does not log among what is said."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "1"}  # as JAX sets it
    settle_tensorflow(environment)
    assert environment == {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}
    own = {"TF_CPP_MIN_LOG_LEVEL": "0", "TF_ENABLE_ONEDNN_OPTS": "1"}
    settle_tensorflow(kept := dict(own))
    assert kept == own
