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

from simclr_jax import assemble, config, train
from simclr_jax.checkpoint import Checkpoints
from simclr_jax.data.sources import in_memory
from simclr_jax.mesh import make_mesh

# Minutes each: begun first, so that the workers end together.
_LONGEST = ("test_processes.py", "test_train.py", "test_stopping.py", "test_end_to_end.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Programs that several tests share are compiled by the first."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="session")
def golden():
    """Outputs of the published TF2 code."""
    with np.load(pathlib.Path(__file__).parent / "data/simclr_reference.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(params=[1, 2, 4, 8])
def devices(request):
    return jax.devices()[: request.param]


def random_images(count, height=12, width=10, channels=3):
    rng = np.random.default_rng(count)
    return rng.integers(0, 256, (count, height, width, channels)).astype(np.uint8)


@pytest.fixture
def small_split():
    """37 random images of 12 x 10 px in three classes."""
    return in_memory(random_images(37), np.arange(37) % 3, ("a", "b", "c"))


@pytest.fixture
def tiny(tmp_path):
    """The configuration of a run of seconds: 8 steps on 48 images of 12 px, in three classes."""
    path = tmp_path / "images.npz"
    np.savez(
        path,
        train_images=random_images(48, 12, 12),
        train_labels=np.arange(48) % 3,
        test_images=random_images(21, 12, 12),
        test_labels=np.arange(21) % 3,
    )
    c = config.default()
    c.data.source = "arrays"
    c.data.path = str(path)
    c.data.placement = "device"  # no TensorFlow to import, no views for it to compile
    c.data.image_size = 12
    c.data.batch_size = 16
    c.data.eval_crop = 1.0
    c.model.depth = 10
    c.model.width = 0.125
    c.model.stem = "strided"
    c.model.head_width = 16
    c.loss.temperature = 0.5
    c.optimizer.warmup_epochs = 1.0
    c.train.steps = 8
    c.train.log_every_steps = 2
    c.checkpoint.every_steps = 4
    c.eval.batch_size = 16
    c.eval.labels_per_class = (1,)
    c.eval.label_fraction = 0.0
    c.eval.seeds = 2
    return c


def encoder_checkpoint(c, folder):
    """A workdir with a checkpoint of step 1 of configuration `c`, whose encoder is not trained but
    has random BatchNorm scales, biases and statistics. Returns its path.
    """
    plan = config.plan(c, 1024)
    job = train.make_job(c, plan, None, make_mesh(jax.devices()[:1]))
    state = job.init(jax.random.key(3))
    rng = np.random.default_rng(4)

    def shaken(path, x):
        if path[-1].key in ("scale", "bias", "mean", "var"):
            return jax.device_put(rng.uniform(0.5, 1.5, x.shape).astype(np.float32), x.sharding)
        return x

    state = jax.tree_util.tree_map_with_path(
        lambda path, x: shaken(path[1:], x) if path[0].name in ("params", "batch_stats") else x,
        state,
    )
    record = {
        "config": c.to_dict(),
        "step": 1,
        "window": [],
        "data_fingerprint": assemble.source(c).train.fingerprint(),
    }
    with Checkpoints(str(folder), every_steps=1, keep_last=1, keep_every_steps=0) as checkpoints:
        checkpoints.save(1, state, record)
    return folder
