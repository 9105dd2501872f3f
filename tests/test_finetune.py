"""Classifiers by SGD: against a loop in float64, on any number of devices, chosen without the test
split, and resumed bit for bit.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import types
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from conftest import encoder_checkpoint, random_images
from etils import epath

import simclr_jax
from simclr_jax import assemble, load_classifier, load_encoder
from simclr_jax.config import default, set_options
from simclr_jax.encoders import apply_network, init_encoder
from simclr_jax.encoders.classified import Classified
from simclr_jax.encoders.heads import LinearClassifier
from simclr_jax.errors import Stopped, UserError
from simclr_jax.evals import classifiers, scores, subjects
from simclr_jax.evals.classifiers import program, protocol, training
from simclr_jax.evals.classifiers.folder import TrainingFolder
from simclr_jax.evals.features import Extractor
from simclr_jax.files import locked
from simclr_jax.mesh import make_mesh, to_global
from simclr_jax.training.loop import job_of
from simclr_jax.training.objectives import no_loss, supervised
from simclr_jax.training.optimizer import make_classifier_optimizer
from simclr_jax.training.state import init_head, start_of
from simclr_jax.training.step import UpdateRule, make_step

CLASSES, BATCH = 3, 16


def model_of(config, layer=0, train_encoder=True):
    return Classified(
        assemble.encoder(config).as_baseline(),
        assemble.head(config),
        layer,
        LinearClassifier(CLASSES),
        train_encoder,
    )


def trained(model, steps, devices, weight_decay=0.0, moved=None):
    """State before and after some steps on random images, and the losses.

    `moved`: the parts of the parameters that the optimizer takes for trained; None: the model's.
    """
    mesh = make_mesh(devices)
    optimizer, schedule = make_classifier_optimizer(
        0.3, steps, weight_decay, 0.9, model.trained if moved is None else moved
    )

    def init(key):
        encoder = init_encoder(model.encoder, 12, key)
        head = init_head(model.head, model.encoder.width, key)
        params, batch_stats = model.start(encoder, head, key)
        return start_of(params, batch_stats, optimizer)

    objective = supervised(model.logits, lambda batch: batch["views"])
    step = make_step(objective, no_loss, UpdateRule(optimizer, schedule))
    job = job_of(step, init, (jax.random.key(0),), steps, mesh)
    state = job.init()
    start, losses = jax.device_get(state), []
    for number in range(steps):
        state, metrics = job.step(state, to_global(mesh, batch_of(number)))
        losses.append(float(metrics["loss"]))
    return start, jax.device_get(state), losses


def batch_of(number):
    images = random_images(BATCH + number, 12, 12)[:BATCH].astype(np.float32) / 255
    return {"views": images[:, None], "label": (np.arange(BATCH) + number) % CLASSES}


def numbers_in(tree):
    """Counts the numbers of float arrays: a momentum's, but no step counter."""
    return sum(x.size for x in jax.tree.leaves(tree) if np.issubdtype(x.dtype, np.floating))


def assert_frozen(start, state):
    """f and g are as they were, bit for bit, and nothing of the optimizer is kept for them."""
    for part in ("encoder", "head"):
        jax.tree.map(np.testing.assert_array_equal, start.params[part], state.params[part])
    jax.tree.map(np.testing.assert_array_equal, start.batch_stats, state.batch_stats)
    assert numbers_in(state.opt_state) == numbers_in(state.params["classifier"])


