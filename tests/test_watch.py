"""A training that is stuck ends by itself, and says what it was doing."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_loop import train
from test_processes import ROOT, cache, environment, quick  # noqa: F401 (two are fixtures)

from simclr_jax.errors import LOST
from simclr_jax.training import loop, watch
from simclr_jax.training.watch import Watch, late_of


def watched(tmp_path, seconds=0.2):
    """A watch, and an event that it sets in place of ending the process."""
    ended = threading.Event()
    return Watch(str(tmp_path), seconds, end=ended.set), ended


def begin(watching, step):
    """Comes to `step`, from two before it."""
    for number in range(step - 2, step + 1):
        watching.beat(number)


def test_a_loop_that_is_stuck_is_ended_with_its_stacks(tmp_path, capfd):
    watching, ended = watched(tmp_path)
    with watching:
        begin(watching, 3)

        def a_data_source_that_never_answers():
            with watching.doing("input"):
                assert ended.wait(20)

        a_data_source_that_never_answers()
    said = json.loads((tmp_path / "hung/process_0.json").read_text())
    assert said == {"process": 0, "step": 3, "doing": "input"}
    assert "a_data_source_that_never_answers" in (tmp_path / "hung/process_0.txt").read_text()
    (line,) = capfd.readouterr().err.splitlines()
    assert "error: process 0 of 1: no progress for " in line
    assert "(input, after step 3; train.hang_seconds=0.2)" in line
    assert line.endswith("The same command resumes from the newest checkpoint")


def test_what_may_take_its_time_is_not_ended(tmp_path):
    watching, ended = watched(tmp_path, seconds=0.1)
    with watching:
        with watching.doing("input"):  # before the first result
            assert not ended.wait(0.5)
        begin(watching, 3)
        with watching.doing("evaluating"):
            assert not ended.wait(0.5)
        with watching.doing("saving"):
            assert not ended.wait(0.5)
        for step in range(10):
            watching.beat(step)
            assert not ended.wait(0.05)
    assert not ended.wait(0.5)  # it is over
    with Watch(str(tmp_path), 0.0, end=ended.set) as never:
        begin(never, 3)
        assert not ended.wait(0.3)
    assert not (tmp_path / "hung").exists()


def test_a_stuck_save_is_ended_after_ten_times_as_long(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "_SLOW", 3)
    watching, ended = watched(tmp_path, seconds=0.2)
    with watching:
        begin(watching, 8)
        began = time.monotonic()
        with watching.doing("saving"):
            assert ended.wait(20)
        assert time.monotonic() - began > 0.5
    assert json.loads((tmp_path / "hung/process_0.json").read_text())["doing"] == "saving"


def test_others_may_still_be_busy_after_a_save_and_the_first_images_may_take_longer(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(watch, "_SLOW", 6)
    watching, ended = watched(tmp_path, seconds=0.2)
    with watching:
        began = time.monotonic()
        with watching.doing("input"):
            assert ended.wait(20)
        assert time.monotonic() - began > 1
    watching, ended = watched(tmp_path, seconds=0.2)
    with watching:
        begin(watching, 3)
        with watching.doing("saving"):
            pass
        with watching.doing("computing"):
            assert not ended.wait(0.7)
        begin(watching, 6)  # three steps on all is as before
        with watching.doing("computing"):
            began = time.monotonic()
            assert ended.wait(20)
            assert time.monotonic() - began < 1


def test_a_stuck_storage_does_not_keep_the_process(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(watch, "_WRITING", 0.3)
    monkeypatch.setattr(watch, "_stacks", lambda: time.sleep(60))
    watching, ended = watched(tmp_path)
    with watching:
        begin(watching, 3)
        assert ended.wait(20)
    assert "hung cannot be written" in capfd.readouterr().err


@pytest.mark.whole
def test_the_training_loop_is_watched(tmp_path, monkeypatch):
    """One that waits for ever in a step, and one whose checkpoint is never written."""
    ended = threading.Event()

    class Ending(Watch):
        def __init__(self, workdir, seconds):
            super().__init__(workdir, seconds, end=ended.set)

    monkeypatch.setattr(loop, "Watch", Ending)
    made = loop.Run

    def run(*args, **more):
        return made(*args, **more | {"hang_seconds": 0.5})

    monkeypatch.setattr("test_loop.Run", run)

    def stuck(step, _):
        if step == 5:
            assert ended.wait(20)

    train(tmp_path / "w", before=stuck)
    assert ended.is_set()
    said = json.loads((tmp_path / "w/hung/process_0.json").read_text())
    assert said["doing"] in ("computing", "input", "between steps")
    assert 3 <= said["step"] <= 5


@pytest.mark.parametrize(
    ("heard", "says"),
    [
        ({0: (7, "computing")}, "; process 1 says nothing"),
        (
            {0: (7, "computing"), 1: (7, "input")},
            "; the others wait for process 1 (input after step 7)",
        ),
        (
            {0: (7, "computing"), 1: (6, "computing")},
            "; the others wait for process 1 (computing after step 6)",
        ),
        ({0: (7, "computing"), 1: (7, "computing")}, "; all processes are at one place"),
        ({0: (7, "saving"), 1: (7, "saving")}, "; all processes are at one place"),
    ],
)
def test_the_late_process_is_named(heard, says):
    found = {p: {"process": p, "step": step, "doing": what} for p, (step, what) in heard.items()}
    assert late_of(found, 2).startswith(says)


STUCK = """
import os, signal, sys, time
import jax
from simclr_jax import main
from simclr_jax.training.checkpoint import Checkpoints

