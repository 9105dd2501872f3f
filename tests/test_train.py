"""The loop: resuming, refusing, reporting, stopping."""

import json
import pathlib

import jax
import numpy as np
import pytest

from simclr_jax import assemble, record, train
from simclr_jax.checkpoint import find, saved_steps
from simclr_jax.console import Progress
from simclr_jax.data.order import batch_positions
from simclr_jax.data.sources import open_source
from simclr_jax.encoder import load_encoder
from simclr_jax.errors import UserError
from simclr_jax.evals import run
from simclr_jax.log import Log
from simclr_jax.metrics import MetricWriter


def metrics_of(workdir):
    """Every line of the metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def variables_of(workdir):
    return load_encoder(workdir).variables


def assert_same_run(workdir, whole):
    """Bit for bit the same parameters and metrics."""
    jax.tree.map(np.testing.assert_array_equal, variables_of(workdir), variables_of(whole))
    assert metrics_of(workdir) == metrics_of(whole)


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step):
    """Lets a run die when it asks for the batch of `step`."""
    original = assemble.training_batches

    def dying(config, split, start_step, broken):
        for i, batch in enumerate(original(config, split, start_step, broken), start_step + 1):
            if i == step:
                raise Stopped
            yield batch

    monkeypatch.setattr(assemble, "training_batches", dying)


@pytest.mark.parametrize(
    "options",
    [
        {"data.placement": "host"},
        pytest.param(
            {
                "data.placement": "host",
                "data.color_on": "device",
                "train.microbatches": 2,
                "mesh.fsdp": 2,
                "loss.implementation": "chunked",
            },
            marks=pytest.mark.slow,
        ),
        {},
    ],
)
def test_a_resumed_run_is_bit_for_bit_the_run_that_was_never_stopped(
    tiny, tmp_path, monkeypatch, options
):
    tiny.update_from_flattened_dict(options)
    tiny.train.log_every_steps = 3  # the checkpoint of step 4 lies within a window
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train.pretrain(tiny, str(whole))
    assert saved_steps(whole) == [4, 8]
    assert [line["step"] for line in metrics_of(whole)] == [3, 6, 8]

    with monkeypatch.context() as patched:
        stop_at(patched, 7)
        with pytest.raises(Stopped):
            train.pretrain(tiny, str(broken))
    assert saved_steps(broken) == [4]
    train.pretrain(tiny, str(broken))
    assert_same_run(broken, whole)


def test_a_finished_run_is_left_as_it_is(tiny, tmp_path):
    train.pretrain(tiny, str(tmp_path / "w"))
    before = (tmp_path / "w" / "metrics.jsonl").read_text()
    train.pretrain(tiny, str(tmp_path / "w"))
    assert (tmp_path / "w" / "metrics.jsonl").read_text() == before


def test_another_configuration_is_refused_with_what_differs(tiny, tmp_path):
    tiny.train.steps = 4
    train.pretrain(tiny, str(tmp_path / "w"))
    tiny.checkpoint.every_steps = 3  # may change
    tiny.loss.temperature = 0.1
    with pytest.raises(UserError, match=r"loss\.temperature: 0\.5 -> 0\.1") as caught:
        train.pretrain(tiny, str(tmp_path / "w"))
    assert "checkpoint" not in str(caught.value)
    tiny.model.head_width = 8
    with pytest.raises(UserError, match=r"head_width: 16 -> 8.*leave --config out") as caught:
        run.probe(tiny, str(tmp_path / "w"))
    assert "temperature" not in str(caught.value)  # what was learned with it is in the weights
    # Nothing was saved: nothing to protect.
    (tmp_path / "new").mkdir()
    (tmp_path / "w" / "config.json").rename(tmp_path / "new" / "config.json")
    record.check_workdir(tiny, str(tmp_path / "new"))


@pytest.mark.slow
def test_batchnorm_per_device_does_not_go_on_on_other_devices(tiny, tmp_path, monkeypatch):
    tiny.train.steps, tiny.model.norm_group = 4, -1
    train.pretrain(tiny, str(tmp_path / "w"))
    record.check_workdir(tiny, str(tmp_path / "w"))
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    with pytest.raises(UserError, match="per device on 8 devices, and there are 4 now"):
        record.check_workdir(tiny, str(tmp_path / "w"))


def test_a_run_does_not_go_on_with_other_images(tiny, tmp_path):
    tiny.train.steps = 4
    train.pretrain(tiny, str(tmp_path / "w"))
    np.savez(tiny.data.path, train_images=np.zeros((50, 12, 12, 3), np.uint8))
    open_source.cache_clear()
    with pytest.raises(UserError, match="on 48 training images and there are 50 now"):
        train.pretrain(tiny, str(tmp_path / "w"))
    np.savez(tiny.data.path, train_images=np.zeros((48, 12, 12, 3), np.uint8))
    open_source.cache_clear()
    with pytest.raises(UserError, match="holds a run on other images"):
        train.pretrain(tiny, str(tmp_path / "w"))


def test_a_run_gets_another_length_only_when_told_so(tiny, tmp_path):
    tiny.train.steps = 4
    train.pretrain(tiny, str(tmp_path / "w"))
    tiny.train.steps = 6
    with pytest.raises(UserError, match=r"train\.steps: 4 -> 6.* or --extend"):
        train.pretrain(tiny, str(tmp_path / "w"))
    assert train.pretrain(tiny, str(tmp_path / "w"), extend=True)
    assert saved_steps(tmp_path / "w") == [4, 6]
    tiny.loss.temperature = 0.1
    with pytest.raises(UserError, match=r"temperature: 0\.5 -> 0\.1") as caught:
        train.pretrain(tiny, str(tmp_path / "w"), extend=True)
    assert "--extend" not in str(caught.value)


def test_the_record_holds_what_a_reader_needs(tiny, tmp_path):
    tiny.train.steps = 4
    train.pretrain(tiny, str(tmp_path / "w"))
    record = json.loads((tmp_path / "w" / "config.json").read_text())
    assert record["config"]["loss"]["temperature"] == 0.5
    assert record["plan"] == {"steps": 4, "warmup_steps": 2, "learning_rate": 0.3 * 16 / 256}
    assert record["training_images"] == 48
    assert record["versions"]["jax"] == jax.__version__
    assert len(record["devices"]) == 8
    assert list((tmp_path / "w").glob("events.out.tfevents.*"))


def test_a_batch_that_does_not_divide_is_refused(tiny, tmp_path):
    tiny.data.batch_size = 12
    with pytest.raises(UserError, match=r"batch_size=12 does not divide over 8 devices"):
        train.pretrain(tiny, str(tmp_path))
    assert list(tmp_path.glob("c*")) == []


def test_a_workdir_that_cannot_be_written_is_refused(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into --workdir"):
        train.pretrain(tiny, str(tmp_path / "file"))


def test_a_loss_that_is_not_finite_stops_the_run_before_its_state_is_saved(tiny, tmp_path):
    """Each step multiplies the weights by up to 1e12, until they overflow; each step is saved."""
    tiny.optimizer.name, tiny.optimizer.scaling = "sgd", "none"
    tiny.optimizer.learning_rate = tiny.optimizer.weight_decay = 1e6
    tiny.train.steps = 12
    tiny.checkpoint.every_steps = 1
    with pytest.raises(UserError, match=r"step \d+: .*not finite"):
        train.pretrain(tiny, str(tmp_path / "w"))
    for leaf in jax.tree.leaves(variables_of(tmp_path / "w")):
        assert np.all(np.isfinite(leaf))


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


def test_the_log_writes_means_of_the_steps_since_the_last_line():
    recorder = Recorder()
    log = Log("", recorder, Progress(5), every=2, batch_size=8, total=5, window=[])
    for step in range(1, 6):
        log.add(step, scalars(step), {})
    assert [step for step, _ in recorder.written] == [2]  # read two steps late
    log.drain()
    assert [step for step, _ in recorder.written] == [2, 4, 5]
    assert [values["loss"] for _, values in recorder.written] == [1.5, 3.5, 5.0]
    np.testing.assert_allclose([v["learning_rate"] for _, v in recorder.written], [0.2, 0.4, 0.5])
    assert all(v["images_per_second"] > 0 for _, v in recorder.written)


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_the_log_names_the_step_that_is_not_finite_and_its_images(name, tmp_path):
    log = Log(str(tmp_path), None, Progress(5), every=1, batch_size=8, total=5, window=[])
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
    log = Log(str(tmp_path), recorder, Progress(40), every=4, batch_size=8, total=40, window=[])
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


@pytest.mark.parametrize("skip", [False, True])
def test_a_step_that_is_not_finite_can_be_skipped(tiny, tmp_path, monkeypatch, skip):
    """The batch of step 3 holds an infinite pixel."""
    original = assemble.training_batches

    def poisoned(config, split, start_step, broken):
        for i, batch in enumerate(original(config, split, start_step, broken), start_step + 1):
            views = batch["views"].astype(np.float32) / 255
            views[0, 0, 0, 0, 0] = np.inf if i == 3 else views[0, 0, 0, 0, 0]
            yield batch | {"views": views}

    monkeypatch.setattr(assemble, "training_batches", poisoned)
    tiny.data.placement = "host"  # where views can be poisoned
    tiny.train.steps, tiny.train.skip_not_finite = 4, skip
    if not skip:
        with pytest.raises(UserError, match=r"step 3: .*not finite"):
            train.pretrain(tiny, str(tmp_path / "w"))
    else:
        train.pretrain(tiny, str(tmp_path / "w"))
        assert [line["skipped_steps"] for line in metrics_of(tmp_path / "w")] == [0, 1]
        for leaf in jax.tree.leaves(variables_of(tmp_path / "w")):
            assert np.all(np.isfinite(leaf))
    named = json.loads((tmp_path / "w/not_finite_step_3.json").read_text())
    epoch, index = next(batch_positions(0, 48, 16, 2, slice(None)))
    assert named["epoch"] == list(epoch)
    assert named["index"] == list(index)


def test_metrics_past_the_restored_step_are_dropped(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut off while writing
    with MetricWriter(str(tmp_path), resume_step=4) as writer:
        writer.write(6, {"loss": 7.0})
    assert metrics_of(tmp_path) == [
        {"step": 2, "loss": 0.5},
        {"step": 4, "loss": 0.25},
        {"step": 6, "loss": 7.0},
    ]


def test_what_a_configuration_comes_to_is_said(tiny, tmp_path, capsys):
    tiny.train.steps = 4
    train.pretrain(tiny, str(tmp_path / "w"))
    said = capsys.readouterr().out
    assert "48 images, 3 classes; views of 12 px" in said
    encoder = load_encoder(tmp_path / "w").variables["params"]
    millions = sum(x.size for x in jax.tree.leaves(encoder)) / 1e6
    assert f"ResNet-10 x0.125, {millions:.2f} M parameters; head" in said
    assert "16 images, 32 views, 30 negatives an anchor, tau 0.5" in said
    assert "4 (1.3 epochs), of which 2 warm-up" in said
    assert "lars, peak learning rate 0.01875 (0.3 x 16 / 256), weight decay 1e-06" in said
    assert "8 x cpu; 1 process, 2 images a device" in said
    assert "NT-Xent, dense for this size; BatchNorm over the batch" in said
    assert "step 4/4  loss" in said
    assert f"trained to step 4: {tmp_path}/w/checkpoints" in said


def test_the_encoder_of_eight_devices_is_loaded_onto_one(tiny, tmp_path):
    tiny.train.steps = 4
    train.pretrain(tiny, str(tmp_path / "w"))
    encoder = load_encoder(tmp_path / "w")
    copied = pathlib.Path(find(str(tmp_path / "w"), None)).rename(tmp_path / "copied")
    images = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3)).astype(np.uint8)
    h = encoder(images)
    assert h.shape == (5, encoder.width)
    assert h.dtype == np.float32
    np.testing.assert_array_equal(load_encoder(copied)(images), h)
    np.testing.assert_allclose(encoder(images / np.float32(255)), h, rtol=1e-5, atol=1e-6)
    # The 300th image is as good as the first: batches are padded, not mixed.
    many = np.concatenate([np.repeat(images[:1], 299, axis=0), images[1:2]])
    np.testing.assert_allclose(encoder(many)[-1], h[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected \\[N, H, W, 3\\]"):
        encoder(images[..., :1])
    with pytest.raises(ValueError, match="expected uint8"):
        encoder(images.astype(np.int64))