@pytest.mark.parametrize(("network", "weight_decay"), [("tiny_resnet", 0.01), ("tiny", 0.0)])
def test_linear_evaluation_equals_a_loop(network, weight_decay, request):
    """Nesterov momentum 0.9, half a cosine, no warm-up; f frozen, with its running statistics."""
    steps = 6
    model = model_of(request.getfixturevalue(network), train_encoder=False)
    start, state, losses = trained(model, steps, jax.devices()[:1], weight_decay)
    assert_frozen(start, state)
    assert state.batch_stats["head"]  # of a BatchNorm
    dense = start.params["classifier"]["dense"]
    w, b = (np.asarray(dense[name], np.float64) for name in ("kernel", "bias"))
    momentum = [np.zeros_like(w), np.zeros_like(b)]
    encoder = {
        "params": start.params["encoder"],
        "batch_stats": start.batch_stats["encoder"],
    }
    represent = jax.jit(lambda x: apply_network(model.encoder, encoder, x, train=False)[0])
    for number in range(steps):
        batch = batch_of(number)
        h = np.asarray(represent(batch["views"][:, 0]), np.float64)
        logits = h @ w + b
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        onehot = np.eye(CLASSES)[batch["label"]]
        assert losses[number] == pytest.approx(-np.mean(np.log(p[onehot == 1])), rel=2e-5)
        rate = 0.3 / 2 * (1 + np.cos(np.pi * number / steps))
        gradients = [h.T @ (p - onehot) / BATCH + weight_decay * w, (p - onehot).mean(axis=0)]
        momentum = [0.9 * m + g for m, g in zip(momentum, gradients, strict=True)]
        w, b = (
            x - rate * (g + 0.9 * m) for x, g, m in zip((w, b), gradients, momentum, strict=True)
        )
    # float32 against float64.
    dense = state.params["classifier"]["dense"]
    np.testing.assert_allclose(dense["kernel"], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(dense["bias"], b, rtol=1e-4, atol=1e-5)


def test_an_encoder_that_is_not_frozen_is_told_apart(tiny):
    """Weight decay moves what has no gradient; BatchNorm in training moves its statistics."""
    frozen, devices = model_of(tiny, train_encoder=False), jax.devices()[:1]
    everything = model_of(tiny).trained
    with pytest.raises(AssertionError):
        assert_frozen(*trained(frozen, 2, devices, weight_decay=0.01, moved=everything)[:2])
    model = model_of(tiny, layer=1)
    with pytest.raises(AssertionError):
        assert_frozen(*trained(model, 2, devices, moved=frozen.trained)[:2])


@pytest.mark.parametrize(
    ("network", "layer"),
    [("tiny", 1), pytest.param("tiny_resnet", 0, marks=pytest.mark.slow)],
)
def test_fine_tuning_is_the_same_on_any_devices(network, layer, request):
    model = model_of(request.getfixturevalue(network), layer)
    _, one, losses = trained(model, 4, jax.devices()[:1])
    _, many, others = trained(model, 4, jax.devices())
    # Sums over the batch in another order; BatchNorm of 16 images passes it on, step by step.
    np.testing.assert_allclose(losses, others, rtol=1e-4)
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(a).max() + 1e-6)


def test_a_layer_of_the_head_is_trained_and_what_follows_is_not(tiny):
    models = [model_of(tiny, layer) for layer in range(3)]
    assert all(model.trained == {"encoder", "head", "classifier"} for model in models)

    @jax.jit
    def gradients(key, batch):
        encoder = init_encoder(models[0].encoder, 12, key)
        head = init_head(models[0].head, models[0].encoder.width, key)

        def gradient(model):
            params, batch_stats = model.start(encoder, head, key)
            embed = supervised(model.logits, lambda batch: batch["views"])
            return jax.grad(lambda params: embed(params, batch_stats, batch).loss)(params)

        return [gradient(model) for model in models]

    moved = [
        {
            part: any(np.abs(x).max() > 0 for x in jax.tree.leaves(tree))
            for part, tree in (
                ("encoder", found["encoder"]),
                ("dense1", found["head"]["dense1"]),
                ("dense2", found["head"]["dense2"]),
            )
        }
        for found in gradients(jax.random.key(0), batch_of(0))
    ]
    assert moved == [
        {"encoder": True, "dense1": False, "dense2": False},
        {"encoder": True, "dense1": True, "dense2": False},
        {"encoder": True, "dense1": True, "dense2": True},
    ]


@pytest.fixture
def run(tiny, tmp_path):
    """A configuration, and a workdir with an encoder: 36 images to train on, 12 to choose on."""
    for group in (tiny.linear, tiny.finetune):
        group.batch_size = BATCH
    tiny.linear.epochs = 2.0
    tiny.finetune.label_fractions = (0.2, 1.0)
    tiny.finetune.epochs = (2.0, 2.0)
    tiny.eval.validation_fraction = 0.25
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    return tiny, workdir


@pytest.fixture
def one_device(monkeypatch):
    """Trains on one device: quicker to compile."""
    monkeypatch.setattr(training, "make_mesh", lambda: make_mesh(jax.devices()[:1]))