kind, check = sys.argv.pop(1), Checkpoints.check

def stuck(self, step):
    if step == 4 and jax.process_index() == 1:
        if kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        while kind == "loop":
            pass
    if kind == "slow" and jax.process_index() == 1:
        time.sleep(0.6)  # well above what another program on this machine may cost process 0
    check(self, step)

Checkpoints.check = stuck
main.run()
"""


@pytest.fixture
def two_stuck(cache, quick, tmp_path):  # noqa: F811
    """(kind) -> two processes, of which the second is stuck at its fourth step."""
    started = []

    def start(kind):
        port = 20000 + os.getpid() % 20000
        options = [
            f"--workdir={tmp_path}",
            f"--coordinator=127.0.0.1:{port}",
            "--processes=2",
            f"--config.train.steps={12 if kind == 'slow' else 100}",
            "--config.train.hang_seconds=10",
            "--config.checkpoint.every_steps=1000",  # right after a save it waits longer
            "--config.eval.after_training=none",
        ]
        for i in range(2):
            command = [sys.executable, "-c", STUCK, kind, *quick, *options, f"--process={i}"]
            how = {"cwd": ROOT, "env": environment(2, cache), "stderr": subprocess.PIPE}
            started.append(subprocess.Popen(command, text=True, **how))
        return started

    yield start
    for process in started:
        process.send_signal(signal.SIGCONT)
        process.kill()


@pytest.mark.whole
@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("stopped", "process 1 says nothing"),
        ("loop", "the others wait for process 1 (between steps after step 4)"),
    ],
)
def test_of_two_processes_the_stuck_one_is_named_and_both_end(kind, says, two_stuck, tmp_path):
    first, second = two_stuck(kind)
    _, said = first.communicate(timeout=200)
    assert first.returncode == LOST
    assert says in said, said
    assert (tmp_path / "hung/process_0.txt").exists()
    if kind == "loop":
        second.communicate(timeout=60)
        # By its own watch, or by JAX, which may see first that process 0 has ended.
        assert second.returncode in (LOST, -signal.SIGABRT)
        assert "in stuck" in (tmp_path / "hung/process_1.txt").read_text()


@pytest.mark.whole
def test_of_two_processes_the_slow_one_is_named(two_stuck, tmp_path):
    first, second = two_stuck("slow")
    _, said = first.communicate(timeout=200)
    second.communicate(timeout=60)
    assert first.returncode == second.returncode == 0, said
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["slowest_process"] for line in lines} == {1}
    assert min(line["slowest_process_share"] for line in lines[1:]) > 0.3  # at first it compiles
