"""Probes against scikit-learn and loops; features of every image exactly once; a run that is followed."""

import json
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import encoder_checkpoint, random_images
from etils import epath
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import top_k_accuracy_score

import simclr_jax
from simclr_jax import assemble, config, processes
from simclr_jax.data import forget_opened, name_of, open_source
from simclr_jax.data.arrays import in_memory
from simclr_jax.data.split import DataSet
from simclr_jax.data.subsets import few_labels, split_validation
from simclr_jax.encoders import init_encoder
from simclr_jax.errors import NotFinite, UserError
from simclr_jax.evals import (
    EVALUATIONS,
    evaluate,
    follow,
    knn,
    logistic,
    on_the_way,
    probe,
    results,
    scores,
    subjects,
    transfer,
)
from simclr_jax.evals.contract import Evaluation, Features
from simclr_jax.evals.evaluate import evaluate_features, pair, why_not
from simclr_jax.evals.features import Extractor, raw_pixels
from simclr_jax.evals.follow import follow_run
from simclr_jax.evals.knn import knn_classes
from simclr_jax.evals.logistic import accuracy, fit_lambdas, fit_logistic, scale
from simclr_jax.evals.probe import probe_all_labels, probe_few_labels
from simclr_jax.evals.scores import Score
from simclr_jax.evals.transfer import LAMBDAS, fit_chosen_lambda
from simclr_jax.mesh import make_mesh
from simclr_jax.training.checkpoint import Checkpoints, Saving
from simclr_jax.training.record import about_training, saved_config, write_record
from simclr_jax.training.saved import checkpoint_folder, read_record, saved_steps
from simclr_jax.training.state import TrainState, init_head

KINDS = ("raw pixels", "untrained encoder", "encoder")


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x, y = data.data.astype(np.float32), data.target
    # Few: scikit-learn needs minutes to come as close to the optimum of all.
    x_train, x_test = scale(x[:400], x[1200:])
    return Features((x_train, y[:400]), (x_test, y[1200:]), 10)


def with_test_labels(features, labels):
    return features._replace(test=(features.test[0], labels))


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_the_fit_is_scikit_learns_optimum(digits, l2):
    (x, y), (x_test, y_test), *_ = digits
    weights = fit_logistic(x, y, l2, 10, 1000)
    # scikit-learn minimises the sum of cross-entropies + 1 / (2 C) |w|^2.
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-8, max_iter=5000).fit(x, y)

    def objective(kernel, bias):
        logits = np.asarray(x @ kernel + bias, np.float64)
        peak = logits.max(axis=1, keepdims=True)
        log_p = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
        return -log_p[np.arange(len(y)), y].mean() + l2 / 2 * np.sum(np.asarray(kernel) ** 2)

    ours = objective(weights["kernel"], weights["bias"])
    optimum = objective(theirs.coef_.T, theirs.intercept_)
    assert ours == pytest.approx(optimum, rel=1e-3)
    assert accuracy(weights, x_test, y_test) == pytest.approx(
        theirs.score(x_test, y_test), abs=2.5 / len(y_test)
    )


def test_of_equally_good_regularisations_the_strongest_is_chosen(digits, monkeypatch):
    for merit in ("accuracy", "_log_likelihood"):
        monkeypatch.setattr(probe, merit, lambda weights, x, y: jnp.float32(0.5))
    options: dict = {"validation_fraction": 0.1, "seed": 0, "seeds": 1, "max_iterations": 3}
    options["l2"] = (1e-6, 1e-3, 1e-1, 1e-4)
    assert probe_all_labels(digits, options)[1] == 1e-1


@pytest.mark.parametrize(("held_out", "chosen"), [(40, 1), (60, 2)])
def test_of_few_validation_images_the_likelihood_chooses(monkeypatch, held_out, chosen):
    """Their accuracy is coarse. Three candidates: wrong, nearly always right and sure, always right by a hair."""
    y = np.arange(held_out) % 2
    sign = np.where(y == 1, 1.0, -1.0)
    sure = np.where(np.arange(held_out) < 1, -1.0, 10.0) * sign
    of_each = np.stack([-sign, sure, 0.01 * sign])
    fits = {"x": np.stack([np.zeros_like(of_each), of_each], axis=-1)}
    monkeypatch.setattr(probe, "_fit_each_l2", lambda *_: fits)
    monkeypatch.setattr(probe, "logits", lambda weights, _: weights["x"])

    def right(weights, x, labels):
        return jnp.mean(jnp.argmax(weights["x"], -1) == labels)

    monkeypatch.setattr(probe, "accuracy", right)
    options = {"l2": (1e-1, 1e-2, 1e-3), "max_iterations": 1}
    best, _ = probe._choose_l2((None, None), (np.zeros((held_out, 1)), y), options, 2)
    assert best == chosen


def test_the_regularisation_is_chosen_without_the_test_split(digits):
    options = {
        "l2": (1e-6, 1e-3, 1e3),
        "validation_fraction": 0.1,
        "seed": 0,
        "seeds": 3,
        "max_iterations": 1000,
    }
    wrong = with_test_labels(digits, (digits.test[1] + 1) % 10)
    reached, l2, validation = probe_all_labels(digits, options)
    _, same, as_before = probe_all_labels(wrong, options)
    assert validation == as_before
    assert l2 == same
    assert l2 != 1e3
    assert reached.value > 0.85
    few = [found.value for found in probe_few_labels(digits, options, per_class=5)]
    assert len(few) == len(set(few)) == 3
    assert 0.5 < np.mean(few) < reached.value


def test_a_probe_says_its_top_5_accuracy(digits, monkeypatch):
    """For data of many classes: here of ten."""
    monkeypatch.setattr(scores, "TOP_5_FROM", 10)
    options = {"l2": (1e-3,), "validation_fraction": 0.1, "seed": 0, "seeds": 2}
    options |= {"max_iterations": 100, "labels_per_class": (1,), "label_fraction": 0.0}
    few, every = probe.rows(digits, options, "encoder")
    assert few["accuracy"] + 0.1 < few["top_5_accuracy"] < every["top_5_accuracy"]
    (x, y), (x_test, y_test), *_ = digits
    theirs = LogisticRegression(C=1 / (1e-3 * len(x)), max_iter=1000).fit(x, y)
    expected = top_k_accuracy_score(y_test, theirs.decision_function(x_test), k=5)
    assert every["top_5_accuracy"] == pytest.approx(expected, abs=2.5 / len(y_test))
    _, ((_, *cells),) = results.labels_table([few, every])
    assert cells[1] == f"{every['accuracy']:.1%}, top-5 {every['top_5_accuracy']:.1%}"


