"""The one loop of every training, with a job of a few numbers: resuming, hooks, reports, not finite."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from simclr_jax.console import Progress
from simclr_jax.errors import UserError
from simclr_jax.mesh import make_mesh, to_global
from simclr_jax.training import loop
from simclr_jax.training.checkpoint import Checkpoints, Saving
from simclr_jax.training.clock import Clock
from simclr_jax.training.gradients import Embedding
from simclr_jax.training.log import Log, Reporting, mean_of, steps_between_reports
from simclr_jax.training.loop import Run, fit
from simclr_jax.training.optimizer import make_optimizer
from simclr_jax.training.saved import find, read_record, saved_steps
from simclr_jax.training.state import start_of
from simclr_jax.training.step import UpdateRule, make_step

ROOT = pathlib.Path(__file__).parent.parent
STEPS, BATCH, WIDTH = 8, 16, 4096
ADVICE = "try another rate"


def embed(params, batch_stats, batch):
    """A layer, a head and a running mean, as small as they can be."""
    x = batch["x"]
    mean = 0.9 * batch_stats["encoder"]["mean"] + 0.1 * jnp.mean(x, axis=0)
    z = x * params["encoder"]["kernel"] + params["head"]["bias"]
    return Embedding(z, jnp.zeros(()), {}, {"encoder": {"mean": mean}})


def to_one(z, labels):
    return jnp.mean(jnp.sum((z - 1.0) ** 2, axis=-1)), {}


@functools.cache
def mesh():
    return make_mesh(jax.devices()[:2])


@functools.cache
def job_of(*, skip=False):
    """The training of `embed` towards 1, by SGD with momentum."""
    optimizer = optax.sgd(0.02, momentum=0.5)

    def init(key):
        params = {"encoder": {"kernel": jax.random.normal(key, (WIDTH,))}}
        params["head"] = {"bias": jnp.zeros((WIDTH,))}
        return start_of(params, {"encoder": {"mean": jnp.zeros((WIDTH,))}}, optimizer)

    rule = UpdateRule(optimizer, lambda step: 0.02 / (step + 1), skip_not_finite=skip)
    step = make_step(embed, to_one, rule)
    return loop.job_of(step, init, (jax.random.key(0),), STEPS, mesh())


def batch_of(step):
    x = np.random.default_rng(step).normal(size=(BATCH, WIDTH)).astype(np.float32)
    return {"x": x, "label": np.zeros(BATCH, np.int32)}


def images_of(step):
    return {"epoch": np.full(BATCH, step // 3), "index": np.arange(BATCH) + step}


class Stopped(Exception):
    pass


def batches(start, *, before=None):
    """Yields the batch of each step; before(step, batch) may change it, or raise."""
    step = start
    while True:
        step += 1
        batch = batch_of(step)
        if before is not None:
            before(step, batch)
        yield to_global(mesh(), batch), images_of(step)


def dies_at(last):
    def before(step, batch):
        if step == last:
            raise Stopped

    return before


def poisoned_at(*bad):
    """Makes one number of the batches of these steps infinite."""

    def before(step, batch):
        if step in bad:
            batch["x"][5, 7] = np.inf

    return before


def train(workdir, *, job=None, before=None, hooks=(), steps=STEPS, every=4, log_every=3, keep=100):
    """Runs `fit` in a workdir. Reports every 3 steps: the checkpoint of step 4 lies between two."""
    workdir.mkdir(exist_ok=True)
    run = Run(
        str(workdir),
        {"config": {}, "note": "kept"},
        Saving(every_steps=every, keep_last=keep),
        Reporting(log_every, BATCH, ADVICE),
    )
    job = (job or job_of())._replace(steps=steps)
    return fit(job, functools.partial(batches, before=before), run, hooks)


OF_THE_CLOCK = ("images_per_second", "share_of_time", "goodput", "slowest_process")


def metrics_of(workdir):
    """Every line of the metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(OF_THE_CLOCK)} for line in lines]


