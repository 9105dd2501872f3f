"""The launch scripts against stand-ins of gcloud, sbatch and srun that note how they are called."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Notes its name and arguments, one shell-quoted line a call; `describe` answers with the next of
# STATES, and keeps to the last.
STUB = r"""#!/usr/bin/env bash
{ printf '%q ' "$(basename "$0")" "$@"; echo; } >> "$CALLS"
[[ $(basename "$0") == srun ]] && exit "${STUB_STATUS_OF_SRUN:-${STUB_STATUS:-0}}"
if [[ " $* " == *" describe "* || $(basename "$0") == squeue ]]; then
  [[ -z ${STUB_WARNS:-} ]] || echo "$STUB_WARNS" >&2
  [[ -z ${STUB_SAYS:-} ]] || { echo "$STUB_SAYS" >&2; exit 1; }
  [[ -s $STATES ]] || { echo "NOT_FOUND: no such resource" >&2; exit 1; }
  head -n 1 "$STATES"
  (( $(wc -l < "$STATES") < 2 )) || sed -i 1d "$STATES"
fi
[[ -z ${STUB_RUN:-} || " $* " != *"--command=if "*simclr.status* ]] || { head -n 1 "$STUB_RUN"; sed -i 1d "$STUB_RUN"; }
# The first request is refused.
[[ -z ${STUB_REFUSES:-} || " $* " != *" create "* || -e $CALLS.refused ]] || { touch "$CALLS.refused"; exit 1; }
exit "${STUB_STATUS:-0}"
"""


@pytest.fixture
def cloud(tmp_path):
    """run(*arguments, states=(...), **environment) -> (finished process, calls)."""
    for name in ("gcloud", "kubectl", "sbatch", "srun", "squeue", "scontrol"):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(STUB)
        path.chmod(0o755)

    def run(*arguments, states=(), **environment):
        (tmp_path / "calls").write_text("")
        (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
        process = subprocess.run(
            arguments,
            cwd=ROOT,
            env=os.environ
            | {
                "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
                "CALLS": str(tmp_path / "calls"),
                "STATES": str(tmp_path / "states"),
                "POLL_SECONDS": "0.01",
            }
            | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
        return process, calls

    return run


TPUS = ["gcloud", "compute", "tpus"]
ZONE = "--zone=us-west4-a"


def test_create_requests_a_spot_slice(cloud):
    process, calls = cloud(
        "launch/tpu_vm.sh", "create", "pod", "--type=v5litepod-64", "--spot", ZONE
    )
    assert process.returncode == 0, process.stderr
    assert calls == [
        [
            *TPUS,
            "queued-resources",
            "create",
            "pod",
            "--node-id=pod",
            "--accelerator-type=v5litepod-64",
            "--runtime-version=v2-alpha-tpuv5-lite",
            "--spot",
            ZONE,
        ]
    ]


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-64", "tpu-ubuntu2204-base"),
        ("v5p-64", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_create_on_demand_knows_the_software_of_a_slice(cloud, kind, version):
    _, (call,) = cloud("launch/tpu_vm.sh", "create", "pod", f"--type={kind}")
    assert f"--runtime-version={version}" in call
    assert "--spot" not in call
    assert not [part for part in call if part.startswith("--zone")]


def test_setup_waits_then_copies_the_commit_and_installs_it_on_all_hosts(cloud):
    states = ("WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    process, calls = cloud("launch/tpu_vm.sh", "setup", "pod", ZONE, states=states)
    assert process.returncode == 0, process.stderr
    assert len(re.findall("pod is WAITING_FOR_RESOURCES", process.stdout)) == 1
    *asked, copied, installed = calls
    assert [call[3:6] for call in asked] == [["queued-resources", "describe", "pod"]] * 4
    assert copied[3:5] == ["tpu-vm", "scp"]
    assert re.fullmatch(r"/\S+/\S+/simclr_jax\.tar\.gz", copied[5])  # of its own for each setup
    assert copied[6:] == ["pod:", "--worker=all", ZONE]
    assert installed[3:7] == ["tpu-vm", "ssh", "pod", "--worker=all"]
    assert "uv pip install -e '.[tpu,report,studies]'" in installed[7]
    emptied, unpacked = (installed[7].index(x) for x in ("rm -rf simclr_jax/{", "tar xzf"))
    assert emptied < unpacked  # a file that is gone from the commit is not left over


def test_setup_does_not_wait_for_a_slice_that_will_not_come(cloud):
    process, calls = cloud("launch/tpu_vm.sh", "setup", "pod", states=("PROVISIONING", "FAILED"))
    assert process.returncode == 2
    assert "the slice pod is FAILED: use resume" in process.stderr
    assert len(calls) == 2


RUN = ("--config=configs/imagenet.py", "--workdir=gs://b/run 1")


@pytest.fixture
def home(tmp_path):
    """A host's home folder after setup, with a stand-in for its Python."""
    home = tmp_path / "home"
    (home / "simclr_jax/.venv/bin").mkdir(parents=True, exist_ok=True)
    (home / "simclr_jax/launch").mkdir(exist_ok=True)
    shutil.copy(ROOT / "launch/xla_flags.sh", home / "simclr_jax/launch")
    python = home / "simclr_jax/.venv/bin/python"
    python.write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@" "$LIBTPU_INIT_ARGS"; exec sleep "${RUNS:-0}"\n'
    )
    python.chmod(0o755)
    return home


