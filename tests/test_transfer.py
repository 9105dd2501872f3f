"""Transfer to other data (appendix B.8): its metrics, its fine-tuning, and images of several labels."""

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import encoder_checkpoint, random_images
from etils import epath
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

import simclr_jax
from simclr_jax import assemble, config
from simclr_jax.errors import UserError
from simclr_jax.evals import classifiers, results, subjects, transfer
from simclr_jax.evals.classifiers import training
from simclr_jax.evals.contract import Features
from simclr_jax.evals.evaluate import evaluate_features
from simclr_jax.evals.logistic import fit_lambdas
from simclr_jax.evals.scores import (
    Score,
    eleven_point_map,
    is_unbalanced,
    mean_per_class,
    published_metric,
    score,
    score_of_classes,
    top_5_accuracy,
)
from simclr_jax.losses.classification import cross_entropy_of_sets
from simclr_jax.mesh import make_mesh


def slow_map(logits, members, recalls=11):
    """The 11-point mean average precision of Everingham et al. 2010, image by image."""
    found = []
    for k in range(members.shape[1]):
        ranked = sorted(
            (i for i in range(len(logits)) if members[i, k] >= 0), key=lambda i: -logits[i, k]
        )
        positives = sum(members[i, k] == 1 for i in ranked)
        hits, points = 0, []
        for place, i in enumerate(ranked, start=1):
            hits += members[i, k] == 1
            points.append((hits / positives, hits / place))
        best = [
            max((p for r, p in points if r >= t / (recalls - 1) - 1e-9), default=0.0)
            for t in range(recalls)
        ]
        found.append(sum(best) / recalls)
    return sum(found) / len(found)


def test_the_mean_average_precision_equals_a_loop():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 5))
    members = rng.choice([1, 0, -1], size=(60, 5), p=[0.3, 0.6, 0.1])
    assert eleven_point_map(logits, members) == pytest.approx(slow_map(logits, members), abs=1e-12)
    with pytest.raises(UserError, match="none of 60 images that are judged by is of any class"):
        eleven_point_map(logits, np.minimum(members, 0))
    # Other numbers of points, and images that do not count counted as wrong, give another value.
    assert abs(slow_map(logits, members, 101) - slow_map(logits, members)) > 1e-3
    counted = eleven_point_map(logits, np.maximum(members, 0))
    assert abs(counted - slow_map(logits, members)) > 1e-3


def test_the_mean_average_precision_of_a_list_worked_by_hand():
    """Right at the ranks 1, 3 and 4 of 4: precision 1 up to recall 1/3, then 3/4."""
    logits = np.asarray([[4.0], [3.0], [2.0], [1.0]])
    members = np.asarray([[1], [0], [1], [1]])
    assert eleven_point_map(logits, members) == pytest.approx((4 * 1 + 7 * 0.75) / 11)
    ties = eleven_point_map(np.zeros((4, 1)), members)
    assert ties == eleven_point_map(np.zeros((4, 1)), members[::-1]) == pytest.approx(0.75)


def test_the_mean_of_the_classes_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, logits = rng.choice(4, size=50, p=[0.7, 0.1, 0.1, 0.1]), rng.normal(size=(50, 4))
    expected = balanced_accuracy_score(labels, logits.argmax(1))
    assert mean_per_class(logits, labels) == pytest.approx(expected)