def newest_state(workdir):
    with Checkpoints(str(workdir), Saving(every_steps=1)) as checkpoints:
        state, _ = checkpoints.restore_newest(job_of().abstract_state)
    return jax.device_get(state)


def assert_same_training(workdir, whole):
    """Bit for bit the same state and metrics."""
    jax.tree.map(np.testing.assert_array_equal, newest_state(workdir), newest_state(whole))
    assert metrics_of(workdir) == metrics_of(whole)


def run_python(code, *arguments):
    """Runs code that can import the tests' own modules."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT / "tests",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def config_file(config, folder):
    """Writes a file for --config that holds a configuration. Returns its path."""
    path = folder / "configured.py"
    path.write_text(
        "from simclr_jax.config import from_dict\n\n\n"
        f"def get_config(argument=''):\n    return from_dict({config.to_dict()!r})\n"
    )
    return path


class Average:
    """A hook whose every line depends on all states that it has seen since the first step."""

    name = "average"

    def __init__(self, every=2):
        self._every = every
        self.memory: dict[str, list[float]] = {"seen": []}

    def due(self, step):
        return step % self._every == 0

    def run(self, step, state):
        seen = self.memory["seen"]
        seen.append(float(np.sum(np.asarray(state.params["encoder"]["kernel"]))))
        return {"average": sum(seen) / len(seen)}


class Forgetful(Average):
    """A wrong hook: what a checkpoint remembers is not taken."""

    @property
    def memory(self):
        return self._memory

    @memory.setter
    def memory(self, _):
        self._memory: dict[str, list[float]] = {"seen": []}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that was never stopped, with a hook every second step."""
    workdir = tmp_path_factory.mktemp("trained") / "whole"
    train(workdir, hooks=[Average()])
    return workdir


def test_the_metrics_hold_the_reports_and_the_lines_of_hooks_in_order(whole):
    lines = metrics_of(whole)
    reports = [line for line in lines if "loss" in line]
    assert [line["step"] for line in reports] == [3, 6, 8]
    assert [line["step"] for line in lines if "average" in line] == [2, 4, 6, 8]
    assert len(lines) == 7
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps)
    assert reports[0]["loss"] > reports[2]["loss"]


@pytest.mark.parametrize("died_at", [3, 5, 7, 8])
def test_a_resumed_training_is_bit_for_bit_the_one_that_was_never_stopped(
    whole, tmp_path, died_at, capsys
):
    """Also where nothing was saved yet, within a window of the reports, and right before the end."""
    workdir = tmp_path / "w"
    with pytest.raises(Stopped):
        train(workdir, hooks=[Average()], before=dies_at(died_at))
    assert saved_steps(workdir) == ([4] if died_at > 4 else [])
    capsys.readouterr()
    train(workdir, hooks=[Average()])
    assert ("resumed from step 4" in capsys.readouterr().out) == (died_at > 4)
    assert_same_training(workdir, whole)


def test_a_hook_that_forgets_is_told_apart(whole, tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path / "w", hooks=[Forgetful()], before=dies_at(7))
    train(tmp_path / "w", hooks=[Forgetful()])
    assert metrics_of(tmp_path / "w") != metrics_of(whole)
    assert [line for line in metrics_of(tmp_path / "w") if "loss" in line] == [
        line for line in metrics_of(whole) if "loss" in line
    ]


def test_the_memory_of_hooks_lies_in_every_checkpoint(whole):
    seen = {}
    for step in (4, 8):
        options = read_record(find(str(whole), step))
        assert options["step"] == step
        assert options["note"] == "kept"
        seen[step] = options["hooks"]["average"]["seen"]
    assert len(seen[4]) == 2
    assert len(seen[8]) == 4  # the last step's run is in it
    assert seen[8][:2] == seen[4]


def test_a_hook_sees_the_state_of_its_step_before_it_is_saved(tmp_path):
    class Watching(Average):
        def run(self, step, state):
            seen.append((step, int(state.step), saved_steps(tmp_path / "w")))
            return {}

    seen: list[tuple[int, int, list[int]]] = []
    train(tmp_path / "w", hooks=[Watching(every=4)], every=100)  # saved at the last step alone
    assert seen == [(4, 4, []), (8, 8, [])]
    assert saved_steps(tmp_path / "w") == [8]
    assert [line["step"] for line in metrics_of(tmp_path / "w")] == [3, 6, 8]  # no empty line


