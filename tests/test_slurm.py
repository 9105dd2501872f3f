"""launch/slurm.sh on a real SLURM: two nodes on this machine, from Debian's packages, as root.

apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
"""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest
from test_processes import cache, environment, quick  # noqa: F401 (two are fixtures)

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or os.geteuid() != 0, reason="needs SLURM, and root"
    ),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
GresTypes=gpu
NodeName={host},{other} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{second}] CPUs={cpus} Gres=gpu:1
PartitionName=main Nodes=ALL Default=YES State=UP
"""


# SLURM sorts nodes by name, and the processes look for process 0 on the first, the machine itself.
OTHER = "zz-other"


class Cluster:
    """A SLURM of two nodes."""

    def __init__(self, folder: pathlib.Path, settings: dict[str, str]):
        self.folder, self.host = folder, socket.gethostname().partition(".")[0]
        self.settings = settings | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self):
        for name in ("state", self.host, OTHER):
            (self.folder / name).mkdir()
        key = self.folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        port = 20000 + os.getpid() % 4000 * 3  # below those that the system gives out
        places = {"host": self.host, "other": OTHER, "folder": self.folder, "cpus": os.cpu_count()}
        places |= {"port": port, "first": port + 1, "second": port + 2}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**places))
        gpu = f"NodeName={self.host},{OTHER} Name=gpu File=/dev/null\n"
        (self.folder / "gres.conf").write_text(gpu)
        self.call(
            *("munged", "--force", f"--key-file={key}", f"--socket={self.folder}/munge.socket"),
            *(f"--log-file={self.folder}/munge.log", f"--pid-file={self.folder}/munged.pid"),
            f"--seed-file={self.folder}/seed",
        )
        self.call("slurmctld")
        for name in (self.host, OTHER):
            self.call("slurmd", "-N", name)
        self.wait(lambda: len(set(self.call("sinfo", "-hNt", "idle", "-o", "%N").split())) == 2)

    def stop(self):
        subprocess.run(["scancel", "--user=root"], env=self.settings, check=False)
        for _ in range(100):
            queue = ["squeue", "-h"]
            if not subprocess.run(
                queue, env=self.settings, capture_output=True, check=False
            ).stdout:
                break
            time.sleep(0.5)
        for file in self.folder.glob("*.pid"):
            subprocess.run(["kill", file.read_text().strip()], check=False)

    def call(self, *command):
        done = subprocess.run(
            command, cwd=ROOT, env=self.settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, log, *arguments):
        said = self.call("launch/slurm.sh", "--gpus-per-node=1", f"--output={log}", *arguments)
        return said.split()[-1]

    def show(self, job):
        """SLURM's account of a job, {"JobState": "RUNNING", "Restarts": "0", ...}."""
        return dict(re.findall(r"(\w+)=(\S+)", self.call("scontrol", "show", "job", job)))

    def wait(self, condition, seconds=200):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "too late"
            time.sleep(0.2)

    def wait_for(self, job, *states, log):
        began = time.monotonic()
        self.wait(lambda: self.show(job)["JobState"] in (*states, "FAILED", "COMPLETED"))
        assert self.show(job)["JobState"] in states, log.read_text()
        print(f"measured: SLURM, {', '.join(states)} after {time.monotonic() - began:.0f} s")

    def go_on(self, job, log):
        """Lets a job that is queued again start at once, in place of two minutes later; to its end."""
        self.wait_for(job, "PENDING", log=log)
        time.sleep(2)  # in the second in which it was revoked its credential stays so
        self.call("scontrol", "update", f"JobId={job}", "StartTime=now")
        self.wait_for(job, "COMPLETED", log=log)
        assert self.show(job)["Restarts"] == "1"
        assert "resumed from step" in log.read_text()


