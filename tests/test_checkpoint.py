"""Checkpoints: what is kept, what comes back, and on which devices."""

import concurrent.futures
import itertools
import pathlib
import shutil
import threading
import time

import jax
import numpy as np
import pytest

import simclr_jax
from simclr_jax import config as config_lib
from simclr_jax.checkpoint import (
    Checkpoints,
    find,
    read_encoder,
    read_newest,
    read_options,
    saved_steps,
)
from simclr_jax.errors import UserError
from simclr_jax.mesh import make_mesh
from simclr_jax.train import make_job


def job_on(config, devices):
    return make_job(config, config_lib.plan(config, 48), 3, make_mesh(devices))


def save(workdir, config, steps, **options):
    job = job_on(config, jax.devices()[:2])
    state = job.init(jax.random.key(0))
    settings = {"every_steps": 2, "keep_last": 3, "keep_every_steps": 0} | options
    with Checkpoints(str(workdir), **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, state, {"config": config.to_dict(), "step": step})
    return jax.device_get(state)


def test_the_state_comes_back_on_any_number_of_devices(tmp_path, tiny, devices):
    saved = save(tmp_path, tiny, [4])
    job = job_on(tiny, devices)
    with Checkpoints(str(tmp_path), **tiny.checkpoint.to_dict()) as checkpoints:
        state, options = checkpoints.restore_newest(job.abstract_state)
        assert options["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), saved)
    for leaf in jax.tree.leaves(state):
        assert set(leaf.sharding.device_set) == set(devices)


def test_the_newest_and_the_multiples_are_kept(tmp_path, tiny):
    save(tmp_path, tiny, range(2, 15, 2), keep_last=2, keep_every_steps=6)
    assert saved_steps(tmp_path) == [6, 12, 14]


def test_encoders_are_read_while_training_saves_and_deletes(tmp_path, tiny):
    job = job_on(tiny, jax.devices()[:1])
    state = job.init(jax.random.key(0))
    stop = threading.Event()

    def train():
        options = {"every_steps": 1, "keep_last": 1, "keep_every_steps": 0}
        with Checkpoints(str(tmp_path), **options) as checkpoints:
            for step in itertools.count(1):
                checkpoints.save(step, state, {"config": tiny.to_dict(), "step": step})
                checkpoints.wait(step)
                if stop.is_set():
                    return

    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        training = threads.submit(train)
        while not saved_steps(tmp_path):
            time.sleep(0.01)
        try:
            steps = [simclr_jax.load_encoder(tmp_path).step for _ in range(15)]
        finally:
            stop.set()
        training.result()
    assert steps == sorted(steps)
    assert len(set(steps)) > 3


def empty(folder):
    for file in pathlib.Path(folder).rglob("*"):
        if file.is_file():
            file.unlink()


def test_what_is_half_deleted_is_read_no_more(tmp_path, tiny):
    """Training deletes the files of an old checkpoint first, and its folders last."""
    save(tmp_path, tiny, [2])
    seen = []

    def read(checkpoint):
        seen.append(checkpoint.name)
        if len(seen) == 1:
            save(tmp_path, tiny, [4])
            empty(checkpoint)
        return read_options(checkpoint)["step"]

    assert read_newest(str(tmp_path), read) == 4
    assert seen == ["2", "4"]
    empty(tmp_path / "checkpoints" / "4")  # damaged, and the newest
    with pytest.raises(UserError, match="4 cannot be read"):
        read_newest(str(tmp_path), read)


def test_saves_are_due_at_multiples(tmp_path):
    with Checkpoints(str(tmp_path), every_steps=3, keep_last=1, keep_every_steps=0) as checkpoints:
        assert [s for s in range(1, 10) if checkpoints.due(s)] == [3, 6, 9]


def test_the_encoder_is_read_without_the_rest(tmp_path, tiny):
    saved = save(tmp_path, tiny, [2, 4])
    folder = find(str(tmp_path), None)
    assert folder.name == "4"
    shutil.rmtree(folder / "trainer")  # the optimizer's state: not needed
    expected = {"params": saved.params["encoder"], "batch_stats": saved.batch_stats["encoder"]}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    jax.tree.map(np.testing.assert_array_equal, read_encoder(folder, abstract), expected)
    assert read_options(folder)["step"] == 4


def test_a_workdir_may_be_called_checkpoints(tmp_path, tiny):
    workdir = tmp_path / "checkpoints"
    save(workdir, tiny, [2])
    assert saved_steps(workdir) == [2]
    assert find(str(workdir), None) == workdir / "checkpoints" / "2"


def test_checkpoints_are_found_from_any_of_their_folders(tmp_path, tiny):
    save(tmp_path, tiny, [2, 4])
    copied = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoints" / "2", copied)
    assert find(str(tmp_path), 2) == tmp_path / "checkpoints" / "2"
    assert find(str(tmp_path / "checkpoints"), None) == tmp_path / "checkpoints" / "4"
    assert find(str(copied), None) == copied
    with pytest.raises(UserError, match="of step 2, not of step 4"):
        find(str(copied), 4)
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .* there are 2, 4"):
        find(str(tmp_path), 3)
    with pytest.raises(UserError, match="no folder"):
        find(str(tmp_path / "nowhere"), None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no checkpoint in"):
        find(str(tmp_path / "empty"), None)