def test_hooks_run_in_their_order_when_they_are_due(tmp_path):
    class Named(Average):
        def __init__(self, name, every):
            super().__init__(every)
            self.name = name

        def run(self, step, state):
            ran.append((step, self.name))
            return {self.name: step}

    ran: list[tuple[int, str]] = []
    train(tmp_path / "w", hooks=[Named("b", 3), Named("a", 2)], log_every=100)
    assert ran == [(2, "a"), (3, "b"), (4, "a"), (6, "b"), (6, "a"), (8, "a")]
    lines = [line for line in metrics_of(tmp_path / "w") if "loss" not in line]
    assert lines == [{"step": step, name: step} for step, name in ran]


def test_no_hook_runs_after_a_loss_that_is_not_finite(tmp_path):
    hook = Average(every=4)
    with pytest.raises(UserError, match="step 4: "):
        train(tmp_path / "w", hooks=[hook], before=poisoned_at(4))
    assert hook.memory == {"seen": []}


def test_a_finished_training_is_left_as_it_is(whole):
    before = (whole / "metrics.jsonl").read_bytes()
    state = train(whole, hooks=[Average()])
    assert int(state.step) == STEPS
    assert (whole / "metrics.jsonl").read_bytes() == before
    assert saved_steps(whole) == [4, 8]


def test_a_shorter_training_than_the_saved_one_is_refused(whole):
    with pytest.raises(UserError, match="is at step 8 already, and 6 steps are asked for"):
        train(whole, steps=6)


def test_damaged_metrics_do_not_forbid_to_go_on(whole, tmp_path):
    """Power failures leave NULs, lines that are cut off, and bytes that are no UTF-8."""
    workdir = tmp_path / "w"
    with pytest.raises(Stopped):
        train(workdir, hooks=[Average()], before=dies_at(7))
    file = workdir / "metrics.jsonl"
    good = file.read_bytes()
    lines = good.splitlines(keepends=True)
    damaged = [b"\0" * 64 + b"\n", *lines[:2], b"\xff\xfe\x80\n", b'{"step": 2, "lo\n', *lines[2:]]
    file.write_bytes(b"".join(damaged) + b'{"step": 6, "loss": 0.' + b"\0" * 512)
    train(workdir, hooks=[Average()])
    assert_same_training(workdir, whole)
    assert b"\0" not in file.read_bytes()


def test_another_thread_than_the_main_one_can_train(whole, tmp_path):
    """Python takes signal handlers in the main thread only."""
    outcome = []
    thread = threading.Thread(
        target=lambda: outcome.append(train(tmp_path / "w", hooks=[Average()]))
    )
    thread.start()
    thread.join(timeout=60)
    (state,) = outcome
    assert int(state.step) == STEPS
    assert_same_training(tmp_path / "w", whole)


@pytest.mark.parametrize("what", ["params", "batch_stats", "opt_state"])
def test_the_state_is_checked_before_it_is_saved(tmp_path, what):
    """An update overflows while the loss before it was finite; each step is saved."""

    def overflowing(state, batch):
        state, metrics = job_of().step(state, batch)
        if int(state.step) == 3:
            huge = jax.tree.map(lambda x: x * 1e38 * 1e38, getattr(state, what))
            state = dataclasses.replace(state, **{what: huge})
        return state, metrics

    with pytest.raises(UserError, match="step 3: the updated state is not finite") as caught:
        train(tmp_path / "w", job=job_of()._replace(step=overflowing), every=1)
    assert str(caught.value).endswith(f"The last checkpoint is from before it; {ADVICE}")
    assert saved_steps(tmp_path / "w") == [1, 2]
    for leaf in jax.tree.leaves(newest_state(tmp_path / "w")):
        assert np.all(np.isfinite(leaf))


