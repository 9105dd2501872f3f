"""A command of the shell: its exit status, its errors in one line, Ctrl-C, and what its process keeps."""

import argparse
import ctypes
import io
import logging
import math
import os
import platform
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, MutableMapping
from typing import NoReturn

import jax

from simclr_jax import processes
from simclr_jax.errors import LOST, Stopped, Unavailable, UserError, near_names
from simclr_jax.files import cache_folder, storage_error

# Exit status of a command that a signal has stopped. The same command resumes from there, so a launcher must not
# take it for finished. EX_TEMPFAIL of sysexits.h.
STOPPED = 75

# The status of a command that Ctrl-C has ended: 128 and the number of SIGINT, as a shell has it.
INTERRUPTED = 130

# Seconds after which a process that is done no longer waits for threads of libraries.
_EXIT_SECONDS = 15.0


class Parser(argparse.ArgumentParser):
    """Reads flags, and says in one line what is wrong with them, as for every other mistake."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help names all flags and modes")

    def parse_with_options(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """Returns the parser's flags, and the rest, which `config.overrides.load` reads. Raises a UserError for a flag
        that is neither the parser's nor an option.
        """
        found, rest = self.parse_known_args(arguments)
        flags = [flag for action in self._actions for flag in action.option_strings]
        for text in rest:
            if text.startswith("--") and not text.startswith("--config."):
                hint = near_names(text.partition("=")[0], flags)
                raise UserError(
                    f"unknown argument {text!r}: options are given as --config.NAME=VALUE{hint}"
                )
        return found, rest


def run(command: Callable[[list[str]], None]) -> None:
    """Runs a command with the arguments that the shell gave, and ends the process with its exit status."""
    mend_unraisable()
    # The name of a file may have characters that a terminal lacks.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Only where SIGINT has Python's own handler: a job in the background ignores it, and is to go on ignoring it.
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, end_interrupted)
    status: object = 1  # if any exception but SystemExit ends the command
    try:
        call(command, sys.argv[1:])
        status = 0
    except SystemExit as ended:
        status = ended.code
        if status == INTERRUPTED:
            exit_now(status)
        raise
    finally:
        exit_within(status)


def call(command: Callable[[list[str]], None], arguments: list[str]) -> None:
    """Calls a command and turns its exceptions into one line and an exit status: 1 for a user's mistake, 69 (`LOST`)
    where a device, a storage or another process does not answer, 75 (`STOPPED`) for a training that a signal has stopped, and
    130 (`INTERRUPTED`) for Ctrl-C.
    """
    settle_tensorflow(os.environ)
    keep_freed_memory(os.environ)
    try:
        command(arguments)
    except Stopped:  # the training has said so
        sys.exit(STOPPED)
    except Exception as raised:
        error = raised
        if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
            error = UserError(_out_of_memory(error))
        error = _without_tensorflow(error) or _not_allowed(error) or storage_error(error) or error
        if jax.distributed.is_initialized():
            if not isinstance(error, UserError | jax.errors.JaxRuntimeError):
                traceback.print_exc()
            processes.end(error)
        if isinstance(error, jax.errors.JaxRuntimeError):  # a device failed
            traceback.print_exc()
            sys.exit(LOST)
        if not isinstance(error, UserError):
            raise
        if isinstance(error, Unavailable):
            print(f"error: {error}", file=sys.stderr)
            sys.exit(LOST)
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        text = "interrupted: the same command resumes a training or an embedding"
        print(text, file=sys.stderr)
        sys.exit(INTERRUPTED)


def _without_tensorflow(error: Exception) -> UserError | None:
    """Returns what to do where TensorFlow or TFDS is not installed; None: the error is another."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    if error.name.partition(".")[0] not in ("tensorflow", "tensorflow_datasets"):
        return None
    return UserError(
        f"the package {error.name} is not installed, which reads images and makes views on the host: install "
        "tensorflow and tensorflow-datasets; images in an .npz file need neither with data.placement=device"
    )


def _not_allowed(error: Exception) -> UserError | None:
    """Returns what to do about a local file that may not be read or written; None: the error is another."""
    if not isinstance(error, PermissionError) or not isinstance(error.filename, str):
        return None
    return UserError(
        f"{error.filename}: {error.strerror}: ask its owner for permission, or set it with chmod"
    )


