"""TensorBoard's view of a run, read back with the protocol buffers of the writer."""

import json
import struct

from tensorboardX.proto.event_pb2 import Event

from simclr_jax.metrics import MetricWriter


def events(path):
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[12 + length + 4 :]


def test_scalars_reach_tensorboard(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        writer.write(3, {"loss": 0.5, "grad_norm": 2.0})
    (path,) = tmp_path.glob("events.out.tfevents.*")
    seen = {(v.tag, e.step): v.simple_value for e in events(path) for v in e.summary.value}
    assert seen == {("loss", 3): 0.5, ("grad_norm", 3): 2.0}


class Bucket:
    """Stands for a file in a bucket: it can be written whole, and not be appended to."""

    def __init__(self, path):
        self.path = path

    def __str__(self):
        return "gs://bucket/metrics.jsonl"

    def write_text(self, text):
        self.path.write_text(text)


def test_metrics_in_a_bucket_are_written_whole(tmp_path):
    with MetricWriter(str(tmp_path)) as writer:
        writer._path = Bucket(tmp_path / "bucket.jsonl")
        for step in (1, 2):
            writer.write(step, {"loss": 0.5})
    lines = (tmp_path / "bucket.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
