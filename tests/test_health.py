"""Whether a run is healthy: bounds, spread, trust ratios, and verdicts on runs made sick on purpose."""

import json
import math
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import random_pairs

import simclr_jax
from simclr_jax import assemble, config
from simclr_jax.console import Progress
from simclr_jax.data.split import BROKEN
from simclr_jax.evals.spread import Spread, rank_of, uniformity_of
from simclr_jax.evals.verdict import judge_accuracy
from simclr_jax.losses import contract, nt_xent, softmax
from simclr_jax.losses.contract import positives
from simclr_jax.losses.health import chance, lower_bound, spread_of
from simclr_jax.modes.pretrain import pretrain, pretrain_and_evaluate
from simclr_jax.training import verdict
from simclr_jax.training.clock import Clock
from simclr_jax.training.log import Log, Reporting
from simclr_jax.training.optimizer import lars_trust_ratios, make_optimizer
from simclr_jax.training.plan import Plan
from simclr_jax.training.verdict import References, Verdict, judge

OF_512 = References(images=512, width=128, settled_after=10, temperature=0.1)
EVEN = 1 / math.sqrt(128)


def simplex(images):
    """Unit vectors at equal angles, one for each image, twice."""
    corners = np.eye(images) - 1 / images
    corners /= np.linalg.norm(corners, axis=1, keepdims=True)
    return np.repeat(corners, 2, axis=0).astype(np.float32)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_a_simplex_attains_the_lower_bound_and_nothing_is_below(tau):
    loss, _ = nt_xent(simplex(8), tau)
    assert float(loss) == pytest.approx(lower_bound(8, tau), rel=1e-4, abs=1e-6)
    assert nt_xent(random_pairs(pairs=8, noise=0.01), tau)[0] > lower_bound(8, tau)


def test_the_bounds_are_those_of_published_settings():
    """Worked by hand for 512 images: ln(1023), and the bound at tau 0.1 and 0.5."""
    assert chance(512) == pytest.approx(6.930, abs=1e-3)
    assert lower_bound(512, 0.1) == pytest.approx(0.045, abs=1e-3)
    assert lower_bound(512, 0.5) == pytest.approx(4.933, abs=1e-3)


def test_spread_equals_loops():
    z = random_pairs(pairs=6).astype(np.float64)
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    found = spread_of(jnp.asarray(z, jnp.float32))
    alignment = np.mean([np.sum((unit[2 * i] - unit[2 * i + 1]) ** 2) for i in range(6)])
    pairs = [
        np.exp(-2 * np.sum((a - b) ** 2))
        for i, a in enumerate(unit)
        for k, b in enumerate(unit)
        if i != k
    ]
    assert float(found["alignment"]) == pytest.approx(alignment, rel=1e-5)
    assert uniformity_of(z) == pytest.approx(np.log(np.mean(pairs)), rel=1e-9)
    assert float(found["z_std"]) == pytest.approx(unit.std(axis=0).mean(), rel=1e-5)


@pytest.mark.parametrize(("loss", "early"), [(6.929, True), (7.5, True), (5.0, False)])
def test_a_run_that_ends_before_it_can_have_learned_says_so(loss, early):
    found = judge(10, {"loss": loss, "z_std": EVEN}, OF_512)
    assert found.name == ("too early to say" if early else "sound")
    assert not found.is_bad
    assert ("before step 11 it may be near chance" in found.because) == early
    few, many = (judge(step, {"loss": loss, "z_std": EVEN}, OF_512) for step in (11, 100))
    assert ("11 steps are few" in few.because) == early
    assert (many.name == "not learning") == early


def test_a_run_that_is_no_longer_bad_is_said_so(capsys):
    """Also where it is too early to call it sound."""
    found = iter(["sound", "collapsed", "collapsed", "too early to say", "too early to say"])
    reporting = Reporting(1, 8, judge=lambda step, means: Verdict(next(found), "why"))
    log = Log("", None, Progress(5), reporting, [], Clock())
    for step in range(1, 6):
        log.add(step, {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1}, {})
    log.drain()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": why")]
    assert lines == ["step 2  collapsed: why", "step 4  no longer 'collapsed': why"]


