"""The options of a configuration reach the parts that are assembled from it."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from simclr_jax import assemble, config
from simclr_jax.data.order import Order
from simclr_jax.errors import UserError
from simclr_jax.evals.classifiers.selection import Selection
from simclr_jax.evals.scores import Score
from simclr_jax.losses.contract import implementation_of
from simclr_jax.mesh import make_mesh, state_shardings
from simclr_jax.training.optimizer import make_optimizer, warmup_cosine
from simclr_jax.training.plan import Plan, make_plan
from simclr_jax.training.verdict import References


def some_params():
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(6, 4)), rng.normal(size=4)
    return {
        part: {"dense": {"kernel": jnp.asarray(kernel + i), "bias": jnp.asarray(bias + i)}}
        for i, part in enumerate(("encoder", "head", "classifier"))
    }


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_the_optimizer_has_its_options(tiny, name):
    own = {"weight_decay": 0.3, "momentum": 0.7, "trust_coefficient": 0.02}
    config.set_options(tiny, {f"optimizer.{option}": value for option, value in own.items()})
    config.set_options(tiny, {"optimizer.name": name, "optimizer.learning_rate": 0.5})
    plan = assemble.plan_of(tiny, 48)
    made, schedule = assemble.pretraining_optimizer(tiny, plan)
    assert [schedule(step) for step in range(9)] == [
        warmup_cosine(plan.learning_rate, plan.warmup_steps, 8)(step) for step in range(9)
    ]
    expected = make_optimizer(name, schedule, **own)

    def after_steps(optimizer):
        params = some_params()
        state = optimizer.init(params)
        for step in range(3):  # the first is of the warm-up, whose rate is 0
            gradient = jax.tree.map(lambda x, step=step: jnp.cos(x + step), params)
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    jax.tree.map(np.testing.assert_array_equal, after_steps(made), after_steps(expected))


def test_the_seed_decides_the_order_and_the_numbers_drawn(tiny):
    mesh, train = make_mesh(jax.devices()[:1]), assemble.data_set(tiny).train
    firsts = []
    for seed in (0, 1):
        tiny.seed = seed
        for views in (assemble.views(tiny, mesh), assemble.classifier_views(tiny, mesh, 16)):
            assert views.settings.order == Order(seed, 16)
            batches = views.batches(assemble.images_of(tiny, train), 0)
            fetched = views.fetch(views.placer(train)(next(batches)))
            firsts.append((fetched["label"], fetched["draws"]))
    for (label, draws), (other_label, other_draws) in itertools.pairwise(firsts[::2]):
        assert not np.array_equal(label, other_label)
        assert not np.allclose(draws, other_draws)


@pytest.mark.parametrize("allowed", [0.1, 0.09])
def test_as_many_images_may_be_broken_as_the_option_says(tiny, tmp_path, allowed):
    """One of ten: a share exactly at the limit passes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(10):
        Image.fromarray(np.full((12, 12, 3), i, np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"no picture")
    config.set_options(
        tiny, {"data.source": "folder", "data.path": str(folder), "data.max_broken": allowed}
    )
    images = assemble.images_of(tiny, assemble.data_set(tiny).train)
    if allowed == 0.1:
        assert images.broken.find(range(10))
        assert images.broken.indices == {3}
        return
    with pytest.raises(
        UserError, match=r"1 of 10 images cannot be read, more than the share of 0\.09"
    ):
        images.broken.find(range(10))


def test_encoder_and_head_take_what_an_evaluation_changes(tiny_resnet):
    made = (
        assemble.encoder(tiny_resnet, norm_momentum=0.5),
        assemble.head(tiny_resnet, norm_momentum=0.5),
    )
    assert [part.norm_momentum for part in made] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("options", "temperature"),
    [
        ({}, 0.5),
        ({"loss.name": "dcl"}, None),
        ({"loss.normalize": False}, None),
        ({"loss.negatives": "other_view"}, None),
        ({"loss.memory": 16}, None),
        ({"train.objective": "supervised"}, None),
    ],
)
def test_bounds_of_nt_xent_are_held_against_it_alone(tiny, options, temperature):
    config.set_options(tiny, options)
    plan = assemble.plan_of(tiny, 48)
    assert assemble.references(tiny, plan) == References(16, 16, 3 + 2, temperature)


