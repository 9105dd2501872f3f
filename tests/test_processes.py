"""Several processes are one run: the same numbers, one set of files, and an end when one dies."""

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import re
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from simclr_jax import config, load_encoder, main, mesh, processes, shell
from simclr_jax.errors import UserError
from simclr_jax.training import program
from simclr_jax.training.workdir import check_data

ROOT = pathlib.Path(__file__).parent.parent

# The digits recipe, short. Muon and Adam make updates of full size out of mere rounding; LARS does not.
RECIPE = (
    "--config.optimizer.name=lars",
    "--config.optimizer.learning_rate=0.3",
    "--config.train.steps=6",
    "--config.train.log_every_steps=2",
    "--config.checkpoint.every_steps=3",
)

# A Transformer and crops that are quick to compile; the projection head has BatchNorm.
QUICK = (
    "--config=configs/digits.py:vit",
    "--config.model.vit.layers=1",
    "--config.data.placement=device",
    "--config.views.color_strength=0",
    "--config.views.grey_probability=0",
    "--config.eval.after_training=knn",
    "--config.eval.baselines=False",
    *RECIPE,
)

CLASSIFIERS = (
    "--mode=finetune",
    "--config.finetune.label_fractions=(0.2,)",
    "--config.finetune.epochs=(2.0,)",
    "--config.finetune.learning_rate=(0.05,0.2)",
    "--config.finetune.batch_size=32",
    "--config.eval.seeds=1",
)

# A ResNet, views with colour made by the hosts, a probe and the baselines: minutes.
ON_HOSTS = (
    "--config=configs/digits.py",
    "--config.eval.labels_per_class=(10,)",
    "--config.eval.label_fraction=0",
    "--config.eval.seeds=1",
    "--config.eval.l2=(1e-4,1e-2)",
    "--config.eval.max_iterations=100",
    *RECIPE,
)


