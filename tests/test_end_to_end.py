"""The real commands, in processes of their own where the process is what is tested."""

import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import random_images
from PIL import Image

from simclr_jax.encoders import ENCODERS
from simclr_jax.errors import UserError
from simclr_jax.main import MODES, main

ROOT = pathlib.Path(__file__).parent.parent


def command(*arguments):
    """Runs `python -m simclr_jax.main ARGUMENTS`; returns the finished process."""
    return subprocess.run(
        [sys.executable, "-m", "simclr_jax.main", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


DIGITS = (
    "--config=configs/digits.py:vit",
    "--config.model.vit.layers=1",
    "--config.train.steps=4",
    "--config.train.log_every_steps=2",
    "--config.checkpoint.every_steps=2",
    "--config.eval.baselines=False",
    "--config.eval.labels_per_class=()",
    "--config.eval.label_fraction=0",
    "--config.eval.max_iterations=20",
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A short run of the digits configuration, and what it said. CI runs the whole one."""
    workdir, said = tmp_path_factory.mktemp("digits"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(ROOT)
        main([*DIGITS, f"--workdir={workdir}"])
    return workdir, said.getvalue()


@pytest.mark.whole
def test_one_command_trains_and_probes(digits):
    workdir, said = digits
    assert re.search(r"step 4/4  loss \d+\.\d+  contrastive acc", said)
    assert "Linear probe, test accuracy" in said
    rows = json.loads((workdir / "probe.json").read_text())["rows"]
    assert [(row["features"], row["labels_per_class"]) for row in rows] == [("encoder", None)]
    assert rows[0]["accuracy"] > 0.5  # few steps and iterations, but a tenth is chance
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "4"]
    assert [json.loads(s)["step"] for s in (workdir / "metrics.jsonl").open()] == [2, 4]


@pytest.mark.whole
def test_knn_needs_only_the_workdir(digits):
    workdir, _ = digits
    on_device = "--config.data.placement=device"  # need not be as in training
    main(["--mode=knn", f"--workdir={workdir}", on_device, "--config.eval.baselines=True"])
    result = json.loads((workdir / "knn.json").read_text())
    assert result["step"] == 4
    assert [row["features"] for row in result["rows"]] == [
        "raw pixels",
        "untrained encoder",
        "encoder",
    ]
    assert result["rows"][0]["accuracy"] > 0.9


def test_a_mistake_ends_in_one_line(tmp_path):
    """In the real command, after TensorFlow has started: the libraries do not chatter."""
    process = command(
        "--config=configs/digits.py", "--config.data.test_split=tests", f"--workdir={tmp_path}/w"
    )
    assert process.returncode == 1
    assert process.stderr.startswith("error: the TFDS data set 'digits' has no split 'tests'")
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--config=configs/digit.py",), "no configuration file"),
        (("--config=configs/digits.py", "--config.data.batchsize=4"), "data.batch_size"),
        (("--config=configs/digits.py", "--config.data.batch_size=9"), "over 8 devices"),
        (("--config=configs/digits.py", "--config.data.name=digit"), "near names: digits"),
        (("--config=configs/folder.py:/nowhere",), "no folder '/nowhere'"),
        (("--mode=knn",), "config.json"),
        (("--mode=knn", "--workdir=/nowhere"), "no folder '/nowhere': expected the --workdir of a"),
        (("--mode=knn", "--workdir=nowhere"), "no folder 'nowhere' below /"),
        (("--mode=wrong",), "there is no mode 'wrong': expected one of pretrain, probe, knn, "),
        (
            ("--config=configs/digits.py", "extra", "stuff"),
            "unknown argument 'extra': options are given as --config.NAME=VALUE",
        ),
        (("--config=configs/digits",), "; digits is one of these"),
        (("--config=tests",), "It is a folder of images? --config=folder:tests"),
        (("--config=fodler:tests",), "near names: folder"),
        (("--config=folder",), "which images? expected --config=folder:PATH"),
        (("--config=folder:tests", "--extend"), "--extend without a length would train as long"),
        (("--config=configs/digits.py", "a b"), "a value with spaces in quotes"),
        (
            ("--config=configs/digits.py", "--mode=views", "--output=v.png"),
            "--output=v.png: the page is HTML",
        ),
        (("--mode=prob",), "argument --mode: there is no mode 'prob'; near names: probe"),
        (("--workdirs=R",), "unknown argument '--workdirs=R': options are given as --config.NAME="),
        (("--workdirs=R",), "near names: --workdir"),
        (("--mode=neighbours", "--k=x"), "argument --k: x: expected a whole number"),
        (("--mode=probe", "--config=configs/digits.py"), "no checkpoint"),
        (("--mode=knn", "--format=stablehlo"), "belongs to --mode=export, not to --mode=knn"),
        (
            ("--mode=linear", "--extend"),
            "--extend belongs to --mode=pretrain, not to --mode=linear",
        ),
        (("--follow",), "--follow belongs to --mode=probe, knn and transfer, not to --mode=pre"),
        (
            ("--mode=export",),
            "--mode=export needs --format, one of safetensors, stablehlo, savedmodel, huggingface",
        ),
        (("--mode=embed", "--input=test"), "--mode=embed needs --output"),
    ],
)
def test_mistakes_leave_nothing_behind(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        main([f"--workdir={tmp_path}", *arguments])
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_mode_and_what_it_does(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    said = "".join(capsys.readouterr().out.split())  # lines break at spaces and hyphens
    assert len(MODES) == 17
    for name, mode in MODES.items():
        assert f"{name}{mode.text}".replace(" ", "") in said
        for flag in mode.flags:
            assert f"--{flag}" in said


@pytest.mark.whole
def test_another_configuration_is_refused_by_the_command(digits, monkeypatch):
    workdir, _ = digits
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        main([*DIGITS, "--config.seed=1", f"--workdir={workdir}"])


@pytest.mark.whole
def test_a_folder_of_images_without_labels_trains(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for i in range(8):
        (tmp_path / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        path = tmp_path / "photos" / str(i % 2) / f"{i}.jpg"
        Image.fromarray(random_images(1, 20 + i, 30)[0]).save(path)
    main(
        [
            f"--config=configs/folder.py:{tmp_path}/photos",
            f"--workdir={tmp_path}/w",
            "--config.data.image_size=24",
            "--config.data.batch_size=8",
            "--config.model.name=vit",
            "--config.model.vit.patch_size=8",
            "--config.model.vit.layers=1",
            "--config.model.vit.width=16",
            "--config.model.vit.heads=2",
            "--config.model.dtype=float32",
            "--config.views.blur_probability=0",
            "--config.views.color_strength=0",
            "--config.train.steps=2",
        ]
    )
    assert "8 images, no labels" in capsys.readouterr().out
    assert (tmp_path / "w" / "checkpoints" / "2").is_dir()
    assert not (tmp_path / "w" / "probe.json").exists()


def test_the_readmes_commands_are_the_ones_that_are_run():
    """.ci/run holds the README's two commands, whole, in order, the test command last."""
    readme = (ROOT / "README.md").read_text()
    script = (ROOT / ".ci" / "run").read_text()
    commands = re.findall(r"^pip install .*$", readme, re.MULTILINE)
    assert len(commands) == 2
    assert re.findall(r"^pip install (.*) \|\| exit 1$", script, re.MULTILINE) == [
        line.removeprefix("pip install ") for line in commands
    ]
    assert script.rstrip().endswith(f"{commands[1]} || exit 1")


CACHED = """
import jax
from simclr_jax.shell import keep_compiled_programs

hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
keep_compiled_programs()
jax.jit(lambda x: x * 2 + 1)(1.0)
print("/jax/compilation_cache/cache_hits" in hits)
"""


@pytest.mark.whole
def test_what_one_run_compiled_the_next_one_reads(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    seen = [
        subprocess.run(
            [sys.executable, "-c", CACHED],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout.strip()
        for _ in range(2)
    ]
    assert seen == ["False", "True"]
    assert list((tmp_path / "simclr_jax").iterdir())


OWN_ENCODER = """
from flax import linen as nn
from simclr_jax import config
from simclr_jax.encoders import ENCODERS


class Pooled(nn.Module):
    width: int = 8

    def describe(self):
        return "pooled"

    def check_image_size(self, size):
        pass

    def as_baseline(self):
        return self

    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(self.width)(nn.avg_pool(x, (2, 2), (2, 2)).reshape(len(x), -1))


ENCODERS["pooled"] = lambda model: Pooled()


def get_config():
    c = config.default()
    c.data.source, c.data.path = "arrays", {path!r}
    c.data.image_size, c.data.batch_size, c.data.eval_crop = 8, 16, 1.0
    c.model.name, c.train.steps, c.eval.knn_k = "pooled", 2, 3
    c.train.report, c.eval.after_training = False, "none"
    c.views.color_strength = 1.0
    return c
"""


def test_of_a_file_with_an_encoder_later_commands_take_the_code_and_the_runs_options(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(ENCODERS, "pooled", None)  # taken away again after the test
    rng = np.random.default_rng(0)
    for name, count in (("one", 40), ("other", 64)):
        labels = np.arange(count) % 4
        images = rng.integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
        arrays = {"train_images": images, "train_labels": labels}
        np.savez(
            tmp_path / f"{name}.npz", **arrays, test_images=images[:20], test_labels=labels[:20]
        )
    own = tmp_path / "own.py"
    text = OWN_ENCODER.replace("{path!r}", repr(str(tmp_path / "other.npz")))
    own.write_text(text)
    run = [f"--config={own}", f"--workdir={tmp_path / 'w'}"]
    main(
        [
            *run,
            f"--config.data.path={tmp_path / 'one.npz'}",
            "--config.views.color_strength=0.5",
            "--config.eval.knn_k=5",
        ]
    )
    capsys.readouterr()
    main([*run, "--mode=knn", "--config.eval.baselines=False"])
    said = capsys.readouterr().out
    assert "40 training images" in said
    assert (tmp_path / "w/knn.json").exists()
    assert "the run's own options are used" in said
    assert "views.color_strength is 0.5 in the run, 1.0 in the file" in said
    assert re.search(r"data\.path is '\S+one\.npz' in the run, '\S+other\.npz' in the file", said)
    assert "eval.knn_k is 5 in the run, 3 in the file" in said
    assert "has changed since the run" not in said
    own.write_text(text + "\n")
    main([*run, "--mode=knn", "--config.eval.baselines=False"])
    assert f"{own} has changed since the run" in capsys.readouterr().out
