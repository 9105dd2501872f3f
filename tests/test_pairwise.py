"""The losses of Table 2 and SupCon against loops in float64, in tiles against dense, on any devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from invariance import check, first_state, for_one_step, step_of
from test_losses import algorithm_1, interleave, random_pairs
from test_losses_in_tiles import softmax_in_tiles

from simclr_jax import assemble, config
from simclr_jax.losses import LOSSES, dcl, nt_xent
from simclr_jax.losses.by_rows import Candidates, Rows, over_rows
from simclr_jax.losses.pairwise import margin, nt_logistic, supcon
from simclr_jax.mesh import batch_sharded, make_mesh

TAU, M = 0.5, 0.4
LABELS = np.asarray([0, 1, 0, 2, -1, 1, 0, -1])


def cosines(z):
    z = np.asarray(z, np.float64)
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    return z @ z.T


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def mined(s, i, negatives, least):
    """Schroff et al. 2015: the nearest of those that are farther than the positive, above `least`."""
    found = [k for k in negatives if least < s[i, k] < s[i, i ^ 1]]
    return [max(found, key=lambda k: s[i, k])] if found else []


def loop(name, z, other_view=False, total=False, normalize=True):
    """One of the losses, pair by pair."""
    s, losses = (
        cosines(z) if normalize else np.asarray(z, np.float64) @ np.asarray(z, np.float64).T,
        [],
    )
    for i in range(len(s)):
        j = i ^ 1
        candidates = [k for k in range(len(s)) if k != i and (not other_view or (k - i) % 2)]
        negatives = [k for k in candidates if k != j]
        over = sum if total else (lambda x: sum(x) / max(1, len(x)))
        if name.endswith("semihard"):
            negatives = mined(s, i, negatives, s[i, j] - M if name.startswith("margin") else -9)
        if name.startswith("nt_logistic"):
            loss = softplus(-s[i, j] / TAU) + over([softplus(s[i, k] / TAU) for k in negatives])
        elif name.startswith("margin"):
            loss = over([max(s[i, k] - s[i, j] + M, 0) for k in negatives])
        elif name == "supcon":
            label = np.repeat(LABELS, 2)
            alike = [k for k in negatives if label[k] == label[i] >= 0]
            log_sum = np.log(sum(np.exp(s[i, k] / TAU) for k in candidates))
            loss = np.mean([log_sum - s[i, k] / TAU for k in [j, *alike]])
        elif name == "dcl":
            loss = np.log(sum(np.exp(s[i, k] / TAU) for k in negatives)) - s[i, j] / TAU
        else:
            loss = np.log(sum(np.exp(s[i, k] / TAU) for k in candidates)) - s[i, j] / TAU
        losses.append(loss)
    return np.mean(losses)


def built(name, images=8, mesh=None, **options):
    given = config.default().loss.to_dict() | {"name": name, "temperature": TAU, "margin": M}
    return LOSSES[name](given | options, mesh or make_mesh(jax.devices()[:1]), images)


@pytest.mark.parametrize("over", ["mean", "sum"])
@pytest.mark.parametrize("negatives", ["both_views", "other_view"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_equals_a_loop(name, negatives, over):
    z = random_pairs()
    loss = built(name, negatives=negatives, over_negatives=over, implementation="dense")
    value, metrics = loss.apply(jnp.asarray(z), jnp.asarray(LABELS))
    expected = loop(name, z, negatives == "other_view", over == "sum")
    np.testing.assert_allclose(value, expected, rtol=2e-6)
    _, top1, top5, entropy = algorithm_1(z, TAU)
    found = [metrics[f"contrastive_{x}"] for x in ("top1", "top5", "entropy")]
    np.testing.assert_allclose(found, [top1, top5, entropy], rtol=1e-5)


def of_the_other_view(s, tau):
    """The share of anchors whose partner is the nearest of the other view's, and the entropy among these."""
    others = [[k for k in range(len(s)) if (k - i) % 2] for i in range(len(s))]
    right = [all(s[i, k] < s[i, i ^ 1] for k in o if k != i ^ 1) for i, o in enumerate(others)]
    p = [np.exp(s[i, o] / tau) / np.exp(s[i, o] / tau).sum() for i, o in enumerate(others)]
    return np.mean(right), np.mean([-np.sum(q * np.log(q)) for q in p])


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_do_without_normalisation_and_tells_of_the_other_view(name):
    z = random_pairs() / 4  # dot products of some 1
    for normalize in (True, False):
        loss = built(name, normalize=normalize, implementation="dense")
        value, metrics = loss.apply(jnp.asarray(z), jnp.asarray(LABELS))
        np.testing.assert_allclose(value, loop(name, z, normalize=normalize), rtol=2e-6)
        s = cosines(z) if normalize else np.asarray(z, np.float64) @ np.asarray(z, np.float64).T
        found = metrics["other_view_top1"], metrics["other_view_entropy"]
        np.testing.assert_allclose(found, of_the_other_view(s, TAU), rtol=1e-5)


