"""Measures simclr_jax beside its peers, in turns: `python benchmarks/run.py input|loss|step|gpu`.

Each turn is a process of its own, so that no library's threads are in another's way. Every turn goes to
benchmarks/results/; `python benchmarks/table.py` makes the table of docs/performance.md of it.
"""

import argparse
import datetime
import importlib.metadata
import io
import json
import os
import pathlib
import platform
import re
import resource
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent
_BATCH = 64
_MOST_MEMORY = 20 * 2**30  # bytes, of a process that measures a loss
_PACKAGES = (
    "jax",
    "tensorflow-cpu",
    "torch",
    "torchvision",
    "lightly",
    "pytorch-metric-learning",
    "numpy",
)
LOSS_PAIRS = (512, 2048, 8192, 32768)
LOSS_WIDTH = 128
OUR_LOSSES = ("simclr_jax in tiles", "simclr_jax dense", "the formula jitted")
STEP_IMAGES = 128
GPU_STEP_IMAGES = (256, 384, 512)  # of two views each; 512 take 40 GiB on either side


def jpegs(count: int = 128) -> list[bytes]:
    """500 x 375 px, some 80 KB each: windows of the two photographs that scikit-learn ships."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    found = []
    for i in range(count):
        width = int(rng.integers(400, 561))
        height = width * 3 // 4
        left, top = rng.integers(0, 640 - width + 1), rng.integers(0, 427 - height + 1)
        window = photographs[i % 2].crop((left, top, left + width, top + height))
        buffer = io.BytesIO()
        window.resize((500, 375), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=96)
        found.append(buffer.getvalue())
    return found


def small_images():
    import numpy as np

    return np.random.default_rng(0).integers(0, 256, (10000, 32, 32, 3)).astype(np.uint8)


def our_batches(images, size: int, distortion: dict, color: bool, batch_size: int):
    """Yields the sizes of the batches that the host pipeline makes from JPEGs or arrays."""
    import numpy as np

    from simclr_jax.data.arrays import in_memory
    from simclr_jax.data.broken import Broken, Images
    from simclr_jax.data.encoded import Encoded
    from simclr_jax.data.indexed import IndexedSplit
    from simclr_jax.data.order import Order
    from simclr_jax.views import make_distortion
    from simclr_jax.views.pipeline import HostWork, training_batches

    if isinstance(images, list):  # as a folder's files, but without reading the disk
        split = IndexedSplit(Encoded(images, np.full(len(images), -1, np.int32)))
    else:
        split = in_memory(images)
    work = HostWork(size, make_distortion(distortion), whole=color)
    batches = training_batches(Images(split, Broken(split, 1.0)), Order(0, batch_size), 0, work)
    for batch in batches:
        yield len(batch["views"])


def decoded(images: list[bytes]):
    """Decodes JPEGs and does nothing else, which no pipeline can beat; yields the sizes of batches."""
    import tensorflow as tf

    dataset = (
        tf.data.Dataset.from_tensor_slices(images)
        .repeat()
        .map(lambda data: tf.io.decode_jpeg(data, 3)[0, 0], tf.data.AUTOTUNE)
        .batch(_BATCH)
    )
    for batch in dataset.as_numpy_iterator():
        yield len(batch)


def _inputs() -> dict:
    import peers

    found = {}
    for case, blur in (("with blur", 0.5), ("without blur", 0.0)):
        case = f"two views of a 500 x 375 JPEG, 224 px, {case}"
        found |= {
            f"{case}, simclr_jax": lambda blur=blur: our_batches(
                jpegs(), 224, {"blur_probability": blur}, True, _BATCH
            ),
            f"{case}, lightly": lambda blur=blur: peers.lightly_batches(jpegs(), blur, _BATCH),
            f"{case}, published": lambda blur=blur: peers.published_batches(
                jpegs(), 224, blur, 1.0, _BATCH
            ),
        }
    weak = {"color_strength": 0.5, "blur_probability": 0.0}
    left = "two views of a 500 x 375 JPEG, 224 px, flip, colour and blur left to the device"
    return found | {
        f"{left}, simclr_jax": lambda: our_batches(jpegs(), 224, {}, False, _BATCH),
        f"{left}, decoding alone": lambda: decoded(jpegs()),
        "two views of 32 px, from memory, simclr_jax": lambda: our_batches(
            small_images(), 32, weak, True, 512
        ),
        "two views of 32 px, from memory, published": lambda: peers.published_batches(
            small_images(), 32, 0.0, 0.5, 512
        ),
    }


def images_rate(batches, seconds: float = 8.0) -> dict:
    """Measures images per second, and per second of CPU time of this process and its workers."""
    for _ in range(6):  # compiling, filling buffers
        next(batches)
    count, began, used = 0, time.perf_counter(), cpu_seconds()
    while (elapsed := time.perf_counter() - began) < seconds:
        count += next(batches)
    return {
        "images_per_second": count / elapsed,
        "images_per_cpu_second": count / (cpu_seconds() - used),
    }


def cpu_seconds() -> float:
    """CPU time so far of this process and of those that it has started, s."""
    own = pathlib.Path("/proc/self/task")
    children = " ".join((task / "children").read_text() for task in own.iterdir()).split()
    ticks = 0
    for child in children:
        fields = pathlib.Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime, stime: proc(5)
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def _our_loss(name: str, pairs: int):
    import jax
    import jax.numpy as jnp

    from simclr_jax.losses import nt_xent, nt_xent_chunked

    def plain(z, temperature):
        z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
        similarities = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, z @ z.T / temperature)
        partner = jnp.arange(len(z)) ^ 1
        log_p = jax.nn.log_softmax(similarities)
        return -jnp.mean(jnp.take_along_axis(log_p, partner[:, None], 1)), None

    loss = dict(zip(OUR_LOSSES, (nt_xent_chunked, nt_xent, plain), strict=True))[name]
    gradient = jax.jit(jax.value_and_grad(lambda z: loss(z, 0.1), has_aux=True))
    z = jax.random.normal(jax.random.key(0), (2 * pairs, LOSS_WIDTH))
    return lambda: jax.block_until_ready(gradient(z))


def _losses() -> dict:
    import peers

    found = {}
    for pairs in LOSS_PAIRS:
        case = f"NT-Xent of {pairs:,} pairs, forward and backward"
        for name in OUR_LOSSES:
            found[f"{case}, {name}"] = lambda name=name, pairs=pairs: _our_loss(name, pairs)
        for name in ("lightly", "pytorch-metric-learning"):
            found[f"{case}, {name}"] = lambda name=name, pairs=pairs: peers.torch_losses(
                name, pairs, LOSS_WIDTH
            )
    return found


def seconds_each(run, seconds: float = 4.0) -> dict:
    """Measures the median of the seconds that a call takes, and the mean of its CPU seconds."""
    run()
    times: list[float] = []
    began, used = time.perf_counter(), cpu_seconds()
    while not times or time.perf_counter() - began < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(times),
        "cpu_seconds": (cpu_seconds() - used) / len(times),
    }


def _our_step(config: str, options: list[str]):
    import jax

    from simclr_jax.bench.step import simclr_job
    from simclr_jax.config.overrides import load
    from simclr_jax.mesh import make_mesh

    c = load(str(HERE.parent / config), [f"--config.{option}" for option in options])
    job, batch = simclr_job(c, make_mesh())
    held = [job.init()]

    def run():
        held[0], metrics = job.step(held[0], batch)
        jax.block_until_ready((held, metrics))

    return run


def _steps() -> dict:
    import peers

    found = {}
    for dtype in ("float32", "bfloat16"):
        case = f"a step of ResNet-18, 32 px, batch {STEP_IMAGES}, {dtype}"
        found[f"{case}, simclr_jax"] = lambda dtype=dtype: _our_step(
            "configs/cifar10.py",
            ["model.depth=18", f"model.dtype={dtype}", f"data.batch_size={STEP_IMAGES}"],
        )
        found[f"{case}, PyTorch compiled"] = lambda dtype=dtype: peers.torch_step(
            STEP_IMAGES, dtype
        )
    return found


def _gpu_steps() -> dict:
    """Steps on a GPU: none of them runs on CPUs."""
    import peers

    found = {}
    for images in GPU_STEP_IMAGES:
        case = f"a step of ResNet-50, 224 px, batch {images}, bfloat16"
        found[f"{case}, simclr_jax"] = lambda images=images: _our_step(
            "configs/imagenet.py", [f"data.batch_size={images}"]
        )
        found[f"{case}, PyTorch compiled"] = lambda images=images: peers.torch_step(
            images, "bfloat16", depth=50, size=224, device="cuda"
        )
    return found


KINDS = {"input": _inputs, "loss": _losses, "step": _steps, "gpu": _gpu_steps}


def _peak_memory(kind: str, name: str) -> int:
    """Returns the peak memory of the GPU or, for other kinds, of this process, bytes. Does not use getrusage, whose
    maximum begins at the parent's.
    """
    if kind == "gpu" and name.endswith("simclr_jax"):
        import jax

        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    if kind == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def one_turn(kind: str, name: str) -> dict:
    """Measures one thing in this process."""
    if kind == "loss":  # get an error before the machine has to kill a process
        resource.setrlimit(resource.RLIMIT_AS, (_MOST_MEMORY, _MOST_MEMORY))
    if name.endswith(("simclr_jax", *OUR_LOSSES)):
        from simclr_jax.shell import keep_freed_memory

        keep_freed_memory(os.environ)  # as the command does
    thing = KINDS[kind]()[name]()
    if kind == "input":
        return images_rate(thing)
    return seconds_each(thing) | {"peak_memory_bytes": _peak_memory(kind, name)}


def main() -> None:
    """Runs all turns of a kind; `--one` is a turn's own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a turn may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_turn(args.kind, args.one)))
        return
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    machine = f"{os.cpu_count()} cores, {_cpu()}"
    if args.kind == "gpu":
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # PyTorch takes one
        environment |= {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": device}
        machine += f", {_gpu(device)}"
    else:
        environment["JAX_PLATFORMS"] = "cpu"
    names = [name for name in KINDS[args.kind]() if args.only in name]
    if not names:
        parser.error(f"--only={args.only}: there are {', '.join(KINDS[args.kind]())}")
    turns: dict[str, list] = {name: [] for name in names}
    failed: dict[str, str] = {}
    for turn in range(args.turns):
        for name in names:
            if name in failed:
                continue
            command = [sys.executable, __file__, args.kind, "--one", name]
            try:
                result = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=args.timeout
                )
            except subprocess.TimeoutExpired:
                failed[name] = f"took more than {args.timeout:g} s"
                continue
            if result.returncode:
                last = (result.stderr.strip().splitlines() or [f"exit {result.returncode}"])[-1]
                # "Out of memory allocating ...", "you tried to allocate ..."
                full = result.returncode == -9 or "llocat" in last
                failed[name] = "out of memory" if full else last[:200]
                continue
            turns[name].append(json.loads(result.stdout.splitlines()[-1]))
            print(f"turn {turn + 1}, {name}: {turns[name][-1]}", flush=True)
    rows = [
        {"name": name}
        | {key: [turn[key] for turn in done] for key in (done[0] if done else ())}
        | ({"failed": failed[name]} if name in failed else {})
        for name, done in turns.items()
    ]
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    result = {
        "kind": args.kind,
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "versions": versions,
        "rows": rows,
    }
    # Results of --only must not replace those of a whole run.
    of_some = "-" + re.sub(r"\W+", "_", args.only) if args.only else ""
    path = HERE / "results" / f"{args.kind}{of_some}-{result['date']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row)
    print(f"written to {path}")


def _cpu() -> str:
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.split(": ")[1] for x in lines if x.startswith("model name")), platform.machine())


def _gpu(device: str) -> str:
    ask = ["nvidia-smi", "-i", device, "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
