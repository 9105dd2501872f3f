"""Faults of one of two processes whose training has everything: microbatches, divided parameters, a loss in tiles,
and a number of images that does not divide.
"""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_processes import PORT, ROOT, cache, environment, quick  # noqa: F401 (two are fixtures)

from simclr_jax import load_encoder
from simclr_jax.errors import LOST
from simclr_jax.shell import STOPPED
from simclr_jax.training.saved import saved_steps

pytestmark = pytest.mark.whole

STEPS, EVERY = 12, 3

# The second process does what its first argument says, at step 4 or in the save of step 6.
FAULTS = """
import os, signal, sys, time
import jax
from simclr_jax import main
from simclr_jax.training import checkpoint, loop

kind, saved = sys.argv.pop(1), sys.argv.pop(1)

def mine():
    return jax.process_index() == 1

def fault():
    while kind.startswith("killed") and not os.path.isdir(saved):  # written while the steps go on
        time.sleep(0.1)
    if kind.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind.startswith("told"):
        os.kill(os.getpid(), signal.SIGTERM)
    if kind.startswith("stuck"):
        time.sleep(1000)

check = checkpoint.Checkpoints.check
def check_or_fault(self, step):
    if step == 4 and mine() and kind in ("killed", "told"):
        fault()
    check(self, step)
checkpoint.Checkpoints.check = check_or_fault

split = checkpoint._split
def split_or_fault(state):
    if mine() and kind.endswith("in a save") and int(state.step) == 6:
        fault()
    return split(state)
checkpoint._split = split_or_fault

fit = loop.fit
def fit_on(job, batches, run, hooks=()):
    def some(start):
        for step, batch in enumerate(batches(start), start + 1):
            if step == 5 and mine() and kind == "stuck in the data":
                fault()
            yield batch
    return fit(job, some, run, hooks)
from simclr_jax.modes import pretrain
pretrain.fit = fit_on

def compiled(event, seconds, **about):
    # The lowering of the step is over, its compilation begins.
    if kind == "told while compiling" and mine() and "jaxpr_to_mlir" in event and about["fun_name"] == "jit(step)":
        fault()
jax.monitoring.register_event_duration_secs_listener(compiled)

main.run()
"""


@pytest.fixture(scope="module")
def two(cache, quick):  # noqa: F811
    """(kind, workdir) -> what the two processes said, their exit statuses, and the seconds by which the second, which
    has the fault, ended before the first.
    """

    def run(kind, workdir):
        options = [
            f"--workdir={workdir}",
            f"--coordinator=127.0.0.1:{PORT}",
            "--processes=2",
            f"--config.train.steps={STEPS}",
            "--config.train.microbatches=2",
            "--config.train.log_every_steps=1",
            f"--config.train.hang_seconds={5 if kind.startswith('stuck') else 1800}",
            "--config.mesh.fsdp=4",
            "--config.loss.implementation=chunked",
            f"--config.checkpoint.every_steps={EVERY}",
            "--config.checkpoint.keep_last=10",
            "--config.eval.after_training=none",
        ]
        # Keeps no program where the fault comes while one is compiled.
        kept = workdir.parent / f"{workdir.name} cache" if "compiling" in kind else cache
        said = [workdir.parent / f"{workdir.name}.{i}.log" for i in range(2)]
        how = {"cwd": ROOT, "env": environment(2, kept), "stderr": subprocess.STDOUT}
        started = [
            subprocess.Popen(
                [
                    *(sys.executable, "-c", FAULTS, kind, workdir / f"checkpoints/{EVERY}"),
                    *(*quick, *options, f"--process={i}"),
                ],
                stdout=file.open("w"),
                **how,
            )
            for i, file in enumerate(said)
        ]
        try:
            ended = []
            for process in reversed(started):  # the one with the fault first
                process.wait(timeout=240)
                ended.append(time.monotonic())
        finally:
            for process in started:
                process.kill()
        after = ended[1] - ended[0]
        print(f"measured: {kind}, process 0 ended {after:.0f} s after process 1")
        return [file.read_text() for file in said], [p.returncode for p in started], after

    return run


@pytest.fixture(scope="module")
def undisturbed(two, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    said, statuses, _ = two("none", workdir)
    assert statuses == [0, 0], said
    return workdir


def losses(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(line["step"], line["loss"]) for line in map(json.loads, lines)]


def assert_goes_on(two, workdir, undisturbed, step):
    """The same command resumes from `step`, and ends with the parameters of the run without faults, bit for bit."""
    said, statuses, _ = two("none", workdir)
    assert statuses == [0, 0], said
    assert f"resumed from step {step}" in said[0]
    assert losses(workdir) == losses(undisturbed)
    found, expected = (load_encoder(w, step=STEPS).variables for w in (workdir, undisturbed))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_both_go_on_before_a_checkpoint_that_one_cannot_read(two, undisturbed, tmp_path):
    """Each process reads its own part of the parameters."""
    shutil.copytree(undisturbed, tmp_path / "w")
    for file in (tmp_path / f"w/checkpoints/{STEPS}/encoder/ocdbt.process_1/d").iterdir():
        content = bytearray(file.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 400] = bytes(400)
        file.write_bytes(content)
    assert_goes_on(two, tmp_path / "w", undisturbed, STEPS - EVERY)
    assert [p.name for p in (tmp_path / "w/broken_checkpoints").iterdir()] == [str(STEPS)]


@pytest.mark.parametrize("kind", ["killed", "killed in a save"])
def test_when_one_is_killed_the_other_names_it_and_ends(kind, two, undisturbed, tmp_path):
    said, statuses, seconds = two(kind, tmp_path)
    assert statuses[1] == -signal.SIGKILL
    assert 1 < seconds < 60
    assert statuses[0] in (LOST, -signal.SIGABRT), said[0]
    # JAX says it, or we do where the survivor saw it first.
    names = r"stopped sending heartbeats\):\n1\n|error: .*process 1"
    assert re.search(names, said[0]), said[0]
    assert "Mend this" not in said[0], said[0]
    assert saved_steps(tmp_path)[-1] == EVERY
    assert_goes_on(two, tmp_path, undisturbed, EVERY)


@pytest.mark.parametrize("kind", ["told", "told in a save", "told while compiling"])
def test_when_one_is_told_to_stop_both_save_one_step_and_end(kind, two, undisturbed, tmp_path):
    said, statuses, _ = two(kind, tmp_path)
    assert statuses == [STOPPED, STOPPED], said
    step = saved_steps(tmp_path)[-1]
    assert f"stopped after step {step}, which is saved" in said[0]
    assert step < STEPS
    assert_goes_on(two, tmp_path, undisturbed, step)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("stuck in the data", "the others wait for process 1 (input after step 4)"),
        # Orbax has each wait for the other there.
        ("stuck in a save", "no progress for 50 s (saving, after step 6"),
    ],
)
def test_when_one_is_stuck_both_end_and_the_other_names_it(kind, says, two, undisturbed, tmp_path):
    said, statuses, _ = two(kind, tmp_path)
    assert statuses[0] == LOST, said
    assert statuses[1] in (LOST, -signal.SIGABRT), said
    assert says in said[0], said[0]
    assert "in fault" in (tmp_path / "hung/process_1.txt").read_text()
    assert_goes_on(two, tmp_path, undisturbed, EVERY)
