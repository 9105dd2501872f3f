"""Pretraining that begins with given weights, and how that is guarded."""

import itertools
import shutil

import jax
import numpy as np
import pytest
from conftest import RESNET, encoder_checkpoint
from safetensors.numpy import save_file

from simclr_jax import assemble, load_encoder, processes
from simclr_jax.config import set_options
from simclr_jax.encoders import init_encoder
from simclr_jax.errors import Stopped, UserError
from simclr_jax.mesh import make_mesh
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.modes.warm_start import begun_with, find_start, read_start
from simclr_jax.training.saved import checkpoint_folder, find, read_record
from simclr_jax.weights import torchvision


@pytest.fixture
def source(tiny, tmp_path):
    """A workdir with other weights than `tiny` starts with."""
    return str(encoder_checkpoint(tiny, tmp_path / "source"))


def equal(a, b):
    return all(
        np.array_equal(x, y)
        for x, y in zip(*map(jax.tree.leaves, jax.device_get((a, b))), strict=True)
    )


def job_of(c, devices, fsdp=1):
    mesh = make_mesh(jax.devices()[:devices], fsdp)
    return assemble.pretraining_job(c, assemble.plan_of(c, 48), None, mesh)


def weights_of(encoder):
    return {k: encoder.variables[k] for k in ("params", "batch_stats")}


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (8, 2)])
def test_the_encoder_is_that_of_the_source_and_the_head_is_new(tiny, source, devices, fsdp):
    job = job_of(tiny, devices, fsdp)
    fresh = jax.device_get(job.init())
    tiny.model.init_from = source
    state = begun_with(read_start(tiny), job).init()
    assert equal(state.params["encoder"], load_encoder(source).variables["params"])
    assert not equal(state.params["encoder"], fresh.params["encoder"])
    assert equal(state.params["head"], fresh.params["head"])
    assert equal(state.opt_state, fresh.opt_state)
    assert int(state.step) == 0
    lies = [x.sharding for x in jax.tree.leaves(job.abstract_state)]
    assert [x.sharding for x in jax.tree.leaves(state)] == lies


def test_the_head_comes_along_where_asked_for(tiny, source):
    job = job_of(tiny, 1)
    fresh = jax.device_get(job.init())
    set_options(tiny, {"model.init_from": source, "model.init_parts": "encoder_and_head"})
    state = begun_with(read_start(tiny), job).init()
    assert not equal(state.params["head"], fresh.params["head"])
    assert not equal(state.batch_stats["head"], fresh.batch_stats["head"])


def run(c, workdir, steps=None):
    if steps is None:
        pretrain(c, str(workdir))
        return
    with pytest.MonkeyPatch.context() as patch:
        step = itertools.count(1)
        # A signal comes in this step.
        patch.setattr("simclr_jax.training.stopping.Stop.now", lambda self: next(step) == steps)
        with pytest.raises(Stopped):
            pretrain(c, str(workdir))


@pytest.mark.whole
def test_a_warm_run_goes_on_as_if_never_stopped(tiny, source, tmp_path, capsys):
    tiny.model.init_from = source
    run(tiny, tmp_path / "whole")
    assert f"begins      with the encoder of {source}, step 1" in capsys.readouterr().out
    run(tiny, tmp_path / "parts", steps=3)
    shutil.rmtree(source)  # no longer needed
    run(tiny, tmp_path / "parts")
    a, b = (load_encoder(tmp_path / name) for name in ("whole", "parts"))
    assert equal(weights_of(a), weights_of(b))
    about = read_record(find(str(tmp_path / "parts"), None))["init_from"]
    assert about["path"] == source
    assert about["step"] == 1
    assert len(about["digest"]) == 32
    cold = tiny.copy_and_resolve_references()
    cold.model.init_from = ""
    run(cold, tmp_path / "cold")
    assert not equal(weights_of(a), weights_of(load_encoder(tmp_path / "cold")))


@pytest.mark.whole
def test_a_run_is_not_mixed_with_one_of_another_beginning(tiny, source, tmp_path):
    cold = tiny.copy_and_resolve_references()
    run(cold, tmp_path / "cold", steps=1)
    tiny.model.init_from = source
    with pytest.raises(UserError, match=r"began with other weights .random ones."):
        run(tiny, tmp_path / "cold")
    run(tiny, tmp_path / "warm", steps=1)
    with pytest.raises(UserError, match=f"give --config.model.init_from={source}"):
        run(cold, tmp_path / "warm")
    other = str(tmp_path / "other")
    shutil.copytree(find(source, 1), checkpoint_folder(other) / "2")
    tiny.model.init_from = other  # which has no step 1
    with pytest.raises(UserError, match=r"began with other weights .those of"):
        run(tiny, tmp_path / "warm")
    tiny.model.init_from = source
    shutil.rmtree(checkpoint_folder(source))
    tiny.seed = 5
    encoder_checkpoint(tiny, source)
    tiny.seed = 0
    with pytest.raises(UserError, match=r"began with other weights .those of"):
        run(tiny, tmp_path / "warm")


