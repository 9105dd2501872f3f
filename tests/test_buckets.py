"""Addresses of buckets: refused in one line before anything is computed where they cannot work."""

import pytest
from etils import epath

from simclr_jax import files, main
from simclr_jax.config import default
from simclr_jax.data import folder
from simclr_jax.errors import UserError
from simclr_jax.modes import export
from simclr_jax.modes.embed import embed, open_input
from simclr_jax.modes.neighbours import neighbours


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
    for good in ("gs://there", "gs://there/a b", "gs://secret/w", "/local/w", "w", "s3://x/w"):
        files.check_bucket(good)


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
