"""Addresses of buckets: refused in one line before anything is computed where they cannot work."""

import orbax.checkpoint as ocp
import pytest
import tensorflow as tf
from conftest import encoder_checkpoint
from etils import epath
from test_loop import job_of

import simclr_jax
from simclr_jax import files, load_encoder, main, shell, weights
from simclr_jax.config import default
from simclr_jax.data import folder
from simclr_jax.data import source as sources
from simclr_jax.errors import LOST, Unavailable, UserError
from simclr_jax.modes import export, warm_start
from simclr_jax.modes.embed import embed, open_input
from simclr_jax.modes.neighbours import neighbours
from simclr_jax.training import saved
from simclr_jax.training.checkpoint import Checkpoints, Saving
from simclr_jax.views import pipeline


class Storage:
    """Stands in for Google's: there is one bucket, and one that may not be looked at."""

    def __init__(self, address):
        self.address = str(address)

    def exists(self):
        if self.address == "gs://secret":
            raise PermissionError("403")
        return self.address == "gs://there"


@pytest.fixture
def storage(monkeypatch):
    monkeypatch.setattr(files.epath, "Path", Storage)
    monkeypatch.setattr(files, "_has_google_storage", lambda: True)


def test_a_mistyped_bucket_is_one_line(storage):
    with pytest.raises(
        UserError, match=r"no bucket gs://their: expected one that is there, in gs://their/runs/1"
    ):
        files.check_bucket("gs://their/runs/1")
    with pytest.raises(UserError, match="no bucket gs://their"):
        main.main(["--config=configs/digits.py", "--workdir=gs://their/w"])
    for good in ("gs://there", "gs://there/a b", "gs://secret/w", "/local/w", "w"):
        files.check_bucket(good)
    with pytest.raises(UserError, match="no file system for s3"):
        simclr_jax.pretrain("digits", "s3://x/w")
    for other in ("s3://x/w", "az://x/w"):
        with pytest.raises(UserError, match=r"no file system for (s3|az)://; mount the bucket"):
            files.check_bucket(other)


def test_without_googles_package_it_is_one_line(storage, monkeypatch):
    monkeypatch.setattr(files, "_has_google_storage", lambda: False)
    with pytest.raises(
        UserError, match=r"gs://there/w needs the package google-cloud-storage: pip"
    ):
        files.check_bucket("gs://there/w")
    files.check_bucket("/local/w")


def test_what_must_be_local_is_refused_before_anything_is_read():
    with pytest.raises(UserError, match=r"--output=gs://b/f\.parquet: expected a local path"):
        embed(default(), "/nowhere", "test", "gs://b/f.parquet")
    with pytest.raises(
        UserError, match=r"--output=gs://b/w/neighbours\.png: expected a local path"
    ):
        neighbours(default(), "gs://b/w", "/nowhere.parquet")
    with pytest.raises(UserError, match=r"data\.path=gs://b/photos: expected a local path"):
        folder.open_split("gs://b/photos", labels=False)
    with pytest.raises(UserError, match=r"--input=gs://b/photos: expected a local path"):
        open_input(default(), "gs://b/photos")
    with pytest.raises(UserError, match=r"gs://b/w\.safetensors: expected a local path of weights"):
        weights.read("gs://b/w.safetensors")


def test_a_run_begins_with_the_weights_of_a_bucket(tiny, tmp_path, monkeypatch):
    """A folder stands in for the bucket."""

    def path_of(path):
        return epath.Path(str(path).replace("gs://b", str(tmp_path)))

    for module in (warm_start, weights, saved):
        monkeypatch.setattr(module, "located", path_of)
    encoder_checkpoint(tiny, tmp_path / "w")
    for source in ("gs://b/w", "gs://b/w/checkpoints/1"):
        tiny.model.init_from = source
        assert warm_start.read_start(tiny).about["path"] == source
    (tmp_path / "w.safetensors").touch()
    for source, says in (("w.safetensors", "expected a local path"), ("none", "does not exist")):
        tiny.model.init_from = f"gs://b/{source}"
        with pytest.raises(UserError, match=says):
            warm_start.read_start(tiny)