@pytest.mark.parametrize("name", ["nt_logistic", "margin", "nt_xent"])
def test_the_gradient_is_table_2s(name):
    """Of one anchor u with a positive and two negatives, in the unit vectors themselves."""
    u, positive, *negatives = (x / np.linalg.norm(x) for x in random_pairs(pairs=2).astype(float))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    if name == "nt_logistic":
        expected = -sigmoid(-u @ positive / TAU) / TAU * positive
        expected = expected + sum(sigmoid(u @ v / TAU) / TAU * v for v in negatives) / 2
    elif name == "margin":
        expected = sum(v - positive for v in negatives if u @ positive - u @ v < M) / 2
    else:
        weights = np.exp([u @ v / TAU for v in (positive, *negatives)])
        p = weights / weights.sum()
        expected = -(1 - p[0]) / TAU * positive + sum(
            q / TAU * v for q, v in zip(p[1:], negatives, strict=True)
        )
    assert np.linalg.norm(expected) > 0.1

    def loss(u):
        s = u @ jnp.stack([positive, *negatives]).T
        mask = jnp.asarray([[True, False, False]])
        rows = Rows(s[None], mask, jnp.ones_like(mask), jnp.zeros_like(mask))
        if name == "margin":
            return margin(rows, margin=M, semihard=False, total=False)[0]
        if name == "nt_logistic":
            return nt_logistic(rows, temperature=TAU, semihard=False, total=False)[0]
        return supcon(rows, temperature=TAU)[0]  # without labels it is NT-Xent

    np.testing.assert_allclose(jax.grad(loss)(jnp.asarray(u)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_equals_finite_differences_of_the_loop(name):
    z = np.random.default_rng(3).normal(size=(16, 3))
    loss = built(name, implementation="dense")
    gradient = jax.jit(jax.grad(lambda z: loss.apply(z, jnp.asarray(LABELS))[0]))(
        jnp.asarray(z, jnp.float32)
    )
    for index in [(0, 0), (5, 1), (8, 2), (15, 0)]:
        step = np.zeros_like(z)
        step[index] = 1e-6
        difference = (loop(name, z + step) - loop(name, z - step)) / 2e-6
        np.testing.assert_allclose(gradient[index], difference, rtol=1e-3, atol=1e-5)


def wrong_view(z):
    """The negatives of the anchor's own view."""
    s = cosines(z)
    own = [[s[i, k] for k in range(len(s)) if k != i and (k - i) % 2 == 0] for i in range(len(s))]
    return np.mean([softplus(-s[i, i ^ 1] / TAU) + np.mean(softplus(np.asarray(x) / TAU))
                    for i, x in enumerate(own)])  # fmt: skip


def hardest(z):
    """The most similar negative, nearer than the positive or not."""
    s = cosines(z)
    near = [max(s[i, k] for k in range(len(s)) if k not in (i, i ^ 1)) for i in range(len(s))]
    return np.mean([max(x - s[i, i ^ 1] + M, 0) for i, x in enumerate(near)])


@pytest.mark.parametrize(
    ("name", "options", "broken"),
    [
        ("nt_logistic", {"negatives": "other_view"}, wrong_view),
        ("margin_semihard", {}, hardest),
        ("margin", {}, lambda z: loop("margin", z, total=True)),
        ("supcon", {}, lambda z: loop("nt_xent", z)),
        ("nt_logistic_semihard", {}, lambda z: loop("nt_logistic", z)),
    ],
)
def test_broken_losses_are_told_apart(name, options, broken):
    z = random_pairs(noise=1.5)
    value, _ = built(name, implementation="dense", **options).apply(z, jnp.asarray(LABELS))
    assert abs(broken(z) / value - 1) > 1e-4  # fifty times the tolerance above


@pytest.mark.parametrize("name", ["margin_semihard", "nt_logistic_semihard"])
def test_where_no_negative_qualifies_the_positive_term_is_left(name):
    """Positives farther than every negative: nothing is semi-hard."""
    z = np.asarray([[1, 0], [-1, 0], [0, 1], [0, -1]], np.float32)
    value, _ = built(name, images=2, implementation="dense").apply(z, jnp.asarray([-1, -1]))
    s = cosines(z)
    alone = np.mean([softplus(-s[i, i ^ 1] / TAU) for i in range(4)])
    np.testing.assert_allclose(value, 0.0 if name.startswith("margin") else alone, atol=1e-6)


def test_a_triplet_loss_without_a_margin_is_zero_for_equal_similarities():
    z = np.ones((8, 4), np.float32)
    value, _ = built("margin", images=4, margin=0.0, implementation="dense").apply(
        z, jnp.full(4, -1)
    )
    assert value == 0


def test_at_a_high_temperature_the_logistic_loss_is_2_log_2():
    value, _ = built("nt_logistic", temperature=1e3).apply(random_pairs(), jnp.asarray(LABELS))
    np.testing.assert_allclose(value, 2 * np.log(2), rtol=1e-3)


@pytest.mark.parametrize(("chunk", "devices"), [(2, 1), (24, 1), (16, 4), (24, 8)])
@pytest.mark.parametrize("name", ["nt_logistic", "margin_semihard", "supcon"])
def test_in_tiles_value_metrics_and_gradient_are_the_dense_ones(name, chunk, devices):
    row_loss = {
        "nt_logistic": functools.partial(nt_logistic, temperature=TAU, semihard=False, total=False),
        "margin_semihard": functools.partial(margin, margin=M, semihard=True, total=False),
        "supcon": functools.partial(supcon, temperature=TAU),
    }[name]
    z, labels = random_pairs(pairs=32), np.arange(32) % 5 - 1
    mesh = make_mesh(jax.devices()[:devices], fsdp=min(2, devices))
    candidates = Candidates(other_view=chunk == 24, temperature=TAU)

    def both(z, labels, **how):
        return jax.jit(
            jax.value_and_grad(
                lambda z: over_rows(z, labels, row_loss, candidates, **how), has_aux=True
            )
        )(z)

    placed = jax.device_put((z, labels), batch_sharded(mesh))
    (loss, metrics), gradient = both(*placed, mesh=mesh if devices > 1 else None, chunk=chunk)
    (dense, dense_metrics), dense_gradient = both(z, labels)
    np.testing.assert_allclose(loss, dense, rtol=1e-5)
    np.testing.assert_allclose(gradient, dense_gradient, atol=1e-5 * np.abs(dense_gradient).max())
    for key, value in dense_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def test_in_tiles_the_memory_is_that_of_a_row_of_tiles():
    def memory(images, **how):
        z = jax.ShapeDtypeStruct((2 * images, 128), jnp.float32)
        labels = jax.ShapeDtypeStruct((images,), jnp.int32)
        row_loss = functools.partial(margin, margin=M, semihard=True, total=False)
        loss = jax.value_and_grad(
            lambda z, labels: over_rows(z, labels, row_loss, Candidates(), **how)[0]
        )
        return jax.jit(loss).lower(z, labels).compile().memory_analysis().temp_size_in_bytes

    similarities = 4 * (2 * 4096) ** 2
    assert memory(4096, chunk=128) < similarities / 4
    assert memory(4096) > similarities


@pytest.mark.parametrize("in_sum", [True, False])
@pytest.mark.parametrize(("chunk", "devices"), [(2, 1), (24, 1), (24, 8)])
def test_softmax_losses_of_the_other_view_in_tiles_are_the_dense_ones(chunk, devices, in_sum):
    z = random_pairs(pairs=32)
    dense = functools.partial(nt_xent if in_sum else dcl, other_view=True, normalized=False)
    tiles = functools.partial(softmax_in_tiles, positive_in_sum=in_sum, chunk=chunk)
    tiles = functools.partial(tiles, other_view=True, normalized=False)
    mesh = make_mesh(jax.devices()[:devices]) if devices > 1 else None

    def both(loss, z):
        return jax.jit(jax.value_and_grad(lambda z: loss(z, 20.0), has_aux=True))(z)

    placed = z if mesh is None else jax.device_put(z, batch_sharded(mesh))
    (loss, metrics), gradient = both(functools.partial(tiles, mesh=mesh), placed)
    (expected, expected_metrics), expected_gradient = both(dense, z)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    scale = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-5 * scale)
    for key, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[key], value, rtol=2e-5, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("normalized", [True, False])
def test_without_normalisation_too_the_loss_is_the_published_codes(golden, tau, normalized):
    z = interleave(golden["loss_hidden"])
    key = f"loss_tau{tau}_norm{int(normalized)}"
    (loss, metrics), gradient = jax.value_and_grad(
        lambda z: nt_xent(z, tau, normalized=normalized), has_aux=True
    )(jnp.asarray(z))
    np.testing.assert_allclose(2 * loss, golden[key], rtol=2e-6)
    expected = interleave(golden[f"{key}_grad"])
    np.testing.assert_allclose(
        2 * gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max()
    )
    # The published accuracy and entropy: of the first views, among the other view's B.
    logits = np.asarray(golden[f"{key}_logits_ab"], np.float64)
    both = [logits, logits.T]
    right = np.mean([np.mean(x.argmax(1) == np.arange(len(x))) for x in both])
    assert metrics["other_view_top1"] == pytest.approx(right)
    p = [np.exp(x - x.max(1, keepdims=True)) for x in both]
    p = [x / x.sum(1, keepdims=True) for x in p]
    entropy = np.mean([-np.sum(x * np.log(x + 1e-300), axis=1) for x in p])
    np.testing.assert_allclose(metrics["other_view_entropy"], entropy, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def once():
    return {}


@pytest.mark.parametrize(
    ("devices", "fsdp", "options"),
    [
        (4, 1, {"loss.implementation": "chunked"}),
        (8, 2, {"train.microbatches": 2}),
    ],
)
@pytest.mark.parametrize("name", ["nt_logistic_semihard", "supcon"])
def test_a_step_is_equal_on_any_mesh(tiny, once, name, devices, fsdp, options, monkeypatch):
    config.set_options(for_one_step(tiny), {"model.head": "none", "loss.name": name})
    if "start" not in once:
        once["start"] = first_state(tiny, monkeypatch)
    if name not in once:
        once[name] = step_of(tiny, jax.devices()[:1], once["start"], monkeypatch)
    config.set_options(tiny, options | {"mesh.fsdp": fsdp})
    found = step_of(tiny, jax.devices()[:devices], once["start"], monkeypatch)
    check(found, once[name])


@pytest.mark.parametrize("name", LOSSES)
def test_bfloat16_projections_are_computed_in_float32(name):
    z = jnp.asarray(random_pairs(), jnp.bfloat16)
    value, _ = built(name).apply(z, jnp.asarray(LABELS))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loop(name, z.astype(jnp.float32)), rtol=2e-6)


def test_a_run_says_what_its_loss_is(tiny):
    config.set_options(tiny, {"loss.name": "margin_semihard", "loss.negatives": "other_view"})
    text = assemble.contrastive_loss(tiny, make_mesh(jax.devices()[:1])).text
    assert text == (
        "margin triplet, dense for this size, margin 0.8, semi-hard negatives, negatives of the other "
        "view only"
    )