def settle_tensorflow(environment: MutableMapping[str, str]) -> None:
    """Sets how TensorFlow logs and computes, which it reads from the environment when it is imported."""
    # Hides its own log below fatal errors: what matters comes as an exception, which is reported once.
    # Importing JAX sets "1".
    if environment.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
    # Its plain kernels instead of oneDNN's, for the same numbers on every CPU, from the shell and from Python.
    environment.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def _out_of_memory(error: Exception) -> str:
    wanted = re.search(r"allocat\w* (\d[\w.]*(?: ?[KMG]i?B| bytes)?)", str(error))
    return (
        "out of memory"
        + (f" while allocating {wanted[1]}" if wanted else "")
        + ": train.microbatches=4 needs about a quarter of the activations' memory, model.remat=True "
        "keeps fewer of them for one more forward pass, mesh.fsdp divides the parameters, and a smaller "
        "data.batch_size or eval.batch_size needs less of all; --mode=explain says how much. eval.baselines=False leaves out "
        "the untrained encoder, which takes 512 images at once"
    )


def mend_unraisable() -> None:
    """Hides the pages that Orbax's threads write when a disk is full, because `call` reports that in one line.
    Also repeats a Ctrl-C that came where Python ignores exceptions, such as in JAX's garbage-collector callback.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    show = sys.unraisablehook

    def show_others(unraisable) -> None:
        if isinstance(unraisable.exc_value, KeyboardInterrupt):
            main_thread = threading.main_thread().ident
            # Later, as it would be ignored here.
            again = threading.Timer(0.1, signal.pthread_kill, [main_thread, signal.SIGINT])
            again.daemon = True
            again.start()
        elif str(unraisable.exc_value) != "Event loop is closed":  # raised by an abandoned save
            show(unraisable)

    sys.unraisablehook = show_others


def end_interrupted(_number: int, _frame: object) -> NoReturn:
    """Handles SIGINT as Python does, but in bounded time: in 2 of 55 commands Python waited for ever for an
    interrupted tf.data iterator.
    """
    exit_within(INTERRUPTED)
    raise KeyboardInterrupt


def exit_now(status: int) -> NoReturn:
    """Skips Python's orderly exit, which crashed in 3 of 10 commands after a Ctrl-C while compiling."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def exit_within(status: object, seconds: float = _EXIT_SECONDS) -> None:
    """Arms a timer that ends the process by force if it still runs after `seconds`, for instance because its exit waits
    for a library's threads; returns at once. Takes over SIGALRM.

    Args:
      status: the code of the SystemExit; a text counts as 1.
      seconds: how long the exit may take, not counting the time in which several processes wait for each other.
    """
    several = processes.SHUTDOWN_SECONDS if jax.distributed.is_initialized() else 0
    code = status if isinstance(status, int) else int(status is not None)

    def end_late():
        time.sleep(seconds + several)
        os._exit(code)

    threading.Thread(target=end_late, daemon=True, name="exit").start()
    # That thread needs Python's global lock. If a library holds it, SIGALRM ends the process 2 s later.
    signal.alarm(math.ceil(seconds + several) + 2)


def keep_compiled_programs() -> None:
    """Keeps compiled programs across runs: compiled once for each machine and version."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # By default JAX keeps only programs that took 1 s to compile; a run has some ten of 0.2 to 0.9 s, 2 to 3 s in
        # all.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def keep_freed_memory(environment: Mapping[str, str]) -> None:
    """Lets a process that computes on CPUs keep the memory it frees; does nothing where JAX uses an accelerator or
    the C library is not glibc. Call it before JAX makes its devices.

    XLA allocates the temporaries of a step anew each time, 100 MB and more, and glibc hands such blocks back
    to the system. If they are kept, a step takes 64 instead of 91 ms for ResNet-10 x0.5 at batch 64, and 3.4 instead
    of 4.1 s for ResNet-18 at 32 px and batch 128 (2 cores).
    """
    on_cpu = environment.get("JAX_PLATFORMS") == "cpu" or not (
        processes.has_tpu() or processes.has_gpu()
    )
    if not on_cpu or platform.libc_ver()[0] != "glibc":
        return
    mmap_max, trim_threshold = -4, -1  # malloc.h; see mallopt(3)
    glibc = ctypes.CDLL(None)
    # Blocks of any size come from the heap, whose end is never given back.
    for parameter, value in ((mmap_max, 0), (trim_threshold, -1)):
        glibc.mallopt(parameter, value)
    # glibc keeps large blocks (over 64 MB) for the main thread only. So let the main thread, which starts a step, also
    # compute it; `processes.start` undoes this if there are several processes. The alternative, one heap for all threads
    # (M_ARENA_MAX=1), makes threads wait for each other: steps of configs/digits.py then take 18 instead of 12 ms,
    # and compiling takes 7 instead of 5 s.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