def test_nothing_is_saved_after_a_loss_that_is_not_finite(tmp_path):
    """Losses are read two steps late, but before a save."""
    with pytest.raises(UserError, match="step 3: loss"):
        train(tmp_path / "w", before=poisoned_at(3), every=1)
    assert saved_steps(tmp_path / "w") == [1, 2]


def test_means_of_a_classifier_are_over_the_images_that_have_a_label():
    """A step without labels says 0 of both; one with twice the labels counts twice. An older step has no share."""
    steps = [(1.0, 0.5, 0.25), (0.0, 0.0, 0.0), (4.0, 1.0, 0.5)]
    window = [
        {"loss": 2.0, "classifier_loss": loss, "classifier_accuracy": accuracy}
        | {"labelled_share": share, "learning_rate": 0.1}
        for loss, accuracy, share in steps
    ]
    means = mean_of(window)
    assert means["classifier_loss"] == pytest.approx((0.25 * 1 + 0.5 * 4) / 0.75)
    assert means["classifier_accuracy"] == pytest.approx((0.25 * 0.5 + 0.5 * 1) / 0.75)
    assert means["labelled_share"] == pytest.approx(0.25)
    assert means["loss"] == 2.0
    assert mean_of(window[1:2]).keys() == {"loss", "labelled_share", "learning_rate"}
    of_before = [{name: x for name, x in window[0].items() if name != "labelled_share"}]
    assert mean_of(of_before) == of_before[0]
    # Steps of a version that did not have a metric, in the window of one that has.
    assert mean_of([*of_before, window[0] | {"new": 3.0}])["new"] == 3.0


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw", "muon"])
def test_a_skipped_step_is_one_of_the_schedule(name):
    """So that the learning rate that is applied is the one that is reported, and ends at 0."""

    def schedule(step):
        return 0.1 * (1 - step / 5)

    settings = {"weight_decay": 0.0, "momentum": 0.0, "trust_coefficient": 1e-3}
    optimizer = make_optimizer(name, schedule, **settings)
    params = {"encoder": {"kernel": jnp.ones((4, 4))}}

    def loss(z, _):
        return jnp.mean(z), {}

    def objective(params, batch_stats, batch):
        z = batch["x"] * jnp.sum(params["encoder"]["kernel"])
        return Embedding(z, jnp.zeros(()), {}, batch_stats)

    step = jax.jit(
        make_step(objective, loss, UpdateRule(optimizer, schedule, skip_not_finite=True))
    )
    state = start_of(params, {}, optimizer)
    for number in range(5):
        x = np.full((2, 1), np.inf if number in (1, 2) else 1.0, np.float32)
        state, metrics = step(state, {"x": x, "label": np.zeros(2, np.int32)})
        assert metrics["learning_rate"] == pytest.approx(schedule(number))
        counts = [
            s.count for s in jax.tree.leaves(state.opt_state, is_leaf=is_schedule) if is_schedule(s)
        ]
        assert counts
        assert set(map(int, counts)) == {number + 1}


def is_schedule(x):
    return isinstance(x, optax.ScaleByScheduleState)


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_is_not_finite_can_be_skipped(tmp_path, skip):
    """The batch of step 3 holds an infinite number, which also reaches the running mean."""
    workdir, job = tmp_path / "w", job_of(skip=skip)
    if not skip:
        with pytest.raises(UserError, match=r"step 3: .*not finite.*not_finite_step_3.json names"):
            train(workdir, job=job, before=poisoned_at(3), log_every=2)
        assert saved_steps(workdir) == []
    else:
        train(workdir, job=job, before=poisoned_at(3), log_every=2)
        assert [line["skipped_steps"] for line in metrics_of(workdir)] == [0, 1, 0, 0]
        state = newest_state(workdir)
        assert int(state.step) == STEPS
        for leaf in jax.tree.leaves(state):
            assert np.all(np.isfinite(leaf))
    named = json.loads((workdir / "not_finite_step_3.json").read_text())
    assert named["epoch"] == images_of(3)["epoch"].tolist()
    assert named["index"] == images_of(3)["index"].tolist()