def leaves_a_classifier(config, workdir, result, states):
    """The logits of what was left are those that fine-tuning scored: the same accuracy on the test images."""
    row = next(r for r in result["rows"] if r["features"] == "encoder" and r["label_fraction"] == 1)
    classifier = load_classifier(workdir / row["runs"][0]["classifier"])
    with np.load(config.data.path) as file:
        images, labels = file["test_images"], file["test_labels"]
    logits = classifier(images)
    assert logits.shape == (21, CLASSES)
    assert np.mean(logits.argmax(1) == labels) == pytest.approx(row["accuracy"])
    params = states[-1].params
    encoder = load_encoder(workdir / row["runs"][0]["classifier"])
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(encoder.variables["params"]),
        params["encoder"],
    )
    wanted = encoder(images) @ params["classifier"]["dense"]["kernel"]
    wanted = wanted + params["classifier"]["dense"]["bias"]
    np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.whole
def test_fine_tuning_with_few_labels_and_all(run, capsys, monkeypatch, one_device):
    monkeypatch.setattr(scores, "TOP_5_FROM", 3)
    config, workdir = run
    with states_of_fit() as states:
        result = classifiers.finetune(config, str(workdir))
    leaves_a_classifier(config, workdir, result, states)
    assert json.loads((workdir / "finetune.json").read_text())["rows"] == result["rows"]
    assert (result["train_images"], result["validation_images"], result["test_images"]) == (
        36,
        12,
        21,
    )
    rows = {(r["features"], r["label_fraction"]): r for r in result["rows"]}
    assert set(rows) == {(k, f) for k in ("untrained encoder", "encoder") for f in (0.2, 1.0)}
    for (_, fraction), row in rows.items():
        assert row["seeds"] == (2 if fraction < 1 else 1)
        # 0.2 of 48 images in three classes: 3 of each class.
        assert row["labels_per_class"] == (3 if fraction < 1 else None)
        assert {r["images"] for r in row["runs"]} == {9 if fraction < 1 else 36}
        assert 0 <= row["selected_accuracy"] <= 1
        assert row["top_5_accuracy"] == row["selected_top_5_accuracy"] == 1.0  # of three classes
    said = capsys.readouterr().out
    assert "trainings   6, some 12 steps in all" in said
    assert "encoder, 9 labels, draw 2, 2 epochs, learning rate 0.05 x 16 / 256\n" in said
    assert "step 4/4  loss " in said
    assert "training acc" in said
    folders = {path.name for path in (workdir / "finetune").iterdir() if path.is_dir()}
    assert len(folders) == 6  # two starts, each with two draws of the few labels and with all
    assert "untrained_0.2_of_labels_draw_1_2_epochs_rate_0.05_decay_0" in folders
    # What remains of a training is small.
    files = {path.name for path in (workdir / "finetune").glob("*/*")}
    assert files == {"about.json", "classifier", "metrics.jsonl", "outcome.json"} | {
        name for name in files if name.startswith("events.")
    }
    kept = {path.parent.name for path in (workdir / "finetune").glob("*/classifier")}
    assert kept == {name for name in folders if name.startswith("encoder") and "draw_0" in name}


@contextlib.contextmanager
def states_of_fit():
    """Collects the state after each training that came to its end."""
    states: list = []

    def fit(*args):
        state = original(*args)
        states.append(jax.device_get(state))
        return state

    original = training.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", fit)
        yield states


def choices(config, workdir, tmp_path, labels):
    """The runs of linear evaluation, for test images that are all said to be of one class, each."""
    with np.load(config.data.path) as file:
        arrays = dict(file)
    runs = []
    for label in labels:
        arrays["test_labels"] = np.full(21, label)
        config.data.path = str(tmp_path / f"{label}.npz")
        np.savez(config.data.path, **arrays)
        (row,) = classifiers.linear(config, str(workdir))["rows"]
        assert row["features"] == "encoder"
        runs += row["runs"]
    return runs


def assert_chosen_alike(runs):
    for name in ("selected_step", "validation", "learning_rate", "steps"):
        assert len({run[name] for run in runs}) == 1


