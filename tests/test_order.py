"""Which image comes when."""

import itertools

import numpy as np
import pytest

from simclr_jax.data import order as orders
from simclr_jax.data.order import (
    Order,
    Share,
    batch_positions,
    epoch_order,
    next_whole,
    standing_in,
)
from simclr_jax.data.subsets import few_labels, share_of_labels, split_validation
from simclr_jax.errors import UserError


def batches(count, batch_size, steps, start=0, share=Share(), seed=3):
    order = Order(seed, batch_size, share)
    return list(itertools.islice(batch_positions(order, count, start), steps))


@pytest.mark.parametrize(("count", "batch_size"), [(10, 5), (10, 4), (10, 9), (7, 20), (1, 3)])
def test_every_epoch_holds_every_image_once(count, batch_size):
    steps = -(-5 * count // batch_size)
    seen = np.concatenate([np.stack(b) for b in batches(count, batch_size, steps)], axis=1)
    epochs, indices = seen[:, : 5 * count]
    assert list(epochs) == sorted(epochs)
    for epoch in range(5):
        np.testing.assert_array_equal(np.sort(indices[epochs == epoch]), np.arange(count))


@pytest.mark.parametrize("count", [20, 21, 25, 31, 39, 40, 41, 50, 53, 90, 1001])
def test_no_batch_holds_an_image_twice(count):
    """Not those either that two epochs share: a copy would be its own negative."""
    shared = 0
    for epochs, indices in batches(count, 20, 40 * count // 20):
        assert len(np.unique(indices)) == 20
        shared += epochs[0] != epochs[-1]
    assert shared or count in (20, 40, 1001)


def test_batches_that_two_epochs_share_would_hold_images_twice_in_the_raw_orders():
    seen = np.concatenate([epoch_order(3, epoch, 53) for epoch in range(40)])
    copies = [20 - len(np.unique(seen[i : i + 20])) for i in range(0, len(seen) - 20, 20)]
    assert sum(copies) > 20


def test_orders_differ_between_epochs_and_seeds():
    orders = [epoch_order(seed, epoch, 100) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(one == other) < 0.1


@pytest.mark.parametrize(("count", "batch_size"), [(11, 4), (11, 6), (11, 10), (11, 20)])
def test_starting_late_gives_what_came_then(count, batch_size):
    whole = batches(count, batch_size, 12)
    late = batches(count, batch_size, 5, start=7)
    for (e1, i1), (e2, i2) in zip(whole[7:], late, strict=True):
        np.testing.assert_array_equal(e1, e2)
        np.testing.assert_array_equal(i1, i2)


def test_the_processes_parts_make_up_the_global_batch():
    whole = batches(11, 6, 5)
    parts = [batches(11, 6, 5, share=Share(p, 2)) for p in range(2)]
    for step, (epochs, indices) in enumerate(whole):
        np.testing.assert_array_equal(epochs, np.concatenate([p[step][0] for p in parts]))
        np.testing.assert_array_equal(indices, np.concatenate([p[step][1] for p in parts]))


@pytest.mark.parametrize("broken", [(), (0,), (3,), (2, 3), (3, 0), (0, 1, 2), (0, 1, 2, 3)])
def test_the_stand_in_of_a_broken_image_is_the_next_whole_one(broken):
    def stand_in(place):
        cycle = [(place + i) % 4 for i in range(4)]
        return next((p for p in cycle if p not in broken), place)

    found = next_whole(np.isin(np.arange(4), broken))
    assert found.tolist() == [stand_in(place) for place in range(4)]


def test_what_stands_in_is_not_in_the_batch():
    """Else it would be its own negative. Where all whole images are in the batch it is the next one, as in evaluation."""
    broken = {2, 3, 7}
    for batch in ([2, 4, 7], [7, 0, 6], [3]):
        found = standing_in(broken, np.asarray(batch), slice(None), 8).tolist()
        for before, after in zip(batch, found, strict=True):
            assert after == before if before not in broken else after not in {*broken, *batch}
    whole = [0, 1, 4, 5, 6]
    assert standing_in(broken, np.asarray([*whole, 2]), slice(None), 8).tolist() == [*whole, 4]
    assert standing_in({0, 1}, np.asarray([0, 1]), slice(None), 2).tolist() == [0, 1]
    for count in range(10, 80):  # all whole ones are in the batch, and not all broken ones
        broken = set(range(0, count, 3))
        whole = [place for place in range(count) if place not in broken]
        for place in broken:
            found = standing_in(broken, np.asarray([*whole, place]), slice(None), count)
            assert found[-1] not in broken


def test_what_stands_in_depends_on_no_other_broken_image_and_differs_among_neighbours():
    """Another process may not know which images of its rows are broken; an interrupted copy leaves a run of them."""
    batch, broken = np.arange(0, 2000, 2), set(range(500))
    found = standing_in(broken, batch, slice(None), 50_000)
    assert len(set(found.tolist())) > 0.99 * len(batch)  # 997 of 1,000
    np.testing.assert_array_equal(found[250:], batch[250:])
    half = slice(100, 200)
    np.testing.assert_array_equal(standing_in(broken, batch, half, 50_000), found[half])
    for place in (0, 100):
        alone = standing_in({place}, batch, slice(place // 2, place // 2 + 1), 50_000)
        assert alone[0] == found[place // 2] or alone[0] in broken


def test_the_images_of_an_order_that_are_held_out_are_nested():
    """Of more labels and of larger fractions: what one training held out is held out by others."""
    among = np.random.default_rng(0).random(100) < 0.5
    fifth, tenth = (set(split_validation(100, f, 0, among=among)[1]) for f in (0.2, 0.1))
    assert tenth < fifth
    assert all(among[i] for i in fifth)
    part, held = split_validation(100, 0.2, 0, among=among)
    assert sorted([*part, *held]) == list(range(100))
    for one, other in zip(
        split_validation(100, 0.2, 0),
        split_validation(100, 0.2, 0, among=among | True),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.1), (2, 0.9), (4, 0.9)])
def test_what_leaves_nothing_to_train_on_is_not_held_out(count, fraction):
    with pytest.raises(UserError, match=rf"^{count} images?, of which a share of {fraction} "):
        split_validation(count, fraction, seed=0)


def test_a_window_is_shuffled_anew_each_epoch():
    found = orders.windows(Order(0, 8), np.array([40]), orders.Lane(0, 1, 0, 8), 0)
    first, second = (positions for _, _, positions in itertools.islice(found, 2))
    np.testing.assert_array_equal(np.sort(first), np.arange(40))
    assert np.mean(first == np.arange(40)) < 0.2
    assert np.mean(first == second) < 0.2


def test_a_share_of_the_labels_is_rounded():
    y = np.repeat([0, 1], [16, 14])
    assert np.bincount(y[share_of_labels(y, 0.1, seed=0)]).tolist() == [2, 1]


def test_what_is_drawn_stays_what_it_was():
    """A run that is resumed by another version goes on in the same order, and a result has the same labels."""
    assert epoch_order(1, 2, 8).tolist() == [6, 0, 7, 5, 1, 4, 3, 2]
    assert few_labels(np.arange(60) % 2, 3, 1).tolist() == [40, 8, 14, 39, 17, 1]
    assert share_of_labels(np.arange(60) % 2, 0.05, 1).tolist() == [40, 8, 39, 17]
    assert split_validation(10, 0.3, 1)[1].tolist() == [4, 7, 8]