def test_of_unbalanced_classes_the_mean_of_the_classes_is_scored_too():
    """Here three quarters of the images are of one class of four."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(4), [75, 10, 10, 5]))
    logits = rng.normal(size=(100, 4)) + 2 * np.eye(4)[labels]
    found = score("accuracy", logits, labels)
    assert found.value == pytest.approx(np.mean(logits.argmax(1) == labels))
    expected = balanced_accuracy_score(labels, logits.argmax(1))
    assert found.mean_per_class == pytest.approx(expected)
    assert abs(expected - found.value) > 0.02
    assert score_of_classes(logits.argmax(1), labels, 4) == found
    assert score("accuracy", logits, np.arange(100) % 4).mean_per_class is None
    row = results.row("encoder", None, [found, found])
    assert row["mean_per_class_accuracy"] == pytest.approx(expected)
    assert results.cell(row).endswith(f", mean of classes {expected:.1%}")


@pytest.mark.parametrize(
    ("counts", "unbalanced"),
    [
        ([50, 50], False),
        ([74, 26], False),
        ([75, 25], True),
        ([50, 20, 20, 10], True),
        ([49, 21, 20, 10], False),
    ],
)
def test_classes_are_unbalanced_from_twice_chance_or_three_quarters_on(counts, unbalanced):
    labels = np.repeat(np.arange(len(counts)), counts)
    assert is_unbalanced(labels, len(counts)) is unbalanced


def test_the_top_5_accuracy_is_scikit_learns_and_said_of_many_classes_alone():
    rng = np.random.default_rng(0)
    labels, logits = rng.permutation(np.arange(300) % 100), rng.normal(size=(300, 100))
    logits[np.arange(300), labels] += 1.5
    expected = top_k_accuracy_score(labels, logits, k=5, labels=range(100))
    assert score("accuracy", logits, labels) == (
        pytest.approx(np.mean(logits.argmax(1) == labels)),
        pytest.approx(expected),
        None,
    )
    assert 0.2 < expected < 0.8
    assert score("mean_per_class", logits, labels).top_5 is None
    few = np.minimum(labels, 98)
    assert score("accuracy", logits[:, :99], few).top_5 is None


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_classifier_that_says_nothing_has_no_better_top_5_accuracy_than_chance(value):
    labels = np.arange(100)
    assert top_5_accuracy(np.full((100, 100), value), labels) == 0.05


@pytest.mark.parametrize(
    ("asked", "name", "expected"),
    [
        ("auto", "oxford_iiit_pet", "mean_per_class"),
        ("auto", "caltech101:3.0.1", "mean_per_class"),
        ("auto", "food101", "accuracy"),
        ("accuracy", "oxford_flowers102", "accuracy"),
    ],
)
def test_the_metric_is_the_papers(asked, name, expected):
    assert published_metric(asked, "tfds", name) == expected


def test_a_classifier_of_sets_is_one_of_scikit_learns_for_each_label():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6)).astype(np.float32)
    members = (x @ rng.normal(size=(6, 3)) + rng.normal(size=(80, 3)) > 0).astype(np.int8)
    members[::7, 1] = -1
    (ours, _), _ = fit_lambdas(x, members, [1.0, 1e5], 3, 1000)
    for k in range(3):
        counted = members[:, k] >= 0
        theirs = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000)
        theirs.fit(x[counted], members[counted, k])
        np.testing.assert_allclose(ours["kernel"][:, k], theirs.coef_[0], atol=1e-3)
        np.testing.assert_allclose(ours["bias"][k], theirs.intercept_[0], atol=1e-3)


def test_the_cross_entropy_of_sets_equals_a_loop():
    members = np.asarray([[1, 0, 0], [1, 1, 0], [0, -1, 1]])
    labels = np.asarray([0, 1, 2, -1, 1])
    logits = np.random.default_rng(0).normal(size=(5, 3))
    counted = [
        (logits[i, k], members[label, k] == 1)
        for i, label in enumerate(labels)
        for k in range(3)
        if label >= 0 and members[label, k] >= 0
    ]
    losses = [np.log1p(np.exp(-logit if wanted else logit)) for logit, wanted in counted]
    loss, accuracy = cross_entropy_of_sets(logits, labels, members)
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)
    right = [(logit > 0) == wanted for logit, wanted in counted]
    assert float(accuracy) == pytest.approx(np.mean(right))
    gradient = jax.grad(lambda z: cross_entropy_of_sets(z, labels, members)[0])(logits)
    assert np.all(np.asarray(gradient)[3] == 0)  # no label
    assert gradient[2, 1] == 0  # does not count
    assert np.count_nonzero(gradient) == len(losses)


class Several(tfds.core.GeneratorBasedBuilder):
    """Images of differing sizes whose first rows say which of three labels they have, as in VOC."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        labels = tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "dog", "owl"]))
        image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
        features = {"image": image, "labels": labels, "labels_no_difficult": labels}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(48), "test": self._generate_examples(21)}

    def _generate_examples(self, count):
        for i in range(count):
            image = random_images(count + i, 12 + i % 3, 12)[0]
            # Every 12th image has no label; of every 6th the owl is difficult.
            labels = [] if i % 12 == 11 else [k for k in range(3) if (1 + i % 7) >> k & 1]
            for k in labels:
                image[4 * k : 4 * k + 4] = 255
            certain = [k for k in labels if k < 2 or i % 6]
            yield i, {"image": image, "labels": labels, "labels_no_difficult": certain}