def test_the_probes_fit_to_no_label_of_the_validation_part_but_the_last_to_all(monkeypatch):
    """Each image's feature is its number, so that the fits say which images they saw."""
    count, fitted, divided = 40, [], probe.divided
    images = np.arange(count, dtype=np.float32)[:, np.newaxis]
    labels = np.arange(count) % 2

    def seen(mesh, x, y):
        fitted.append(sorted(int(row) for row in x[:, 0]))
        return divided(mesh, x, y)

    monkeypatch.setattr(probe, "divided", seen)
    mesh = make_mesh(jax.devices()[:1])
    features = Features((images, labels), (images[:4], labels[:4]), 2, mesh)
    options = {"l2": (1e-3,), "validation_fraction": 0.25, "seed": 3, "seeds": 5}
    options |= {"max_iterations": 2}
    part, held = split_validation(count, 0.25, 3)
    probe_all_labels(features, options)
    assert fitted == [sorted(part), list(range(count))]
    fitted.clear()
    probe_few_labels(features, options, per_class=10)
    assert [len(rows) for rows in fitted] == [20] * 5
    assert not set(held) & set().union(*fitted)


def test_what_is_reported_of_all_labels_is_fitted_to_the_validation_part_too(monkeypatch):
    fitted = []

    def fit(x, y, l2, classes, max_iterations):
        fitted.append(len(x))
        return {"kernel": jnp.zeros((x.shape[1], classes)), "bias": jnp.zeros(classes)}

    monkeypatch.setattr(probe, "fit_logistic", fit)
    x, y = np.arange(41, dtype=np.float32)[:, None], np.arange(41) % 3
    features = Features((x, y), (x[:4], y[:4]), 3, make_mesh(jax.devices()[:1]))
    options = {"l2": (1e-3, 1e-2), "validation_fraction": 0.25, "seed": 0, "max_iterations": 1}
    probe_all_labels(features, options)
    assert fitted[-1] == 41
    assert max(fitted[:-1]) < 41


def test_of_few_training_images_all_vote():
    options = {"knn_k": 200, "knn_temperature": 0.1}
    assert [knn.settings(options, images, 3)["k"] for images in (50, 500)] == [50, 200]


def test_an_evaluation_gets_the_metric_that_was_asked_for(tiny, tmp_path, monkeypatch):
    seen = []

    def rows(features, options, kind):
        seen.append(options["metric"])
        return [
            results.row(kind, None, [Score(0.5)]) | {"lambda": 1.0, "validation_accuracies": []}
        ]

    monkeypatch.setitem(EVALUATIONS, "transfer", EVALUATIONS["transfer"]._replace(rows=rows))
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    tiny.eval.metric = "mean_per_class"
    result = evaluate_features("transfer", tiny, str(workdir))
    assert set(seen) == {"mean_per_class"} == {result["settings"]["metric"]}
    assert follow._name_of_metric("transfer", result) == "transfer_mean_per_class"
    tiny.eval.metric = "11_point_map"  # for several labels an image
    assert evaluate_features("knn", tiny, str(workdir))["rows"]  # of accuracy, whatever is asked
    monkeypatch.setattr(subjects, "features_of", None)  # it says so before it computes features
    with pytest.raises(UserError, match=r"eval.metric=11_point_map is for several labels"):
        evaluate_features("transfer", tiny, str(workdir))


def test_what_the_largest_class_alone_would_reach_is_said(capsys):
    results.say_if_unbalanced(np.array([0] * 6 + [1, 2]), ("oak", "elm", "ash", "fir"))
    said = capsys.readouterr().out
    assert "always answering 'oak', the largest of 4, would reach 75.0%" in said
    assert "1 of 4 have no test image" in said
    results.say_if_unbalanced(np.arange(8) % 4, ("oak", "elm", "ash", "fir"))
    assert capsys.readouterr().out == ""


def test_features_are_centred_and_scaled_by_the_training_images():
    rng = np.random.default_rng(0)
    train, test = rng.normal(3, 7, (50, 4)), rng.normal(5, 2, (9, 4))
    found, of_test = (np.asarray(x) for x in scale(train, test))
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-5)
    assert np.mean(np.sum(found**2, axis=1)) == pytest.approx(1, rel=1e-5)
    factor = np.sqrt(np.mean(np.sum((train - train.mean(axis=0)) ** 2, axis=1)))
    np.testing.assert_allclose(of_test, (test - train.mean(axis=0)) / factor, rtol=1e-4, atol=1e-6)


def test_the_mean_of_many_rows_is_exact():
    """The sum of 400,000 numbers near 3 in float32 is off by some thousandths."""
    x = np.random.default_rng(0).normal(3.05, 0.029, (400_000, 2)).astype(np.float32)
    (found,) = scale(x)
    assert np.mean(np.sum(np.float64(found) ** 2, axis=1)) == pytest.approx(1, rel=1e-4)
    np.testing.assert_allclose(found.mean(axis=0, dtype=np.float64), 0, atol=1e-4)


def test_a_row_has_the_sample_deviation():
    found = results.row("encoder", 1, [Score(0.5), Score(0.6)])
    assert found["accuracy"] == pytest.approx(0.55)
    assert found["std"] == pytest.approx(0.1 / np.sqrt(2))
    assert results.row("encoder", 1, [Score(0.5)])["std"] == 0


def objective(x, y, kernel, bias, value):
    """Sum of the cross-entropies + value / 2 * |kernel|^2, in float64."""
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + bias
    peak = logits.max(axis=1, keepdims=True)
    log_p = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(y)), y].sum() + value / 2 * np.sum(np.float64(kernel) ** 2)


def optimum(x, y, value):
    """scikit-learn's classifier. By Newton's method: its default ends far above the flat optimum of a
    small lambda.
    """
    model = LogisticRegression(C=1 / value, tol=1e-10, max_iter=5000, solver="newton-cholesky")
    model.fit(np.asarray(x, np.float64), y)
    return model, objective(x, y, model.coef_.T, model.intercept_, value)


# What `optimum` finds on `digits`, by scikit-learn 1.9: it takes seconds for small lambdas.
OPTIMA = {1e-6: 0.01287001855, 1e-3: 3.350358379, 1e-2: 17.33624635, 1e-1: 75.53520016}


@pytest.mark.whole
@pytest.mark.parametrize("value", OPTIMA)
def test_the_optima_are_scikit_learns(digits, value):
    x, y = digits.train
    assert optimum(x, y, value)[1] == pytest.approx(OPTIMA[value], rel=1e-5)


def test_the_weakest_lambda_is_fitted_too(digits):
    (x, y), *_ = digits
    (weights,), _ = fit_lambdas(x, y, LAMBDAS[:1], 10, 1000)
    value = LAMBDAS[0]
    assert objective(x, y, **weights, value=value) == pytest.approx(OPTIMA[value], rel=5e-3)


@pytest.mark.parametrize("value", [1e-2, 1.0, 100.0])
def test_a_lambda_reaches_scikit_learns_optimum(digits, value):
    (x, y), (x_test, _), *_ = digits
    (weaker, weights, _), _ = fit_lambdas(x, y, [value / 10, value, value * 10], 10, 1000)
    theirs, least = optimum(x, y, value)
    assert objective(x, y, **weights, value=value) == pytest.approx(least, rel=1e-4)
    logits = x_test @ weights["kernel"] + weights["bias"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p, theirs.predict_proba(x_test), atol=5e-3)
    assert not np.allclose(weaker["kernel"], weights["kernel"], rtol=1e-2)