def test_a_short_run_is_judged_after_its_warm_up(tiny):
    """It is reported ten times, so that later reports have no step of the warm-up in them."""
    tiny.train.log_every_steps = 50
    for steps, every in ((40, 4), (60, 50)):
        plan = Plan(steps, 4, 0.1)
        assert assemble.references(tiny, plan).settled_after == 4 + every


def test_spread_of_one_point_and_of_a_sphere():
    point = spread_of(jnp.ones((16, 4)))
    assert [float(point[k]) for k in ("alignment", "z_std")] == pytest.approx([0, 0], abs=1e-5)
    assert uniformity_of(np.ones((16, 4))) == pytest.approx(0, abs=1e-9)
    even = np.random.default_rng(0).normal(size=(2048, 128))
    assert float(spread_of(jnp.asarray(even))["z_std"]) == pytest.approx(EVEN, rel=0.01)
    assert uniformity_of(even) == pytest.approx(-3.938, abs=0.01)  # -4 + ln M_128(4)
    gradient = jax.grad(lambda z: sum(spread_of(z).values()))(jnp.ones((8, 4)))
    assert not np.any(gradient)


def test_trust_ratios_are_those_that_lars_applies():
    rng = np.random.default_rng(0)
    shapes = {"a": {"kernel": (3, 4), "bias": (4,)}, "b": {"kernel": (4, 2), "scale": (2,)}}
    params, gradients = (
        jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), shapes, is_leaf=is_shape)
        for _ in range(2)
    )
    how = {"weight_decay": 0.1, "trust_coefficient": 0.01}
    others = {"c": {"kernel": np.ones((2, 2), np.float32)}}  # not trained
    found = lars_trust_ratios(params | others, gradients | others, trained=frozenset("ab"), **how)
    optimizer = make_optimizer("lars", 1.0, momentum=0.0, **how)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    ratios = [
        np.linalg.norm(updates[k]["kernel"])
        / np.linalg.norm(gradients[k]["kernel"] + 0.1 * params[k]["kernel"])
        for k in "ab"
    ]
    np.testing.assert_allclose(found["trust_ratio_min"], min(ratios), rtol=1e-5)
    np.testing.assert_allclose(found["trust_ratio_max"], max(ratios), rtol=1e-5)
    np.testing.assert_allclose(found["trust_ratio_median"], np.mean(ratios), rtol=1e-5)


@pytest.mark.parametrize("zero", ["gradient", "parameter"])
def test_a_trust_ratio_without_a_norm_is_the_1_that_lars_applies(zero):
    """The gradient of a kernel behind a BatchNorm whose scale is 0, without weight decay."""
    kernel, nothing = np.full((2, 2), 2.0, np.float32), np.zeros((2, 2), np.float32)
    params = {"a": {"kernel": nothing if zero == "parameter" else kernel}}
    gradients = {"a": {"kernel": nothing if zero == "gradient" else kernel}}
    how = {"weight_decay": 0.0, "trust_coefficient": 0.01}
    found = lars_trust_ratios(params, gradients, trained=frozenset("a"), **how)
    assert set(map(float, found.values())) == {1.0}
    optimizer = make_optimizer("lars", 1.0, momentum=0.0, **how)
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["a"]["kernel"], -gradients["a"]["kernel"])


def is_shape(x):
    return isinstance(x, tuple)


@pytest.mark.parametrize(
    ("step", "loss", "z_std", "expected"),
    [
        (5, 6.93, EVEN, "too early to say"),  # before the end of the warm-up
        (50, 6.93, EVEN, "too early to say"),  # few steps
        (100, 6.93, EVEN, "not learning"),
        (50, 5.0, EVEN, "sound"),
        (50, 0.01, EVEN, "below the lower bound"),
        (50, 0.0447, EVEN, "sound"),
        (5, 6.93, 0.005, "collapsed"),
        (5, 7.3, EVEN, "too early to say"),  # untrained, a loss may lie above chance
        (50, 7.3, EVEN, "too early to say"),
        (100, 7.3, EVEN, "not learning"),
    ],
)
def test_verdicts(step, loss, z_std, expected):
    verdict = judge(step, {"loss": loss, "z_std": z_std}, OF_512)
    assert verdict.name == expected
    assert ("loss" in verdict.because) or expected == "collapsed"


