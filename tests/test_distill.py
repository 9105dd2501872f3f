"""Distillation: its loss against loops in float64, one step on any mesh, resumed bit for bit, and guarded."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import RESNET
from invariance import batch, check

from simclr_jax import assemble, load_classifier
from simclr_jax.config import from_dict, set_options, validate
from simclr_jax.encoders import init_encoder
from simclr_jax.errors import Stopped, UserError
from simclr_jax.losses.classification import cross_entropy, distillation
from simclr_jax.mesh import make_mesh, to_global
from simclr_jax.modes.distill import distill, distillation_job, student_of
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.training.checkpoint import save_once
from simclr_jax.training.objectives import distilled
from simclr_jax.training.record import about_classifier, saved_config
from simclr_jax.training.sinks import SINKS
from simclr_jax.training.state import TrainState, init_head
from simclr_jax.views.placement import HostViews

CLASSES = 3


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def loops(logits, taught, temperature):
    """Equation 2 and its gradient by the logits, one image and one class after the other."""
    total, gradient = 0.0, np.zeros_like(logits)
    for i, (s, t) in enumerate(zip(logits, taught, strict=True)):
        p_s, p_t = softmax(s / temperature), softmax(t / temperature)
        for y in range(len(s)):
            total -= p_t[y] * np.log(p_s[y])
            gradient[i, y] = (p_s[y] - p_t[y]) / temperature
    return total / len(logits), gradient / len(logits)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 4.0])
def test_the_loss_equals_loops(temperature):
    rng = np.random.default_rng(0)
    logits, taught = rng.normal(size=(2, 5, 7))
    loss, gradient = jax.value_and_grad(distillation)(
        jnp.float32(logits), jnp.float32(taught), temperature
    )
    wanted, slope = loops(logits, taught, temperature)
    np.testing.assert_allclose(loss, wanted, rtol=2e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-6)
    to_teacher = jax.grad(distillation, 1)(jnp.float32(logits), jnp.float32(taught), temperature)
    np.testing.assert_array_equal(to_teacher, 0)


def test_broken_losses_differ_from_the_loops():
    rng = np.random.default_rng(0)
    logits, taught = rng.normal(size=(2, 5, 7))
    wanted, _ = loops(logits, taught, 0.5)
    swapped = distillation(jnp.float32(taught), jnp.float32(logits), 0.5)
    hard, _ = cross_entropy(jnp.float32(logits) / 0.5, jnp.argmax(jnp.float32(taught), -1))
    for broken in (swapped, hard):
        assert abs(broken - wanted) > 0.05 * wanted


def classifier_at(c, folder, layer=1, seed=3, classes=CLASSES, names=None):
    """Saves an untrained classifier on a layer of the head. Returns its folder."""
    encoder, head = assemble.encoder(c), assemble.head(c)
    key = jax.random.key(seed)
    f = init_encoder(encoder, c.data.image_size, key)
    g = init_head(head, encoder.width, key)
    student = student_of(c, classes)._replace(layer=layer)
    params, batch_stats = student.start(f, g, key)
    # Logits that differ from class to class.
    params["classifier"] = jax.tree.map(lambda x: 3000 * x, params["classifier"])
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, ())
    names = [str(i) for i in range(classes)] if names is None else names
    record = {"config": c.to_dict(), "classifier": about_classifier(layer, classes, names)}
    save_once(str(folder), 5, state, record)
    return str(folder)


@pytest.fixture
def teacher(tiny, tmp_path):
    return classifier_at(tiny, tmp_path / "teacher")


@pytest.fixture
def one_device(monkeypatch):
    """Trains on one device: quicker to compile."""
    alone = make_mesh(jax.devices()[:1])
    monkeypatch.setattr("simclr_jax.modes.distill.make_mesh", lambda fsdp: alone)


def run(c, workdir, stop_in=None):
    if stop_in is None:
        distill(c, str(workdir))
        return
    with pytest.MonkeyPatch.context() as patch:
        step = itertools.count(1)
        # A signal comes in this step.
        patch.setattr("simclr_jax.training.stopping.Stop.now", lambda self: next(step) == stop_in)
        with pytest.raises(Stopped):
            distill(c, str(workdir))


@pytest.mark.whole
def test_a_student_learns_from_its_teacher_and_goes_on_bit_for_bit(
    tiny, teacher, tmp_path, one_device, capsys
):
    options = {
        "distill.teacher": teacher,
        "distill.temperature": 1.0,
        "train.steps": 12,
        "optimizer.name": "adamw",
        "optimizer.scaling": "none",
        "optimizer.learning_rate": 0.02,
    }
    set_options(tiny, options)
    run(tiny, tmp_path / "whole")
    said = capsys.readouterr().out
    assert "3 classes on layer 1 of its head" in said
    run(tiny, tmp_path / "parts", stop_in=4)
    run(tiny, tmp_path / "parts")
    a, b = (load_classifier(tmp_path / name) for name in ("whole", "parts"))
    jax.tree.map(np.testing.assert_array_equal, a.variables, b.variables)
    assert a.classes == ["0", "1", "2"]
    result = json.loads((tmp_path / "whole" / "distill.json").read_text())
    with np.load(tiny.data.path) as file:
        images, labels = file["test_images"], file["test_labels"]
    scores = {row["features"]: row["accuracy"] for row in result["rows"]}
    for kind, classifier in (("student", a), ("teacher", load_classifier(teacher))):
        assert scores[kind] == pytest.approx(np.mean(classifier(images).argmax(1) == labels))
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "teacher_agreement" in line]
    assert losses[-1] < 0.9 * losses[0]
    with pytest.raises(UserError, match="holds a run of --mode=distill, not of pretrain"):
        pretrain(tiny, str(tmp_path / "whole"))


@pytest.mark.whole
def test_a_run_keeps_its_teacher(tiny, teacher, tmp_path, one_device, monkeypatch):
    monkeypatch.chdir(tmp_path)
    set_options(tiny, {"distill.teacher": "teacher", "train.steps": 2, "finetune.from_layer": 1})
    run(tiny, tmp_path / "w", stop_in=1)
    saved = from_dict(saved_config(str(tmp_path / "w")))
    validate(saved)  # of a student without a head
    assert saved.distill.teacher == teacher  # from any current folder
    shutil.rmtree(teacher)
    classifier_at(tiny, teacher, seed=4)
    with pytest.raises(UserError, match="holds a run with another teacher"):
        run(tiny, tmp_path / "w")


def test_what_cannot_be_distilled_is_refused(tiny, teacher, tmp_path, one_device):
    with pytest.raises(UserError, match=r"distill.teacher is empty"):
        run(tiny, tmp_path / "w")
    other = classifier_at(tiny, tmp_path / "other", classes=5)
    set_options(tiny, {"distill.teacher": other, "distill.alpha": 0.5})
    with pytest.raises(UserError, match="3 classes, and the teacher has 5"):
        run(tiny, tmp_path / "w")
    swapped = classifier_at(tiny, tmp_path / "swapped", names=["0", "2", "1"])
    tiny.distill.teacher = swapped
    with pytest.raises(UserError, match="class 1 of the data is '1', and the teacher's is '2'"):
        run(tiny, tmp_path / "w")
    np.savez(tmp_path / "unlabelled.npz", train_images=np.zeros((48, 12, 12, 3), np.uint8))
    tiny.data.path = str(tmp_path / "unlabelled.npz")
    with pytest.raises(UserError, match="no training image has one: expected labelled images, or"):
        run(tiny, tmp_path / "w")


def test_a_teacher_that_would_see_a_part_of_each_image_is_refused(tiny, teacher, tmp_path):
    """Of a ViT whose patches do not divide the student's images."""
    set_options(tiny, {"distill.teacher": teacher, "train.steps": 1, "data.image_size": 10})
    set_options(tiny, {"model.name": "resnet", "model.depth": 10, "model.width": 0.125})
    with pytest.raises(UserError, match=r"patch_size=\d+ does not divide"):
        run(tiny, tmp_path / "w")