def test_a_path_of_fits_is_rough_but_for_its_end(digits):
    (x, y), *_ = digits
    lambdas = [1e-3, 1e-2, 1e-1]
    least = [OPTIMA[value] for value in lambdas]
    above = {}
    for enough in (0.0, logistic.ROUGHLY):
        fits, unfinished = fit_lambdas(x, y, lambdas, 10, 1000, None, enough)
        assert unfinished == []
        above[enough] = [
            objective(x, y, **weights, value=value) / lowest - 1
            for value, weights, lowest in zip(lambdas, fits, least, strict=True)
        ]
    assert max(above[0.0]) < 1e-4
    assert above[logistic.ROUGHLY][0] < 1e-4
    assert 1e-4 < max(above[logistic.ROUGHLY]) < 0.05
    with pytest.raises(UserError, match="not finite"):
        fit_lambdas(np.full((4, 2), np.nan, np.float32), np.arange(4) % 2, lambdas, 2, 10)


@pytest.mark.parametrize(("split", "kind"), [(0, "encoder"), (1, "untrained encoder")])
def test_features_that_are_not_finite_are_no_accuracy(split, kind):
    """kNN and probe would find the accuracy of chance."""
    rng = np.random.default_rng(0)
    kinds = ("encoder", "untrained encoder")
    parts = [({k: rng.normal(size=(6, 4)) for k in kinds}, np.arange(6) % 3) for _ in range(2)]
    assert set(pair(parts[0], parts[1], 3, make_mesh())) == set(kinds)
    parts[split][0][kind][5, 3] = np.inf
    with pytest.raises(
        NotFinite, match=f"the features of the {kind} hold numbers that are not finite"
    ):
        pair(parts[0], parts[1], 3, make_mesh())


@pytest.mark.parametrize("several", [False, True])
def test_images_without_a_label_change_no_lambda(digits, several):
    """The penalty is a share of the images that count; those without labels lie at the mean, which centring takes off."""
    (x, y), *_ = digits
    x, y = x[:300], y[:300]
    y = np.eye(10, dtype=np.int64)[y] if several else y
    unlabelled = np.broadcast_to(x.mean(axis=0), x.shape)
    both = np.concatenate([x, unlabelled]), np.concatenate([y, np.full_like(y, -1)])
    ours, theirs = (fit_lambdas(a, b, [10.0], 10, 1000)[0][0] for a, b in ((x, y), both))
    np.testing.assert_allclose(theirs["kernel"], ours["kernel"], rtol=1e-3, atol=1e-5)


def test_features_need_not_be_centred_or_scaled(digits):
    """The same optimum, where scikit-learn's solver ends above it."""
    (x, y), *_ = digits
    x = 7 * x + 3
    (weights,), unfinished = fit_lambdas(x, y, [1.0], 10, 1000)
    assert unfinished == []
    assert fit_lambdas(x, y, [1.0, 1e5], 10, 20)[1] == [1.0]  # in so few iterations
    theirs = LogisticRegression(tol=1e-8, max_iter=20000).fit(x, y)
    optimum = objective(x, y, theirs.coef_.T, theirs.intercept_, 1.0)
    assert objective(x, y, **weights, value=1.0) <= optimum * (1 + 1e-6)


def test_the_lambda_is_chosen_on_validation_and_fitted_to_all(digits):
    assert len(LAMBDAS) == 45
    np.testing.assert_allclose([LAMBDAS[0], LAMBDAS[-1]], [1e-6, 1e5])
    lambdas = (1e-2, 1.0, 1e2, 1e5)
    options = {"validation_fraction": 0.2, "seed": 0, "max_iterations": 1000} | {
        "metric": "accuracy"
    }
    x_test, y_test = digits.test
    found = fit_chosen_lambda(digits, options, lambdas)
    wrong = fit_chosen_lambda(with_test_labels(digits, (y_test + 1) % 10), options, lambdas)
    assert found["lambda"] == wrong["lambda"] != 1e5
    assert found["validation_accuracies"] == wrong["validation_accuracies"]
    theirs = LogisticRegression(C=1 / found["lambda"], tol=1e-8, max_iter=5000).fit(*digits.train)
    assert found["score"].value == pytest.approx(
        theirs.score(x_test, y_test), abs=2.5 / len(y_test)
    )
    right = theirs.predict(x_test) == y_test
    by_class = np.mean([right[y_test == c].mean() for c in range(10)])
    assert found["mean_per_class_accuracy"] == pytest.approx(by_class, abs=0.01)


def test_a_reported_fit_that_has_not_converged_is_said(digits, monkeypatch, capsys):
    """Where all fits on the part have, and that on all training images has not."""
    lambdas = (1e-2, 1.0, 1e2)

    def fitted(x, y, values, *how):
        fits, _ = fit_lambdas(x, y, values, *how)
        return fits, [min(values)] if len(x) == len(digits.train[0]) else []

    monkeypatch.setattr(transfer, "fit_lambdas", fitted)
    options = {"validation_fraction": 0.2, "seed": 0, "max_iterations": 50, "metric": "accuracy"}
    found = fit_chosen_lambda(digits, options, lambdas)
    assert found["unfinished"] == [found["lambda"]]
    assert "the fit that is reported" in capsys.readouterr().out


@pytest.mark.parametrize("count", [3, 8])  # devices; neither divides 398
def test_probes_and_neighbours_are_the_same_on_any_devices(digits, count, monkeypatch):
    """Fits that converge: until then, L-BFGS follows the rounding of the sums."""
    x, y = digits.train
    monkeypatch.setattr(logistic, "_DIVIDE_FROM", 0)
    mesh = make_mesh(jax.devices()[:count])
    (one,), (many,) = (fit_lambdas(x[:398], y[:398], [1.0], 10, 1000, m)[0] for m in (None, mesh))
    np.testing.assert_allclose(
        many["kernel"], one["kernel"], atol=2e-3 * np.abs(one["kernel"]).max()
    )
    settings = {"k": 20, "temperature": 0.1}
    assert knn_accuracy(digits._replace(mesh=mesh), **settings) == knn_accuracy(digits, **settings)


def test_few_labels_are_as_many_of_each_class():
    y = np.repeat([0, 1, 2], [50, 30, 4])
    picked = few_labels(y, 10, seed=0)
    np.testing.assert_array_equal(np.bincount(y[picked]), [10, 10, 4])
    assert len(set(picked)) == 24
    assert not np.array_equal(picked, few_labels(y, 10, seed=1))
    np.testing.assert_array_equal(picked, few_labels(y, 10, seed=0))


def test_the_validation_part_is_disjoint():
    part, held = split_validation(105, 0.1, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([part, held])), np.arange(105))
    assert len(held) == 10


def knn_accuracy(features, **settings):
    return np.mean(knn_classes(features, **settings) == features.test[1])


def knn_loop(train, test, k, temperature):
    bank, labels = (np.asarray(a, np.float64) for a in train)
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    right = 0
    for x, y in zip(*test, strict=True):
        s = bank @ (x / np.linalg.norm(x))
        votes = np.zeros(10)
        for i in np.argsort(-s)[:k]:
            votes[int(labels[i])] += np.exp(s[i] / temperature)
        right += votes.argmax() == y
    return right / len(test[1])