def test_a_loss_above_chance_is_no_alarm_where_pairs_are_told_apart():
    """As at tau 0.001: ln(2B - 1) tells nothing there."""
    means = {"loss": 300.0, "z_std": EVEN}
    found = judge(50, means | {"other_view_top1": 0.12}, OF_512)
    assert found.name == "not judged"
    assert "12.0% of the pairs are told apart (by chance 0.2%)" in found.because
    assert judge(100, means | {"other_view_top1": 0.01}, OF_512).name == "not learning"
    assert not judge(50, means | {"other_view_top1": 0.12}, OF_512).is_bad


def test_at_a_high_temperature_every_loss_is_near_chance_and_that_is_no_alarm():
    warm = OF_512._replace(temperature=1000.0)
    least, no_better = lower_bound(512, 1000.0), chance(512)
    for share, name in ((0.5, "sound"), (0.01, "not learning")):
        loss = no_better - share * (no_better - least)
        assert judge(100, {"loss": loss, "z_std": EVEN}, warm).name == name


def test_of_a_loss_without_bounds_only_the_spread_is_judged():
    unbounded = OF_512._replace(temperature=None)
    assert judge(50, {"loss": -9.0, "z_std": EVEN}, unbounded).name == "not judged"
    assert judge(50, {"loss": -9.0, "z_std": 0.0}, unbounded).name == "collapsed"


def test_an_encoder_that_is_no_better_than_untrained_is_named():
    rows = [
        {"features": "untrained encoder", "labels_per_class": None, "accuracy": 0.5},
        {"features": "encoder", "labels_per_class": None, "accuracy": 0.4},
    ]
    assert judge_accuracy(rows, {"other_view_top1": 0.5}).name == "no better than untrained"
    assert judge_accuracy(rows, {"other_view_top1": 0.999}).name == "a shortcut"
    rows[1]["accuracy"] = 0.6
    assert judge_accuracy(rows, {}).name == "sound"
    rows.append({"features": "raw pixels", "labels_per_class": None, "accuracy": 0.6})
    assert judge_accuracy(rows, {}).name == "sound"
    rows[2]["accuracy"] = 0.7
    found = judge_accuracy(rows, {})
    assert (found.name, found.is_bad) == ("below raw pixels", True)
    assert "raw pixels 70.0%" in found.because
    found = judge_accuracy(rows, {"other_view_top1": 1.0})
    assert found.name == "a shortcut"
    assert "raw pixels 70.0%, other_view_top1 100.0%: " in found.because
    assert judge_accuracy(rows[1:], {}) is None


def test_few_test_images_are_too_few_to_tell():
    """A difference within a standard error of the difference: of 25 images and 50 % 14 points."""
    rows = [
        {"features": "untrained encoder", "labels_per_class": None, "accuracy": 0.5},
        {"features": "encoder", "labels_per_class": None, "accuracy": 0.42},
    ]
    found = judge_accuracy(rows, {}, 25)
    assert (found.name, found.is_bad) == ("not judged", False)
    assert "25 test images are too few to tell (standard error 14.1%)" in found.because
    assert judge_accuracy(rows, {"other_view_top1": 1.0}, 25).name == "not judged"
    for images in (100, 10_000, None):
        assert judge_accuracy(rows, {}, images).name == "no better than untrained"
    rows[1]["accuracy"] = 0.35
    assert judge_accuracy(rows, {}, 25).name == "no better than untrained"
    assert judge_accuracy(rows, {"other_view_top1": 1.0}, 25).name == "a shortcut"
    rows[0]["accuracy"], rows[1]["accuracy"] = 1.0, 1.0
    assert judge_accuracy(rows, {}, 1000).name == "not judged"
    rows[0]["accuracy"], rows[1]["accuracy"] = 1.0, 0.95  # one image of 20
    assert judge_accuracy(rows, {}, 20).name == "not judged"
    assert judge_accuracy(rows, {}, 200).name == "no better than untrained"