def run_on_a_host(command, home):
    """Runs what would be sent to a host."""
    return subprocess.run(
        ["bash", "-c", command],
        cwd=home,
        env=os.environ | {"HOME": str(home), "RUNS": "20"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_run_starts_the_run_on_all_hosts_and_leaves_it_running(cloud, home):
    process, (call,) = cloud("launch/tpu_vm.sh", "run", "pod", ZONE, "--", *RUN)
    assert process.returncode == 0, process.stderr
    assert call[3:7] == ["tpu-vm", "ssh", "pod", "--worker=all"]
    command = call[7].removeprefix("--command=")
    started = run_on_a_host(command, home)
    assert started.returncode == 0, started.stderr
    # A second one beside it is refused.
    again = run_on_a_host(command, home)
    assert again.returncode == 1
    assert "a run is under way here" in again.stderr
    deadline = time.monotonic() + 30
    while len(said := (home / "simclr.log").read_text().splitlines()) < 7:  # it starts behind us
        assert time.monotonic() < deadline, said
        time.sleep(0.1)
    # The log keeps what earlier runs said, so each begins with a mark.
    assert re.fullmatch(r"--- .* --config=configs/imagenet\.py --workdir=gs://b/run.*", said[0])
    assert said[1:6] == ["-u", "-m", "simclr_jax.main", *RUN]
    assert "--xla_tpu_overlap_compute_collective_tc=true" in said[6]
    # What `stop` and `status` send finds it.
    _, (stop,) = cloud("launch/tpu_vm.sh", "stop", "pod")
    _, (_, ask) = cloud("launch/tpu_vm.sh", "status", "pod", states=("ACTIVE",))
    ask = ask[7].removeprefix("--command=")
    assert run_on_a_host(ask, home).stdout.startswith("running\n")
    assert run_on_a_host(stop[7].removeprefix("--command="), home).returncode == 0
    deadline = time.monotonic() + 30
    while not (home / "simclr.status").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run_on_a_host(ask, home).stdout.startswith("stopped\n")


def test_a_gcloud_that_cannot_say_does_not_lead_to_a_second_slice(cloud):
    process, calls = cloud(*RESUME, STUB_SAYS="Reauthentication required")
    assert process.returncode == 1
    assert "Reauthentication required" in process.stderr
    assert "gcloud cannot say what has become of pod" in process.stderr
    assert verbs(calls) == ["describe"]


def test_warnings_of_gcloud_are_not_the_state(cloud):
    process, calls = cloud(*RESUME, states=("ACTIVE",), STUB_WARNS="WARNING: updates are available")
    assert process.returncode == 0, process.stderr
    assert "create" not in verbs(calls)
    process, calls = cloud(*RESUME, STUB_SAYS="credentials file not found")
    assert process.returncode == 1
    assert verbs(calls) == ["describe"]


@pytest.fixture
def babysit(cloud, tmp_path):
    """run(what the first host says of its run, time after time, ...) -> (finished process, calls)."""

    def run(*said, states=("ACTIVE",), arguments=RUN, **environment):
        file = tmp_path / "said"
        file.write_text("".join(f"{line}\n" for line in said))
        command = ("launch/tpu_vm.sh", "babysit", *RESUME[2 : -len(RUN)], *arguments)
        return cloud(*command, states=states, STUB_RUN=str(file), **environment)

    return run


def test_babysit_tries_again_what_fails_while_it_resumes(babysit):
    """A slice that fails while it is awaited does not end it."""
    states = ("SUSPENDED", "SUSPENDED", "FAILED", "ACTIVE")
    process, calls = babysit("ended 0", states=states)
    assert process.returncode == 0, process.stderr
    assert "the slice pod is FAILED" in process.stderr
    assert "the run on pod is done" in process.stdout
    assert verbs(calls).count("create") == 1


def test_further_options_reach_gcloud_and_a_workdir_may_be_an_argument_of_its_own(cloud):
    _, (created,) = cloud(
        "launch/tpu_vm.sh",
        "create",
        "pod",
        "--type=v4-8",
        "--gcloud=--network=n",
        "--gcloud=--tags=a",
    )
    assert "--network=n" in created
    assert "--tags=a" in created
    arguments = ("--config=configs/imagenet.py", "--workdir", "gs://b/run 1")
    process, (call,) = cloud("launch/tpu_vm.sh", "run", "pod", "--", *arguments)
    assert process.returncode == 0, process.stderr
    assert "--workdir gs://b/run\\ 1" in call[7]


def test_babysit_resumes_until_the_run_is_done(babysit):
    process, calls = babysit("running", "ended 75", "ended 0")
    assert process.returncode == 0, process.stderr
    assert "the run: ended 75; resuming" in process.stdout
    assert "the run on pod is done" in process.stdout
    assert sum("nohup" in " ".join(call) for call in calls) == 1
    # What is left on other hosts is ended first, and the slice is set up if it never was.
    sent = [" ".join(call) for call in calls if call[4] == "ssh"]
    assert [i for i, text in enumerate(sent) if "pkill -TERM" in text] == [2]
    assert ".set_up" in sent[3]
    process, _ = babysit(*3 * ["ended 69"])
    assert process.returncode == 2
    assert "ended early three times in a row (ended 69): see logs" in process.stderr


def test_babysit_ends_where_the_run_was_stopped_or_the_slice_given_back(babysit):
    process, calls = babysit("running", "stopped")
    assert process.returncode == 0, process.stderr
    assert "the run on pod was stopped: resume goes on" in process.stdout
    process, more = babysit(*2 * ["running"], states=("ACTIVE", "MISSING"))
    assert process.returncode == 2
    assert "the slice pod is given back: to request it anew, babysit again" in process.stderr
    assert not any("nohup" in " ".join(call) for call in (*calls, *more))
    assert "create" not in verbs(more)


def test_babysit_asks_again_for_a_slice_that_could_not_be_requested(babysit):
    """Resume gives back what was taken away, and the new request fails: the slice is missing then."""
    states = ("ACTIVE", "SUSPENDED", "SUSPENDED", "MISSING", "MISSING", "ACTIVE")
    process, calls = babysit("running", "ended 0", states=states, STUB_REFUSES="1")
    assert process.returncode == 0, process.stderr
    assert "the run on pod is done" in process.stdout
    assert verbs(calls).count("create") == 2


def test_babysit_does_not_resume_for_ever(babysit):
    """Each attempt lasts long enough not to count as short."""
    limits = {"SHORT_SECONDS": "0", "RESTARTS": "3"}
    process, calls = babysit(*9 * ["ended 137"], **limits)
    assert process.returncode == 2
    assert "ended early 4 times (ended 137): see logs" in process.stderr
    assert sum("nohup" in " ".join(call) for call in calls) == 3


def test_babysit_does_not_resume_what_ended_by_a_mistake(babysit):
    process, calls = babysit("running", "ended 1", "ended 0", SHORT_SECONDS="0")
    assert process.returncode == 2
    assert "the run on pod ended by a mistake (ended 1): see logs" in process.stderr
    assert not any("nohup" in " ".join(call) for call in calls)


def test_babysit_does_not_take_the_end_of_an_earlier_run_for_that_of_its_own(cloud, babysit, home):
    def asked(*arguments):
        _, calls = babysit("ended 0", arguments=arguments)
        return calls[-1][7].removeprefix("--command=")

    _, (started,) = cloud("launch/tpu_vm.sh", "run", "pod", ZONE, "--", *RUN)
    assert run_on_a_host(started[7].removeprefix("--command="), home).returncode == 0
    _, (stop,) = cloud("launch/tpu_vm.sh", "stop", "pod")
    run_on_a_host(stop[7].removeprefix("--command="), home)
    deadline = time.monotonic() + 30
    while not (home / "simclr.status").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run_on_a_host(asked(*RUN), home).stdout == "stopped\n"
    other = asked("--mode=linear", "--workdir=gs://b/run")
    while (told := run_on_a_host(other, home).stdout) != "no run\n":  # its shell ends behind us
        assert time.monotonic() < deadline, told
        time.sleep(0.1)


GKE = (
    "launch/gke.sh",
    "apply",
    "first",
    "--accelerator=tpu-v5-lite-podslice",
    "--topology=4x8",
    "--image=eu.pkg.dev/p/r/simclr:1",
)


def test_gke_writes_a_manifest_and_applies_it(cloud, tmp_path):
    file = tmp_path / "first.json"
    odd = 'say "no" \\ $(PATH)'
    process, calls = cloud(*GKE, "--slices=2", f"--file={file}", "--", *RUN, odd)
    assert process.returncode == 0, process.stderr
    assert calls == [["kubectl", "apply", "-f", str(file)]]
    job_set = json.loads(file.read_text())
    policy = job_set["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 100
    assert [rule["action"] for rule in policy["rules"]] == ["FailJobSet"]
    (slices,) = job_set["spec"]["replicatedJobs"]
    job = slices["template"]
    assert slices["replicas"] == 2
    assert job["spec"]["parallelism"] == job["spec"]["completions"] == 8
    assert job["spec"]["backoffLimit"] == 0
    (mistakes,) = job["spec"]["podFailurePolicy"]["rules"]
    assert mistakes["action"] == "FailJob"
    assert mistakes["onExitCodes"]["values"] == [1, 2, 126, 127]
    pod = job["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    assert container["args"] == [*RUN, odd.replace("$(", "$$(")]
    kubernetes = pytest.importorskip("kubernetes_validate")
    kubernetes.validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {}} | job, "1.34")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((*GKE[:5], "--", *RUN), "apply needs --accelerator, --topology and --image"),
        ((*GKE, "--", "--workdir=/tmp/w"), "a container's own disk is lost"),
        ((*GKE, "--topology=4by8", "--", *RUN), "--topology=4by8: expected a shape"),
        ((*GKE, "--chips_per_host=5", "--", *RUN), "does not divide the 32 chips of 4x8"),
        ((*GKE, "--image=a b", "--", *RUN), "has a character that no such name has"),
        ((*GKE, "--", *RUN, "a\nb"), "has a line break"),
        (("launch/gke.sh", "apply", "First"), "the run's name comes second"),
        (("launch/gke.sh", "start", "first"), "Actions:"),
    ],
)
def test_mistakes_with_gke(cloud, arguments, says):
    process, calls = cloud(*arguments)
    assert process.returncode == 2
    assert says in process.stderr
    assert calls == []


def test_gke_says_what_has_become_of_a_run(cloud):
    assert cloud("launch/gke.sh", "delete", "first")[1] == [["kubectl", "delete", "jobset/first"]]
    _, (sets, jobs) = cloud("launch/gke.sh", "status", "first")
    assert sets == ["kubectl", "get", "jobset", "first"]
    assert jobs[-1] == "--selector=jobset.sigs.k8s.io/jobset-name=first"
    _, (logs,) = cloud("launch/gke.sh", "logs", "first")
    assert logs[:3] == ["kubectl", "logs", "--follow"]


def test_run_needs_a_workdir_that_all_hosts_see(cloud):
    process, calls = cloud(
        "launch/tpu_vm.sh", "run", "pod", "--", "--config=configs/imagenet.py", "--workdir=/tmp/w"
    )
    assert process.returncode == 2
    assert "--workdir=gs://BUCKET/FOLDER" in process.stderr
    assert calls == []


def test_logs_and_delete(cloud):
    _, (followed,) = cloud("launch/tpu_vm.sh", "logs", "pod", "--host=3")
    assert followed[3:] == [
        *("tpu-vm", "ssh", "pod", "--worker=3"),
        "--command=tail -n 100 -F ~/simclr.log",
    ]
    _, (deleted,) = cloud("launch/tpu_vm.sh", "delete", "pod", ZONE)
    assert deleted[3:] == ["queued-resources", "delete", "pod", "--force", "--quiet", ZONE]


RESUME = ("launch/tpu_vm.sh", "resume", "pod", "--type=v5litepod-64", "--spot", "--", *RUN)


def verbs(calls):
    return [call[4] for call in calls]


def test_resume_requests_a_preempted_slice_anew(cloud):
    process, calls = cloud(*RESUME, states=("SUSPENDED", "PROVISIONING", "ACTIVE"))
    assert process.returncode == 0, process.stderr
    assert verbs(calls) == [
        *("describe", "delete", "create", "describe", "describe", "scp", "ssh", "ssh"),
    ]
    assert "run\\ 1" in calls[-1][7]


def test_resume_keeps_the_place_in_the_queue(cloud):
    process, calls = cloud(*RESUME, states=("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"))
    assert process.returncode == 0, process.stderr
    assert "delete" not in verbs(calls)
    assert "create" not in verbs(calls)


def test_resume_only_starts_the_run_where_the_slice_is_there(cloud):
    process, calls = cloud(*RESUME, states=("ACTIVE",))
    assert process.returncode == 0, process.stderr
    assert verbs(calls) == ["describe", "ssh", "ssh"]
    assert calls[1][7] == "--command=[ -e simclr_jax/.set_up ]"


def test_dry_run_prints_commands_that_can_be_pasted_and_runs_none(cloud):
    process, calls = cloud(*RESUME[:5], "--dry_run", *RESUME[5:])
    assert process.returncode == 0, process.stderr
    assert calls == []
    printed = [shlex.split(line) for line in process.stdout.splitlines() if line[0] != "#"]
    assert [line[4] for line in printed if line[0] == "gcloud"] == [
        *("delete", "create", "scp", "ssh", "ssh"),
    ]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("create", "pod"), "create needs --type"),
        (("create", "pod", "--type=v9-8"), "no --version is known"),
        (("create", "Pod;rm"), "the slice's name comes second"),
        (("create", "pod", "--typ=v4-8"), "unknown option --typ=v4-8"),
        (("run", "pod"), "run needs the run's arguments"),
        (("resume", "pod", "--type=v4-8"), "resume needs the run's arguments"),
        (("resume", "pod", "--", "--workdir=gs://bucket/run"), "resume needs --type"),
        (("babysit", "pod", "--", "--workdir=gs://bucket/run"), "babysit needs --type"),
        (
            ("babysit", "pod", "--type=v4-8", "--", "--workdir=run"),
            "a workdir that all of them see",
        ),
        (("start", "pod"), "Actions:"),
        ((), "Actions:"),
    ],
)
def test_mistakes_with_tpu_vm(cloud, arguments, says):
    process, calls = cloud("launch/tpu_vm.sh", *arguments)
    assert process.returncode == 2
    assert says in process.stderr
    assert calls == []


