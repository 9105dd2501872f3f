"""Several processes as one run: start-up, on TPU pods and under SLURM without being told."""

import contextlib
import ctypes
import glob
import hashlib
import importlib.util
import math
import os
import pathlib
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import NoReturn

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from simclr_jax.errors import LOST, Unavailable, UserError, one_line
from simclr_jax.files import locked

# Seconds without a heartbeat after which a process counts as dead and the others end too. JAX's default is
# 100; a thread of its own sends the heartbeats, also while a step compiles.
HEARTBEAT_SECONDS = 30

# Seconds a process that is done waits for the others before it gives them up.
_SHUTDOWN_SECONDS = 120

# The status of a command that Ctrl-C has ended: 128 and the number of SIGINT, as a shell has it.
INTERRUPTED = 130

# Seconds after which a process that is done no longer waits for threads of libraries.
_EXIT_SECONDS = 15.0


def keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Lets a process that computes on CPUs keep the memory it frees; does nothing where JAX uses an accelerator or
    the C library is not glibc. Call it before JAX makes its devices.

    XLA allocates the temporaries of a step anew each time, 100 MB and more, and glibc hands such blocks back
    to the system. If they are kept, a step takes 64 instead of 91 ms for ResNet-10 x0.5 at batch 64, and 3.4 instead
    of 4.1 s for ResNet-18 at 32 px and batch 128 (2 cores).
    """
    on_cpu = environment.get("JAX_PLATFORMS") == "cpu" or not (_has_tpu() or _has_gpu())
    if not on_cpu or platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold = -4, -1  # malloc.h; see mallopt(3)
    glibc = ctypes.CDLL(None)
    # Blocks of any size come from the heap, whose end is never given back.
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1)):
        glibc.mallopt(parameter, value)
    # glibc keeps large blocks (over 64 MB) for the main thread only. So let the main thread, which starts a step, also
    # compute it; `start` undoes this if there are several processes. The alternative, one heap for all threads
    # (M_ARENA_MAX=1), makes threads wait for each other: steps of configs/digits.py then take 18 instead of 12 ms,
    # and compiling takes 7 instead of 5 s.
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def start(coordinator: str | None, count: int | None, index: int | None) -> None:
    """Joins the processes of this run, if there are several. Call it before anything uses a device.

    Args:
      coordinator: "HOST:PORT" where process 0 listens; None: JAX finds it out on a Cloud TPU VM and under SLURM.
      count: how many processes there are; given together with `coordinator`.
      index: number of this process, from 0; given together with `coordinator`.

    Raises:
      UserError: only some of the three arguments are given, or the other processes cannot be reached.
    """
    given = [x is not None for x in (coordinator, count, index)]
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes and --process go together: give all or none")
    if not any(given) and not is_one_of_many(os.environ, _has_tpu()):
        return
    if not any(given) and (tasks := _tasks_of_slurm(os.environ)) > 1:
        print(
            f"waiting for the {tasks} processes of SLURM's step; if this is the only one, unset "
            "SLURM_STEP_NODELIST",
            file=sys.stderr,
            flush=True,
        )
    # With synchronous dispatch a lost peer raises a ValueError on CPUs, which `end` would take for a user's mistake.
    jax.config.update("jax_cpu_enable_async_dispatch", True)
    # SIGTERM is ours, see stopping.py; JAX's own service would swallow it until then.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            local_device_ids=own_devices(os.environ),
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the processes of this run: {' '.join(str(error).split())}"
        ) from error


def is_one_of_many(environment: Mapping[str, str], has_tpu: bool) -> bool:
    """Whether this process may be one of several that JAX can find by itself."""
    if environment.get("JAX_PLATFORMS", "tpu") != "cpu" and has_tpu:
        return True  # the VM's metadata say how many hosts there are, even if only one
    return _tasks_of_slurm(environment) > 1


def _tasks_of_slurm(environment: Mapping[str, str]) -> int:
    """Counts the processes of the step that srun started. Returns 1 for a batch script's own process, which is in no
    step, and for an interactive shell, whose step has one task however many its job has.
    """
    if "SLURM_STEP_NODELIST" not in environment:
        return 1
    job = environment.get("SLURM_NTASKS", "1")
    return int(environment.get("SLURM_STEP_NUM_TASKS", job))


def own_devices(environment: Mapping[str, str]) -> list[int] | None:
    """Returns which of the GPUs that this process sees are its own under SLURM. None: JAX's default, which gives the
    i-th process of a node the i-th GPU. That fails if each process sees only its own GPU (`--gpus-per-task`;
    jax-ml/jax#28194) or has several (jax-ml/jax#16788).
    """
    seen = [x for x in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    if _tasks_of_slurm(environment) == 1 or not seen:
        return None
    one_a_node = re.fullmatch(r"1(\(x\d+\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return list(range(len(seen))) if len(seen) == 1 or one_a_node else None


def _has_tpu() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _has_gpu() -> bool:
    return bool(glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/kfd"))


def end(error: Exception) -> NoReturn:
    """Reports an error of this process, and ends it so that the others end too, in bounded time.

    If another process is gone, this process only sees that a step failed. JAX finds out which one is gone when its
    heartbeat is overdue, names it and ends every process: this function waits for that.
    """
    reason = one_line(error)
    me = f"error: process {jax.process_index()} of {jax.process_count()}: "
    if isinstance(error, UserError):
        seconds = 2.0  # let every process report: all may have the same error
        status = LOST if isinstance(error, Unavailable) else 1
        print(me + reason, file=sys.stderr, flush=True)
    else:
        lost = isinstance(error, jax.errors.JaxRuntimeError)
        seconds, status = 1.5 * HEARTBEAT_SECONDS, LOST if lost else 1
        print(
            f"{me}the step failed ({reason[:300]}). If another process ended, its number follows within "
            f"{HEARTBEAT_SECONDS} s. The same command goes on from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
    if status == 1 and (mark := os.environ.get("SIMCLR_MISTAKE")):
        with contextlib.suppress(OSError):  # tells the launcher, which sees only how the others end
            pathlib.Path(mark).touch()
    time.sleep(seconds)
    os._exit(status)  # an orderly exit would wait for the others, who wait for this one


def exit_now(status: int) -> NoReturn:
    """Skips Python's orderly exit, which crashed in 3 of 10 commands after a Ctrl-C while compiling."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_within(status: object, seconds: float = _EXIT_SECONDS) -> None:
    """Ends the process by force if its exit takes too long, for instance because it waits for a library's threads.

    Args:
      status: the code of the SystemExit; a text counts as 1.
      seconds: how long the exit may take, not counting the time in which several processes wait for each other.
    """
    several = _SHUTDOWN_SECONDS if jax.distributed.is_initialized() else 0
    code = status if isinstance(status, int) else int(status is not None)

    def end_late():
        time.sleep(seconds + several)
        os._exit(code)

    threading.Thread(target=end_late, daemon=True, name="exit").start()
    # That thread needs Python's global lock. If a library holds it, SIGALRM ends the process 2 s later.
    signal.alarm(math.ceil(seconds + several) + 2)


def end_interrupted(_number: int, _frame: object) -> NoReturn:
    """Handles SIGINT as Python does, but in bounded time: in 2 of 55 commands Python waited for ever for an
    interrupted tf.data iterator.
    """
    exit_within(INTERRUPTED)
    raise KeyboardInterrupt


@contextlib.contextmanager
def alone(folder: epath.PathLike, advice: str) -> Iterator[None]:
    """Keeps other programs from writing into a folder while the block runs; process 0 takes the
    lock for all. The arguments and errors are those of `files.locked`.
    """
    with locked(folder, advice) if jax.process_index() == 0 else contextlib.nullcontext():
        yield


def as_first_process_says(number: int) -> int:
    """Returns process 0's `number` on every process; all processes must call this together."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def that_differ(text: str) -> list[int]:
    """Lists the processes whose `text` differs from process 0's; all processes must call this together."""
    if jax.process_count() == 1:
        return []
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # As int32, because JAX would cut 64-bit numbers to 32 bits.
    texts = multihost_utils.process_allgather(np.frombuffer(digest, np.int32))
    return np.flatnonzero((texts != texts[0]).any(axis=1)).tolist()