class Recorder:
    def __init__(self):
        self.written = []

    def write(self, step, values):
        self.written.append((step, values))


def scalars(step, **changed):
    values = {
        "loss": float(step),
        "grad_norm": 1.0,
        "contrastive_top1": 0.5,
        "learning_rate": 0.1 * step,
    }
    return {k: np.float32(v) for k, v in (values | changed).items()}


def log_of(recorder, every, total, workdir=""):
    return Log(str(workdir), recorder, Progress(total), Reporting(every, 8), [], Clock())


def test_a_training_shorter_than_a_report_is_reported_ten_times():
    assert [steps_between_reports(50, steps) for steps in (50, 49, 12, 5)] == [50, 4, 1, 1]


def test_the_log_writes_means_of_the_steps_since_the_last_line():
    recorder = Recorder()
    log = log_of(recorder, every=2, total=5)
    for step in range(1, 6):
        log.add(step, scalars(step), {})
    assert [step for step, _ in recorder.written] == [2]  # read two steps late
    log.drain()
    assert [step for step, _ in recorder.written] == [2, 4, 5]
    assert [values["loss"] for _, values in recorder.written] == [1.5, 3.5, 5.0]
    np.testing.assert_allclose([v["learning_rate"] for _, v in recorder.written], [0.2, 0.4, 0.5])
    # The step of the last line was waited for, and is not timed.
    speeds = [values.get("images_per_second", 0.0) > 0 for _, values in recorder.written]
    assert speeds == [True, True, False]


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_log_names_the_step_that_is_not_finite_and_its_images(name, tmp_path):
    log = log_of(None, every=1, total=5, workdir=tmp_path)
    images = {"epoch": np.array([0, 1]), "index": np.array([47, 3])}
    log.add(1, scalars(1), images)
    log.add(2, scalars(2, **{name: np.nan}), images)
    with pytest.raises(UserError, match=f"step 2: {name} nan, not finite.*not_finite_step_2.json"):
        log.drain()
    named = json.loads((tmp_path / "not_finite_step_2.json").read_text())
    assert named["step"] == 2
    assert named["index"] == [47, 3]
    assert named[name] == "nan"


def test_skipped_steps_are_counted_and_leave_the_means_alone(tmp_path):
    recorder = Recorder()
    log = log_of(recorder, every=4, total=40, workdir=tmp_path)
    for step in range(1, 5):
        bad = {"loss": np.inf, "skipped_steps": 1.0} if step == 2 else {"skipped_steps": 0.0}
        log.add(step, scalars(step, **bad), {})
    log.drain()
    ((_, values),) = recorder.written
    assert values["loss"] == pytest.approx((1 + 3 + 4) / 3)
    assert values["skipped_steps"] == 1
    for step in range(5, 20):
        log.add(step, scalars(step, loss=np.nan, skipped_steps=1.0), {})
        if step == 16:
            break
    with pytest.raises(UserError, match="step 15: loss nan, the 11th in a row, not finite"):
        log.drain()
    log = log_of(Recorder(), every=4, total=40, workdir=tmp_path)
    for step in range(1, 12):  # of finite loss and gradient
        log.add(step, scalars(step, skipped_steps=1.0), {})
    says = "step 11: the update or running statistics, the 11th in a row, not finite"
    with pytest.raises(UserError, match=says):
        log.drain()
    assert (tmp_path / "not_finite_step_11.json").exists()


def test_closing_is_watched(tmp_path, monkeypatch):
    """A sink or a save that is stuck while everything is closed must not keep the process for ever."""
    closed = []
    for kind in (loop.Watch, loop.MetricWriter, Checkpoints):

        def leave(self, *error, original=kind.__exit__, name=kind.__name__):
            closed.append(name)
            return original(self, *error)

        monkeypatch.setattr(kind, "__exit__", leave)
    train(tmp_path / "w")
    assert closed == ["MetricWriter", "Checkpoints", "Watch"]