def test_a_failure_of_gcloud_is_not_hidden(cloud):
    process, _ = cloud("launch/tpu_vm.sh", "delete", "pod", STUB_STATUS="3")
    assert process.returncode == 3


SLURM = ("launch/slurm.sh", "--nodes=2", "--gpus-per-node=8")
ARGS = ("--config=configs/imagenet.py", "--workdir=/shared/a b")


def test_slurm_submits_itself_and_then_starts_a_process_a_gpu(cloud):
    process, (submitted,) = cloud(*SLURM, "--time=1:00:00", "--", *ARGS)
    assert process.returncode == 0, process.stderr
    assert submitted[0] == "sbatch"
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue"} <= set(submitted)
    assert f"--chdir={ROOT}" in submitted
    assert {"--time=1:00:00", "--signal=TERM@120"} <= set(submitted)
    job = submitted[submitted.index("launch/slurm.sh") :]
    process, (started,) = cloud(*job, SLURM_JOB_ID="7")
    assert process.returncode == 0, process.stderr
    assert started == [
        *("srun", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"),
        *("python", "-m", "simclr_jax.main", *ARGS),
    ]


@pytest.mark.parametrize("status", [75, 143])  # while it trained, and before that
@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("COMPLETING", False)])
def test_a_job_that_was_stopped_is_queued_again_unless_it_is_cancelled(
    cloud, state, requeued, status
):
    job = (*SLURM, "--", *ARGS)
    of_srun = {"SLURM_JOB_ID": "7", "STUB_STATUS_OF_SRUN": str(status)}
    process, calls = cloud(*job, states=[state], **of_srun)
    assert process.returncode == status
    assert [call[0] for call in calls] == ["srun", "squeue", *(["scontrol"] if requeued else [])]
    if requeued:
        assert calls[-1] == ["scontrol", "requeue", "7"]
    process, calls = cloud(*job, states=[state], SLURM_JOB_ID="7", STUB_STATUS_OF_SRUN="1")
    assert (process.returncode, len(calls)) == (1, 1)


