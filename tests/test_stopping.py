"""Real signals and real processes: SIGTERM, SIGINT and SIGKILL cost nothing but time."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from test_loop import (
    ROOT,
    STEPS,
    Average,
    assert_same_training,
    config_file,
    mesh,
    metrics_of,
    run_python,
    train,
)

from simclr_jax import errors, load_encoder
from simclr_jax.modes.pretrain import pretrain
from simclr_jax.shell import STOPPED
from simclr_jax.training import stopping
from simclr_jax.training.saved import saved_steps

HOST_STEPS = 60


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training of 8 steps that was never stopped."""
    workdir = tmp_path_factory.mktemp("trained") / "whole"
    train(workdir, hooks=[Average()])
    return workdir


def sends(number, at, times=1):
    """Sends a signal to this process while the batch of step `at` is made."""

    def before(step, _):
        if step == at:
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.1)  # two that arrive at once are one

    return before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("at", [1, 4, 6])
def test_a_signal_lets_the_step_finish_and_saves(whole, tmp_path, capsys, number, at):
    before = signal.getsignal(number)
    # Twice, as from a terminal and a launcher.
    with pytest.raises(errors.Stopped):
        train(tmp_path / "w", hooks=[Average()], before=sends(number, at, times=2))
    assert signal.getsignal(number) is before
    assert saved_steps(tmp_path / "w") == sorted({at} | ({4} if at > 4 else set()))
    said = capsys.readouterr().out
    assert f"stopped after step {at}, which is saved: the same command resumes from it" in said
    train(tmp_path / "w", hooks=[Average()])
    assert f"resumed from step {at}" in capsys.readouterr().out
    assert_same_training(tmp_path / "w", whole)


def test_a_signal_in_the_last_step_leaves_it_whole_and_is_passed_on(whole, tmp_path, monkeypatch):
    def train_to_the_end(workdir):
        return train(workdir, hooks=[Average()], before=sends(signal.SIGINT, STEPS))

    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(tmp_path / "w")
    assert_same_training(tmp_path / "w", whole)
    # One of several processes goes on with the others: they would wait for it.
    monkeypatch.setattr(stopping, "_wishes_are_passed_on", lambda: False)
    state = train_to_the_end(tmp_path / "v")
    assert int(state.step) == STEPS


