"""What breaks around a run: storage that is full, damaged, read-only or gone. Nothing is lost."""

import os
import shutil
import subprocess

import pytest
from test_train import assert_same_run

from simclr_jax import assemble, train
from simclr_jax.checkpoint import saved_steps
from simclr_jax.encoder import load_encoder
from simclr_jax.errors import UserError


@pytest.fixture
def whole(tiny, tmp_path):
    """A run of 8 steps, saved at 4 and 8."""
    train.pretrain(tiny, str(tmp_path / "whole"))
    return tmp_path / "whole"


@pytest.fixture
def disk(tmp_path):
    """mount(options): a file system of its own in tmp_path / "disk", remounted if it is there."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = False

    def mount(options):
        nonlocal mounted
        options = f"remount,{options}" if mounted else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        mounted = True
        return where

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(where)], check=True)


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_stops_the_run_at_the_step_and_costs_no_checkpoint(
    tiny, whole, disk, monkeypatch
):
    one = size_of(whole / "checkpoints/8")
    where = disk(f"size={int(3.5 * one)}")
    tiny.checkpoint.every_steps, tiny.checkpoint.keep_last = 1, 100
    with pytest.raises(UserError, match="a checkpoint could not be written") as caught:
        train.pretrain(tiny, str(where / "w"))
    said = str(caught.value)
    assert "No space left on device" in said
    assert "\n" not in said
    kept = saved_steps(where / "w")
    assert kept
    assert f"the newest whole one is of step {kept[-1]}" in said
    assert said.startswith((f"step {kept[-1] + 1}: ", f"step {kept[-1] + 2}: "))
    disk("size=1g")
    train.pretrain(tiny, str(where / "w"))
    assert_same_run(where / "w", whole)


def test_a_full_disk_under_the_metrics_is_said(tiny, disk, monkeypatch):
    where = disk("size=1m")
    tiny.checkpoint.every_steps = 100
    (where / "w").mkdir()
    original = assemble.training_batches

    def filling(*args):
        for i, batch in enumerate(original(*args)):
            if i == 4:
                (where / "ballast").write_bytes(bytes(2**20)[: shutil.disk_usage(where).free])
            yield batch

    monkeypatch.setattr(assemble, "training_batches", filling)
    # Lines until the page that the file already has is full.
    tiny.train.log_every_steps, tiny.train.steps = 1, 60
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: No space left on device"):
        train.pretrain(tiny, str(where / "w"))


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


DAMAGES = {
    "truncated": lambda folder: os.truncate(largest(folder), largest(folder).stat().st_size // 2),
    "emptied": lambda folder: os.truncate(largest(folder), 0),
    "data missing": lambda folder: largest(folder).unlink(),
    "item missing": lambda folder: shutil.rmtree(folder / "trainer"),
    "options missing": lambda folder: shutil.rmtree(folder / "config"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_taken(
    tiny, whole, tmp_path, damage, capsys
):
    shutil.copytree(whole, tmp_path / "w")
    DAMAGES[damage](tmp_path / "w/checkpoints/8")
    capsys.readouterr()
    train.pretrain(tiny, str(tmp_path / "w"))
    said = capsys.readouterr().out
    assert "cannot read the checkpoint of step 8: " in said
    assert "resumed from step 4" in said
    assert_same_run(tmp_path / "w", whole)
    assert (tmp_path / "w/broken_checkpoints/8").is_dir()


def test_when_no_checkpoint_can_be_read_nothing_is_begun_over(tiny, whole):
    for step in (4, 8):
        DAMAGES["truncated"](whole / f"checkpoints/{step}")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(step 8: .*step 4: "):
        train.pretrain(tiny, str(whole))
    assert saved_steps(whole) == [4, 8]


def test_a_damaged_checkpoint_is_not_evaluated(whole):
    DAMAGES["truncated"](whole / "checkpoints/8/encoder")
    with pytest.raises(UserError, match=r"checkpoints/8 cannot be read"):
        load_encoder(whole)
    assert load_encoder(whole, step=4).step == 4


def test_a_workdir_on_a_read_only_disk_is_refused_before_anything_is_computed(tiny, disk):
    where = disk("size=10m")
    (where / "w").mkdir()
    disk("ro")
    with pytest.raises(UserError, match=r"cannot write into --workdir .*: Read-only file system"):
        train.pretrain(tiny, str(where / "w"))


def test_a_workdir_that_is_removed_stops_the_run(tiny, tmp_path, monkeypatch):
    original = assemble.training_batches

    def removing(*args):
        for i, batch in enumerate(original(*args)):
            if i == 4:
                while (tmp_path / "w").exists():  # a save may be writing into it
                    shutil.rmtree(tmp_path / "w", ignore_errors=True)
            yield batch

    monkeypatch.setattr(assemble, "training_batches", removing)
    with pytest.raises(UserError, match=r"cannot write .*: No such file|could not be written"):
        train.pretrain(tiny, str(tmp_path / "w"))