@pytest.mark.parametrize(("before", "requeued"), [("0", True), ("4", False)])
def test_a_job_whose_processes_died_is_queued_again_a_bounded_number_of_times(
    cloud, before, requeued
):
    job = (*SLURM, "--restarts=4", "--", *ARGS)
    of_srun = {"SLURM_JOB_ID": "7", "STUB_STATUS_OF_SRUN": "69", "SLURM_RESTART_COUNT": before}
    process, calls = cloud(*job, states=["RUNNING"], **of_srun)
    assert process.returncode == 69
    assert (calls[-1] == ["scontrol", "requeue", "7"]) == requeued


@pytest.mark.parametrize(
    ("options", "per_node"),
    [
        (("-N", "4", "--gpus-per-node=h100:8"), "h100:8"),
        (("-N4", "--gpus=h100:8"), "h100:2"),
        (("--nodes=4", "-G", "8"), "2"),
        (("--nodes=4", "-G4"), "1"),
    ],
)
def test_nodes_and_gpus_mean_what_they_mean_to_slurm(cloud, options, per_node):
    process, (submitted,) = cloud("launch/slurm.sh", *options, "--", *ARGS)
    processes = per_node.rpartition(":")[2]
    assert process.stderr == f"4 node(s) with {processes} GPU(s) and processes each\n"
    wanted = {"--nodes=4", f"--gpus-per-node={per_node}", f"--ntasks-per-node={processes}"}
    assert wanted <= set(submitted)
    job = submitted[submitted.index("launch/slurm.sh") :]
    _, (started,) = cloud(*job, SLURM_JOB_ID="7")
    assert wanted <= set(started)