def test_weights_that_one_process_does_not_see_are_gone_for_all(tiny, source, monkeypatch):
    """Otherwise it would go on alone while the remaining processes read them together."""
    tiny.model.init_from = source
    began_with = read_start(tiny).about | {"digest": "another"}
    with pytest.raises(UserError, match="began with other weights"):
        find_start(tiny, {"init_from": began_with}, "w")
    monkeypatch.setattr(processes, "of_all", lambda seen: [seen, 0.0])
    assert find_start(tiny, {"init_from": began_with}, "w") == (None, began_with)


def test_a_run_goes_on_whatever_becomes_of_the_workdir_that_it_began_with(
    tiny, source, tmp_path, capsys
):
    tiny.model.init_from = source
    began_with = read_start(tiny).about
    shutil.copytree(find(source, 1), tmp_path / "first")
    shutil.rmtree(checkpoint_folder(source))
    tiny.seed = 5  # other weights, as if trained on
    encoder_checkpoint(tiny, source)
    newer = find(source, 1).rename(checkpoint_folder(source) / "3")
    (tmp_path / "first").rename(checkpoint_folder(source) / "1")
    record = {"init_from": began_with}
    for is_kept in (True, False):
        assert find_start(tiny, record, "w") == (None, began_with)
        said = capsys.readouterr().out
        assert said == (
            "" if is_kept else f"begun       with step 1 of {source}, which is no longer there\n"
        )
        if is_kept:
            shutil.rmtree(newer.parent / "1")
    tiny.model.init_parts = "encoder_and_head"
    with pytest.raises(UserError, match="began with other weights"):
        find_start(tiny, record, "w")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("model.vit.layers", 2, r"model.vit.layers: 1 there, 2 here"),
        ("model.name", "resnet", r"model.name: vit there, resnet here"),
        ("model.init_from", "/nowhere/at/all", "does not exist"),
    ],
)
def test_another_model_is_refused(tiny, source, option, value, message):
    tiny.model.init_from = source
    set_options(tiny, {option: value})
    with pytest.raises(UserError, match=message) as error:
        read_start(tiny)
    assert "\n" not in str(error.value)


def test_a_head_of_another_width_is_refused_where_it_is_wanted(tiny, source):
    set_options(tiny, {"model.init_from": source, "model.head_width": 8})
    read_start(tiny)
    tiny.model.init_parts = "encoder_and_head"
    with pytest.raises(UserError, match=r"model.head_width: 16 there, 8 here"):
        read_start(tiny)


def test_a_file_of_torchvisions_names_is_a_beginning(tiny, tmp_path):
    set_options(tiny, RESNET)
    network = assemble.encoder(tiny)
    variables = jax.device_get(init_encoder(network, 12, jax.random.key(9)))
    path = tmp_path / "w.safetensors"
    save_file(torchvision.torchvision_weights(variables), path)
    tiny.model.init_from = str(path)
    start = read_start(tiny)
    assert any(note.startswith("model.standardize: imagenet there") for note in start.notes)
    (note,) = (note for note in start.notes if note.startswith("model.standardize"))
    assert note.endswith("none here (--config.model.standardize=imagenet keeps it)")
    assert equal(start.parts, {"encoder": variables})
    tiny.model.init_parts = "encoder_and_head"
    with pytest.raises(UserError, match="has no projection head"):
        read_start(tiny)


def test_a_width_that_is_no_multiple_of_a_channel_is_that_of_its_file(tiny, tmp_path):
    """0.02 and 1 / 64 are both one channel."""
    set_options(tiny, RESNET | {"model.width": 0.02})
    variables = jax.device_get(init_encoder(assemble.encoder(tiny), 12, jax.random.key(9)))
    path = tmp_path / "w.safetensors"
    save_file(torchvision.torchvision_weights(variables), path)
    tiny.model.init_from = str(path)
    start = read_start(tiny)
    assert equal(start.parts, {"encoder": variables})
    assert not any(note.startswith("model.width") for note in start.notes)
    tiny.model.width = 0.03
    with pytest.raises(UserError, match=r"model.width: 0.015625 there, 0.03 here"):
        read_start(tiny)


def test_a_kernel_of_another_size_is_refused(tiny, tmp_path):
    set_options(tiny, RESNET)
    network = assemble.encoder(tiny)
    variables = jax.device_get(init_encoder(network, 12, jax.random.key(9)))
    save_file(torchvision.torchvision_weights(variables), tmp_path / "w.safetensors")
    set_options(
        tiny, {"model.init_from": str(tmp_path / "w.safetensors"), "model.stem": "imagenet"}
    )
    with pytest.raises(UserError, match=r"model\.stem: cifar there, imagenet here"):
        begun_with(read_start(tiny), job_of(tiny, 1))