def test_the_nearest_are_found_without_sorting_all():
    """On CPUs XLA sorts all similarities, in 20 times the time, where it merges the vote into their top k."""
    shapes = [(8, 4), (600, 4), (600,), ()]
    queries, bank, labels, temperature = (jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes)
    labels = labels.update(dtype=jnp.int32)
    lowered = knn._vote.lower(queries, bank, labels, temperature, k=20, classes=3)
    program = str(lowered.compile().as_text())
    assert "TopK" in program
    assert " sort(" not in program


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.01)])
def test_knn_equals_its_definition(digits, k, temperature):
    found = knn_accuracy(digits, k=k, temperature=temperature)
    # A tie between two neighbours may be broken either way.
    expected = knn_loop(digits.train, digits.test, k, temperature)
    assert found == pytest.approx(expected, abs=1.5 / len(digits.test[1]))


@pytest.mark.parametrize("count", [1, 16, 37])
def test_features_are_of_every_image_once(count, devices):
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    batches = [
        {"image": images[i : i + 16], "label": np.arange(count, dtype=np.int32)[i : i + 16]}
        for i in range(0, count, 16)
    ]
    extractor = Extractor(
        lambda scale, x: {"mean": scale * jnp.mean(x.astype(jnp.float32), axis=(1, 2))},
        batch_size=16,
        size=4,
        mesh=make_mesh(devices),
    )
    features, labels = extractor.extract(jnp.float32(2.0), batches, count)
    np.testing.assert_array_equal(labels, np.arange(count))
    np.testing.assert_allclose(features["mean"], 2.0 * np.arange(count)[:, None] * np.ones(3))


def test_raw_pixels_are_the_pixels():
    x = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3)).astype(np.uint8)
    np.testing.assert_allclose(raw_pixels(x, 3), x.reshape(3, -1) / 255, rtol=1e-6)
    assert raw_pixels(x, 1).shape == (3, 64)
    large = np.full((2, 64, 64, 3), 100, np.uint8)
    assert raw_pixels(large, 3).shape == (2, 32 * 32 * 3)
    np.testing.assert_allclose(raw_pixels(large, 3), 100 / 255, rtol=1e-5)


def means_for_each_lambda(x, y, lambdas, classes, *_, **__):
    """Stands for `fit_lambdas` where the fit is not what is tested: the nearest mean of a class."""
    kernel = np.stack([x[y == c].mean(axis=0) for c in range(classes)], axis=1)
    bias = -0.5 * np.sum(kernel**2, axis=0)
    return [{"kernel": kernel, "bias": bias} for _ in lambdas], []


def test_the_few_labels_of_a_probe_are_given_as_numbers_and_as_a_share(monkeypatch, capsys):
    """2 % of 150 images in 3 classes is one of each class."""
    x, y = np.eye(150, 4, dtype=np.float32), np.arange(150) % 3
    features = Features((x, y), (x, y), 3)
    monkeypatch.setattr(probe, "probe_few_labels", lambda _, options, n: [Score(n / 10)] * 2)
    monkeypatch.setattr(probe, "probe_all_labels", lambda *_: (Score(0.9), 1e-3, 0.8))
    found = {}
    for share in (0.0, 0.02, 0.08):
        options = {"labels_per_class": (10, 4), "label_fraction": share}
        options |= {"validation_fraction": 0.1, "seed": 0}
        rows = probe.rows(features, options, "encoder")
        found[share] = [(r["labels_per_class"], r["seeds"], r["accuracy"]) for r in rows]
    few_and_all = [(4, 2, pytest.approx(0.4)), (10, 2, pytest.approx(1.0)), (None, 1, 0.9)]
    assert found[0.0] == found[0.08] == few_and_all
    assert found[0.02] == [(1, 2, pytest.approx(0.1)), *few_and_all]
    assert "have fewer" not in capsys.readouterr().out
    probe.rows(features, options | {"labels_per_class": (60,)}, "encoder")
    assert "60 labels per class (3 classes have fewer: all of theirs)" in capsys.readouterr().out


@pytest.mark.whole
def test_evaluations_write_their_settings_and_all_rows(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "LAMBDAS", LAMBDAS[::11])
    monkeypatch.setattr(transfer, "fit_lambdas", means_for_each_lambda)
    # 16 pixels and 16 numbers of h: every kind is fitted by the same programs.
    rng = np.random.default_rng(0)
    arrays = {
        f"{split}_{name}": x
        for split, count in (("train", 48), ("test", 21))
        for name, x in (
            ("images", rng.integers(0, 256, (count, 4, 4, 1)).astype(np.uint8)),
            ("labels", np.arange(count) % 3),
        )
    }
    np.savez(tiny.data.path, **arrays)
    tiny.data.image_size = 4
    tiny.eval.labels_per_class = ()
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    evaluate_features("probe", tiny, str(workdir))
    result = json.loads((workdir / "probe.json").read_text())
    assert result["step"] == 1
    assert (result["train_images"], result["test_images"]) == (48, 21)
    assert [(r["features"], r["labels_per_class"]) for r in result["rows"]] == [
        (kind, None) for kind in KINDS
    ]
    for row in result["rows"]:
        assert 0 <= row["accuracy"] <= 1
        assert row["seeds"] == 1
    assert result["settings"]["validation_fraction"] == 0.1

    tiny.data.eval_crop = 0.875
    transferred = evaluate_features("transfer", tiny, str(workdir))
    assert [row["features"] for row in transferred["rows"]] == list(KINDS)
    assert len(transferred["rows"][0]["validation_accuracies"]) == 5
    written = json.loads((workdir / "transfer.json").read_text())
    assert written["config"]["data"]["eval_crop"] == 1.0  # appendix B.8: the whole square
    assert tiny.data.eval_crop == 0.875  # the caller's stays as it is

    evaluate_features("knn", tiny, str(workdir))
    result = json.loads((workdir / "knn.json").read_text())
    assert result["settings"] | {"k": 48, "temperature": 0.1} == result["settings"]
    assert result["settings"]["views"]["eval_crop"] == 0.875
    assert result["settings"]["labels"]["baselines"] is True
    assert [row["features"] for row in result["rows"]] == list(KINDS)

    # On other data than those of training: a result of its own, without the baselines if so wished.
    np.savez(tmp_path / "fewer.npz", **{name: x[:20] for name, x in arrays.items()})
    tiny.data.path = str(tmp_path / "fewer.npz")
    assert evaluate_features("knn", tiny, str(workdir))["train_images"] == 20
    assert list(workdir.glob("knn_fewer_*.json"))
    assert json.loads((workdir / "knn.json").read_text()) == result
    tiny.data.source, tiny.data.name, tiny.data.path = "tfds", "digits", ""
    tiny.eval.baselines = False
    other = evaluate_features("knn", tiny, str(workdir))
    assert (other["train_images"], other["test_images"]) == (1437, 360)
    assert [row["features"] for row in other["rows"]] == ["encoder"]
    (written,) = workdir.glob("knn_digits_*.json")
    assert json.loads(written.read_text())["rows"] == other["rows"]


def nearest_mean(x, y, x_test, y_test):
    """The share of test images that are nearest to the mean of their class, by a loop."""
    means = [np.mean([v for v, c in zip(x, y, strict=True) if c == k], axis=0) for k in range(3)]
    found = [np.argmin([np.linalg.norm(v - mean) for mean in means]) for v in x_test]
    return float(np.mean(found == y_test))


MEANS = Evaluation(
    text="the nearest of the classes' means",
    rows=lambda features, options, kind: [
        results.row(kind, None, [Score(nearest_mean(*features.train, *features.test))])
    ],
    settings=lambda options, images, classes: {"classes": classes, "seed": options["seed"]},
    title=lambda settings: f"The nearest of {settings['classes']} means, test accuracy",
    table=results.labels_table,
    changes={"data.eval_crop": 0.5},
    chooses=True,
    metric="mean_accuracy",
)


def test_an_evaluation_is_one_row_of_the_table(tiny, tmp_path, monkeypatch, capsys):
    """It is run by name, on the way too, with its own settings, title, options and metric."""
    monkeypatch.setitem(EVALUATIONS, "means", MEANS)
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    tiny.eval.on_the_way = "means"
    watch = on_the_way.OnTheWay(tiny, 1, assemble.pretraining(tiny))
    trained = subjects.trained(tiny, str(workdir), make_mesh()).encoder
    parts = {part: {"encoder": tree} for part, tree in trained.items()}
    on_the_way_metrics = watch.run(1, TrainState(step=None, opt_state=None, **parts))
    capsys.readouterr()
    result = simclr_jax.evaluate("means", str(workdir), seed=3)
    said = capsys.readouterr().out
    assert "The nearest of 3 means, test accuracy" in said
    assert [row["features"] for row in result["rows"]] == list(KINDS)
    assert result["settings"] == {
        "classes": 3,
        "seed": 3,
        "labels": {
            "labels_per_class": [1],
            "label_fraction": 0.0,
            "seeds": 2,
            "baselines": True,
        },
        "views": {
            "image_size": tiny.data.image_size,
            "eval_crop": 0.5,
            "upright": True,
            "sample_bits": 0,
            "antialias": False,
        },
    }
    written = json.loads((workdir / "means.json").read_text())
    assert written["rows"] == result["rows"]
    assert written["config"]["data"]["eval_crop"] == 0.5

    with np.load(tiny.data.path) as file:
        arrays = dict(file)
    encoder = simclr_jax.load_encoder(workdir)
    scores = {}
    for crop in (0.5, 1.0):
        tiny.data.eval_crop = crop
        views = assemble.views(tiny, make_mesh(jax.devices()[:1]))
        h = []
        for split in ("train", "test"):
            images = assemble.images_of(tiny, getattr(assemble.data_set(tiny), split))
            seen = [batch["image"] for batch in views.evaluation_batches(images, 16)]
            h.append(encoder(np.concatenate(seen)))
        scores[crop] = nearest_mean(h[0], arrays["train_labels"], h[1], arrays["test_labels"])
    assert result["rows"][2]["accuracy"] == pytest.approx(scores[0.5])
    assert on_the_way_metrics == {"mean_accuracy": pytest.approx(scores[0.5])}
    assert scores[0.5] != scores[1.0]  # else a crop that is not changed would pass

    with pytest.raises(
        UserError, match=r"eval\.validation_fraction=0 leaves means .*: expected a number"
    ):
        simclr_jax.evaluate("means", str(workdir), **{"eval.validation_fraction": 0.0})
    with pytest.raises(UserError, match="unknown evaluation 'mean': expected one of probe, knn"):
        simclr_jax.evaluate("mean", str(workdir))


def test_without_a_validation_part_there_is_no_probe(tiny, tmp_path):
    assert not why_not(tiny, "probe")
    tiny.eval.validation_fraction = 0.0
    assert why_not(tiny, "probe").startswith("eval.validation_fraction=0 leaves probe nothing")
    with pytest.raises(
        UserError, match=r"eval\.validation_fraction=0 leaves probe .*: expected a number"
    ):
        evaluate_features("probe", tiny, str(tmp_path))
    tiny.eval.on_the_way, tiny.eval.every_steps = "probe", 2
    with pytest.raises(
        UserError, match=r"eval\.validation_fraction=0 leaves probe .*: expected a number"
    ):
        on_the_way.evaluations_on_the_way(tiny, assemble.pretraining(tiny))


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b'{"config": {}}', b'{"config": {}, "plan": "\xff"}']
)
def test_a_damaged_record_of_a_run_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="is not what training wrote: give a --config"):
        saved_config(str(tmp_path))


def test_a_record_that_a_network_file_system_hides_is_read_by_process_0(
    tiny, tmp_path, monkeypatch
):
    """The processes that do not see it yet would wait for checkpoints, and the other ones for them."""
    record = json.dumps({"config": tiny.to_dict(), "plan": {}})
    monkeypatch.setattr(processes, "text_of_first", lambda text: record)
    monkeypatch.setattr(processes, "as_first_process_says", lambda number: True)
    assert saved_config(str(tmp_path / "hidden")) == json.loads(record)["config"]


def test_the_untrained_encoder_is_not_a_straw_man(tiny_resnet):
    """It sees the whole image, at the scale that training would give it."""
    tiny_resnet.views.color_strength = tiny_resnet.views.grey_probability = 0.0
    network = assemble.encoder(tiny_resnet)
    train = assemble.data_set(tiny_resnet).train
    tiny_resnet.eval.batch_size = 48
    images = assemble.images_of(tiny_resnet, train)
    variables = subjects.untrained(tiny_resnet, images, make_mesh(jax.devices()[:1]))
    scales = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "scale"
    ]
    assert scales
    assert all(np.all(np.asarray(scale) == 1) for scale in scales)

    @jax.jit
    def apply(views):
        return network.apply(
            jax.device_get(variables),
            views,
            train=False,
            capture_intermediates=lambda module, _: module.name == "stem_norm",
            mutable=["intermediates"],
        )

    views = train.source.arrays.astype(np.float32) / 255
    h, seen = apply(views)
    normed = np.asarray(seen["intermediates"]["stem_norm"]["__call__"][0])
    assert 0.5 < normed.std() < 2
    changed = views.copy()
    changed[:, -3:, -3:] = 1 - changed[:, -3:, -3:]
    assert np.all(np.abs(h - apply(changed)[0]).max(axis=1) > 1e-4)


def test_data_without_labels_cannot_be_probed(tiny, tmp_path):
    np.savez(tmp_path / "bare.npz", train_images=np.zeros((16, 12, 12, 3), np.uint8))
    tiny.data.path = str(tmp_path / "bare.npz")
    assert why_not(tiny, "probe").startswith("the data have no labels")
    with pytest.raises(UserError, match="the data have no labels"):
        evaluate_features("probe", tiny, str(tmp_path))


