"""Several processes as one run: start-up, on TPU pods and under SLURM without being told."""

import contextlib
import glob
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
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

# A network file system may hide for this long from one host what another has written: Linux keeps for up to 60 s that
# a file was not there (nfs(5), acdirmax).
_SEEN_WITHIN_SECONDS = 90.0

# Seconds in which all processes must have joined: hosts of another slice, or images of containers, may come late.
_ALL_HERE_WITHIN_SECONDS = 1800

# Seconds a process that is done waits for the others before it gives them up.
SHUTDOWN_SECONDS = 120


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
    if not any(given) and not is_one_of_many(os.environ, has_tpu()):
        return
    if not any(given) and (tasks := _tasks_of_slurm(os.environ)) > 1:
        print(
            f"waiting for the {tasks} processes of SLURM's step; if this is the only one, unset "
            "SLURM_STEP_NODELIST",
            file=sys.stderr,
            flush=True,
        )
    if coordinator:
        print(
            f"process {index} of {count}: waiting up to {_ALL_HERE_WITHIN_SECONDS // 60} minutes for all at {coordinator}",
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
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
            initialization_timeout=_ALL_HERE_WITHIN_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot join the processes of this run: {' '.join(str(error).split())}"
        ) from error


def is_one_of_many(environment: Mapping[str, str], tpu: bool) -> bool:
    """Returns whether this process may be one of several that JAX can find by itself."""
    if environment.get("JAX_PLATFORMS", "tpu") != "cpu" and tpu:
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


def has_tpu() -> bool:
    chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def has_gpu() -> bool:
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
            f"{HEARTBEAT_SECONDS} s. The same command resumes from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
    if status == 1 and (mark := os.environ.get("SIMCLR_MISTAKE")):
        with contextlib.suppress(OSError):  # tells the launcher, which sees only how the others end
            pathlib.Path(mark).touch()
    time.sleep(seconds)
    os._exit(status)  # an orderly exit would wait for the others, who wait for this one


@contextlib.contextmanager
def alone(folder: epath.PathLike, advice: str) -> Iterator[None]:
    """Keeps other programs from writing into a folder while the block runs; process 0 takes the
    lock for all. The arguments and errors are those of `files.locked`.
    """
    with locked(folder, advice) if jax.process_index() == 0 else contextlib.nullcontext():
        yield


def wait_for_all(why: str) -> None:
    """Returns once every process has come here; `why` says in an error of JAX what they waited for."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(why)


def of_all(number: float) -> list[float]:
    """Returns the number of each process; all processes must call this together."""
    if jax.process_count() == 1:
        return [number]
    return multihost_utils.process_allgather(np.float32(number)).tolist()


def as_first_process_says(number: int) -> int:
    """Returns process 0's `number` on every process; all processes must call this together."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def text_of_first(text: str | None) -> str | None:
    """Returns process 0's `text`, or None, on every process; all processes must call this together.

    For what lies in files: a network file system may hide for a minute from one host what another has written.
    """
    if jax.process_count() == 1:
        return text
    content = (text or "").encode()
    length = as_first_process_says(-1 if text is None else len(content))
    if length < 0:
        return None
    buffer = np.zeros(max(1, length), np.uint8)
    if jax.process_index() == 0:
        buffer[:length] = np.frombuffer(content, np.uint8)
    return multihost_utils.broadcast_one_to_all(buffer)[:length].tobytes().decode()


def wait_until_all_see(what: str, see: Callable[[], bool]) -> None:
    """Returns once every process sees what process 0 has; all processes must call this together.

    Args:
      what: the file or folder, for the message.
      see: returns whether this process sees it.

    Raises:
      UserError: a process does not see it for longer than a network file system needs.
    """
    until = time.monotonic() + _SEEN_WITHIN_SECONDS
    while blind := [i for i, seen in enumerate(of_all(see())) if not seen]:
        if as_first_process_says(time.monotonic() > until):
            raise UserError(
                f"processes {', '.join(map(str, blind))} do not see {what}: expected a folder that all processes "
                "share"
            )
        time.sleep(1.0)


def check_alike(found: Mapping[str, str]) -> None:
    """Raises a UserError, on all processes, if one of these values differs from process 0's; all must call this together.

    Args:
      found: {what it is, in a message: its value}.
    """
    text = json.dumps(found)
    differ = that_differ(text)
    if not differ:
        return
    of_first = json.loads(text_of_first(text) or "{}")
    here = [
        f"{what} is {found.get(what, 'not there')[:100]} here and {of_first.get(what, 'not there')[:100]} there"
        for what in sorted({*found, *of_first})
        if found.get(what) != of_first.get(what)
    ]
    more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
    raise UserError(
        f"processes {', '.join(map(str, differ[:5]))}{more} have other options or another program than process 0"
        + (f" ({'; '.join(here)})" if here else "")
        + ": expected one command, and one state of the program, on all of them"
    )


def that_differ(text: str) -> list[int]:
    """Lists the processes whose `text` differs from process 0's; all processes must call this together."""
    if jax.process_count() == 1:
        return []
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    # As int32, because JAX would cut 64-bit numbers to 32 bits.
    texts = multihost_utils.process_allgather(np.frombuffer(digest, np.int32))
    return np.flatnonzero((texts != texts[0]).any(axis=1)).tolist()
