"""Eight CPU devices in one process: set before JAX starts."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import pathlib

import jax
import numpy as np
import pytest

from simclr_jax.data.sources import in_memory


@pytest.fixture(scope="session")
def golden():
    """Outputs of the published TF2 code."""
    with np.load(pathlib.Path(__file__).parent / "data/simclr_reference.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(params=[1, 2, 4, 8])
def devices(request):
    return jax.devices()[: request.param]


@pytest.fixture
def small_split():
    """37 random images of 12 x 10 px in three classes."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 12, 10, 3)).astype(np.uint8)
    return in_memory(images, np.arange(37) % 3, ("a", "b", "c"))