@pytest.fixture
def several(tiny, tmp_path):
    """A configuration whose images have several labels each."""
    builder = Several(data_dir=tmp_path / "tfds")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=4))
    tiny.data.source, tiny.data.name, tiny.data.path = "tfds", "several", f"{tmp_path}/tfds"
    tiny.data.placement = "host"
    tiny.eval.validation_fraction = 0.25
    return tiny


def test_each_set_of_labels_that_occurs_is_a_class(several):
    data = assemble.data_set(several)
    assert set(data.train.classes) == set(data.test.classes)
    labels = data.train.all_labels()
    assert np.sum(labels < 0) == 4
    for name, row in zip(data.train.classes, data.members, strict=True):
        said = {1: "{}", -1: "[{}]"}
        words = [said[x].format(n) for x, n in zip(row, ("cat", "dog", "owl"), strict=True) if x]
        assert name == ", ".join(words)
    # In the order of the files, which TFDS shuffles: as often as they were written.
    written = [1 + i % 7 for i in range(48) if i % 12 != 11]
    for k in range(3):
        assert np.sum(data.members[labels[labels >= 0], k] != 0) == sum(w >> k & 1 for w in written)
    assert "[owl]" in " ".join(data.train.classes)


def test_they_keep_their_labels_where_test_images_are_held_out(several):
    members = assemble.data_set(several).members
    several.data.test_split, several.data.test_fraction = "", 0.25
    data = assemble.data_set(several)
    assert 0 < data.test.count < data.train.count < 48
    np.testing.assert_array_equal(data.members[:1], members[:1])


@pytest.mark.whole
def test_transfer_evaluates_them_and_other_evaluations_refuse(several, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "LAMBDAS", transfer.LAMBDAS[::11])
    workdir = str(encoder_checkpoint(several, tmp_path / "w"))
    result = evaluate_features("transfer", several, workdir)
    assert result["settings"]["metric"] == "11_point_map"
    assert result["train_images"] == 44
    assert all(0 < row["accuracy"] <= 1 for row in result["rows"])
    # The label is written into the pixels.
    assert result["rows"][0]["features"] == "raw pixels"
    assert result["rows"][0]["accuracy"] > 0.9
    with pytest.raises(UserError, match="several labels each: --mode=transfer and"):
        evaluate_features("probe", several, workdir)
    several.eval.metric = "accuracy"
    with pytest.raises(UserError, match=r"eval\.metric=accuracy is for one label an image"):
        evaluate_features("transfer", several, workdir)


def test_pretraining_takes_them_for_images_without_labels(several, tmp_path, capsys):
    several.train.steps = 1
    simclr_jax.pretrain(several, str(tmp_path / "w"))
    assert "48 images, no labels" in capsys.readouterr().out


GRID = {
    "transfer_finetune.steps": 4,
    "transfer_finetune.learning_rate": (0.01, 0.1),
    "transfer_finetune.weight_decay": (1e-3,),
    "transfer_finetune.untrained_steps": 6,
    "transfer_finetune.untrained_learning_rate": (0.1,),
    "transfer_finetune.untrained_weight_decay": (1e-3,),
    "transfer_finetune.batch_size": 16,
    "eval.validation_fraction": 0.25,
}


