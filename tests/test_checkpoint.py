"""Checkpoints: what is kept, what comes back, and on which devices."""

import concurrent.futures
import functools
import itertools
import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import encoder_checkpoint
from etils import epath

import simclr_jax
from simclr_jax import assemble, processes
from simclr_jax.errors import Unavailable, UserError
from simclr_jax.evals import subjects
from simclr_jax.mesh import make_mesh, state_shardings
from simclr_jax.training import saved
from simclr_jax.training.checkpoint import Checkpoints, Saving
from simclr_jax.training.saved import (
    beside,
    find,
    read_encoder_arrays,
    read_newest,
    read_record,
    saved_steps,
    with_shardings,
)
from simclr_jax.training.state import start_of
from simclr_jax.training.workdir import alone_in


def abstract_of(config):
    """The shapes of the state of a pretraining."""
    plan = assemble.plan_of(config, 48)
    return assemble.pretraining_job(config, plan, 3, make_mesh()).abstract_state


def laid_out_on(abstract, mesh):
    return with_shardings(abstract, state_shardings(mesh, abstract))


def random_state(abstract):
    """A state of these shapes and shardings."""
    rng = np.random.default_rng(0)

    def filled(x):
        return jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding)

    return jax.tree.map(filled, abstract)


@functools.cache
def small_state():
    """The smallest state that is saved as a training's is."""
    params = {"encoder": {"kernel": np.arange(6.0)}, "head": {"kernel": np.ones(3)}}
    stats = {"encoder": {"mean": np.full(2, 0.5)}, "head": {}}
    return jax.tree.map(jnp.asarray, start_of(params, stats, optax.sgd(0.1, 0.9)))


def save(workdir, steps, state=None, config=None, **saving):
    options = {"every_steps": 2, "keep_last": 3} | saving
    with Checkpoints(str(workdir), Saving(**options)) as checkpoints:
        for step in steps:
            checkpoints.save(step, state or small_state(), {"config": config or {}, "step": step})


def test_the_state_comes_back_on_any_number_of_devices(tmp_path, tiny_resnet):
    """Saved from 2 devices, with BatchNorm's statistics and the optimizer's state."""
    abstract = abstract_of(tiny_resnet)
    assert jax.tree.leaves(abstract.batch_stats)
    state = random_state(laid_out_on(abstract, make_mesh(jax.devices()[:2])))
    save(tmp_path, [4], state)
    for count, fsdp in ((1, 1), (2, 1), (4, 1), (8, 1), (4, 2)):
        mesh = make_mesh(jax.devices()[:count], fsdp)
        expected = laid_out_on(abstract, mesh)
        with Checkpoints(str(tmp_path), Saving(every_steps=4)) as checkpoints:
            restored, options = checkpoints.restore_newest(expected)
        assert options["step"] == 4
        for leaf, before, wanted in zip(
            *map(jax.tree.leaves, (restored, state, expected)), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(leaf), np.asarray(before))
            assert set(leaf.sharding.device_set) == set(mesh.devices.flat)
            assert leaf.sharding == wanted.sharding


def test_where_nothing_was_saved_training_starts_at_step_0(tmp_path):
    with Checkpoints(str(tmp_path), Saving(every_steps=1)) as checkpoints:
        assert checkpoints.restore_newest(small_state()) == (None, {"step": 0, "window": []})


def test_the_newest_and_the_multiples_are_kept(tmp_path):
    save(tmp_path, range(2, 15, 2), keep_last=2, keep_every_steps=6)
    assert saved_steps(tmp_path) == [6, 12, 14]


def restored(workdir):
    with Checkpoints(str(workdir), Saving(every_steps=2, keep_last=3)) as checkpoints:
        return checkpoints.restore_newest(small_state())[1]["step"]


def test_a_process_restores_what_process_0_has_not_what_it_sees_itself(tmp_path, monkeypatch):
    """On a network file system two hosts may see different folders for a while."""
    save(tmp_path, [2, 4])
    monkeypatch.setattr(processes, "text_of_first", lambda own: "[2]")
    assert restored(tmp_path) == 2
    monkeypatch.setattr(processes, "text_of_first", lambda own: "[2, 4, 6]")
    monkeypatch.setattr(processes, "of_all", lambda own: [1.0, float(own)])

    def appears(seconds):
        save(tmp_path, [6])

    monkeypatch.setattr(processes.time, "sleep", appears)
    assert restored(tmp_path) == 6
    shutil.rmtree(tmp_path / "checkpoints/6")
    monkeypatch.setattr(processes, "_SEEN_WITHIN_SECONDS", -1.0)
    with pytest.raises(
        UserError, match=r"processes 1 do not see all checkpoints of .* that process 0 sees"
    ):
        restored(tmp_path)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (MemoryError("x"), MemoryError),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: x"), jax.errors.JaxRuntimeError),
        (OSError(24, "Too many open files"), Unavailable),
    ],
)
def test_what_is_short_while_restoring_is_no_damage(error, raised, tmp_path, monkeypatch):
    save(tmp_path, [2, 4])

    def fails(*_):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "_read_alone", fails)
        with pytest.raises(raised, match=r"x|cannot be read at the moment .*Too many open files"):
            restored(tmp_path)
    assert not (tmp_path / "broken_checkpoints").exists()
    assert restored(tmp_path) == 4


def test_what_the_caller_changes_after_a_save_is_not_in_it(tmp_path, monkeypatch):
    """A thread writes the options while training goes on and adds to its window of metrics."""
    original = ocp.JsonCheckpointHandler._save_fn
    went_on = threading.Event()

    async def late(handler, item, directory):
        assert went_on.wait(20)
        await original(handler, item, directory)

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "_save_fn", late)
    window = [{"loss": 1.0}]
    with Checkpoints(str(tmp_path), Saving(every_steps=1)) as checkpoints:
        checkpoints.save(1, small_state(), {"step": 1, "window": window})
        window.append({"loss": 2.0})
        went_on.set()
    found = read_record(find(str(tmp_path), 1))
    assert set(found.pop("checksums")) == {"encoder", "trainer", "head", "config"}
    assert found == {"step": 1, "window": [{"loss": 1.0}]}


def test_encoders_are_read_while_training_saves_and_deletes(tmp_path, tiny):
    one = make_mesh(jax.devices()[:1])
    state = random_state(laid_out_on(abstract_of(tiny), one))
    stop = threading.Event()

    def train():
        with Checkpoints(str(tmp_path), Saving(every_steps=1, keep_last=1)) as checkpoints:
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
            steps: list[int] = []
            until = time.monotonic() + 60
            while len(set(steps)) < 4 or len(steps) < 15:
                assert time.monotonic() < until
                steps.append(simclr_jax.load_encoder(tmp_path).step)
        finally:
            stop.set()
        training.result()
    assert steps == sorted(steps)


@pytest.mark.parametrize("name", ["encoder", "head"])
def test_arrays_that_are_not_those_saved_are_refused(name, tmp_path, tiny, monkeypatch):
    """Where the storage has noticed nothing."""
    encoder_checkpoint(tiny, tmp_path)
    original = saved._read

    def with_one_bit_flipped(checkpoint, item, *how):
        found = original(checkpoint, item, *how)
        if item != (saved.ENCODER if name == "encoder" else saved.TRAINER):
            return found
        leaves, tree = jax.tree.flatten(found)
        x = np.array(leaves[1])
        x.view(np.uint32).reshape(-1)[0] ^= 1
        return jax.tree.unflatten(tree, [leaves[0], jnp.asarray(x), *leaves[2:]])

    def read():
        simclr_jax.load_encoder(tmp_path)
        subjects.trained(tiny, str(tmp_path), make_mesh(), head=True)

    read()
    monkeypatch.setattr(saved, "_read", with_one_bit_flipped)
    with pytest.raises(UserError, match=f"the arrays of {name} differ from those that were saved"):
        read()


def empty(folder):
    for file in pathlib.Path(folder).rglob("*"):
        if file.is_file():
            file.unlink()


def step_in(checkpoint):
    return read_record(checkpoint)["step"]