def test_a_second_signal_seconds_later_ends_the_run_at_once(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "_SAME_WISH_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "w", hooks=[Average()], before=sends(signal.SIGINT, 6, times=2))
    assert saved_steps(tmp_path / "w") == [4]
    train(tmp_path / "w", hooks=[Average()])
    assert_same_training(tmp_path / "w", whole)


def test_an_interrupt_that_was_ignored_before_stays_ignored():
    """As in the background job of a script: Ctrl-C is for the script."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stopping.Stop(mesh()) as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.now()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_is_answered_at_once_and_once(capsys):
    """By a thread: the main one, which runs Python's handlers, may be compiling for a minute."""
    with stopping.Stop(mesh()):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        until, said = time.monotonic() + 20, ""
        while "stopping" not in said and time.monotonic() < until:
            time.sleep(0.01)
            said += capsys.readouterr().out
    assert signal.set_wakeup_fd(-1) == -1
    assert (said + capsys.readouterr().out).count(
        "stopping    after the step that is under way"
    ) == 1


def test_processes_stop_together_some_steps_after_the_wish(monkeypatch):
    """No step waits for the others' wishes: they are read two steps late."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "local_device_count", lambda: mesh().size)
    stop = stopping.Stop(mesh())
    with stop:
        assert [stop.now() for _ in range(4)] == [False] * 4
        os.kill(os.getpid(), signal.SIGTERM)
        assert [stop.now() for _ in range(3)] == [False, False, True]


TERMINAL_IS_CLOSED = """
import os, pathlib, pty, signal, sys
screen, terminal = pty.openpty()
for stream in (1, 2):
    os.dup2(terminal, stream)
os.close(terminal)
from simclr_jax.errors import Stopped
from test_loop import Average, train

def close_the_terminal(step, _):
    if step == 6:
        os.close(screen)  # what is written from now on is an OSError
        os.kill(os.getpid(), signal.SIGHUP)

try:
    train(pathlib.Path(sys.argv[1]), hooks=[Average()], before=close_the_terminal)
except Stopped:
    os._exit(10)
"""


def test_a_terminal_that_is_closed_costs_nothing(whole, tmp_path):
    done = run_python(TERMINAL_IS_CLOSED, tmp_path / "w")
    assert done.returncode == 10, done
    assert saved_steps(tmp_path / "w") == [4, 6]
    train(tmp_path / "w", hooks=[Average()])
    assert_same_training(tmp_path / "w", whole)


def test_nohup_lets_a_training_go_on_without_its_terminal(whole, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        train(tmp_path / "w", hooks=[Average()], before=sends(signal.SIGHUP, 6))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same_training(tmp_path / "w", whole)


KILLED_WHILE_IT_SAVES = """
import os, pathlib, signal, sys
import orbax.checkpoint as ocp
from test_loop import Average, train

saves, original = [], ocp.JsonCheckpointHandler._save_fn

async def killed_in_the_second(handler, item, directory):
    saves.append(directory)
    if len(saves) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    await original(handler, item, directory)

ocp.JsonCheckpointHandler._save_fn = killed_in_the_second
train(pathlib.Path(sys.argv[1]), hooks=[Average()], every=2)
"""


def test_killed_in_the_middle_of_a_save(whole, tmp_path):
    """What a save leaves that never came to its end is not taken for a checkpoint."""
    workdir = tmp_path / "w"
    done = run_python(KILLED_WHILE_IT_SAVES, workdir)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(os.listdir(workdir / "checkpoints"))
    assert left[0] == "2"
    assert left[1].startswith("4.")  # half of a checkpoint
    assert len(left) == 2
    assert saved_steps(workdir) == [2]
    train(workdir, hooks=[Average()])
    assert_same_training(workdir, whole)
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "4", "8"]


def variables_of(workdir):
    return load_encoder(workdir).variables


def assert_same_run(workdir, whole):
    """Bit for bit the same encoder and metrics."""
    jax.tree.map(np.testing.assert_array_equal, variables_of(workdir), variables_of(whole))
    assert metrics_of(workdir) == metrics_of(whole)


def start(arguments, workdir, processes=1, **environment):
    """The running command; all it says goes to WORKDIR.log."""
    command = [sys.executable, "-m", "simclr_jax.main"]
    if processes > 1:
        command = ["launch/local.sh", str(processes), "--"]
    path = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    log = pathlib.Path(f"{workdir}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, f"--workdir={workdir}", *arguments],
            cwd=ROOT,
            env=os.environ | {"PATH": path} | environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, log


def finish(process, log, status=0):
    assert process.wait(timeout=300) == status, log.read_text()
    return log.read_text()


def stopped_after(said):
    """Returns the step that a run said it stopped after."""
    found = re.search(r"stopped after step (\d+), which is saved: the same command", said)
    assert found, said
    return int(found[1])


def wait_for(text, process, log):
    deadline = time.monotonic() + 200
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.mark.whole
def test_the_command_stops_when_it_is_told_and_goes_on_where_it_was(tiny, tmp_path):
    """The real command, stopped; the rest, and the run that is never stopped, in this process."""
    file = config_file(tiny, tmp_path)
    pretrain(tiny, str(tmp_path / "whole"))
    # A save at each step, so that there is time to send a signal.
    process, log = start([f"--config={file}", "--config.checkpoint.every_steps=1"], tmp_path / "w")
    wait_for("step 2/", process, log)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    said = finish(process, log, STOPPED)
    seconds = time.monotonic() - began
    print(f"measured: SIGTERM, ended after {seconds:.1f} s")
    assert seconds < 30
    step = stopped_after(said)
    assert 2 <= step < tiny.train.steps
    assert saved_steps(tmp_path / "w")[-1] == step
    assert "probe" not in said
    pretrain(tiny, str(tmp_path / "w"))
    assert_same_run(tmp_path / "w", tmp_path / "whole")


# From here on: minutes, with views made by the host.


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    path = folder / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, train_images=rng.integers(0, 256, (48, 12, 12, 3)).astype(np.uint8))
    return [
        "--config=configs/cifar10.py",
        "--config.data.source=arrays",
        f"--config.data.path={path}",
        "--config.data.image_size=12",
        "--config.data.batch_size=16",
        "--config.model.depth=10",
        "--config.model.width=0.125",
        "--config.model.stem=strided",
        "--config.model.dtype=float32",
        f"--config.train.steps={HOST_STEPS}",
        "--config.train.log_every_steps=7",
        "--config.checkpoint.every_steps=5",
        "--config.checkpoint.keep_last=100",
    ]


def start_on_host(options, workdir, processes=1):
    flags = f"--xla_force_host_platform_device_count={2 // processes}"
    return start(options, workdir, processes, XLA_FLAGS=flags)


@pytest.fixture(scope="module")
def whole_on_host(options, tmp_path_factory):
    """A run that is never stopped."""
    workdir = tmp_path_factory.mktemp("host") / "w"
    finish(*start_on_host(options, workdir))
    return workdir


@pytest.mark.slow
def test_two_runs_are_bit_for_bit_the_same(options, whole_on_host, tmp_path):
    finish(*start_on_host(options, tmp_path / "w"))
    assert_same_run(tmp_path / "w", whole_on_host)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_with_views_of_the_host_stops_and_goes_on(
    options, whole_on_host, tmp_path, number
):
    process, log = start_on_host(options, tmp_path / "w")
    wait_for("step 14/", process, log)
    process.send_signal(number)
    process.send_signal(number)
    said = finish(process, log, STOPPED)
    step = stopped_after(said)
    assert 14 <= step < HOST_STEPS
    assert saved_steps(tmp_path / "w")[-1] == step
    said = finish(*start_on_host(options, tmp_path / "w"))
    assert f"resumed from step {step}" in said
    assert_same_run(tmp_path / "w", whole_on_host)


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step(options, tmp_path):
    """The launcher passes the signal on to both; they would hang if they disagreed."""
    process, log = start_on_host(options, tmp_path / "w", processes=2)
    wait_for("step 14/", process, log)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(
        int(pid)
        for pid in children
        if "--process=1" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    )
    os.kill(second, signal.SIGTERM)  # only one of them is told
    said = finish(process, log, STOPPED)
    step = stopped_after(said)
    assert saved_steps(tmp_path / "w")[-1] == step


def kill_at_random(options, workdir, whole, kills, seed):
    """Runs to the end in spite of `kills` SIGKILLs, each some way into what is left to do."""
    rng = random.Random(seed)
    for _ in range(kills):
        process, log = start_on_host(options, workdir)
        wait_for("devices ", process, log)
        time.sleep(rng.uniform(0, 4))  # a run takes some 3 s from here
        process.kill()
        process.wait()
    finish(*start_on_host(options, workdir))
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_killed_at_random_moments(options, whole_on_host, tmp_path):
    kill_at_random(options, tmp_path / "w", whole_on_host, kills=3, seed=0)


@pytest.mark.slow
def test_killed_at_20_random_moments(options, whole_on_host, tmp_path):
    """Each begins anew once it has come to the end, so that all 20 hit a run under way."""
    done = 0
    while done < 20:
        workdir = tmp_path / f"w{done}"
        kill_at_random(options, workdir, whole_on_host, kills=4, seed=done)
        done += 4


@pytest.mark.slow
def test_metrics_hold_each_step_once(whole_on_host):
    steps = [json.loads(line)["step"] for line in (whole_on_host / "metrics.jsonl").open()]
    assert steps == [*range(7, HOST_STEPS, 7), HOST_STEPS]