def save(workdir, c, step, state):
    """Saves a checkpoint as pretraining does; the ones before it are deleted."""
    train = assemble.data_set(c).train
    record = {
        "config": c.to_dict(),
        "step": step,
        "window": [],
        "data_fingerprint": train.fingerprint(),
    }
    with Checkpoints(str(workdir), Saving(every_steps=1, keep_last=1)) as checkpoints:
        checkpoints.save(step, state, record)


@pytest.fixture
def trained_beside(tiny, tmp_path, monkeypatch):
    """(configuration, workdir, moments, evaluated): while a follower sleeps, the next of `moments` of
    a training of 6 steps comes to pass: "begins", a step that is saved, or an error that is raised.
    `evaluated` collects the steps that were evaluated.
    """
    tiny.train.steps = 6
    tiny.eval.baselines, tiny.eval.labels_per_class = False, ()
    workdir, data = tmp_path / "w", assemble.data_set(tiny)
    plan, mesh = assemble.plan_of(tiny, data.train.count), make_mesh(jax.devices()[:1])
    state = jax.device_get(assemble.pretraining_job(tiny, plan, None, mesh).init())
    moments: list = []
    evaluated: list = []

    def passes(moment):
        if moment == "begins":
            write_record(tiny, about_training(plan, data, data.train.fingerprint()), str(workdir))
        elif isinstance(moment, int):
            rng = np.random.default_rng(moment)
            params = jax.tree.map(
                lambda x: x + rng.normal(size=x.shape).astype(np.float32), state.params
            )
            save(workdir, tiny, moment, state.replace(params=params))
        else:
            raise moment

    def sleep(_):
        assert moments, "it waits for ever"
        passes(moments.pop(0))

    def result_of(evaluation, c, features, step, metric):
        evaluated.append(step)
        return original(evaluation, c, features, step, metric)

    original = evaluate.result_of
    monkeypatch.setattr(evaluate, "result_of", result_of)
    monkeypatch.setattr(follow, "time", types.SimpleNamespace(sleep=sleep))
    return tiny, workdir, moments, evaluated


@pytest.mark.whole
def test_a_run_is_followed_to_its_last_step(trained_beside):
    """Also from before it begins, and after a restart; no step is evaluated twice."""
    c, workdir, moments, evaluated = trained_beside
    moments += ["begins", 2, 3, KeyboardInterrupt(), 5, 6]
    with pytest.raises(KeyboardInterrupt):
        follow_run("probe", c, str(workdir))
    assert evaluated == [2, 3]
    result = follow_run("probe", c, str(workdir))
    assert evaluated == [2, 3, 5, 6]
    file = workdir / "probe_followed.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 5, 6]
    assert result["step"] == 6
    last = {name: lines[-1][name] for name in ("step", "probe_accuracy")}
    assert last == {"step": 6, "probe_accuracy": result["rows"][0]["accuracy"]}
    assert json.loads((workdir / "probe.json").read_text())["rows"] == result["rows"]
    # Once more, with nothing left to do.
    again = follow_run("probe", c, str(workdir))
    assert again["rows"] == result["rows"]
    assert evaluated == [2, 3, 5, 6]
    assert [json.loads(line) for line in file.read_text().splitlines()] == lines
    # Each line is what the evaluation of that checkpoint says.
    assert evaluate_features("probe", c, str(workdir))["rows"] == result["rows"]


def test_a_run_in_the_place_of_a_former_one_is_followed_anew(trained_beside, tmp_path):
    c, workdir, moments, evaluated = trained_beside
    moments += ["begins", 6]
    follow_run("knn", c, str(workdir))
    shutil.rmtree(workdir / "checkpoints")
    moments += ["begins", 5, 6]
    (workdir / "config.json").unlink()
    follow_run("knn", c, str(workdir))
    assert evaluated == [6, 5, 6]
    lines = [json.loads(line) for line in (workdir / "knn_followed.jsonl").open()]
    assert [line["step"] for line in lines] == [5, 6]
    assert {line["run"] for line in lines} == {
        json.loads((workdir / "config.json").read_text())["run"]
    }


def test_a_folder_of_checkpoints_cannot_be_followed(tiny, tmp_path):
    """It lacks config.json, which says how long the run is: the command would wait for ever."""
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    for folder in (workdir, workdir / "checkpoints", checkpoint_folder(workdir) / "1"):
        (workdir / "config.json").unlink(missing_ok=True)
        with pytest.raises(UserError, match="expected the workdir of a run, in which config"):
            follow_run("knn", tiny, str(folder))


@pytest.mark.whole
def test_a_run_is_followed_anew_with_other_settings(trained_beside):
    c, workdir, moments, evaluated = trained_beside
    moments += ["begins", 5, 6]
    follow_run("knn", c, str(workdir))
    assert evaluated == [5, 6]
    evaluated.clear()
    c.eval.knn_k = 3
    assert follow_run("knn", c, str(workdir))["settings"]["k"] == 3
    assert evaluated == saved_steps(workdir)
    assert len((workdir / "knn_followed.jsonl").read_text().splitlines()) == len(evaluated)
    # Another call has replaced the result of the last step: that step alone is evaluated again.
    c.eval.knn_k = 2
    evaluate_features("knn", c, str(workdir))
    evaluated.clear()
    c.eval.knn_k = 3
    assert follow_run("knn", c, str(workdir))["settings"]["k"] == 3
    assert evaluated == [6]
    evaluated.clear()
    c.eval.seeds, c.eval.labels_per_class = 1, (2,)  # they change no line, and the result
    follow_run("knn", c, str(workdir))
    assert evaluated == [6]
    evaluated.clear()
    c.data.eval_crop = 0.5
    follow_run("knn", c, str(workdir))
    assert evaluated == saved_steps(workdir)


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_passed_over(trained_beside, monkeypatch):
    c, workdir, moments, evaluated = trained_beside
    moments += ["begins", 2, 4]
    original = subjects.trained

    def read_slowly(*args, step=None, **more):
        if step == 4:  # training saves step 6, and keeps only the newest
            moments.append(6)
            follow.time.sleep(0)
            folder = checkpoint_folder(workdir) / "4"
            assert not folder.exists()
            folder.mkdir()  # half deleted
        return original(*args, **(more | {"step": step}))

    monkeypatch.setattr(subjects, "trained", read_slowly)
    assert follow_run("knn", c, str(workdir))["step"] == 6
    assert evaluated == [2, 6]
    # The newest one is never deleted: if it cannot be read, it is damaged.
    c.train.steps = 8
    newest = checkpoint_folder(workdir) / "6"
    shutil.rmtree(newest / "encoder")
    (workdir / "knn.json").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        follow_run("knn", c, str(workdir))
    assert read_record(newest)["step"] == 6


@pytest.mark.parametrize("temperature", [1e-4, 1e-3, 0.1])
def test_neighbours_vote_at_any_temperature(temperature):
    """The nearest image decides at a low one, however far away it is."""
    angles = np.asarray([0.9, 1.4, 2.0])
    train = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    features = Features(
        (train, np.asarray([2, 1, 0])), (np.asarray([[1.0, 0.0]], np.float32), np.asarray([2])), 3
    )
    assert knn_accuracy(features, k=3, temperature=temperature) == 1.0