def test_a_teacher_of_other_classes_is_not_compared(tiny, tmp_path, one_device, capsys):
    """distill.alpha is 1: no label counts."""
    other = classifier_at(tiny, tmp_path / "other", names=["0", "2", "1"])
    set_options(tiny, {"distill.teacher": other, "train.steps": 1})
    run(tiny, tmp_path / "w")
    said = capsys.readouterr().out
    assert "compared    none: class 1 of the data is '1', and the" in said
    assert "ignored " not in said
    assert not (tmp_path / "w/distill.json").exists()


def test_options_of_training_are_followed_or_said_to_have_no_effect(
    tiny, teacher, tmp_path, one_device, capsys, monkeypatch
):
    sent, pages = [], []

    class Kept:
        def __init__(self, workdir, config):
            sent.append(config["distill.teacher"])

        def write(self, step, values):
            sent.append(step)

        def close(self, finished):
            sent.append(finished)

    monkeypatch.setitem(SINKS, "wandb", Kept)
    monkeypatch.setattr("simclr_jax.modes.report.report", lambda *args: pages.append(args[1]))
    options = {"distill.teacher": teacher, "train.steps": 1, "train.log_every_steps": 1}
    unused = {"model.init_from": "W", "model.norm_group": 4, "eval.every_steps": 5}
    set_options(tiny, options | unused | {"train.report": True, "train.sinks": ("wandb",)})
    workdir = str(tmp_path / "w")
    run(tiny, workdir)
    said = "ignored     model.init_from=W, model.norm_group=4, eval.every_steps=5: "
    assert said in capsys.readouterr().out
    assert pages == [workdir]
    assert sent == [teacher, 1, True]