def test_a_prelude_and_a_container_are_of_the_processes(cloud, tmp_path):
    prelude = tmp_path / "a prelude"
    prelude.write_text("export SAID=yes\n")
    options = (f"--prelude={prelude}", "--container-image=simclr.sqsh", "--container-mounts=/s:/s")
    _, (submitted,) = cloud(*SLURM, *options, "--", *ARGS)
    job = submitted[submitted.index("launch/slurm.sh") :]
    assert not set(options[1:]) & set(submitted[: -len(job)])
    _, (started,) = cloud(*job, SLURM_JOB_ID="7")
    assert set(options[1:]) <= set(started)
    command = started[started.index("bash") :]
    assert command[-len(ARGS) - 3 :] == ["python", "-m", "simclr_jax.main", *ARGS]
    assert command[:2] == ["bash", "-c"]
    said = subprocess.run(
        [*command[:4], "bash", "-c", "echo $SAID $0 $1", "a", "b c"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "yes a b c\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--gpus-per-task=1",), "there is one process a GPU"),
        (("--gpus-per-node=8", "--ntasks=4"), "there is one process a GPU"),
        (("--gpus=3",), "expected a multiple of the 2 nodes"),
        (("--gpus=2", "--prelude=there is none"), "expected a file that is there"),
    ],
)
def test_mistakes_with_slurm(cloud, options, says):
    process, calls = cloud("launch/slurm.sh", "--nodes=2", *options, "--", *ARGS)
    assert (process.returncode, calls) == (2, [])
    assert says in process.stderr.splitlines()[-1]