def test_a_few_steps_that_have_learned_little_are_too_few_to_call_a_run_sound():
    references = References(64, 128, 5, 0.5)
    by_chance, best = chance(64), lower_bound(64, 0.5)
    for step, way, name in (
        (20, 0.05, "too early to say"),
        (20, 0.2, "too early to say"),
        (20, 0.3, "sound"),
        (200, 0.05, "sound"),
    ):
        means = {"loss": by_chance - way * (by_chance - best), "z_std": 0.08}
        assert judge(step, means, references).name == name


def health_of(workdir):
    return json.loads((workdir / "health.json").read_text())["name"]


@pytest.fixture
def plain(tiny):
    """Runs of 8 steps that report every two, whose views are crops."""
    tiny.optimizer.warmup_epochs = 0.0
    return tiny


def sick_of_constant_images(options, patch, tmp_path):
    """All images are one, and so are the views: a grey square."""
    path = tmp_path / "grey.npz"
    np.savez(path, train_images=np.full((48, 12, 12, 3), 128, np.uint8))
    config.set_options(options, {"data.path": str(path), "model.head": "none"})


def sick_of_wrong_partners(options, patch, tmp_path):
    """The positive of an image is a view of the next one."""
    patch.setattr(
        softmax, "positives", lambda s, is_partner: positives(s, jnp.roll(is_partner, 2, 1))
    )
    options.loss.temperature = 5.0


def sick_of_no_normalisation(options, patch, tmp_path):
    """z three times as long as they should be, and views that are equal: the loss falls too far."""
    original = contract.normalize
    patch.setattr(contract, "normalize", lambda z: 3 * original(z))
    config.set_options(options, {"views.crop_area": (1.0, 1.0), "views.flip": False})
    options.optimizer.weight_decay = 0.0  # a step of its own: traced with the wrong function


def sick_of_batchnorm(options, patch, tmp_path):
    """Statistics of one image: they push its two views to opposite sides."""
    options.model.norm_group = 1


def sick_of_the_learning_rate(options, patch, tmp_path):
    """Each step throws the encoder elsewhere."""
    config.set_options(options, {"optimizer.name": "sgd", "optimizer.learning_rate": 1000.0})


@pytest.mark.whole
@pytest.mark.parametrize(
    ("sick", "expected"),
    [
        (sick_of_constant_images, "collapsed"),
        (sick_of_batchnorm, "not learning"),
        (sick_of_the_learning_rate, "not learning"),
        (sick_of_wrong_partners, "not learning"),
        (sick_of_no_normalisation, "below the lower bound"),
    ],
)
def test_runs_made_sick_on_purpose_are_named(plain, tmp_path, capsys, monkeypatch, sick, expected):
    """In eight steps, which count as many here: before step 100 a run is not called sick for its loss."""
    monkeypatch.setattr(verdict, "_FEW_STEPS", 0)
    sick(plain, monkeypatch, tmp_path)
    pretrain(plain, str(tmp_path / "w"))
    assert health_of(tmp_path / "w") == expected
    said = capsys.readouterr().out
    assert f"health      {expected}: " in said
    first = 4 if expected == "not learning" else 2  # a mean of two steps after the warm-up of none
    assert f"step {first}  {expected}: " in said  # when it turned bad, and not again
    assert len(re.findall(rf"step \d+  {expected}: ", said)) == 1


@pytest.mark.whole
def test_a_healthy_run_raises_no_alarm_and_its_metrics_are_there(plain, tmp_path, capsys):
    plain.eval.after_training = "knn"
    plain.train.log_every_steps = 8  # of 8 steps on noise none is after the warm-up
    pretrain_and_evaluate(plain, str(tmp_path / "w"))
    # 8 steps on noise.
    early = "too early to say"
    assert health_of(tmp_path / "w") in (early, "no better than untrained", "below raw pixels")
    said = capsys.readouterr().out
    assert f"health      {early}: loss " in said
    lines = [json.loads(x) for x in (tmp_path / "w/metrics.jsonl").read_text().splitlines()]
    names = {"alignment", "z_std", "update_norm", "share_of_time_input"}
    assert names < set(lines[-1])
    assert {"trust_ratio_min", "trust_ratio_median", "trust_ratio_max"} < set(lines[-1])
    assert all(0 <= line["share_of_time_input"] <= 1 for line in lines)
    assert lines[-1]["update_norm"] > 0