def environment(devices, cache):
    return os.environ | {
        "XLA_FLAGS": re.sub(r"count=\d+", f"count={devices}", os.environ["XLA_FLAGS"]),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def command(count, *arguments):
    if count == 1:
        return [sys.executable, "-m", "simclr_jax.main", *arguments]
    return ["launch/local.sh", str(count), "--", *arguments]


def run(count, devices, cache, *arguments):
    """The finished run of `count` processes with `devices` each."""
    return subprocess.run(
        command(count, *arguments),
        cwd=ROOT,
        env=environment(devices, cache),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


PORT = 20000 + os.getpid() % 20000  # where process 0 listens


def beside_each_other(commands, cache):
    """Runs Python with these arguments as processes of one device each; returns (status, stdout, stderr) of each."""
    started = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(1, cache),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments in commands
    ]
    try:
        said = [process.communicate(timeout=240) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


@pytest.fixture(scope="module")
def cache():
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """Options of a run on the digits from a file of arrays, which needs no TensorFlow."""
    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    train, test = slice(0, 1437), slice(1437, 1797)
    np.savez(
        path,
        train_images=images[train],
        train_labels=digits.target[train],
        test_images=images[test],
        test_labels=digits.target[test],
    )
    return [*QUICK, "--config.data.source=arrays", f"--config.data.path={path}"]


@pytest.fixture(scope="module")
def one(tmp_path_factory, quick):
    """1 process, this one, with 8 devices."""
    workdir = tmp_path_factory.mktemp("one")
    main.main([*quick, f"--workdir={workdir}"])
    return workdir


@pytest.fixture(scope="module")
def two(tmp_path_factory, cache, quick):
    """2 processes with 2 devices each."""
    workdir = tmp_path_factory.mktemp("two")
    return workdir, run(2, 2, cache, *quick, f"--workdir={workdir}")


def assert_same_parameters(workdir, other, step):
    """To 2e-5 of the largest of each array at step 3, where sums in another order made 8e-6, and to
    2e-2 at step 6: a rounding that moves an activation across zero was followed by 5.6e-4 on one
    kind of CPU and by 6e-3 on another.
    """
    tolerance = {3: 2e-5, 6: 2e-2}[step]
    found, expected = (load_encoder(w, step=step).variables for w in (workdir, other))
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            x,
            y,
            rtol=0,
            atol=tolerance * max(1e-2, np.abs(y).max()),
            err_msg=jax.tree_util.keystr(path),
        )


def assert_same_accuracies(rows, others, kinds):
    """Of the 360 test images one may lie on a border, and some where the parameters differ by 6e-3."""
    assert len({row["features"] for row in rows}) == kinds
    for expected, found in zip(rows, others, strict=True):
        images = 4 if expected["features"] == "encoder" else 1
        assert abs(found["accuracy"] - expected["accuracy"]) <= images / 360 + 1e-9, expected


@pytest.mark.whole
def test_two_processes_train_and_evaluate_as_one_does(one, two):
    workdir, process = two
    assert process.returncode == 0, process.stderr
    assert_same_parameters(workdir, one, step=3)
    assert_same_parameters(workdir, one, step=6)
    losses = [
        [json.loads(line)["loss"] for line in (w / "metrics.jsonl").open()] for w in (one, workdir)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    rows = [json.loads((w / "knn.json").read_text())["rows"] for w in (one, workdir)]
    assert_same_accuracies(rows[0], rows[1], kinds=1)


@pytest.mark.whole
def test_two_processes_leave_one_set_of_files_and_say_things_once(two):
    workdir, process = two
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["3", "6"]
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()] == [2, 4, 6]
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    assert len(re.findall(r"^step 6/6 ", process.stdout, re.MULTILINE)) == 1
    assert "2 processes, 16 images a device" in process.stdout
    assert json.loads((workdir / "config.json").read_text())["processes"] == 2


@pytest.mark.whole
def test_two_processes_train_classifiers_as_one_does(one, cache, quick, tmp_path):
    """From one checkpoint. A command given again finds every training finished."""
    results = []
    for count in (1, 2):
        workdir = tmp_path / f"{count}"
        shutil.copytree(one, workdir)
        arguments = [*quick, *CLASSIFIERS, f"--workdir={workdir}"]
        process = run(count, 4 // count, cache, *arguments)
        assert process.returncode == 0, process.stderr
        results.append(json.loads((workdir / "finetune.json").read_text()))
    ours, theirs = results
    assert_same_accuracies(ours["rows"], theirs["rows"], kinds=1)
    for name in ("train_images", "validation_images", "test_images"):
        assert ours[name] == theirs[name]
    folders = [sorted(p.name for p in (tmp_path / n / "finetune").iterdir()) for n in "12"]
    assert folders[0] == folders[1]
    assert process.stdout.count("Fine-tuning (appendix B.5)") == 1
    again = run(2, 2, cache, *arguments)
    assert again.returncode == 0, again.stderr
    assert not re.search(r"^step \d", again.stdout, re.MULTILINE)
    rows = json.loads((tmp_path / "2/finetune.json").read_text())["rows"]
    assert rows == theirs["rows"]


@pytest.mark.whole
def test_two_processes_go_on_before_a_damaged_checkpoint(two, cache, quick, tmp_path):
    shutil.copytree(two[0], tmp_path / "w")
    for file in (tmp_path / "w/checkpoints/6").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(b"0" * file.stat().st_size)
    process = run(2, 2, cache, *quick, f"--workdir={tmp_path}/w")
    assert process.returncode == 0, process.stderr
    assert "resumed from step 3" in process.stdout
    assert [p.name for p in (tmp_path / "w/broken_checkpoints").iterdir()] == ["6"]
    assert_same_parameters(tmp_path / "w", two[0], step=6)


@pytest.mark.slow
def test_two_processes_make_the_views_of_one_on_their_hosts(cache, tmp_path):
    """With a ResNet, and with the baselines, whose features they extract together."""
    rows, losses = [], []
    for count in (1, 2):
        workdir = tmp_path / f"{count}"
        process = run(count, 4 // count, cache, *ON_HOSTS, f"--workdir={workdir}")
        assert process.returncode == 0, process.stderr
        losses.append([json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()])
        rows.append(json.loads((workdir / "probe.json").read_text())["rows"])
    assert_same_parameters(tmp_path / "2", tmp_path / "1", step=3)
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    assert_same_accuracies(rows[0], rows[1], kinds=3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_the_checkpoint_of_one_is_resumed_by_two_and_the_other_way_round(
    one, two, count, cache, quick, tmp_path
):
    """Steps 4 to 6 again, from step 3 of the other."""
    source = one if count == 2 else two[0]
    shutil.copytree(source, tmp_path / "w")
    shutil.rmtree(tmp_path / "w/checkpoints/6")
    process = run(count, 4 // count, cache, *quick, f"--workdir={tmp_path}/w")
    assert process.returncode == 0, process.stderr
    assert "resumed from step 3" in process.stdout
    assert_same_parameters(tmp_path / "w", one, step=6)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [1, 0])
def test_when_a_process_dies_the_others_end_with_an_error_that_names_it(
    cache, quick, tmp_path, dies
):
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen(
            command(2, *quick, "--config.train.steps=100000", f"--workdir={tmp_path}/w"),
            cwd=ROOT,
            env=environment(1, cache),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        said = (tmp_path / "log").read_text
        deadline = time.monotonic() + 200
        while "step 4/" not in said():
            assert launched.poll() is None, said()
            assert time.monotonic() < deadline, said()
            time.sleep(0.2)
        children = pathlib.Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text()
        victim = next(
            int(pid)
            for pid in children.split()
            if f"--process={dies}" in pathlib.Path(f"/proc/{pid}/cmdline").read_text()
        )
        os.kill(victim, signal.SIGKILL)
        assert launched.wait(timeout=2 * processes.HEARTBEAT_SECONDS) == 128 + signal.SIGKILL
    assert f"error: process {dies} of 2 ended with status 137" in said()
    if dies == 1:
        # Said by the process that lives, without the script: as on a cluster.
        assert re.search(r"tasks are unhealthy \(stopped sending heartbeats\):\n1\n", said())
    else:
        assert "process 1 of 2: the step failed" in said() or "leader" in said()


@pytest.mark.whole
def test_an_error_of_all_processes_ends_all(cache, quick, tmp_path):
    process = run(2, 1, cache, *quick, "--config.data.batch_size=9", f"--workdir={tmp_path}/w")
    assert process.returncode == 1
    assert "data.batch_size=9 does not divide over 2 devices of 2 processes: use" in process.stderr


@pytest.mark.parametrize(
    ("environment", "has_tpu", "expected"),
    [
        ({}, False, False),
        ({}, True, True),
        ({"JAX_PLATFORMS": "cpu"}, True, False),
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node[1-2]"}, False, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False, False),
        ({"SLURM_NTASKS": "8", "SLURM_NODELIST": "node[1-2]"}, False, False),  # not under srun
        # An interactive shell is a step of one process in a job of eight tasks.
        (
            {"SLURM_NTASKS": "8", "SLURM_STEP_NODELIST": "node1", "SLURM_STEP_NUM_TASKS": "1"},
            False,
            False,
        ),
        (
            {"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1", "SLURM_STEP_NUM_TASKS": "2"},
            False,
            True,
        ),
    ],
)
def test_clusters_are_recognised(environment, has_tpu, expected):
    assert processes.is_one_of_many(environment, has_tpu) == expected


@pytest.mark.parametrize(
    ("gpus", "tasks", "expected"),
    [
        (None, "8(x2)", None),
        ("0,1,2,3,4,5,6,7", "8(x2)", None),  # the i-th process takes the i-th
        ("5", "8(x2)", [0]),  # --gpus-per-task=1: its own, whatever its number
        ("2,3", "1(x4)", [0, 1]),  # one process a node
        ("2,3", "1", [0, 1]),
    ],
)
def test_processes_under_slurm_know_their_gpus(gpus, tasks, expected):
    step = {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_TASKS": "16"}
    step |= {"SLURM_STEP_TASKS_PER_NODE": tasks} | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
    assert processes.own_devices(step) == expected
    assert processes.own_devices({"CUDA_VISIBLE_DEVICES": "5"}) is None  # not under SLURM


def test_under_slurm_jax_is_left_to_find_the_others(monkeypatch, capfd):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append(a))
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_STEP_NODELIST", "node[1-2]")
    processes.start(None, None, None)
    said = capfd.readouterr().err
    assert said.startswith("waiting for the 2 processes of SLURM's step")
    assert said.count("\n") == 1
    processes.start("host:1234", 2, 1)
    assert calls == [(None, None, None), ("host:1234", 2, 1)]


def test_flags_go_together(tmp_path):
    with pytest.raises(UserError, match="go together"):
        main.main(
            ["--config=configs/digits.py", f"--workdir={tmp_path}", "--coordinator=localhost:1"]
        )


@pytest.mark.parametrize("arguments", [(), ("2",), ("0", "--", "--help"), ("2", "--help", "x")])
def test_local_sh_says_how_it_is_used(arguments):
    process = subprocess.run(
        ["launch/local.sh", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 2
    assert process.stderr.startswith("usage: launch/local.sh N -- ARGS")


STUCK_AT_EXIT = """
import sys, threading, time
from simclr_jax import main, shell

shell.exit_within.__defaults__ = (1.0,)

def end(_):
    {ends}

main.main = end
threading.Thread(target=time.sleep, args=(1000,)).start()
main.run()
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    ("ends", "expected", "says"),
    [
        ("sys.exit(75)", 75, ""),
        ("sys.exit('error: no')", 1, "error: no"),
        ("return", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_an_exit_that_waits_for_a_thread_is_bounded(ends, expected, says):
    program = STUCK_AT_EXIT.format(ends=ends)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == expected, done.stderr
    assert done.stderr.decode().strip().endswith(says)


STUCK_IN_THE_WAY_OUT = """
import ctypes, os, signal, threading, time
from simclr_jax import main, shell

shell.exit_within.__defaults__ = (1.0,)

def interrupted(_):
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    try:
        time.sleep(1000)
    finally:
        ctypes.{library}(None).sleep(1000)  # as a library's destructor may

main.main = interrupted
main.run()
"""


@pytest.mark.whole
@pytest.mark.parametrize(
    ("library", "expected"),
    [("CDLL", shell.INTERRUPTED), ("PyDLL", -signal.SIGALRM)],  # PyDLL keeps Python's lock
)
def test_ctrl_c_ends_a_command_that_is_stuck(library, expected):
    program = STUCK_IN_THE_WAY_OUT.format(library=library)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == expected, done.stderr


FREED = """
import os, resource
import jax, jax.numpy as jnp
from simclr_jax import shell
os.environ.update({environment})
if {keeps}:
    shell.keep_freed_memory(os.environ)
add = jax.jit(lambda x: x + 1)
x = jnp.zeros(20_000_000)
for _ in range(3):
    add(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    add(x).block_until_ready()  # 80 MB, 19,532 pages, written by JAX's threads
    block = bytearray(64 << 20)  # 16,384 pages, written by the main thread
    block = None
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
@pytest.mark.whole
def test_a_process_on_cpus_keeps_the_memory_it_frees():
    def faults(keeps, platform="cpu"):
        code = FREED.format(environment={"JAX_PLATFORMS": platform}, keeps=keeps)
        return int(subprocess.check_output([sys.executable, "-c", code], text=True))

    kept = faults(True)
    # The faults of two blocks each at most, as the next block may not fit where the last was.
    assert kept < 2 * (16_384 + 19_532)
    if platform.libc_ver()[0] == "glibc" and not huge_pages_always():
        freed = faults(False)
        assert freed > 5 * kept or freed == 0  # 0: this system counts none
    if platform.libc_ver()[0] == "glibc" and (processes.has_gpu() or processes.has_tpu()):
        assert faults(True, "cuda") > 5 * kept  # not beside an accelerator


def huge_pages_always() -> bool:
    """Says whether Linux maps 512 pages at once without being asked, which then is one fault."""
    setting = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[always]" in setting.read_text()


def test_processes_with_other_options_or_another_program_end_with_one_line(monkeypatch):
    first = {"seed": "0", "code": "abc"}
    several = list(range(1, 8))
    monkeypatch.setattr(processes, "text_of_first", lambda text: json.dumps(first))
    monkeypatch.setattr(
        processes, "that_differ", lambda text: [] if json.loads(text) == first else several
    )
    processes.check_alike(first)
    says = (
        r"processes 1, 2, 3, 4, 5 and 2 more have other options or another program than process 0 \(seed is 7 here and "
        r"0 there\): expected one"
    )
    with pytest.raises(UserError, match=says):
        processes.check_alike(first | {"seed": "7"})


def test_the_program_that_is_compared_is_all_of_its_code(tmp_path, monkeypatch):
    package = shutil.copytree(
        ROOT / "simclr_jax", tmp_path / "simclr_jax", ignore=shutil.ignore_patterns("__pycache__")
    )
    monkeypatch.setattr(program, "__file__", str(package / "training/program.py"))
    (package / ".#loss.py").symlink_to("nobody@nowhere")  # an editor's lock
    start = program.program_in_words()
    for name in ("main.py", "evals/classifiers/program.py", "training/program.py"):
        text = (package / name).read_text()
        (package / name).write_text(text + "# changed\n")
        assert program.program_in_words()["code"] != start["code"], name
        (package / name).write_text(text)
    own = package / "training/program.py"
    own.write_text(own.read_text().replace("$Format:%H$", 40 * "a"))  # as `git archive` does
    assert program.program_in_words() == start


def test_what_processes_compare(monkeypatch):
    """Paths may differ; a configuration file of one's own may not."""
    compared: list[dict] = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "check_alike", compared.append)
    monkeypatch.setattr(main, "own_files", lambda: {"/a/own.py": "digest"})
    c = config.default()
    c.data.path = "/scratch/1"
    args = argparse.Namespace(mode="embed")
    main._check_processes(args, {"input": "/a", "output": "b", "with_z": True}, c)
    (found,) = compared
    assert found["seed"] == "0"
    assert found["--mode"] == "embed"
    assert found["--with_z"] == "True"
    assert "digest" in found["code of --config"]
    assert not {"data.path", "--input", "--output"} & set(found)


@pytest.mark.whole
def test_two_processes_with_other_options_do_not_train(cache, quick, tmp_path):
    commands = [
        [
            *("-m", "simclr_jax.main", *quick, f"--workdir={tmp_path / 'w'}"),
            *(f"--coordinator=127.0.0.1:{PORT}", "--processes=2", f"--process={i}"),
            f"--config.optimizer.learning_rate={rate}",
        ]
        for i, rate in enumerate(("0.3", "0.1"))
    ]
    for status, _, said in beside_each_other(commands, cache):
        assert status in (1, -signal.SIGABRT), said  # where process 0 is gone first
        assert "processes 1 have other options or another program than process 0" in said
    assert not (tmp_path / "w/config.json").exists()


def test_processes_that_find_other_images_end_with_one_line(monkeypatch, small_split):
    """Returns what process 1 of three finds, where the others find the first text."""
    given = []

    def gathered(digest):
        given.append(digest)
        return np.stack([given[0], digest, given[0]])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", gathered)
    for _ in range(2):
        check_data(small_split, "one fingerprint", None, "w")
    with pytest.raises(
        UserError, match=r"processes 1 found other .* than process 0 \(here 37\): give"
    ):
        check_data(small_split, "another", None, "w")


@dataclasses.dataclass(eq=False)
class Device:
    platform: str
    slice_index: int
    process_index: int
    id: int


class Grid:
    """Stands for a mesh of such devices."""

    def __init__(self, devices, axes):
        self.devices = devices


def test_groups_that_share_parameters_span_hosts_of_gpus(monkeypatch):
    """JAX gives each host of GPUs a slice of its own."""
    devices = [Device("gpu", n // 4, n // 4, n) for n in range(8)]
    monkeypatch.setattr(mesh.jax, "devices", lambda: devices)
    monkeypatch.setattr(mesh, "Mesh", Grid)
    made = mesh.make_mesh(fsdp=8)
    assert made.devices.shape == (1, 8)
    assert mesh.slices_in(made) == 1
    assert mesh.processes_of(made) == [0, 1]


def test_groups_that_share_parameters_lie_within_a_slice(monkeypatch):
    """Two slices of four devices; the ids of hosts interleave."""
    devices = [Device("tpu", n % 2, n % 4, n) for n in range(8)]
    monkeypatch.setattr(mesh.jax, "devices", lambda: devices)
    monkeypatch.setattr(mesh, "Mesh", Grid)
    made = mesh.make_mesh(fsdp=4)
    assert mesh.processes_of(made) == [0, 2, 1, 3]
    rows = made.devices
    assert [[device.slice_index for device in row] for row in rows] == [[0] * 4, [1] * 4]
    assert [[device.process_index for device in row] for row in rows] == [
        [0, 0, 2, 2],
        [1, 1, 3, 3],
    ]
    with pytest.raises(
        UserError, match=r"mesh\.fsdp=8 does not divide 4 devices of a slice: .* 1, 2, 4"
    ):
        mesh.make_mesh(fsdp=8)


INTERLEAVED = """
import sys
import jax
import numpy as np
from simclr_jax import mesh, processes
from simclr_jax.assemble import views
from simclr_jax.config import default
from simclr_jax.data.arrays import in_memory
from simclr_jax.data.broken import Broken, Images
from simclr_jax.evals.features import Extractor

port, index = sys.argv[1], int(sys.argv[2])
processes.start(f"127.0.0.1:{port}", 4, index)
mesh._slice_of = lambda device: device.process_index % 2
made = mesh.make_mesh()
count = 10
values = np.arange(count, dtype=np.uint8)
split = in_memory(np.broadcast_to(values[:, None, None, None], (count, 8, 8, 3)).copy(), values.astype(np.int32))
c = default()
c.data.placement, c.data.image_size, c.data.batch_size, c.data.eval_crop = "device", 8, 8, 1.0
batches = views(c, made).evaluation_batches(Images(split, Broken(split, 0.5)), 8)
means = lambda variables, images: {"mean": images[:, 0, 0, :1].astype("float32") + variables}
found, labels = Extractor(means, batch_size=8, size=8, mesh=made).extract(np.float32(0), batches, count)
print(mesh.processes_of(made), found["mean"][:, 0].astype(int).tolist(), labels.tolist())
"""


@pytest.mark.whole
def test_features_keep_the_order_of_the_images_where_slices_interleave(cache):
    """Of 10 images in batches of 8: the second is not full."""
    commands = [["-c", INTERLEAVED, str(PORT), str(i)] for i in range(4)]
    order = list(range(10))
    for _, said, _ in beside_each_other(commands, cache):
        assert f"[0, 2, 1, 3] {order} {order}" in said