def test_a_program_that_loads_an_export_of_a_bucket_copies_it_first():
    path = epath.Path("gs://b/w/encoder.safetensors")
    text = (
        'load_file("gs://b/w/encoder.safetensors") load_file("gs://b/w/encoder.head.safetensors")'
    )
    first, second = export._beginning_local(text, path, "safetensors").splitlines()
    assert first == "# first: gcloud storage cp -r 'gs://b/w/encoder*' ."
    assert second == 'load_file("encoder.safetensors") load_file("encoder.head.safetensors")'
    assert export._beginning_local(text, path, "savedmodel") == text
    assert export._beginning_local("x", epath.Path("/w/encoder.safetensors"), "safetensors") == "x"


class AbortedError(Exception):
    """TensorFlow's errors are of no class of Python's."""


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AbortedError("All 10 retry attempts failed ... when deleting gs://bucket/w/x"), LOST),
        (ValueError("UNAVAILABLE: Error reading gs://bucket/w/d/0: CURL error"), LOST),
        (ValueError("NOT_FOUND: Error opening zarr ... gs://bucket/w/d/0"), 1),
        (OSError("HTTP response code 403 ... when reading gs://bucket/w/config.json"), 1),
    ],
)
def test_what_a_bucket_s_library_raises_is_one_line(error, status, capsys):
    def command(_):
        raise error

    with pytest.raises(SystemExit) as ended:
        shell.call(command, [])
    line = capsys.readouterr().err.strip() or str(ended.value.code)
    assert (ended.value.code if status == LOST else 1) == status
    assert line.startswith("error: the bucket ")
    assert "\n" not in line
    assert str(error)[:20] in line


def test_errors_of_other_things_are_left_as_they_are():
    assert files.storage_error(ValueError("HTTP response code 403")) is None
    assert files.storage_error(UserError("gs://bucket")) is None
    # A fault of ours, or of the files, that happens to name the address.
    assert files.storage_error(KeyError("gs://bucket/w: expected a tree of 3, got 4")) is None
    gone = ValueError("UNAVAILABLE: Error reading gs://bucket/checkpoints/404/d/403")
    assert isinstance(files.storage_error(gone), Unavailable)


def test_a_bucket_that_is_away_is_no_broken_checkpoint(tiny, tmp_path, monkeypatch):
    workdir = encoder_checkpoint(tiny, tmp_path / "w")

    def restore(*_, **__):
        raise ValueError("UNAVAILABLE: Error reading gs://bucket/w/checkpoints/1: CURL error")

    monkeypatch.setattr(ocp.Checkpointer, "restore", restore)
    with pytest.raises(Unavailable, match="does not answer"):
        load_encoder(workdir)
    with Checkpoints(str(workdir), Saving(1)) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        with pytest.raises(Unavailable, match="does not answer"):
            checkpoints.restore_newest(job_of().abstract_state)
    assert not (workdir / "broken_checkpoints").exists()


class Away:
    """Stands in for a tf.data.Dataset whose files lie in a bucket that does not answer."""

    def prefetch(self, _):
        return self

    def as_numpy_iterator(self):
        yield {"image": 0}
        message = (
            "All 10 retry attempts failed. The last failure: Error executing an HTTP request: libcurl code 6 meaning "
            "'Could not resolve hostname' when reading gs://bucket/tensorflow_datasets/x.tfrecord"
        )
        raise tf.errors.AbortedError(None, None, message)


def test_an_outage_of_the_datas_bucket_is_no_mistake(monkeypatch):
    """Else launchers would give the run up, and every image would count as broken."""
    monkeypatch.setattr(sources, "in_order", lambda dataset: dataset)
    monkeypatch.setattr(pipeline, "in_order", lambda dataset: dataset)
    batches = pipeline._run(None, lambda passed: Away(), None)
    for stream in (sources.elements_of(Away(), "imagenet2012"), batches):
        assert next(stream) == {"image": 0}
        with pytest.raises(Unavailable, match=r"the bucket does not answer: .*libcurl code 6"):
            next(stream)
