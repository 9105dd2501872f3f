"""Eight CPU devices in one process: set before JAX starts."""

import gc
import importlib.metadata
import importlib.util
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs run for milliseconds here and are compiled for seconds. Without optimisation and fusion
# emitters a train step takes 1.1 s instead of 3.4 s with the emitters, and some 7 s with both.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
# Later ones and libtpu end the process at this flag, which they do not know.
if (
    importlib.metadata.version("jaxlib").startswith("0.10.")
    and importlib.util.find_spec("libtpu") is None
):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"

import pathlib
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from simclr_jax import assemble, config
from simclr_jax.data.arrays import in_memory
from simclr_jax.mesh import make_mesh
from simclr_jax.training.checkpoint import Checkpoints, Saving

# Millions of objects live as long as the tests do. To look through all of them for garbage takes
# seconds, and tracing makes Python do it often.
gc.set_threshold(100_000, 50, 100)

# Eight devices would save an eighth of each array, cut out by a program of its own for each shape and
# each device: 80 programs, 2 s, for the smallest run. Programs that tests start do it.
ocp.type_handlers.get_type_handler(jax.Array)._min_slice_bytes_for_replica_parallel = 2**20

# Half a minute each: begun first, so that the workers end together.
_LONGEST = ("test_processes.py", "test_end_to_end.py", "test_finetune.py", "test_evals.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONGEST)


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Programs that several tests, workers or programs started by tests share are compiled once.

    JAX_COMPILATION_CACHE_DIR, where it is set, keeps them for the next run of the tests.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # all workers share it
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# Groups of options that do not decide the train step of pretraining.
_NOT_OF_THE_STEP = (
    "checkpoint.",
    "eval.",
    "linear.",
    "finetune.",
    "transfer_finetune.",
    "data.path",
    "data.test_path",
)


# Modules that a train step is traced through.
_OF_THE_STEP = tuple(
    f"simclr_jax.{name}"
    for name in ("assemble", "mesh", "training", "losses", "views", "encoders", "data")
)
_AS_WRITTEN: dict[tuple[str, str], Any] = {}
_REPLACEMENTS: list[Any] = []


def replaced() -> frozenset:
    """Names the attributes that a test has replaced for a while in the modules of a train step: it is then another step."""
    found = set()
    for name, module in list(sys.modules.items()):
        if not name.startswith(_OF_THE_STEP):
            continue
        content = dict(vars(module))
        for key, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == name:
                content |= {f"{key}.{attribute}": x for attribute, x in vars(value).items()}
        for key, value in content.items():
            if _AS_WRITTEN.setdefault((name, key), value) is not value:
                _REPLACEMENTS.append(value)  # kept, so that nothing else gets its id
                found.add((name, key, id(value)))
    return frozenset(found)


@pytest.fixture(scope="session", autouse=True)
def trace_once():
    """Runs of equal options share a train step, which takes 2 s to trace and to lower."""
    assembled, jobs = assemble.pretraining_job, {}

    def pretraining_job(options, plan, classes, mesh):
        flat = config.flatten(options)
        decisive = {k: v for k, v in flat.items() if not k.startswith(_NOT_OF_THE_STEP)}
        key = repr(sorted(decisive.items())), plan, classes, mesh, replaced()
        if key not in jobs:
            jobs[key] = assembled(options, plan, classes, mesh)
        return jobs[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble, "pretraining_job", pretraining_job)
        yield


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
    """The configuration of a run of seconds: 8 steps on 48 images of 12 px, in three classes.

    The encoder is a ViT of one layer, and views are only cropped and flipped: quick to compile. Use
    `tiny_resnet` where BatchNorm or colour matters.
    """
    return tiny_config(tmp_path)


@pytest.fixture
def tiny_resnet(tmp_path):
    """`tiny` with a ResNet-10 of an eighth of the width, and views with colour."""
    c = tiny_config(tmp_path)
    config.set_options(c, RESNET)
    return c


RESNET = {
    "model.name": "resnet",
    "model.depth": 10,
    "model.width": 0.125,
    "model.stem": "strided",
    "views.color_strength": 1.0,
    "views.grey_probability": 0.2,
}


def tiny_config(folder):
    """Returns the configuration of the fixture `tiny`, and writes its images into `folder`."""
    path = folder / "images.npz"
    np.savez(
        path,
        train_images=random_images(48, 12, 12),
        train_labels=np.arange(48) % 3,
        test_images=random_images(21, 12, 12),
        test_labels=np.arange(21) % 3,
    )
    c = config.default()
    options = {
        "data.source": "arrays",
        "data.path": str(path),
        "data.placement": "device",  # no TensorFlow to import, no views for it to compile
        "data.image_size": 12,
        "data.batch_size": 16,
        "data.eval_crop": 1.0,
        "model.name": "vit",
        "model.vit.patch_size": 4,
        "model.vit.layers": 1,
        "model.vit.width": 16,
        "model.vit.heads": 2,
        "model.head_width": 16,
        "views.color_strength": 0.0,
        "views.grey_probability": 0.0,
        "views.blur_probability": 0.0,
        "loss.temperature": 0.5,
        "optimizer.warmup_epochs": 1.0,
        "train.steps": 8,
        "train.log_every_steps": 2,
        "checkpoint.every_steps": 4,
        "eval.batch_size": 16,
        "eval.labels_per_class": (1,),
        "eval.label_fraction": 0.0,
        "eval.seeds": 2,
    }
    config.set_options(c, options)
    return c


def encoder_checkpoint(c, folder, **more):
    """A workdir with a checkpoint of step 1 of configuration `c`, whose encoder is not trained but
    has random BatchNorm scales, biases and statistics; `more` is added to its record. Returns its path.
    """
    mesh = make_mesh(jax.devices()[:1])
    job = assemble.pretraining_job(c, assemble.plan_of(c, 1024), None, mesh)
    state = job.init()
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
        "data_fingerprint": assemble.data_set(c).train.fingerprint(),
    } | more
    with Checkpoints(str(folder), Saving(every_steps=1)) as checkpoints:
        checkpoints.save(1, state, record)
    return folder
