"""WORKDIR/metrics.jsonl, and TensorBoard's view of it, read back with its protocol buffers."""

import contextlib
import json
import struct
import types
from typing import Any

import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from simclr_jax.errors import Unavailable, UserError
from simclr_jax.training import metrics
from simclr_jax.training.metrics import MetricWriter, read_lines


def events(path):
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        (check,) = struct.unpack("<I", data[12 + length : 16 + length])
        assert check == masked_crc32c(data[12 : 12 + length])
        yield Event.FromString(data[12 : 12 + length])
        data = data[12 + length + 4 :]


def lines_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_sinks_are_closed_where_the_last_metrics_cannot_be_stored(tmp_path, monkeypatch):
    closed: list[bool] = []
    sinks: Any = types.SimpleNamespace(close=closed.append)

    def full(_):
        raise UserError("the disk is full")

    monkeypatch.setattr(MetricWriter, "store", full)
    with (
        pytest.raises(UserError, match="the disk is full"),
        MetricWriter(str(tmp_path), sinks=lambda: sinks),
    ):
        pass
    assert closed == [False]


def test_scalars_reach_tensorboard(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        writer.write(3, {"loss": 0.5, "grad_norm": 2.0})
        (path,) = tmp_path.glob("events.out.tfevents.*")
        there = list(events(path))  # while the run goes on
    assert list(events(path)) == there
    seen = {(v.tag, e.step): v.simple_value for e in there for v in e.summary.value}
    assert seen == {("loss", 3): 0.5, ("grad_norm", 3): 2.0}


@pytest.mark.parametrize("finished", [True, False])
def test_sinks_hear_whether_the_training_came_to_its_last_step(tmp_path, finished):
    """A run that a signal has stopped leaves the writer without an error."""
    closed: list[bool] = []
    sinks: Any = types.SimpleNamespace(close=closed.append)
    with MetricWriter(str(tmp_path), sinks=lambda: sinks) as writer:
        writer.finished = finished
    assert closed == [finished]


def test_lines_that_are_no_metrics_are_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_lines(file) == []
    whole = b'{"step": 3, "loss": 0.5}\n'
    file.write_bytes(whole + b'\xff\x00\n7\n{"loss": 1}\n{"step": 4, "lo')
    assert read_lines(file) == [{"step": 3, "loss": 0.5}]


def test_lines_are_json_that_strict_readers_take(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        writer.write(3, {"loss": 0.5, "trust_ratio_max": float("inf"), "rank_h": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "loss": 0.5}\n'
    (path,) = tmp_path.glob("events.out.tfevents.*")
    seen = {v.tag: v.simple_value for e in events(path) for v in e.summary.value}
    assert seen["trust_ratio_max"] == float("inf")


def test_tensorboard_hides_the_steps_that_are_run_again(tmp_path):
    with MetricWriter(str(tmp_path), resume_step=4):
        pass
    (path,) = tmp_path.glob("events.out.tfevents.*")
    version, start = events(path)
    assert version.file_version == "brain.Event:2"
    assert (start.step, start.session_log.status) == (5, SessionLog.START)


def test_metrics_past_the_restored_step_are_dropped(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        for step in (2, 4, 6):
            writer.write(step, {"loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # cut off while writing
    with MetricWriter(str(tmp_path), resume_step=4) as writer:
        writer.write(6, {"loss": 7.0})
    assert lines_of(tmp_path) == [
        {"step": 2, "loss": 0.5},
        {"step": 4, "loss": 0.25},
        {"step": 6, "loss": 7.0},
    ]


GOOD = b'{"step": 2, "loss": 0.5}\n'


@pytest.mark.parametrize(
    "damage",
    [
        bytes(4096),
        bytes(64) + b"\n",
        b'{"step": 3, "lo\n',
        b'{"step": 3, "loss": 0.',
        b"\xff\xfe\x80\n",
        b'\xff{"step": 3}\n',
        b"\n",
        b"3\n",
        b"null\n",
        b'["step"]\n',
        b'{"loss": 1}\n',
        b'{"step": "3"}\n',
        b'{"step": -3}\n',
        b'{"step": null}\n',
    ],
)
def test_damaged_lines_are_dropped_and_the_others_kept(tmp_path, damage):
    before = damage if damage.endswith(b"\n") else b""
    (tmp_path / "metrics.jsonl").write_bytes(before + GOOD + damage)
    with MetricWriter(str(tmp_path), resume_step=4) as writer:
        assert (tmp_path / "metrics.jsonl").read_bytes() == GOOD
        writer.write(6, {"loss": 7.0})
    assert lines_of(tmp_path) == [{"step": 2, "loss": 0.5}, {"step": 6, "loss": 7.0}]


def test_metrics_in_a_bucket_are_copied_whole_now_and_then(tmp_path, monkeypatch):
    copies = []
    monkeypatch.setattr(metrics, "in_bucket", lambda path: True)
    write_all = MetricWriter._write_all

    def counted(self):
        copies.append(len(self._lines))
        write_all(self)

    monkeypatch.setattr(MetricWriter, "_write_all", counted)
    with MetricWriter(str(tmp_path)) as writer:
        for step in (1, 2):
            writer.write(step, {"loss": 0.5})
        assert not copies
        monkeypatch.setattr(metrics, "_COPY_SECONDS", -1.0)
        writer.write(3, {"loss": 0.25})
        assert [x["step"] for x in lines_of(tmp_path)] == [1, 2, 3]
        monkeypatch.setattr(metrics, "_COPY_SECONDS", 60.0)
        writer.write(4, {"loss": 0.25})
    assert [x["step"] for x in lines_of(tmp_path)] == [1, 2, 3, 4]
    assert copies == [3, 4]
    (path,) = tmp_path.glob("events.out.tfevents.*")
    assert [e.step for e in events(path) if e.summary.value] == [1, 2, 3, 4]


def test_the_end_of_a_run_that_a_bucket_ended_asks_it_no_more(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(MetricWriter, "store", lambda self: asked.append(1))
    away = ValueError("UNAVAILABLE: Error writing gs://bucket/w")
    for error in (UserError("not finite"), Unavailable("the bucket"), away):
        with contextlib.suppress(Exception), MetricWriter(str(tmp_path)):
            raise error
    assert len(asked) == 1