class Peeking(training.Selection):
    """A wrong selection: the test split chooses."""

    def __init__(self, steps, accuracy, validation, test, moments):
        super().__init__(steps, accuracy, test, test, moments)


@pytest.mark.whole
def test_selection_never_sees_the_test_split(run, tmp_path, monkeypatch, one_device):
    config, workdir = run
    config.eval.baselines = False
    config.linear.learning_rate = (0.1, 1.6)
    config.linear.weight_decay = (0.01,)
    with states_of_fit() as states:
        runs = choices(config, workdir, tmp_path, range(3))
    assert_chosen_alike(runs)
    # Each test image was put into one class.
    for name in ("last", "selected"):
        assert sum(run[name] for run in runs) == pytest.approx(1)
    # Other test images are other data: each rate was trained with each.
    assert len(states) == 6
    encoder = simclr_jax.load_encoder(workdir).variables
    for state in states:
        for part in ("params", "batch_stats"):
            found = getattr(state, part)["encoder"]
            jax.tree.map(np.testing.assert_array_equal, found, encoder[part])
        assert numbers_in(state.opt_state) == numbers_in(state.params["classifier"])
    shutil.rmtree(workdir / "linear")
    monkeypatch.setattr(training, "Selection", Peeking)
    config.linear.learning_rate = (0.1,)
    with pytest.raises(AssertionError):
        assert_chosen_alike(choices(config, workdir, tmp_path, range(2)))


def test_candidates_share_one_program_and_train_as_alone(run, monkeypatch, one_device):
    config, workdir = run
    made = []

    def counted(*args):
        made.append(args)
        return job_of(*args)

    monkeypatch.setattr(program, "job_of", counted)
    config.eval.baselines = False
    config.linear.learning_rate, config.linear.weight_decay = (0.1, 0.4), (0.0, 0.3)
    with states_of_fit() as states:
        classifiers.linear(config, str(workdir))
    assert len(states) == 4
    assert len(made) == 1
    kernels = [state.params["classifier"]["dense"]["kernel"] for state in states]
    assert len({kernel.tobytes() for kernel in kernels}) == 4
    for rate in (0.1, 0.4):
        (folder,) = (workdir / "linear").glob(f"*_rate_{rate:g}_decay_0.3")
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        *_, last = (line for line in lines if "learning_rate" in line)
        steps = last["step"]  # its rate is that of step `steps` - 1, counted from 0
        cosine = (1 + math.cos(math.pi * (steps - 1) / steps)) / 2
        assert last["learning_rate"] == pytest.approx(rate * BATCH / 256 * cosine, rel=1e-5)
    shutil.rmtree(workdir / "linear")
    config.linear.learning_rate, config.linear.weight_decay = (0.4,), (0.3,)
    with states_of_fit() as alone:
        classifiers.linear(config, str(workdir))
    found = alone[0].params["classifier"]["dense"]["kernel"]
    np.testing.assert_array_equal(found, kernels[3])


def test_the_candidate_is_chosen_by_the_step_that_is_reported():
    """The first candidate is the better one on the way, the second at the end."""
    found = [
        {"last": 0.1, "validation": 0.9, "last_validation": 0.3},
        {"last": 0.2, "validation": 0.6, "last_validation": 0.5},
    ]
    assert chosen_of(found) == 0.4
    # Earlier versions kept no validation accuracy of the last step: then the best moments of all candidates decide.
    del found[0]["last_validation"]
    assert chosen_of(found) == 0.1


def chosen_of(found):
    """The learning rate of the candidate that is chosen, of 0.1 and 0.4."""
    outcomes = iter(found)
    parts = types.SimpleNamespace(labels=lambda fraction, draw: None)
    trainer: Any = types.SimpleNamespace(
        parts=parts, refits=False, _train=lambda *_, **__: next(outcomes)
    )
    search = protocol.Search(1.0, protocol.Length(1, "epochs"), [(0.1, 0.0), (0.4, 0.0)])
    chosen = training.Trainer.best_of(trainer, "encoder", search, 0)
    assert chosen["last"] in (0.1, 0.2)
    return chosen["learning_rate"]