def test_each_job_of_an_array_makes_a_part_of_a_study(cloud):
    study = ("--mode=study", "--study=configs/studies/loss.py", *ARGS)
    _, (submitted,) = cloud(*SLURM, "--array=3-6", "--", *study)
    assert "--array=3-6" in submitted
    job = submitted[submitted.index("launch/slurm.sh") :]
    array = {"SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    process, (started,) = cloud(*job, SLURM_JOB_ID="7", **array)
    assert process.returncode == 0, process.stderr
    assert started[-len(study) - 1 :] == [*study, "--part=2/4"]
    stopped = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "STUB_STATUS_OF_SRUN": "75"}
    _, calls = cloud(*job, states=["RUNNING"], **array, **stopped)
    assert calls[1][:3] == ["squeue", "--noheader", "--jobs=7_4"]  # 7 is also the whole array
    assert calls[2] == ["scontrol", "requeue", "7_4"]
    process, calls = cloud(*SLURM, "--", *ARGS, SLURM_JOB_ID="7", **array)
    assert (process.returncode, calls) == (2, [])
    assert "--array is for --mode=study" in process.stderr


def test_slurm_dry_run(cloud):
    process, calls = cloud(*SLURM, "--dry_run", "--", *ARGS)
    assert calls == []
    assert shlex.split(process.stdout)[0] == "sbatch"
    process, calls = cloud(*SLURM, "--dry_run", "--", *ARGS, SLURM_JOB_ID="7")
    assert calls == []
    assert shlex.split(process.stdout)[0] == "srun"


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--nodes=2", "--", "x"),
        ("--nodes=2", "--gpus=8"),
        ("--nodes=2", "--gpus=8", "--gpus-per-node=4", "--", "x"),
        ("--gpus-per-node=4", "--", "x"),
    ],
)
def test_slurm_says_how_it_is_used(cloud, arguments):
    process, calls = cloud("launch/slurm.sh", *arguments)
    assert process.returncode == 2
    assert "launch/slurm.sh --nodes=N --gpus-per-node=" in process.stderr
    assert calls == []


def test_what_the_user_has_set_wins_over_our_flags():
    said = subprocess.run(
        ["bash", "-c", "source launch/xla_flags.sh gpu && echo $XLA_FLAGS"],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "--mine=1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.split() == ["--xla_gpu_enable_latency_hiding_scheduler=true", "--mine=1"]


def test_every_file_that_the_scripts_name_is_there():
    named = {
        name
        for script in (ROOT / "launch").glob("*.sh")
        for name in re.findall(r"\b(?:launch|simclr_jax|docs)/[\w/]+\.\w+", script.read_text())
    }
    assert {"launch/xla_flags.sh", "docs/cluster.md", "simclr_jax/processes.py"} <= named
    assert {name for name in named if not (ROOT / name).is_file()} == set()


def test_shellcheck_is_clean():
    scripts = sorted(str(path) for path in (ROOT / "launch").glob("*.sh"))
    assert len(scripts) == 6
    process = subprocess.run(
        ["shellcheck", "--external-sources", *scripts],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout
