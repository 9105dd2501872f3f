"""What breaks around a run: storage that is full, damaged, read-only or gone. Nothing is lost."""

import fcntl
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import encoder_checkpoint
from etils import epath
from test_loop import (
    ROOT,
    STEPS,
    Average,
    assert_same_training,
    config_file,
    job_of,
    run_python,
    train,
)

from simclr_jax import assemble, load_encoder, main, shell
from simclr_jax.config import set_options
from simclr_jax.config.python_files import run_file
from simclr_jax.errors import LOST, Unavailable, UserError
from simclr_jax.files import locked
from simclr_jax.mesh import make_mesh
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.training import checksums, program, record, saved
from simclr_jax.training import workdir as workdirs
from simclr_jax.training.checkpoint import Checkpoints, Saving
from simclr_jax.training.saved import read_record, saved_steps


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of 8 steps, saved at 4 and 8."""
    workdir = tmp_path_factory.mktemp("trained") / "whole"
    train(workdir, hooks=[Average()])
    return workdir


@pytest.mark.parametrize("read", [workdirs._newest_record, record.saved_config])
def test_a_record_that_cannot_be_read_at_the_moment_is_no_empty_workdir(
    read, whole, tmp_path, monkeypatch
):
    """To go on without it would be to begin another run, with other options, from this one's state."""
    shutil.copytree(whole, tmp_path / "w")
    (tmp_path / "w" / "config.json").unlink(missing_ok=True)

    def short(*_, **__):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(saved.ocp.Checkpointer, "restore", short)
        with pytest.raises(Unavailable, match=r"cannot be read at the moment.*Too many open files"):
            read(str(tmp_path / "w"))


def test_a_checkpoint_that_may_not_be_read_stays(whole, tmp_path, monkeypatch):
    """Orbax says of such a folder that it is empty; training would set the checkpoint aside."""
    shutil.copytree(whole, tmp_path / "w")
    encoder = str(tmp_path / "w/checkpoints/8/encoder")
    access = os.access
    monkeypatch.setattr(
        saved.os, "access", lambda path, how: str(path) != encoder and access(path, how)
    )
    for read in (
        lambda: train(tmp_path / "w", hooks=[Average()]),
        lambda: saved.read_encoder_arrays(epath.Path(encoder).parent, {}),
    ):
        with pytest.raises(
            Unavailable, match=r"encoder may not be read .permission denied.: ask its"
        ):
            read()
    assert saved_steps(tmp_path / "w") == [4, 8]


def test_a_lock_that_its_owner_removes_before_it_is_taken_is_taken_anew(tmp_path, monkeypatch):
    flock = fcntl.flock
    taken: list = []

    def late(file, how):
        if not taken:
            (tmp_path / "lock").unlink()
        taken.append(file)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with (
        locked(tmp_path, ""),
        pytest.raises(UserError, match="another program is writing into"),
        locked(tmp_path, ""),
    ):
        pass
    assert len(taken) == 3
    assert not (tmp_path / "lock").exists()


def test_the_commit_is_that_of_the_packages_own_checkout(tmp_path, monkeypatch):
    """A package below another project's checkout, such as in its .venv, has no commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    places = (tmp_path / ".venv/lib/simclr_jax/training", tmp_path / "simclr_jax/training")
    for place in places:
        place.mkdir(parents=True)
    found = []
    for place in places:
        monkeypatch.setattr(program, "__file__", str(place / "program.py"))
        found.append(program.commit())
    assert found[0] is None
    assert re.fullmatch("[0-9a-f]{40}(-dirty)?", found[1])


def test_an_archive_of_a_commit_names_it(tmp_path):
    """As launch/tpu_vm.sh copies it to the hosts."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", "HEAD", "simclr_jax/training/program.py"],
        stdout=subprocess.PIPE,
        check=True,
    )
    subprocess.run(["tar", "x", "-C", str(tmp_path)], input=archive.stdout, check=True)
    found = run_file(str(tmp_path / "simclr_jax/training/program.py"), "commit")
    head = subprocess.check_output(["git", "-C", str(ROOT), "rev-parse", "HEAD"], text=True)
    assert found == head.strip()


def test_a_resumed_run_says_that_the_program_has_changed():
    versions = program.versions()
    assert program.what_changed({"versions": versions, "commit": program.commit()}) == []
    then = {"versions": versions | {"jax": "0.1"}, "commit": 40 * "0"}
    jax_has, commit = program.what_changed(then)
    assert jax_has == f"jax 0.1 then, {jax.__version__} now"
    assert commit.startswith("commit 000000000000 then, ")


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


def seen_at_the_terminal(capfd, *arguments):
    """Runs the command, which must fail, in this process. Returns the one line of its error."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        shell.call(main.main, [*arguments])
    line = caught.value.code  # Python prints it and exits with status 1
    assert isinstance(line, str)
    assert line.startswith("error: ")
    assert "\n" not in line
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    return line


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_stops_the_run_at_the_step_and_costs_no_checkpoint(whole, disk):
    where = disk(f"size={int(3.5 * size_of(whole / 'checkpoints/8'))}")
    with pytest.raises(UserError, match="a checkpoint could not be written") as caught:
        train(where / "w", hooks=[Average()], every=1)
    said = str(caught.value)
    assert "No space left on device" in said
    assert "\n" not in said
    kept = saved_steps(where / "w")
    assert kept
    assert kept[-1] < STEPS
    assert f"the newest whole one is of step {kept[-1]}" in said
    assert said.startswith((f"step {kept[-1] + 1}: ", f"step {kept[-1] + 2}: "))
    disk("size=1g")
    train(where / "w", hooks=[Average()], every=1)
    assert_same_training(where / "w", whole)


ON_A_FULL_DISK = """
import pathlib, shutil, sys
from simclr_jax import main
from test_loop import train

where, every = pathlib.Path(sys.argv[1]), int(sys.argv[2])

def filling(step, _):
    if step == 5 and every > 60:
        (where / "ballast").write_bytes(bytes(2**20)[: shutil.disk_usage(where).free])

# Lines until the page that the file already has is full.
main.main = lambda _: train(where / "w", before=filling, steps=60, every=every, log_every=1)
main.run()
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    ("every", "says"),
    [
        (100, "cannot write .*/metrics.jsonl: No space left on device. Mend this, then the same"),
        (1, "(a checkpoint could not|cannot write) .*No space left on device.* the same"),
    ],
)
def test_of_a_full_disk_the_terminal_shows_one_line(disk, every, says):
    """Nothing of Orbax's and TensorBoard's threads, which fail too, and again at the exit."""
    where = disk("size=1m")
    done = run_python(ON_A_FULL_DISK, where, every)
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.fullmatch(f"error: .*{says} command resumes from .*", line)
    assert "step 2/60  loss" in done.stdout


def data_files(folder):
    """The files with the arrays below `folder`. Which of them a reader opens is a matter of timing:
    some hold what later ones replace.
    """
    return [p for p in folder.rglob("d/*") if p.is_file()]


def truncate(folder, share=0.5):
    for file in data_files(folder):
        os.truncate(file, int(file.stat().st_size * share))


def remove_data(folder):
    for file in data_files(folder):
        file.unlink()


DAMAGES = {
    "truncated": truncate,
    "emptied": lambda folder: truncate(folder, 0),
    "data missing": remove_data,
    "item missing": lambda folder: shutil.rmtree(folder / "trainer"),
    "options missing": lambda folder: shutil.rmtree(folder / "config"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_taken(whole, tmp_path, damage, capsys):
    shutil.copytree(whole, tmp_path / "w")
    DAMAGES[damage](tmp_path / "w/checkpoints/8")
    capsys.readouterr()
    train(tmp_path / "w", hooks=[Average()])
    said = capsys.readouterr().out
    assert "cannot read the checkpoint of step 8: " in said
    assert "resumed from step 4" in said
    assert_same_training(tmp_path / "w", whole)
    assert (tmp_path / "w/broken_checkpoints/8").is_dir()


def test_the_checksum_of_a_record_is_that_of_what_is_read_again():
    """Numbers as keys are texts in JSON, and in another order."""
    record = {"step": 1, "hooks": {10: (1, 2), 9: math.nan}, "checksums": {"encoder": 3}}
    again = json.loads(json.dumps(record))
    assert checksums.checksum_of_record(record) == checksums.checksum_of_record(again)
    again["hooks"]["10"][1] = 3
    assert checksums.checksum_of_record(record) != checksums.checksum_of_record(again)


def test_a_record_with_one_other_digit_is_set_aside(whole, tmp_path, capsys):
    """As by a flipped bit: with another step the batches and the learning rate would no longer fit the state."""
    shutil.copytree(whole, tmp_path / "w")
    record = tmp_path / "w/checkpoints/8/config/metadata"
    assert record.read_text().count('"step": 8,') >= 1
    record.write_text(record.read_text().replace('"step": 8,', '"step": 9,', 1))
    with pytest.raises(UserError, match="the record differs from the one that was saved"):
        read_record(record.parent.parent)
    train(tmp_path / "w", hooks=[Average()])
    assert "resumed from step 4" in capsys.readouterr().out
    assert_same_training(tmp_path / "w", whole)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads given up
def test_a_flipped_bit_is_never_restored(whole, tmp_path):
    """In each file, at the start, in the middle and at the end: the state is right, or an older one's."""
    workdir = shutil.copytree(whole, tmp_path / "w")
    folder, abstract = workdir / "checkpoints/8", job_of().abstract_state
    with Checkpoints(str(workdir), Saving(1)) as checkpoints:
        right, _ = checkpoints._restore(8, abstract)
        assert right is not None
        files = [file for file in folder.rglob("*") if file.is_file() and file.stat().st_size]
        refused = 0
        for file in files:
            content = file.read_bytes()
            for place in (0, len(content) // 2, len(content) - 1):
                damaged = bytearray(content)
                damaged[place] ^= 1
                file.write_bytes(damaged)
                found, reason = checkpoints._restore(8, abstract)
                if found is None:
                    assert reason
                    refused += 1
                    continue
                for item in ("encoder", "trainer"):
                    jax.tree.map(np.testing.assert_array_equal, found[item], right[item])
            file.write_bytes(content)
    assert refused > 10


def test_arrays_that_are_not_those_that_were_saved_are_refused():
    tree = {
        "a": jnp.arange(6, dtype=jnp.float32),
        "b": jnp.ones(6, jnp.bfloat16),
        "c": jnp.int32(7),
        "d": jnp.ones(6, jnp.float32),
    }
    options = {"checksums": {"encoder": checksums.checksum(tree)}}
    checksums.verify("encoder", jax.tree.map(jnp.copy, tree), options)
    checksums.verify("encoder", tree, {})  # saved by an earlier version
    for name in tree:
        for bit in (0, 15):
            x = np.array(tree[name]).reshape(-1)
            x.view(f"uint{8 * x.itemsize}")[-1] ^= 1 << bit
            other = tree | {name: jnp.asarray(x.reshape(tree[name].shape))}
            with pytest.raises(ValueError, match="damaged on disk"):
                checksums.verify("encoder", other, options)
    swapped = tree | {"a": tree["d"], "d": tree["a"]}
    with pytest.raises(ValueError, match="damaged on disk"):
        checksums.verify("encoder", swapped, options)
    for devices in (2, 8):
        mesh = make_mesh(jax.devices()[:devices])
        x = np.random.default_rng(0).standard_normal((16, 8), np.float32)
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        assert checksums.checksum(jax.device_put(x, rows)) == checksums.checksum(jnp.asarray(x))


def test_when_no_checkpoint_can_be_read_nothing_is_begun_over(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "w")
    for step in (4, 8):
        truncate(workdir / f"checkpoints/{step}")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(step 8: .*step 4: "):
        train(workdir)
    assert saved_steps(workdir) == [4, 8]


def test_a_workdir_that_is_removed_stops_the_run(tmp_path):
    def removing(step, _):
        if step == 5:
            while (tmp_path / "w").exists():  # a save may be writing into it
                shutil.rmtree(tmp_path / "w", ignore_errors=True)

    with pytest.raises(UserError, match=r"cannot write .*: No such file|could not be written"):
        train(tmp_path / "w", before=removing)


def test_a_workdir_that_a_save_makes_again_stops_the_run_all_the_same(tmp_path):
    """Orbax makes the folders of a save with their parents."""

    def removing(step, _):
        if step == 3:  # before the save of step 4
            shutil.rmtree(tmp_path / "w")
            (tmp_path / "w" / "checkpoints").mkdir(parents=True)

    with pytest.raises(UserError, match=r"cannot write .*/metrics.jsonl: No such file"):
        train(tmp_path / "w", before=removing)


def test_a_damaged_checkpoint_is_not_evaluated(tiny, tmp_path, capfd):
    workdir = encoder_checkpoint(tiny, tmp_path / "w")
    shutil.copytree(workdir / "checkpoints/1", workdir / "checkpoints/2")
    truncate(workdir / "checkpoints/2/encoder")
    with pytest.raises(UserError, match=r"checkpoints/2 cannot be read"):
        load_encoder(workdir)
    assert load_encoder(workdir, step=1).step == 1
    said = seen_at_the_terminal(capfd, f"--workdir={workdir}", "--mode=knn")
    assert said.startswith(f"error: {workdir}/checkpoints/2 cannot be read (")
    assert said.endswith(
        "use an older checkpoint, or run the training command again, which sets it aside"
    )


def test_a_workdir_on_a_read_only_disk_is_refused_before_anything_is_computed(
    tiny, tmp_path, disk, capfd
):
    file = config_file(tiny, tmp_path)
    where = disk("size=10m")
    (where / "w").mkdir()
    disk("ro")
    said = seen_at_the_terminal(capfd, f"--config={file}", f"--workdir={where}/w")
    assert said == (
        f"error: cannot write {where}/w: Read-only file system. "
        "It must be a folder that can be written"
    )


def test_out_of_memory_is_one_line_that_says_what_to_turn(capfd):
    """The error of JAX itself, for more memory than any machine has, and Python's."""

    def too_large(arguments):
        jnp.zeros(2**50, jnp.uint8).block_until_ready()

    def too_many(arguments):
        raise MemoryError

    for command, size in ((too_large, "while allocating 1125899906842624 bytes"), (too_many, "")):
        with pytest.raises(SystemExit) as ended:
            shell.call(command, [])
        said = str(ended.value.code)
        assert said.startswith(f"error: out of memory {size}".rstrip())
        assert "\n" not in said
        for option in ("train.microbatches=4", "model.remat=True", "data.batch_size"):
            assert option in said


def test_a_device_that_fails_may_be_tried_again(capfd):
    def fails(arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ECC_UNCORRECTABLE")

    with pytest.raises(SystemExit) as ended:
        shell.call(fails, [])
    assert ended.value.code == LOST
    assert "CUDA_ERROR_ECC_UNCORRECTABLE" in capfd.readouterr().err


def test_an_interrupt_where_python_ignores_exceptions_is_not_lost():
    """JAX clears its caches in a callback of the garbage collector, where a Ctrl-C would only be printed."""
    code = (
        "import time; from simclr_jax import shell\n"
        "class Deleted:\n"
        "    def __del__(self): raise KeyboardInterrupt\n"
        "def command(_):\n"
        "    Deleted()\n"
        "    time.sleep(60)\n"
        "shell.mend_unraisable()\n"
        "shell.call(command, [])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted: ")


def test_a_run_that_saved_nothing_is_replaced_and_says_so(tiny, tmp_path, capsys):
    workdir = str(tmp_path / "w")
    set_options(tiny, {"train.steps": 1, "eval.after_training": "none"})
    about = record.about_training(
        assemble.plan_of(tiny, 48), assemble.data_set(tiny), "of other data"
    )
    before = record.write_record(tiny, about, workdir)
    for name in ("not_finite_step_6.json", "health.json"):
        (tmp_path / "w" / name).write_text("{}")
    tiny.seed = 1
    pretrain(tiny, workdir)
    said = capsys.readouterr().out
    assert "a run that saved nothing is replaced (seed: 0 -> 1)" in said
    now = json.loads((tmp_path / "w/config.json").read_text())
    assert now["config"]["seed"] == 1
    assert now["run"] != before["run"]
    assert not (tmp_path / "w/not_finite_step_6.json").exists()
    assert json.loads((tmp_path / "w/health.json").read_text())["name"]  # of this run
    pretrain(tiny, workdir)
    again = json.loads((tmp_path / "w/config.json").read_text())
    assert again["run"] == now["run"] == saved.read_record(saved.find(workdir, None))["run"]


def test_a_clone_that_is_not_installed_trains_all_the_same(tiny, tmp_path, monkeypatch):
    def none(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", none)
    set_options(tiny, {"train.steps": 1, "eval.after_training": "none"})
    pretrain(tiny, str(tmp_path / "w"))
    versions = json.loads((tmp_path / "w/config.json").read_text())["versions"]
    assert versions["simclr_jax"] == "not installed"