def test_every_image_has_a_part_in_the_statistics_of_the_untrained_encoder(tiny_resnet):
    train, mesh = assemble.data_set(tiny_resnet).train, make_mesh(jax.devices()[:1])

    def statistics(images):
        images = assemble.images_of(tiny_resnet, in_memory(images, train.all_labels()))
        variables = subjects.untrained(tiny_resnet, images, mesh)
        return np.asarray(jax.tree.leaves(variables["batch_stats"])[0])

    arrays = train.source.arrays
    of_all = statistics(arrays)
    for i in (0, 23, 47):
        changed = arrays.copy()
        changed[i] = 255 - changed[i]
        assert np.abs(statistics(changed) - of_all).max() > 1e-4


def test_grey_images_have_one_channel_of_raw_pixels(tiny, tmp_path, monkeypatch):
    """Three equal channels would weigh each pixel three times against the regularisation."""
    with np.load(tiny.data.path) as file:
        arrays = dict(file)
    for name in ("train_images", "test_images"):
        arrays[name] = arrays[name][..., :1]
    np.savez(tiny.data.path, **arrays)
    workdir, widths = encoder_checkpoint(tiny, tmp_path / "w"), {}
    evaluation = EVALUATIONS["knn"]

    def rows(features, options, kind):
        widths[kind] = features.train[0].shape[1]
        return evaluation.rows(features, options, kind)

    monkeypatch.setitem(EVALUATIONS, "knn", evaluation._replace(rows=rows))
    evaluate_features("knn", tiny, str(workdir))
    assert widths == {"raw pixels": 144, "untrained encoder": 16, "encoder": 16}


def test_the_untrained_encoder_depends_on_no_devices_and_no_batch(tiny_resnet):
    images = assemble.images_of(tiny_resnet, assemble.data_set(tiny_resnet).train)
    found = []
    for devices, batch_size in ((1, 16), (3, 24), (8, 64)):
        tiny_resnet.eval.batch_size = batch_size
        mesh = make_mesh(jax.devices()[:devices])
        variables = subjects.untrained(tiny_resnet, images, mesh)
        assert all(len(x.sharding.device_set) == devices for x in jax.tree.leaves(variables))
        found.append(jax.device_get(variables))
    for other in found[1:]:
        jax.tree.map(np.testing.assert_array_equal, other, found[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"source": "tfds", "name": "cifar10", "path": "/tfds"}, "cifar10"),
        ({"source": "folder", "name": "imagenet2012", "path": "/home/me/birds"}, "birds"),
        ({"source": "folder", "name": "", "path": "/data/emoji/train"}, "emoji"),
        ({"source": "arrays", "name": "", "path": "tinted.npz"}, "tinted"),
        ({"source": "parquet", "name": "", "path": "cats/*.parquet"}, "cats"),
        ({"source": "parquet", "name": "", "path": "cats/train/*.parquet"}, "cats"),
        ({"source": "parquet", "name": "", "path": "/data/cats/**/*.parquet"}, "cats"),
        ({"source": "folder", "name": "", "path": "/home/me/photos.v2"}, "photos.v2"),
        ({"source": "synthetic", "name": "cifar10", "path": ""}, "synthetic"),
        ({"source": "synthetic", "name": "", "path": ""}, "synthetic"),
    ],
)
def test_data_are_called_what_a_person_calls_them(options, expected):
    assert name_of(options) == expected


def test_two_shares_of_as_many_labels_a_class_have_a_column_each():
    """100 images of 10 classes: 1 % and 10 % are one label per class."""
    rows = [
        results.row("encoder", per_class, [Score(accuracy)]) | {"label_fraction": share}
        for per_class, share, accuracy in ((1, 0.01, 0.1), (1, 0.1, 0.2), (None, 1.0, 0.3))
    ]
    header, lines = results.labels_table(rows)
    assert header == ["labels per class", "1 (1%)", "1 (10%)", "all"]
    assert lines == [["encoder", "10.0%", "20.0%", "30.0%"]]


def test_results_of_other_data_have_files_of_their_own(tiny, tmp_path, capsys):
    """Two folders called train, two test splits, and a name with a slash."""
    saved: dict[str, str | None] = {"data_fingerprint": "run", "test_fingerprint": "test"}

    class Print:
        def __init__(self, text):
            self.fingerprint = lambda: text

    def name(train, test, path="x/train", **options):
        config.set_options(tiny, {"data.path": path} | options)
        data = DataSet(Print(train), Print(test))
        return results.path_of(tiny, saved, data, str(tmp_path), "knn").name

    assert name("run", "test") == "knn.json"
    assert "other" not in capsys.readouterr().out
    names = {name("a", "b"), name("c", "b", path="y/train"), name("a", "d"), name("run", "d")}
    assert len(names) == 4
    assert all(some.startswith(("knn_x_", "knn_y_")) for some in names)
    assert "other test images or labels than the run's" in capsys.readouterr().out
    assert "/" not in name("a", "b", **{"data.name": "set/config"})
    saved = dict.fromkeys(saved)
    assert name("a", "b").startswith("knn_x_")
    assert "weights were imported, and have no data of their own" in capsys.readouterr().out
    tiny.data.test_fraction = 0.2
    name("a", "b")
    assert "trained on" not in capsys.readouterr().out  # nothing is known
    saved = {"data_fingerprint": "run"}  # of an earlier version
    assert name("run", "d", **{"data.name": ""}) == "knn.json"


def test_test_images_that_were_trained_on_are_told(tiny, tmp_path, capsys):
    """A larger part than training left out, from the same folder however it is named; and the training images themselves."""

    class Print:
        def __init__(self, text):
            self.fingerprint = lambda: text

    def is_told(then, now, test="test", count=40, **more):
        record = tiny.copy_and_resolve_references()
        config.set_options(record, then)
        evaluation = tiny.copy_and_resolve_references()
        config.set_options(evaluation, now)
        saved = {
            "data_fingerprint": "run",
            "config": record.to_dict(),
            "training_images": 40,
        } | more
        train = Print("a")
        train.count = count
        results.path_of(evaluation, saved, DataSet(train, Print(test)), str(tmp_path), "knn")
        return "may have been trained on some of the test images" in capsys.readouterr().out

    fifth = {"data.test_fraction": 0.2}
    assert is_told({}, fifth)
    assert not is_told(fifth, fifth | {"seed": 7})  # the seed divides nothing
    assert is_told(fifth, fifth, partly_labelled=True)  # other labels were held out
    assert not is_told(fifth, {"data.test_fraction": 0.1}, partly_labelled=True)
    assert is_told(
        fifth, {"data.test_fraction": 0.1, "data.labels_file": "b.csv"}, partly_labelled=True
    )
    assert is_told(fifth, fifth, count=41)  # others are held out of another number of images
    assert not is_told(fifth, {"data.test_fraction": 0.1})  # a part of the fifth
    assert is_told(fifth, {"data.test_fraction": 0.3})
    assert is_told({"data.path": os.path.abspath("photos")}, fifth | {"data.path": "./photos"})
    assert not is_told({}, fifth | {"data.path": "elsewhere"})
    assert not is_told({}, {})
    assert is_told({}, {}, test="run")