def test_a_plan_rounds_to_the_nearest_step():
    plan = functools.partial(make_plan, learning_rate=0.1, scaling="none", steps=0)
    assert plan(100, 64, epochs=1.0, warmup_epochs=1.0) == Plan(2, 1, 0.1)  # of 1.56 steps
    assert plan(100, 64, epochs=4.0, warmup_epochs=1.0) == Plan(6, 2, 0.1)
    assert plan(10, 64, epochs=1.0, warmup_epochs=0.0) == Plan(1, 0, 0.1)
    assert plan(100, 64, epochs=9.0, warmup_epochs=0.0, steps=5).steps == 5


def test_the_loss_is_computed_in_tiles_where_a_devices_share_is_large():
    """4 (2B)^2 bytes: 67 MB at 2,048 images, of which 16 MB may be a device's."""
    one, eight = (make_mesh(jax.devices()[:count]) for count in (1, 8))
    assert implementation_of("auto", 1024, one) == "dense"
    assert implementation_of("auto", 2048, one) == "chunked"
    assert implementation_of("auto", 2048, eight) == "dense"
    assert implementation_of("dense", 2**16, one) == "dense"


def test_kernels_are_divided_along_their_last_axis_that_can_be():
    mesh = make_mesh(jax.devices()[:8], fsdp=4)
    shapes = {"both": (8, 12), "first": (8, 6), "none": (3, 5), "bias": (8,)}
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    found = {name: x.spec for name, x in state_shardings(mesh, abstract).items()}
    whole = jax.sharding.PartitionSpec()
    assert found == {
        "both": jax.sharding.PartitionSpec(None, "fsdp"),
        "first": jax.sharding.PartitionSpec("fsdp"),
        "none": whole,
        "bias": whole,
    }


def test_of_equally_good_steps_the_later_is_selected():
    # Validation, test, of two moments.
    scores = iter([Score(0.5, 0.6), Score(0.1, 0.3), Score(0.5, 0.6), Score(0.2, 0.4, 0.3)])
    selection: Any = Selection(8, lambda *_: next(scores), "validation", "test", 2)
    assert [step for step in range(1, 9) if selection.due(step)] == [4, 8]
    for step in (4, 8):
        selection.run(step, None)
    assert selection.outcome(None) == {
        "last": 0.2,
        "selected": 0.2,
        "selected_step": 8,
        "validation": 0.5,
        "last_validation": 0.5,
        "last_top_5": 0.4,
        "selected_top_5": 0.4,
        "last_mean_per_class": 0.3,
        "selected_mean_per_class": 0.3,
    }


def test_a_selection_goes_on_from_one_of_an_earlier_version():
    """Whose test score was a number."""
    selection: Any = Selection(8, lambda *_: Score(0.2), "validation", "test", 2)
    selection.memory = {"step": 4, "validation": 0.5, "test": 0.1}
    selection.run(8, None)
    assert selection.outcome(None) == {
        "last": 0.2,
        "selected": 0.1,
        "selected_step": 4,
        "validation": 0.5,
        "last_validation": 0.2,
    }


@pytest.mark.parametrize(
    ("asked", "microbatches", "rows"),
    [(0, 1, 32), (0, 2, 16), (4, 1, 8), (-1, 1, 8), (-1, 2, 4)],
)
def test_batchnorm_counts_both_views_of_its_images(
    tiny_resnet, asked, microbatches, rows, monkeypatch
):
    """A batch of 16 images on 4 devices. The memory of negatives has one view of each."""
    c = tiny_resnet
    c.model.norm_group, c.train.microbatches, c.data.batch_size = asked, microbatches, 16
    mesh = make_mesh(jax.devices()[:4])
    assert assemble.images_of_a_norm(c, mesh) == rows // 2
    networks = assemble.networks(c, 3, mesh)
    assert (networks.encoder.norm_group, networks.head.norm_group) == (rows, rows)
    seen = []
    monkeypatch.setattr(
        assemble, "projection_of_second_views", lambda networks, views: seen.append(networks)
    )
    assemble.memory_rule(c, mesh, assemble.views(c, mesh))
    assert [network.norm_group for network in seen[0][:2]] == [rows // 2] * 2