def one_step(c, teacher, devices, fsdp=1):
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    made = assemble.classifier_views(c, mesh, c.data.batch_size)
    views = HostViews(made.settings)  # views that are given
    classifier = load_classifier(teacher)
    student = student_of(c, CLASSES)
    job = distillation_job(c, assemble.plan_of(c, 48), student, classifier, views)
    start = jax.device_get(job.init())
    given = batch(c.data.batch_size)
    given["views"] = given["views"][:, :1]
    state, metrics = job.step(job.init(), to_global(mesh, given))
    return start, jax.device_get(
        {"metrics": metrics, "params": state.params, "batch_stats": state.batch_stats}
    )


@pytest.fixture
def small(tiny, tmp_path):
    set_options(
        tiny,
        RESNET
        | {
            "model.head_layers": 2,
            "optimizer.warmup_epochs": 0.0,
            "distill.temperature": 1.0,
            "distill.alpha": 0.7,
        },
    )
    teacher = classifier_at(tiny, tmp_path / "teacher")
    tiny.model.head = "none"
    return tiny, teacher


@pytest.mark.whole
def test_a_step_of_a_resnet_is_equal_on_any_mesh(small):
    """With BatchNorm: the student's of the whole batch, the teacher's running."""
    c, teacher = small
    _, one = one_step(c, teacher, 1)
    check(one_step(c, teacher, 8, fsdp=2)[1], one, 2e-5)


@pytest.mark.whole
def test_no_microbatch_changes_the_running_statistics_of_the_teacher(small):
    """The mean of three equal numbers may be rounded to another."""
    c, teacher = small
    set_options(c, {"data.batch_size": 12, "train.microbatches": 3})
    start, one = one_step(c, teacher, 1)
    kept = start.batch_stats["teacher"]
    assert len(jax.tree.leaves(kept)) > 0
    jax.tree.map(np.testing.assert_array_equal, one["batch_stats"]["teacher"], kept)


def test_a_step_is_equal_on_any_mesh_and_leaves_the_teacher(tiny, teacher):
    c = tiny
    set_options(c, {"model.head": "none", "optimizer.warmup_epochs": 0.0})
    start, one = one_step(c, teacher, 1)
    check(one_step(c, teacher, 8, fsdp=2)[1], one, 2e-5)
    for kind in ("params", "batch_stats"):
        jax.tree.map(
            np.testing.assert_array_equal,
            one[kind]["teacher"],
            getattr(start, kind)["teacher"],
        )
    moved = jax.tree.map(
        lambda x, y: np.abs(x - y).max(), one["params"]["encoder"], start.params["encoder"]
    )
    assert max(jax.tree.leaves(moved)) > 0


def test_a_step_in_microbatches_is_the_whole_batchs(tiny, teacher):
    """The student has no BatchNorm, through which an image's logits would depend on its microbatch."""
    set_options(tiny, {"model.head": "none", "optimizer.warmup_epochs": 0.0, "distill.alpha": 0.7})
    _, whole = one_step(tiny, teacher, 1)
    tiny.train.microbatches = 2
    check(one_step(tiny, teacher, 1)[1], whole, 2e-5)


def test_with_alpha_1_no_label_counts():
    """Labels of more classes than the teacher has would index beyond its logits."""
    x = jnp.asarray(np.random.default_rng(0).random((4, 1, 2, 2, 3)), jnp.float32)

    def logits(x):
        return x.reshape(len(x), -1)[:, :CLASSES]

    objective = distilled(
        lambda params, batch_stats, x: (logits(x), {}),
        lambda variables, x: 2 * logits(x),
        lambda batch: batch["views"],
        temperature=1.0,
        alpha=1.0,
    )
    nothing: dict = {"teacher": {}}
    found = objective(nothing, nothing, {"views": x, "label": jnp.asarray([0, 1, 2, 7])})
    wanted, _ = loops(np.float64(logits(x[:, 0])), np.float64(2 * logits(x[:, 0])), 1.0)
    np.testing.assert_allclose(found.loss, wanted, rtol=2e-5)
    assert found.metrics.keys() == {"loss", "teacher_agreement"}


def test_alpha_weighs_the_teacher_and_the_labels(tiny, teacher):
    c = tiny
    c.model.head = "none"
    losses = {}
    for alpha in (0.0, 0.7, 1.0):
        c.distill.alpha = alpha
        losses[alpha] = float(one_step(c, teacher, 1)[1]["metrics"]["loss"])
    assert losses[0.0] != losses[1.0]
    wanted = 0.7 * losses[1.0] + 0.3 * losses[0.0]
    np.testing.assert_allclose(losses[0.7], wanted, rtol=1e-5)
