"""Real processes and real signals: SIGTERM, SIGINT and SIGKILL cost nothing but time."""

import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from test_train import assert_same_run

from simclr_jax.checkpoint import saved_steps

ROOT = pathlib.Path(__file__).parent.parent
STEPS = 60


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    np.savez(path, train_images=rng.integers(0, 256, (48, 12, 12, 3)).astype(np.uint8))
    return path


def command(images, workdir, processes=1):
    start = (
        [sys.executable, "-m", "simclr_jax.main"]
        if processes == 1
        else ["launch/local.sh", str(processes), "--"]
    )
    return [
        *start,
        "--config=configs/cifar10.py",
        f"--workdir={workdir}",
        "--config.data.source=arrays",
        f"--config.data.path={images}",
        "--config.data.image_size=12",
        "--config.data.batch_size=16",
        "--config.model.depth=10",
        "--config.model.width=0.125",
        "--config.model.stem=strided",
        "--config.model.dtype=float32",
        f"--config.train.steps={STEPS}",
        "--config.train.log_every_steps=7",
        "--config.checkpoint.every_steps=5",
        "--config.checkpoint.keep_last=100",
    ]


def start(cache, images, workdir, processes=1):
    """The running command; all it says goes to WORKDIR.log."""
    log = pathlib.Path(f"{workdir}.log")
    with log.open("w") as file:
        process = subprocess.Popen(
            command(images, workdir, processes),
            cwd=ROOT,
            env=os.environ
            | {
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // processes}",
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    return process, log


def finish(process, log):
    assert process.wait(timeout=300) == 0, log.read_text()
    return log.read_text()


def wait_for(text, process, log):
    deadline = time.monotonic() + 200
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(cache, images, tmp_path_factory):
    """A run that is never stopped."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    finish(*start(cache, images, workdir))
    return workdir


@pytest.mark.slow
def test_two_runs_are_bit_for_bit_the_same(cache, images, whole, tmp_path):
    finish(*start(cache, images, tmp_path / "w"))
    assert_same_run(tmp_path / "w", whole)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_lets_the_step_finish_and_saves(cache, images, whole, tmp_path, number):
    process, log = start(cache, images, tmp_path / "w")
    wait_for("step 14/", process, log)
    process.send_signal(number)
    process.send_signal(number)  # as from a terminal and a launcher
    began = time.monotonic()
    said = finish(process, log)
    assert time.monotonic() - began < 30
    step = int(re.search(r"stopped after step (\d+), which is saved: the same command", said)[1])
    assert 14 <= step < STEPS
    assert saved_steps(tmp_path / "w")[-1] == step
    said = finish(*start(cache, images, tmp_path / "w"))
    assert f"resumed from step {step}" in said
    assert_same_run(tmp_path / "w", whole)


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step(cache, images, tmp_path):
    """The launcher passes the signal on to both; they would hang if they disagreed."""
    process, log = start(cache, images, tmp_path / "w", processes=2)
    wait_for("step 14/", process, log)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(
        int(pid)
        for pid in children
        if "--process=1" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
    )
    os.kill(second, signal.SIGTERM)  # only one of them is told
    said = finish(process, log)
    step = int(re.search(r"stopped after step (\d+)", said)[1])
    assert saved_steps(tmp_path / "w")[-1] == step


def kill_at_random(cache, images, workdir, whole, kills, seed):
    """Runs to the end in spite of `kills` SIGKILLs, each some way into what is left to do."""
    rng = random.Random(seed)
    for _ in range(kills):
        process, log = start(cache, images, workdir)
        wait_for("devices ", process, log)
        time.sleep(rng.uniform(0, 4))  # a run takes some 3 s from here
        process.kill()
        process.wait()
    finish(*start(cache, images, workdir))
    assert_same_run(workdir, whole)


@pytest.mark.slow
def test_killed_at_random_moments(cache, images, whole, tmp_path):
    kill_at_random(cache, images, tmp_path / "w", whole, kills=3, seed=0)


@pytest.mark.slow
def test_killed_at_20_random_moments(cache, images, whole, tmp_path):
    """Each begins anew once it has come to the end, so that all 20 hit a run under way."""
    done = 0
    while done < 20:
        workdir = tmp_path / f"w{done}"
        kill_at_random(cache, images, workdir, whole, kills=4, seed=done)
        done += 4


def test_killed_in_the_middle_of_a_save(cache, images, whole, tmp_path):
    """What a save leaves that never came to its end is not taken for a checkpoint."""
    process, log = start(cache, images, tmp_path / "w")
    wait_for("devices ", process, log)
    deadline = time.monotonic() + 100
    caught = False
    while not caught and time.monotonic() < deadline and process.poll() is None:
        names = (
            os.listdir(tmp_path / "w/checkpoints") if (tmp_path / "w/checkpoints").is_dir() else []
        )
        caught = any("tmp" in name for name in names) and len(names) > 1
    process.kill()
    process.wait()
    assert caught, log.read_text()
    finish(*start(cache, images, tmp_path / "w"))
    assert_same_run(tmp_path / "w", whole)
    assert not [n for n in os.listdir(tmp_path / "w/checkpoints") if "tmp" in n]


def test_metrics_hold_each_step_once(whole):
    steps = [json.loads(line)["step"] for line in (whole / "metrics.jsonl").open()]
    assert steps == [*range(7, STEPS, 7), STEPS]