@pytest.mark.whole
def test_images_of_several_labels_are_fine_tuned_on(several, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    config.set_options(several, GRID | {"eval.baselines": False, "data.placement": "host"})
    config.set_options(several, {"transfer_finetune.learning_rate": (0.1,)})
    workdir = str(encoder_checkpoint(several, tmp_path / "w"))
    result = classifiers.transfer_finetune(several, workdir)
    assert result["settings"]["metric"] == "11_point_map"
    assert 0 < result["rows"][0]["accuracy"] <= 1


def test_the_grid_is_chosen_on_validation_and_the_choice_trained_on_all(
    tiny, tmp_path, capsys, monkeypatch
):
    """With no step done: each training ends as it begins. The second candidate is the better one."""
    looked_at_validation = {}

    def fit(job, batches, run, hooks):
        state = job.init()
        now = looked_at_validation["now"] = epath.Path(run.workdir).name
        looked_at_validation[now] = any(hook.due(job.steps) for hook in hooks)
        for hook in hooks:
            if hook.due(job.steps):
                hook.run(job.steps, state)
        epath.Path(run.workdir, "checkpoints").mkdir()
        return state

    def score(trainer, state, images):
        better = "rate_0.1" in looked_at_validation["now"]
        judges = images is trainer.parts.validation
        return Score((0.9 if better else 0.2) if judges else 0.5)

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(training.Trainer, "_score", score)
    monkeypatch.setattr(training, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
    config.set_options(tiny, GRID)
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    result = classifiers.transfer_finetune(tiny, str(workdir))
    untrained, trained = result["rows"]
    (run,) = trained["runs"]
    assert run["images"] == 48  # 36 and the 12 of the validation part
    assert run["steps"] == 4
    assert untrained["runs"][0]["steps"] == 6
    folders = {path.name for path in (workdir / "transfer_finetune").iterdir()}
    # Decays are divided by the rates of the trainings at batch 16: 1e-3 / (0.01 x 16 / 256) and 1e-3 / (0.1 x 16 / 256).
    candidates = {
        f"encoder_1_of_labels_draw_0_4_steps_rate_{r}_decay_{d}"
        for r, d in (("0.01", "1.6"), ("0.1", "0.16"))
    }
    assert candidates < folders
    assert (run["learning_rate"], run["validation"]) == (0.1, 0.9)
    # A refit has the validation part among its training images.
    del looked_at_validation["now"]
    judged = {name for name, looked in looked_at_validation.items() if looked}
    assert judged == {name for name in folders - {"lock"} if not name.endswith("refit")}
    chosen = f"rate_{run['learning_rate']:g}_decay_{run['weight_decay']:g}"
    refits = [name for name in folders - candidates if name.startswith("encoder")]
    assert refits == [f"encoder_1_of_labels_draw_0_4_steps_{chosen}_refit"]
    # A network of each of the paper's 56 candidates would fill the disk: that of the result is kept.
    kept = [path.parent.name for path in (workdir / "transfer_finetune").glob("*/classifier")]
    assert kept == refits == [epath.Path(run["classifier"]).parent.name]
    assert "untrained_1_of_labels_draw_0_6_steps_rate_0.1_decay_0.16_refit" in folders
    said = capsys.readouterr().out
    assert (
        "2 of 2: encoder, 36 labels, 4 steps, learning rate 0.1 x 16 / 256, weight decay 0.16"
        in said
    )
    assert f"chosen: encoder, 48 labels, 4 steps, learning rate {run['learning_rate']:g}" in said
    assert "test accuracy" in said
    # Nothing is trained again.
    monkeypatch.setattr(training, "fit", None)
    assert classifiers.transfer_finetune(tiny, str(workdir)) == result


def test_the_grids_of_the_paper_are_the_defaults():
    c = config.default().transfer_finetune
    assert (c.steps, c.untrained_steps, c.batch_size, c.momentum) == (20_000, 40_000, 256, 0.9)
    np.testing.assert_allclose(c.learning_rate, np.logspace(-4, -1, 7), rtol=1e-3)
    np.testing.assert_allclose(c.weight_decay, [0, *np.logspace(-6, -3, 7)], rtol=1e-3)
    np.testing.assert_allclose(c.untrained_learning_rate, np.logspace(-3, 0, 7), rtol=1e-3)
    np.testing.assert_allclose(c.untrained_weight_decay, np.logspace(-5, -1.5, 8), rtol=1e-3)


@pytest.mark.parametrize(
    "name", ["caltech101", "fgvc_aircraft", "oxford_flowers102", "oxford_iiit_pet"]
)
def test_four_data_sets_are_judged_by_the_mean_over_classes(name):
    assert published_metric("auto", "tfds", name) == "mean_per_class"


def test_what_is_difficult_stays_uncounted(monkeypatch):
    members, labels = np.array([[1, 0], [-1, 1]], np.int8), np.array([1, 0])
    features = Features(None, None, 2, members=members)
    np.testing.assert_array_equal(features.targets(labels), members[labels])
    logits = np.array([[9.0, 1.0], [1.0, 0.0]])  # the difficult one is first
    monkeypatch.setattr(subjects, "features_of", lambda *_: ({"logits": logits}, labels))
    score, _ = subjects.score_of("11_point_map", None, None, None, None, members)
    assert score.value == 1.0


def test_of_equally_good_lambdas_the_strongest_is_taken(monkeypatch):
    monkeypatch.setitem(transfer.METRICS, "accuracy", lambda logits, targets: 0.5)
    rng = np.random.default_rng(0)
    part = rng.normal(size=(40, 4)).astype(np.float32), np.arange(40) % 2
    options = {"validation_fraction": 0.2, "seed": 0, "max_iterations": 20, "metric": "accuracy"}
    features = Features(part, part, 2, make_mesh(jax.devices()[:1]))
    assert transfer.fit_chosen_lambda(features, options, (1.0, 0.1, 10.0))["lambda"] == 10.0