def test_other_labels_of_a_partly_labelled_folder_hold_out_images_that_were_trained_on(
    tiny, tmp_path, capsys
):
    arrays = {"train_images": random_images(60, 12, 12)}
    for name, labelled in (("a", range(30)), ("b", range(30, 60))):
        labels = np.full(60, -1)
        labels[list(labelled)] = np.arange(30) % 3
        np.savez(tmp_path / f"{name}.npz", **arrays, train_labels=labels)
    tiny.data.test_fraction, tiny.data.path = 0.2, str(tmp_path / "a.npz")
    train = open_source(tiny.data.to_dict() | {"seed": 0}).train
    saved = {
        "data_fingerprint": train.fingerprint(),
        "config": tiny.to_dict(),
        "training_images": train.count,
    }
    shutil.copy(tmp_path / "b.npz", tmp_path / "a.npz")
    forget_opened()
    others = open_source(tiny.data.to_dict() | {"seed": 0})
    assert others.train.count == train.count
    results.path_of(tiny, saved, others, str(tmp_path), "knn")
    assert "may have been trained on some of the test images" in capsys.readouterr().out


def test_a_result_is_called_after_its_data_and_says_its_settings(tiny, tmp_path, capsys):
    tiny.data.path, tiny.data.test_path = "x/train", "y/held out/"
    result = {"config": tiny.to_dict(), "settings": {"k": 3, "l2": [0.1, 0.2], "temperature": 0.1}}
    name = results._name_of(tiny.data.to_dict())
    of_data = f"on {name_of(tiny.data.to_dict())}, test images of held out"
    old: dict = {"rows": []}  # of an earlier version
    alike = {f"knn_{name}_0a1b2c": result, f"knn_{name}_0a1b2d": result}
    titles = results.titles_of({"knn": result, "knn_step_5": result, "probe": old} | alike)
    assert list(titles.values()) == [
        "knn",
        "knn_step_5",
        "probe",
        f"knn {of_data} (0a1b2c)",
        f"knn {of_data} (0a1b2d)",
    ]
    (title,) = results.titles_of({f"probe_z_{name}_0a1b2c": result}).values()
    assert title == f"probe_z {of_data}"
    assert results.settings_in_words(result["settings"]) == "k 3, temperature 0.1"
    path = epath.Path(tmp_path) / "knn.json"
    for changed, said in (
        ({}, ""),
        ({}, ""),
        ({"k": 5}, "replaces    knn.json, made with k 3"),
        ({"k": 5, "l2": (0.1, 0.3)}, "replaces    knn.json, made with l2 [0.1, 0.2]"),
        (
            {"k": 5, "l2": (0.1, 0.3), "views": {"eval_crop": 1.0}},
            "",
        ),  # an earlier version's had none
        (
            {"k": 5, "l2": (0.1, 0.3), "views": {"eval_crop": 0.5}},
            "replaces    knn.json, made with eval_crop 1.0",
        ),
    ):
        results.save(path, tiny, {"settings": result["settings"] | changed})
        assert capsys.readouterr().out.strip() == said
    for odd in ("[]", "null", '{"settings": null}', "no JSON"):
        path.write_text(odd)
        results.save(path, tiny, {"settings": {"k": 5}})
        assert json.loads(path.read_text())["settings"] == {"k": 5}


def test_one_class_is_nothing_to_tell_apart(tiny, tmp_path):
    images = random_images(16, 12, 12)
    arrays = {"train_images": images[:8], "test_images": images[8:]}
    arrays |= {f"{part}_labels": np.zeros(8, np.int64) for part in ("train", "test")}
    np.savez(tmp_path / "one.npz", **arrays)
    tiny.data.path = str(tmp_path / "one.npz")
    with pytest.raises(UserError, match="all labels are of one class, so there is nothing to tell"):
        evaluate_features("knn", tiny, str(tmp_path / "w"))


def test_the_result_of_a_checkpoint_does_not_lie_where_training_deletes_it(tiny, tmp_path):
    """Training removes the folders of older checkpoints."""
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    whole = evaluate_features("knn", tiny, str(workdir))
    assert evaluate_features("knn", tiny, str(checkpoint_folder(workdir) / "1")) == whole
    assert (workdir / "knn_step_1.json").exists()
    assert not list((checkpoint_folder(workdir) / "1").glob("knn*"))
    # A copy elsewhere is nobody's to remove.
    shutil.copytree(checkpoint_folder(workdir) / "1", tmp_path / "copy")
    evaluate_features("knn", tiny, str(tmp_path / "copy"))
    assert (tmp_path / "copy" / "knn.json").exists()


def test_raw_pixels_of_large_images_are_averaged():
    """Stripes four pixels wide at 128 px are grey at 32 px."""
    x = np.zeros((1, 128, 128, 3), np.uint8)
    x[:, :, 1::4] = x[:, :, 2::4] = 255
    inside = np.asarray(raw_pixels(x, 3)).reshape(32, 32, 3)[2:-2, 2:-2]
    assert np.abs(inside - 0.5).max() < 0.2


def test_a_representation_is_of_its_image_alone(tiny_resnet):
    key, network = jax.random.key(0), assemble.encoder(tiny_resnet)

    @jax.jit
    def start():
        head = assemble.head(tiny_resnet)
        return init_encoder(network, 12, key), init_head(head, network.width, key)

    variables, images = start(), random_images(6, 12, 12)
    represent = jax.jit(subjects.representations(tiny_resnet, with_z=True))
    together, apart = represent(variables, images), represent(variables, images[:2])
    for name in ("h", "z"):
        np.testing.assert_allclose(together[name][:2], apart[name], rtol=1e-5, atol=1e-6)


def test_a_probe_is_scaled_by_the_training_images(monkeypatch):
    seen = []

    def fitted(features, options):
        seen.append(features)
        return Score(1.0), 0.0, 1.0

    monkeypatch.setattr(probe, "probe_all_labels", fitted)
    rng = np.random.default_rng(0)
    parts = [
        (rng.normal(mean, spread, (50, 4)).astype(np.float32), np.arange(50) % 2)
        for mean, spread in ((3, 2), (9, 5))
    ]
    options = {"labels_per_class": (), "label_fraction": 0, "validation_fraction": 0.2, "seed": 0}
    probe.rows(Features(parts[0], parts[1], 2), options, "encoder")
    x = seen[0].train[0]
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    assert np.mean(np.sum(x**2, axis=1)) == pytest.approx(1)


def test_the_untrained_encoder_has_the_statistics_of_training_images(tiny, tmp_path, monkeypatch):
    original, seen = subjects.untrained, []

    def untrained(c, images, mesh):
        seen.append(images.split.fingerprint())
        return original(c, images, mesh)

    monkeypatch.setattr(subjects, "untrained", untrained)
    evaluate_features("knn", tiny, str(encoder_checkpoint(tiny, tmp_path / "w")))
    assert seen == [assemble.data_set(tiny).train.fingerprint()]