@pytest.fixture(scope="module")
def cluster(cache, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    slurm = Cluster(folder, environment(1, cache))
    try:
        try:
            socket.gethostbyname(slurm.host)  # JAX looks for process 0 there
            slurm.start()
        except (AssertionError, OSError) as error:  # nothing of ours has run yet
            pytest.skip(f"SLURM does not start on this machine: {error}")
        yield slurm
    finally:
        slurm.stop()


@pytest.fixture
def run(cluster, quick, tmp_path):  # noqa: F811
    """A job on both nodes that has come to its tenth step: (job, log)."""
    log = tmp_path / "log"

    def begin(*options, steps=100):
        job = cluster.submit(
            *(log, "-N", "2", *options, "--", *quick, f"--workdir={tmp_path}/w d"),
            *(f"--config.train.steps={steps}", "--config.eval.after_training=none"),
            *("--config.checkpoint.every_steps=5", "--config.train.log_every_steps=5"),
        )
        cluster.wait(lambda: log.exists() and "step 10/" in log.read_text())
        assert cluster.show(job)["JobState"] == "RUNNING"
        return job, log

    return begin


def process_of(job, index):
    """The process number `index` of a job's step."""
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            variables = (folder / "environ").read_bytes().split(b"\0")
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={index}".encode()}
        if wanted <= set(variables) and b"simclr_jax.main" in command and b"python" in command:
            return int(folder.name)
    raise AssertionError(f"job {job} has no process {index}")


def test_a_job_that_is_queued_again_goes_on(cluster, run):
    job, log = run()
    cluster.call("scontrol", "requeue", job)
    cluster.go_on(job, log)


def test_a_job_at_its_time_limit_saves_and_is_queued_again(cluster, run):
    # SLURM looks every half a minute, and so may be early by that.
    job, log = run("--time=2", "--signal=TERM@75", steps=4000)
    cluster.wait_for(job, "PENDING", log=log)
    assert "stopped before the end: queued again" in log.read_text()
    assert "stopped after step" in log.read_text()
    cluster.call("scancel", job)


def test_a_process_that_is_killed_costs_what_was_not_saved(cluster, run):
    job, log = run()
    os.kill(process_of(job, 1), 9)
    cluster.go_on(job, log)
    assert "Killed" in log.read_text()
    assert ": queued again, to go on from the newest checkpoint" in log.read_text()


def test_a_job_that_is_cancelled_saves_and_is_over(cluster, run):
    job, log = run(steps=4000)
    cluster.call("scancel", job)
    cluster.wait_for(job, "CANCELLED", log=log)
    cluster.wait(lambda: "stopped after step" in log.read_text())
    assert cluster.show(job)["Restarts"] == "0"


def test_a_mistake_is_not_tried_again(cluster, tmp_path):
    log = tmp_path / "log"
    job = cluster.submit(log, "--nodes=2", "--", "--config=there_is_none.py", "--workdir=w")
    cluster.wait_for(job, "FAILED", log=log)
    assert cluster.show(job)["Restarts"] == "0"
    assert cluster.show(job)["ExitCode"] == "1:0"
    assert "there_is_none.py" in log.read_text()


ONE_IS_MISTAKEN = """
import sys
from simclr_jax import main
from simclr_jax.errors import UserError
from simclr_jax.training.checkpoint import Checkpoints

def mistaken(self, step):
    import jax
    if step == 4 and jax.process_index() == 0:
        raise UserError("the disk of this host alone is full")

Checkpoints.check = mistaken
main.run()
"""


def test_a_mistake_of_one_process_is_not_tried_again(cluster, quick, tmp_path):  # noqa: F811
    """The others end for lack of the one, and so with a status that would have them queued again."""
    (tmp_path / "python").write_text(
        f"#!/bin/bash\nshift 2\nexec {sys.executable} -c '{ONE_IS_MISTAKEN}' \"$@\"\n"
    )
    (tmp_path / "python").chmod(0o755)
    prelude = tmp_path / "prelude.sh"
    prelude.write_text(f"export PATH={tmp_path}:$PATH\n")
    log = tmp_path / "log"
    job = cluster.submit(
        *(log, "--nodes=2", f"--prelude={prelude}", "--", *quick, f"--workdir={tmp_path}/w"),
        *("--config.train.steps=100000", "--config.eval.after_training=none"),
    )
    cluster.wait_for(job, "FAILED", log=log)
    assert cluster.show(job)["Restarts"] == "0"
    assert "the disk of this host alone is full" in log.read_text()
    assert "queued again" not in log.read_text()


def test_each_job_of_an_array_makes_its_part_of_a_study(cluster, quick, tmp_path):  # noqa: F811
    prelude = tmp_path / "prelude.sh"
    prelude.write_text(f"export PATH={pathlib.Path(sys.executable).parent}:$PATH\n")
    cluster.submit(
        *(tmp_path / "log.%a", "--nodes=1", "--array=1-2", f"--prelude={prelude}", "--"),
        *("--mode=study", "--study=configs/studies/flip_blur.py", *quick, "--dry_run"),
        f"--workdir={tmp_path}/s",
    )
    cluster.wait(lambda: not cluster.call("squeue", "-h"))
    runs = [
        set(re.findall(r"^\d+:\S+  (\S+_seed-\d)", (tmp_path / f"log.{i}").read_text(), re.M))
        for i in (1, 2)
    ]
    assert all(runs)
    assert not runs[0] & runs[1]