@contextlib.contextmanager
def at_moment(number, action):
    """Has `action` done once, at the `number`-th moment of the next trainings at which settings are
    chosen.
    """
    seen = []

    class Interrupted(training.Selection):
        def run(self, step, state):
            seen.append(step)
            if len(seen) == number:
                action()
            return super().run(step, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Selection", Interrupted)
        yield


def metrics_of(folder):
    """Every line that the trainings below a folder wrote, without what depends on the clock."""
    return {
        path.parent.name: [
            {
                k: v
                for k, v in json.loads(line).items()
                if not k.startswith(("images_per_second", "share_of_time", "goodput"))
            }
            for line in path.read_text().splitlines()
        ]
        for path in folder.glob("*/metrics.jsonl")
    }


@pytest.mark.parametrize("name", ["linear", "finetune"])
def test_draws_have_other_labels_and_only_a_frozen_start_is_calibrated(
    name, run, monkeypatch, one_device
):
    """With no step done."""
    config, workdir = run

    def fit(job, batches, run, hooks):
        return job.init()

    calibrated, original = [], subjects.untrained

    def untrained(*args):
        calibrated.append(name)
        return original(*args)

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(subjects, "untrained", untrained)
    config.eval.validation_fraction = 0.0
    getattr(classifiers, name)(config, str(workdir))
    assert calibrated == (["linear"] if name == "linear" else [])
    if name == "finetune":
        about = [json.loads(path.read_text()) for path in workdir.glob("finetune/*/about.json")]
        few = {a["setting"]["draw"]: a["images"] for a in about if a["setting"]["fraction"] < 1}
        assert len(set(few.values())) == len(few) == 2


@pytest.mark.parametrize(
    ("option", "value"),
    [("optimizer", "lars"), ("scaling", "sqrt"), ("momentum", 0.5), ("metric", "x")],
)
def test_what_decides_a_training_makes_it_another(tiny, option, value):
    def decided(metric="accuracy", **changed):
        tiny.finetune.update(changed)
        asked = protocol.Protocol("finetune", "t", tiny.finetune, True, 0, lambda kind: [])
        length = protocol.Length(1.0, "epochs")
        training = protocol.Training("encoder", 1.0, 0, length, 0.1, 0.0)
        return protocol.what_decides(tiny, asked, training, {}, "crops", metric)

    before = decided()
    assert protocol.decides_the_same(before, decided())
    assert not protocol.decides_the_same(before, decided(**{option: value}))


def test_an_untrained_start_of_an_earlier_version_makes_no_other_training():
    about = {"setting": {"from": "untrained"}, "model": {}}
    now = about | {"start": "untrained"}
    assert protocol.decides_the_same(about | {"start": "a digest of the checkpoint"}, now)
    assert not protocol.decides_the_same(about | {"start": "a"}, about | {"start": "b"})


def test_an_option_that_an_earlier_version_lacked_makes_no_other_training():
    model = default().model.to_dict()
    then = {"model": model | {"vit": {"heads": 6}}, "seed": 0, "digest": "of an earlier version"}
    del then["model"]["remat"]
    assert protocol.decides_the_same(then, {"model": model, "seed": 0})
    assert not protocol.decides_the_same(then, {"model": model, "seed": 1})
    assert not protocol.decides_the_same(then, {"model": model | {"remat": True}, "seed": 0})
    then["model"]["vit"]["heads"] = 4
    assert not protocol.decides_the_same(then, {"model": model, "seed": 0})


class Killed(Exception):
    pass


def kill():
    raise Killed


@pytest.mark.whole
def test_a_stopped_evaluation_goes_on_bit_for_bit(run, tmp_path, capsys, one_device):
    """Of two trainings of 7 steps, saved every 4: the first is stopped by a signal after step 4, the
    second dies at step 6. From a layer of the head: its BatchNorm has statistics to go on with.
    """
    config, workdir = run
    config.finetune.label_fractions, config.finetune.epochs = (1.0,), (3.0,)
    config.finetune.from_layer = 1
    whole = tmp_path / "whole"
    shutil.copytree(workdir, whole)
    expected = classifiers.finetune(config, str(whole))
    assert expected["rows"][0]["runs"][0]["steps"] == 7
    capsys.readouterr()

    with states_of_fit() as states:
        signal_comes = at_moment(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with signal_comes, pytest.raises(Stopped):
            classifiers.finetune(config, str(workdir))
        assert "stopped after step 4, which is saved" in capsys.readouterr().out
        assert states == []
        assert not (workdir / "finetune.json").exists()

        with at_moment(9, kill), pytest.raises(Killed):
            classifiers.finetune(config, str(workdir))
        assert "resumed from step 4" in capsys.readouterr().out
        assert [int(state.step) for state in states] == [7]

        result = classifiers.finetune(config, str(workdir))
        assert "resumed from step 4" in capsys.readouterr().out
        assert [int(state.step) for state in states] == [7, 7]  # the first one is not repeated
    assert result == expected
    assert metrics_of(workdir / "finetune") == metrics_of(whole / "finetune")


@pytest.mark.whole
def test_a_signal_in_the_last_step_ends_what_would_come_next(run, one_device):
    """The first of two trainings is whole, and the second does not begin: the handler that was there
    before, here one that raises, gets the signal.
    """
    config, workdir = run
    config.finetune.label_fractions, config.finetune.epochs = (1.0,), (3.0,)
    before = signal.signal(signal.SIGTERM, lambda *_: kill())
    try:
        with states_of_fit() as states:
            last = at_moment(7, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with last, pytest.raises(Killed):
                classifiers.finetune(config, str(workdir))
            assert states == []
            classifiers.finetune(config, str(workdir))
            assert [int(state.step) for state in states] == [7, 7]
    finally:
        signal.signal(signal.SIGTERM, before)
    lines = metrics_of(workdir / "finetune")
    assert all([line["step"] for line in x].count(7) == 2 for x in lines.values())


@pytest.fixture
def begun(run, monkeypatch, one_device):
    """(configuration, workdir, begun): where no step is done, `begun` holds the folders' names of the
    trainings that would have been.
    """
    config, workdir = run
    config.eval.baselines = False
    names: list[str] = []

    def fit(job, batches, run, hooks):
        folder = type(workdir)(run.workdir)
        names.append(f"{folder.parent.name}/{folder.name}")
        (folder / "checkpoints").mkdir()
        return job.init()

    monkeypatch.setattr(training, "fit", fit)
    return config, workdir, names


@pytest.mark.whole
def test_what_was_trained_is_not_trained_again_unless_something_else_is_asked(begun, tmp_path):
    config, workdir, names = begun

    def trains():
        names.clear()
        classifiers.linear(config, str(workdir))
        return len(names)

    assert trains() == 1
    assert trains() == 0
    config.eval.batch_size = 32  # changes nothing that is learned
    assert trains() == 0
    config.linear.learning_rate = (0.1, 0.2)
    assert trains() == 1  # the other one is there
    config.linear.momentum = 0.5
    assert trains() == 2
    # What was finished stays, as its classifier may be in use, and is known again.
    assert all(name.endswith("_2") for name in names)
    config.linear.momentum = 0.9
    assert trains() == 0
    config.linear.momentum = 0.5
    assert trains() == 0
    config.seed = 1
    assert trains() == 2
    config.views.crop_area = (0.5, 1.0)
    assert trains() == 2
    config.linear.learning_rate = (0.1,)
    assert trains() == 0
    config.eval.validation_fraction = 0.5
    assert trains() == 1

    # Another untrained encoder: such as by the statistics of other views.
    config.eval.baselines = True
    assert trains() == 1
    config.views.grey_probability = 0.9
    assert trains() == 1
    assert names[0].startswith("linear/untrained")
    config.eval.baselines = False

    # Another encoder in the workdir.
    shutil.rmtree(workdir / "checkpoints")
    encoder_checkpoint(config, workdir)  # of another seed
    assert trains() == 1
    assert trains() == 0
    config.eval.baselines = True
    assert trains() == 0  # the untrained encoder is the same
    config.eval.baselines = False

    # Other data than those of pretraining have a folder and a result of their own.
    with np.load(config.data.path) as file:
        arrays = dict(file)
    first = config.data.path
    config.data.path = str(tmp_path / "other.npz")
    np.savez(config.data.path, **(arrays | {"train_labels": np.roll(arrays["train_labels"], 1)}))
    assert trains() == 1
    assert names[0].startswith("linear_other_")
    assert list(workdir.glob("linear_other_*.json"))
    config.data.path = first
    assert trains() == 0
    # Other test images: what was chosen holds, but not the accuracy.
    config.data.path = str(tmp_path / "tested.npz")
    np.savez(config.data.path, **(arrays | {"test_images": arrays["test_images"][::-1]}))
    assert trains() == 1
    assert names[0].startswith("linear/")


def test_a_training_that_was_not_finished_gives_way(tmp_path):
    def begin(about):
        folder = TrainingFolder(epath.Path(tmp_path) / "x")
        return folder.begin({"model": {}} | about), folder

    for number in (1, 2):
        outcome, folder = begin({"number": number})
        assert (outcome, folder.path.name) == (None, "x")
    folder.finish({"last": 0.5})
    _, other = begin({"number": 3})
    assert other.path.name == "x_2"
    assert begin({"number": 4})[1].path.name == "x_2"
    outcome, folder = begin({"number": 2})
    assert (outcome, folder.path.name) == ({"last": 0.5}, "x")


def test_two_programs_do_not_train_in_one_folder(begun):
    config, workdir, names = begun
    (workdir / "linear").mkdir()
    with locked(workdir / "linear", ""), pytest.raises(UserError, match="another program"):
        classifiers.linear(config, str(workdir))
    assert not names
    assert classifiers.linear(config, str(workdir)) is not None


def test_images_that_are_not_turned_upright_are_trained_on_anew(begun):
    config, workdir, names = begun
    classifiers.linear(config, str(workdir))
    config.data.upright = False
    classifiers.linear(config, str(workdir))
    assert len(names) == 2


def test_a_loss_that_is_not_finite_ends_in_one_line(run):
    config, workdir = run
    config.eval.baselines = False
    # Each step multiplies the weights by 6e7: past 1e38 in six of them.
    config.linear.learning_rate, config.linear.weight_decay = (1e6,), (1e3,)
    config.linear.momentum, config.linear.epochs = 0.0, 60.0
    with pytest.raises(
        UserError, match=r"^step \d+: .*not finite.*try a lower linear\.learning"
    ) as e:
        classifiers.linear(config, str(workdir))
    assert "\n" not in str(e.value)
    (named,) = workdir.glob("linear/*/not_finite_step_*.json")
    assert str(named) in str(e.value)
    assert len(json.loads(named.read_text())["index"]) == BATCH


@pytest.mark.whole
def test_a_candidate_that_is_not_finite_is_left_out(run, capsys):
    config, workdir = run
    config.eval.baselines = False
    config.linear.momentum, config.linear.epochs = 0.0, 6.0
    # As above with the second decay; without, the weights stay finite.
    config.linear.learning_rate, config.linear.weight_decay = (1e6,), (0.0, 1e3)
    result = classifiers.linear(config, str(workdir))
    (row,) = result["rows"]
    assert row["runs"][0]["weight_decay"] == 0.0
    assert "left out    step " in capsys.readouterr().out
    with states_of_fit() as states:  # and is not tried again
        classifiers.linear(config, str(workdir))
    assert not states
    assert "left out    step " in capsys.readouterr().out
    config.linear.weight_decay = (1e3, 2e3)
    with pytest.raises(UserError, match="not finite"):
        classifiers.linear(config, str(workdir))


def test_without_a_validation_part_all_is_trained_on_and_nothing_chosen(begun):
    config, workdir, _ = begun
    config.eval.validation_fraction = 0.0
    result = classifiers.linear(config, str(workdir))
    assert result is not None
    assert (result["train_images"], result["validation_images"]) == (48, 0)
    assert "selected_accuracy" not in result["rows"][0]
    config.linear.learning_rate = (0.1, 0.2)
    with pytest.raises(UserError, match="leaves nothing to choose them on"):
        classifiers.linear(config, str(workdir))


def test_the_top_5_accuracy_is_said_of_many_classes(begun, monkeypatch, capsys):
    """Here of three, of which the first five are all."""
    monkeypatch.setattr(scores, "TOP_5_FROM", 3)
    config, workdir, _ = begun
    (row,) = classifiers.linear(config, str(workdir))["rows"]
    assert row["top_5_accuracy"] == 1.0
    assert row["runs"][0]["last_top_5"] == 1.0
    assert "top-5 100.0%" in capsys.readouterr().out


def test_accuracies_are_of_the_test_images_that_can_be_read(begun, monkeypatch):
    """Also where everything was trained before."""
    config, workdir, names = begun
    extract = Extractor.extract

    def without_two(self, variables, batches, count):
        found, labels = extract(self, variables, batches, count)
        if count == 21:  # the test images
            return {name: x[2:] for name, x in found.items()}, labels[2:]
        return found, labels

    monkeypatch.setattr(Extractor, "extract", without_two)
    for trained in (1, 1):
        assert classifiers.linear(config, str(workdir))["test_images"] == 19
        assert len(names) == trained


def test_a_share_of_the_labels_is_written_as_it_was_given(begun, capsys):
    config, workdir, _ = begun
    config.finetune.label_fractions, config.finetune.epochs = (0.075, 0.751), (1.0, 1.0)
    config.eval.seeds = 1
    classifiers.finetune(config, str(workdir))
    said = capsys.readouterr().out
    assert "7.5%, 3 images" in said
    assert "classifier  of 75.1% of the labels" in said


def test_mistakes(run):
    config, workdir = run
    set_options(config, {"finetune.label_fractions": (0.8, 1.0)})
    with pytest.raises(UserError, match=r"names 0\.8, and .* leaves 0\.75 of the images"):
        classifiers.finetune(config, str(workdir))
    config.linear.batch_size = 12
    with pytest.raises(UserError, match=r"linear\.batch_size=12 does not divide over 8 devices"):
        classifiers.linear(config, str(workdir))
    config.model.vit.width = 32
    with pytest.raises(UserError, match=r"of another model \(model\.vit\.width: 16 -> 32\)"):
        classifiers.finetune(config, str(workdir))


@pytest.mark.whole
def test_fine_tuning_by_lars_from_a_layer_of_the_head(run, one_device, capsys):
    config, workdir = run
    set_options(
        config,
        {
            "finetune.optimizer": "lars",
            "finetune.scaling": "sqrt",
            "finetune.learning_rate": (0.005,),
            "finetune.from_layer": 1,
            "finetune.label_fractions": (1.0,),
            "finetune.epochs": (1.0,),
        },
    )
    result = classifiers.finetune(config, str(workdir))
    assert "learning rate 0.005 x sqrt(16)" in capsys.readouterr().out
    (row,) = (r for r in result["rows"] if r["features"] == "encoder")
    classifier = load_classifier(workdir / row["runs"][0]["classifier"])
    assert classifier.network.layer == 1
    assert (workdir / "finetune_layer_1.json").exists()
    assert not (workdir / "finetune.json").exists()
    with np.load(config.data.path) as file:
        logits, labels = classifier(file["test_images"]), file["test_labels"]
    assert np.mean(logits.argmax(1) == labels) == pytest.approx(row["accuracy"])


def test_what_has_no_classifier_is_refused(run):
    _, workdir = run
    with pytest.raises(UserError, match="has no classifier"):
        load_classifier(workdir)


def test_only_what_changes_the_result_decides_which_training_it_is(tiny):
    usual = protocol._model_that_decides(tiny)
    assert usual == tiny.model.to_dict()
    set_options(tiny, {"model.remat": True, "model.init_from": "elsewhere"})
    assert protocol._model_that_decides(tiny) == usual
    tiny.model.head_width = 32
    assert protocol._model_that_decides(tiny) != usual


@pytest.mark.parametrize(("steps", "momentum"), [(0, 0.9), (50, 0.9), (1000, 0.99)])
def test_a_running_statistic_remembers_a_tenth_of_the_training(tiny_resnet, steps, momentum):
    """Appendix B.8: max(1 - 10 / s, 0.9) for s steps an epoch."""
    made: Any = object.__new__(program.Program)
    made._config, made._parts = tiny_resnet, SimpleNamespace(outputs=3)
    made._protocol = SimpleNamespace(layer=0, train_encoder=True)
    model = made._model(steps)
    assert model.encoder.norm_momentum == pytest.approx(momentum)
    assert model.head.norm_momentum == pytest.approx(momentum)


def test_the_length_of_a_training_is_rounded():
    assert protocol.Length(1, "epochs").steps(28, 16) == 2
    assert protocol.Length(0.1, "epochs").steps(28, 16) == 1
