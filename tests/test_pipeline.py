"""Batches of views: reproducible, the same for any number of processes, and complete."""

import itertools
import time

import numpy as np
import pytest

from simclr_jax.data import pipeline
from simclr_jax.data.broken import Broken
from simclr_jax.data.distortion import Distortion
from simclr_jax.data.pipeline import evaluation_batches, training_batches
from simclr_jax.data.sources import IndexedSplit, Share
from simclr_jax.errors import UserError


def batches(split, steps, start=0, share=Share(), **changed):
    options = {"seed": 1, "batch_size": 8, "size": 8, "distortion": Distortion()}
    options |= {"broken": Broken(split, 1.0)} | changed
    stream = training_batches(split, start_step=start, share=share, **options)
    taken = list(itertools.islice(stream, steps))
    stream.close()
    return taken


def test_batches_are_repeatable_and_can_be_entered_anywhere(small_split):
    whole = batches(small_split, 10)  # 2 epochs of 37 images
    assert whole[0]["views"].shape == (8, 2, 8, 8, 3)
    assert whole[0]["views"].dtype == np.uint8
    for one, other in zip(whole[6:], batches(small_split, 4, start=6), strict=True):
        np.testing.assert_array_equal(one["views"], other["views"])
        np.testing.assert_array_equal(one["label"], other["label"])


def test_batches_do_not_depend_on_threads_prefetching_or_timing(small_split, monkeypatch):
    whole = batches(small_split, 8)
    monkeypatch.setattr(pipeline.tf.data, "AUTOTUNE", 1)
    monkeypatch.setattr(pipeline, "_PREFETCH_BATCHES", 1)
    stream = training_batches(
        small_split,
        seed=1,
        batch_size=8,
        start_step=0,
        share=Share(),
        size=8,
        distortion=Distortion(),
        broken=Broken(small_split, 0.0),
    )
    for one, other in zip(whole, stream, strict=False):
        time.sleep(0.05)
        np.testing.assert_array_equal(one["views"], other["views"])


def test_the_content_of_a_batch_does_not_depend_on_the_number_of_processes(small_split):
    whole = batches(small_split, 6)
    parts = [batches(small_split, 6, share=Share(p, 4)) for p in range(4)]
    for step, batch in enumerate(whole):
        together = np.concatenate([part[step]["views"] for part in parts])
        np.testing.assert_array_equal(batch["views"], together)


def test_an_image_has_other_views_in_another_epoch(small_split):
    # Weak colours: at full strength two views may both be all white.
    weak = Distortion(color_strength=0.5)
    found = batches(small_split, 2, batch_size=37, distortion=weak)
    views = np.concatenate([b["views"] for b in found])
    assert len(np.unique(views.reshape(len(views) * 2, -1), axis=0)) == 4 * 37


@pytest.mark.parametrize("batch_size", [1, 10, 37, 50])
def test_evaluation_gives_every_image_once_in_order(small_split, batch_size):
    found = list(
        evaluation_batches(
            small_split,
            batch_size=batch_size,
            share=Share(),
            size=10,
            proportion=1.0,
            broken=Broken(small_split, 0.0),
        )
    )
    images = np.concatenate([b["image"] for b in found])
    labels = np.concatenate([b["label"] for b in found])
    # The centred square of 12 x 10 px.
    np.testing.assert_array_equal(images, small_split.images[:, 1:11])
    np.testing.assert_array_equal(labels, small_split.labels)


def test_an_unreadable_image_is_named(tmp_path):
    path = tmp_path / "broken.png"
    path.write_text("no image")
    split = IndexedSplit(np.array([str(path)]), np.array([-1], np.int32))
    with pytest.raises(UserError, match=r"1 of 1 images .*broken\.png") as caught:
        batches(split, 1, broken=Broken(split, 1.0))
    assert "\n" not in str(caught.value)