def test_rank_is_the_number_of_directions():
    rng = np.random.default_rng(0)
    even = np.linalg.qr(rng.normal(size=(200, 8)))[0]
    assert rank_of(even) == pytest.approx(8, rel=1e-4)
    assert rank_of(np.outer(rng.normal(size=200), np.ones(8))) == pytest.approx(1, abs=1e-3)
    assert rank_of(np.zeros((20, 8))) == pytest.approx(1, abs=1e-3)


def test_a_run_measures_the_rank_of_its_encoder_on_the_way(plain, tmp_path):
    """Of all 48 images, as the encoder that is saved at that step has it."""
    config.set_options(plain, {"health.every_steps": 4, "checkpoint.every_steps": 4})
    workdir = tmp_path / "w"
    pretrain(plain, str(workdir))
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["rank_h"] for line in lines if "rank_h" in line}
    assert set(found) == {4, 8}
    with np.load(plain.data.path) as file:
        images = file["train_images"]
    for step, rank in found.items():
        h = simclr_jax.load_encoder(str(workdir), step)(images)
        assert rank == pytest.approx(rank_of(h), rel=1e-4)


def test_what_stands_in_for_broken_images_has_no_rank():
    rng = np.random.default_rng(0)
    h, labels = rng.normal(size=(40, 8)).astype(np.float32), np.zeros(40, int)
    h[30:], labels[30:] = 1.0, BROKEN  # one picture in the place of ten
    hook: Any = object.__new__(Spread)
    some = SimpleNamespace(split=SimpleNamespace(count=40))
    hook._images, hook._views = some, SimpleNamespace(evaluation_batches=lambda *_: None)
    z = rng.normal(size=(40, 3)).astype(np.float32)
    z[30:] = 1.0
    found = [({"h": h[k : k + 8], "z": z[k : k + 8]}, labels[k : k + 8]) for k in range(0, 40, 8)]
    hook._extractor = SimpleNamespace(batch_size=8, stream=lambda *_: found)
    seen = hook.run(1, SimpleNamespace(variables=lambda _: {}))
    assert seen["rank_h"] == pytest.approx(rank_of(h[:30]))
    assert seen["rank_z"] == pytest.approx(rank_of(z[:30]))
    assert seen["uniformity"] == pytest.approx(uniformity_of(z[:30]))
    labels[1:] = BROKEN
    assert hook.run(1, SimpleNamespace(variables=lambda _: {})) == {}


def test_the_references_are_the_runs(tiny):
    plan = assemble.plan_of(tiny, 48)
    tiny.loss.name, tiny.model.head = "dcl", "none"
    assert assemble.references(tiny, plan) == References(16, 16, 3 + 2, None)


def test_as_good_as_untrained_is_no_better():
    kinds = ("untrained encoder", "encoder")
    rows = [{"features": kind, "labels_per_class": None, "accuracy": 0.5} for kind in kinds]
    assert judge_accuracy(rows, {}).name == "no better than untrained"
    assert judge_accuracy(rows, {"other_view_top1": 0.98}).name == "no better than untrained"


@pytest.mark.parametrize(
    ("step", "metrics", "name"),
    [
        (2000, {"z_std": 0.099 * EVEN, "loss": 5.0}, "collapsed"),
        (2000, {"z_std": 0.11 * EVEN, "loss": 5.0}, "sound"),
        (99, {"z_std": EVEN, "loss": 6.5}, "too early to say"),
        (100, {"z_std": EVEN, "loss": 6.5}, "sound"),
        (2000, {"z_std": EVEN, "loss": 7.5, "other_view_top1": 9.9 / 512}, "not learning"),
        (2000, {"z_std": EVEN, "loss": 7.5, "other_view_top1": 10.1 / 512}, "not judged"),
    ],
)
def test_verdicts_beside_their_thresholds(step, metrics, name):
    assert judge(step, metrics, OF_512).name == name
