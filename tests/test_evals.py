"""Probes against scikit-learn and loops; features of every image exactly once."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from simclr_jax import record, train
from simclr_jax.data.order import few_labels, split_validation
from simclr_jax.errors import UserError
from simclr_jax.evals import encoders, linear_probe, run
from simclr_jax.evals.features import Extractor, raw_pixels
from simclr_jax.evals.knn import knn_accuracy
from simclr_jax.evals.linear_probe import (
    LAMBDAS,
    accuracy,
    fit,
    fit_chosen_lambda,
    fit_lambdas,
    probe_all_labels,
    probe_few_labels,
    scale,
)
from simclr_jax.mesh import make_mesh


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    x, y = data.data.astype(np.float32), data.target
    x_train, x_test = scale(x[:1200], x[1200:])
    return (x_train, y[:1200]), (x_test, y[1200:])


@pytest.mark.parametrize("l2", [1e-4, 1e-2])
def test_the_fit_is_scikit_learns_optimum(digits, l2):
    (x, y), (x_test, y_test) = digits
    weights = fit(x, y, l2, 10, 1000)
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


def test_the_regularisation_is_chosen_without_the_test_split(digits):
    train_split, (x_test, y_test) = digits
    settings = {
        "l2": (1e-6, 1e-3, 1e3),
        "validation_fraction": 0.1,
        "seed": 0,
        "classes": 10,
        "max_iterations": 200,
    }
    best, l2 = probe_all_labels(train_split, (x_test, y_test), **settings)
    _, same = probe_all_labels(train_split, (x_test, (y_test + 1) % 10), **settings)
    assert l2 == same
    assert l2 != 1e3
    assert best > 0.85
    few = probe_few_labels(train_split, (x_test, y_test), per_class=5, seeds=3, **settings)
    assert len(few) == len(set(few)) == 3
    assert 0.5 < np.mean(few) < best


def objective(x, y, kernel, bias, value):
    """Sum of the cross-entropies + value / 2 * |kernel|^2, in float64."""
    logits = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + bias
    peak = logits.max(axis=1, keepdims=True)
    log_p = logits - peak - np.log(np.exp(logits - peak).sum(axis=1, keepdims=True))
    return -log_p[np.arange(len(y)), y].sum() + value / 2 * np.sum(np.float64(kernel) ** 2)


@pytest.mark.parametrize("value", [1e-2, 1.0, 100.0])
def test_a_lambda_reaches_scikit_learns_optimum(digits, value):
    (x, y), (x_test, _) = digits
    weaker, weights, _ = fit_lambdas(x, y, [value / 10, value, value * 10], 10, 1000)
    theirs = LogisticRegression(C=1 / value, tol=1e-8, max_iter=5000).fit(x, y)
    optimum = objective(x, y, theirs.coef_.T, theirs.intercept_, value)
    assert objective(x, y, **weights, value=value) == pytest.approx(optimum, rel=1e-4)
    logits = x_test @ weights["kernel"] + weights["bias"]
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p, theirs.predict_proba(x_test), atol=5e-3)
    assert not np.allclose(weaker["kernel"], weights["kernel"], rtol=1e-2)


def test_features_need_not_be_centred_or_scaled(digits):
    """The same optimum, where scikit-learn's solver ends above it."""
    (x, y), _ = digits
    x = 7 * x + 3
    (weights,) = fit_lambdas(x, y, [1.0], 10, 1000)
    theirs = LogisticRegression(tol=1e-8, max_iter=20000).fit(x, y)
    optimum = objective(x, y, theirs.coef_.T, theirs.intercept_, 1.0)
    assert objective(x, y, **weights, value=1.0) <= optimum * (1 + 1e-6)


def test_the_lambda_is_chosen_on_validation_and_fitted_to_all(digits):
    train_split, (x_test, y_test) = digits
    assert len(LAMBDAS) == 45
    np.testing.assert_allclose([LAMBDAS[0], LAMBDAS[-1]], [1e-6, 1e5])
    settings = {
        "lambdas": (1e-2, 1.0, 1e2, 1e5),
        "validation_fraction": 0.2,
        "seed": 0,
        "classes": 10,
        "max_iterations": 300,
    }
    found = fit_chosen_lambda(train_split, (x_test, y_test), **settings)
    wrong = fit_chosen_lambda(train_split, (x_test, (y_test + 1) % 10), **settings)
    assert found["lambda"] == wrong["lambda"] != 1e5
    assert found["validation_accuracies"] == wrong["validation_accuracies"]
    theirs = LogisticRegression(C=1 / found["lambda"], tol=1e-8, max_iter=5000).fit(*train_split)
    assert found["accuracy"] == pytest.approx(theirs.score(x_test, y_test), abs=2.5 / len(y_test))
    right = theirs.predict(x_test) == y_test
    by_class = np.mean([right[y_test == c].mean() for c in range(10)])
    assert found["mean_per_class_accuracy"] == pytest.approx(by_class, abs=0.01)


def test_probes_and_neighbours_are_the_same_on_any_devices(digits, devices, monkeypatch):
    """Fits that converge: until then, L-BFGS follows the rounding of the sums."""
    (x, y), test = digits
    monkeypatch.setattr(linear_probe, "_DIVIDE_FROM", 0)
    mesh = make_mesh(devices)
    (one,), (many,) = (fit_lambdas(x[:999], y[:999], [1.0], 10, 300, m) for m in (None, mesh))
    np.testing.assert_allclose(
        many["kernel"], one["kernel"], atol=2e-3 * np.abs(one["kernel"]).max()
    )
    settings = {"k": 20, "temperature": 0.1, "classes": 10}
    assert knn_accuracy((x, y), test, mesh=mesh, **settings) == knn_accuracy(
        (x, y), test, **settings
    )