def test_what_is_half_deleted_is_read_no_more(tmp_path):
    """Training deletes the files of an old checkpoint first, and its folders last."""
    save(tmp_path, [2])
    seen = []

    def read(checkpoint):
        seen.append(checkpoint.name)
        if len(seen) == 1:
            save(tmp_path, [4])
            empty(checkpoint)
        return step_in(checkpoint)

    assert read_newest(str(tmp_path), read) == 4
    assert seen == ["2", "4"]
    empty(tmp_path / "checkpoints" / "4")  # damaged, and the newest
    with pytest.raises(UserError, match="4 cannot be read"):
        read_newest(str(tmp_path), read)


def in_time(function, *arguments):
    """Returns function(*arguments), or fails if that takes for ever."""
    outcome = concurrent.futures.Future()  # type: ignore[var-annotated]

    def run():
        try:
            outcome.set_result(function(*arguments))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return outcome.result(timeout=20)


def test_folders_named_like_those_of_a_checkpoint_do_not_make_readers_loop(tmp_path):
    save(tmp_path, [2])
    (tmp_path / "encoder").mkdir()  # such as an export
    assert in_time(read_newest, str(tmp_path), step_in) == 2
    (tmp_path / "config").mkdir()
    assert in_time(read_newest, str(tmp_path), step_in) == 2
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="cannot be read"):
        in_time(read_newest, str(tmp_path), step_in)


def test_a_damaged_copy_of_a_checkpoint_is_refused(tmp_path):
    save(tmp_path, [2])
    copied = shutil.copytree(tmp_path / "checkpoints/2", tmp_path / "elsewhere")
    empty(copied)
    with pytest.raises(UserError, match="elsewhere cannot be read"):
        in_time(read_newest, str(copied), step_in)


def test_saves_are_due_at_multiples(tmp_path):
    with Checkpoints(str(tmp_path), Saving(every_steps=3)) as checkpoints:
        assert [s for s in range(1, 10) if checkpoints.due(s)] == [3, 6, 9]


def test_the_encoder_is_read_without_the_rest(tmp_path):
    save(tmp_path, [2, 4])
    folder = find(str(tmp_path), None)
    assert folder.name == "4"
    shutil.rmtree(folder / "trainer")  # the optimizer's state: not needed
    state = small_state()
    expected = {"params": state.params["encoder"], "batch_stats": state.batch_stats["encoder"]}
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)
    jax.tree.map(np.testing.assert_array_equal, read_encoder_arrays(folder, abstract), expected)
    assert step_in(folder) == 4


def test_a_workdir_may_be_called_checkpoints(tmp_path):
    workdir = tmp_path / "checkpoints"
    save(workdir, [2])
    assert saved_steps(workdir) == [2]
    assert find(str(workdir), None) == workdir / "checkpoints" / "2"


def test_checkpoints_are_found_from_any_of_their_folders(tmp_path):
    save(tmp_path, [2, 4])
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


def test_what_is_made_of_a_checkpoint_lies_beside_the_workdirs(tmp_path, monkeypatch):
    """Training removes the folder of a checkpoint with all that lies in it."""
    step = tmp_path / "w/checkpoints/20"
    (step / "config").mkdir(parents=True)
    assert beside(str(step)) == (epath.Path(tmp_path / "w"), "_step_20")
    monkeypatch.chdir(step)
    assert beside(".")[1] == "_step_20"
    assert beside(str(tmp_path / "w")) == (epath.Path(tmp_path / "w"), "")
    assert beside(str(tmp_path / "w/checkpoints")) == (epath.Path(tmp_path / "w"), "")
    (tmp_path / "checkpoints/checkpoints/20").mkdir(parents=True)  # a workdir of this name
    assert beside(str(tmp_path / "checkpoints")) == (epath.Path(tmp_path / "checkpoints"), "")
    for path in (tmp_path / "w/checkpoints", step):
        (step / "encoder").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="is a folder of checkpoints: expected the workdir"):
            alone_in(str(path))
    (tmp_path / "copied/20/config").mkdir(parents=True)
    assert beside(str(tmp_path / "copied/20"))[1] == ""