def test_few_labels_are_as_many_of_each_class():
    y = np.repeat([0, 1, 2], [50, 30, 4])
    picked = few_labels(y, 10, seed=0)
    np.testing.assert_array_equal(np.bincount(y[picked]), [10, 10, 4])
    assert len(set(picked)) == 24
    assert not np.array_equal(picked, few_labels(y, 10, seed=1))
    np.testing.assert_array_equal(picked, few_labels(y, 10, seed=0))


def test_the_validation_part_is_disjoint():
    part, held = split_validation(np.zeros(105), 0.1, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([part, held])), np.arange(105))
    assert len(held) == 10


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


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (20, 0.1), (200, 0.01)])
def test_knn_equals_its_definition(digits, k, temperature):
    train_split, test_split = digits
    found = knn_accuracy(train_split, test_split, k=k, temperature=temperature, classes=10)
    # A tie between two neighbours may be broken either way.
    expected = knn_loop(train_split, test_split, k, temperature)
    assert found == pytest.approx(expected, abs=1.5 / len(test_split[1]))


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


def test_probe_and_knn_write_their_settings_and_all_rows(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LAMBDAS", LAMBDAS[::11])
    tiny.train.steps = 4
    train.pretrain(tiny, str(tmp_path / "w"))
    run.probe(tiny, str(tmp_path / "w"))
    result = json.loads((tmp_path / "w" / "probe.json").read_text())
    assert result["step"] == 4
    assert (result["train_images"], result["test_images"]) == (48, 21)
    rows = {(row["features"], row["labels_per_class"]): row for row in result["rows"]}
    kinds = ("raw pixels", "untrained encoder", "encoder")
    assert set(rows) == {(kind, labels) for kind in kinds for labels in (1, None)}
    for (_, labels), row in rows.items():
        assert 0 <= row["accuracy"] <= 1
        assert row["seeds"] == (2 if labels else 1)
    assert result["settings"]["validation_fraction"] == 0.1

    transferred = run.transfer(tiny, str(tmp_path / "w"))
    assert [row["features"] for row in transferred["rows"]] == list(kinds)
    assert len(transferred["rows"][0]["validation_accuracies"]) == 5
    assert (tmp_path / "w" / "transfer.json").exists()

    run.knn(tiny, str(tmp_path / "w"))
    result = json.loads((tmp_path / "w" / "knn.json").read_text())
    assert result["settings"] == {"k": 48, "temperature": 0.1}
    assert [row["features"] for row in result["rows"]] == list(kinds)

    # On other data than those of training: a result of its own, without the baselines if so wished.
    with np.load(tiny.data.path) as file:
        np.savez(tmp_path / "fewer.npz", **{name: x[:20] for name, x in file.items()})
    tiny.data.path = str(tmp_path / "fewer.npz")
    assert run.knn(tiny, str(tmp_path / "w"))["train_images"] == 20
    assert (tmp_path / "w" / "knn_fewer.json").exists()
    assert json.loads((tmp_path / "w" / "knn.json").read_text()) == result
    tiny.data.source, tiny.data.name, tiny.data.path = "tfds", "digits", ""
    tiny.eval.baselines = False
    other = run.knn(tiny, str(tmp_path / "w"))
    assert (other["train_images"], other["test_images"]) == (1437, 360)
    assert [row["features"] for row in other["rows"]] == ["encoder"]
    assert json.loads((tmp_path / "w" / "knn_digits.json").read_text())["rows"] == other["rows"]


def test_without_a_validation_part_there_is_no_probe(tiny, tmp_path, capsys):
    assert run.can_evaluate(tiny)
    tiny.eval.validation_fraction = 0.0
    assert not run.can_evaluate(tiny)
    assert "no probe    eval.validation_fraction=0" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"eval\.validation_fraction=0: expected a part"):
        run.probe(tiny, str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_record_of_a_run_is_one_line(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="is not what training wrote: give a --config"):
        record.saved_config(str(tmp_path))


def test_the_untrained_encoder_is_not_a_straw_man(tiny, tmp_path):
    """It sees the whole image, at the scale that training would give it."""
    from simclr_jax import assemble

    network = assemble.encoder(tiny)
    variables = encoders.untrained(
        tiny, assemble.source(tiny).train, str(tmp_path), 48, make_mesh()
    )
    scales = [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "scale"
    ]
    assert all(np.all(np.asarray(scale) == 1) for scale in scales)
    images = np.array(assemble.source(tiny).train.images)
    views = images.astype(np.float32) / 255
    _, seen = network.apply(
        jax.device_get(variables),
        views,
        train=False,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    normed = np.asarray(seen["intermediates"]["stem_norm"]["__call__"][0])
    assert 0.5 < normed.std() < 2
    changed = views.copy()
    changed[:, -3:, -3:] = 1 - changed[:, -3:, -3:]
    h = network.apply(variables, views, train=False)
    assert np.all(np.abs(h - network.apply(variables, changed, train=False)).max(axis=1) > 1e-4)


def test_data_without_labels_cannot_be_probed(tiny, tmp_path):
    np.savez(tmp_path / "bare.npz", train_images=np.zeros((16, 12, 12, 3), np.uint8))
    tiny.data.path = str(tmp_path / "bare.npz")
    assert not run.can_evaluate(tiny)
    with pytest.raises(UserError, match="the data have no labels"):
        run.probe(tiny, str(tmp_path))
