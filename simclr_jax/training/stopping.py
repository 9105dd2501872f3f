"""Turns SIGTERM, SIGINT and SIGHUP into a stop at the end of a step, the same step on all processes."""

import collections
import os
import signal
import threading
import time
from collections.abc import Callable, Container
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simclr_jax.console import say
from simclr_jax.mesh import replicated, to_global

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# Steps after which the processes' wishes are read, so that no step waits for them.
_STEPS_LATE = 2


# A terminal's Ctrl-C and a launcher that passes it on are one wish, not two.
_SAME_WISH_SECONDS = 2.0


_STOPPING = "stopping    after the step that is under way, and a save"


class Stop:
    """Takes note of the first signal; a second one, seconds later, gets the handling it had before.

    A context manager. Python delivers signals only to the main thread: in another thread, a Stop only
    follows the other processes.
    """

    def __init__(self, mesh: Mesh):
        """Starts without a wish. The processes agree over `mesh`, which holds all devices."""
        self._mesh = mesh
        self._wished, self._since, self._number = False, 0.0, 0
        self._ends: Callable[[], None] | None = None
        self._pending: collections.deque[jax.Array] = collections.deque()
        self._any = jax.jit(jnp.any, out_shardings=replicated(mesh))

    def __enter__(self) -> Self:
        main = threading.current_thread() is threading.main_thread()
        numbers = set(_SIGNALS if main else ())
        # Ignored before: SIGHUP under nohup, to go on without the terminal; SIGINT in a script's background job.
        for number in (signal.SIGHUP, signal.SIGINT):
            if signal.getsignal(number) == signal.SIG_IGN:
                numbers.discard(number)
        self._terminals = [fd for fd in (1, 2) if os.isatty(fd)]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        self._ends = _tell_of({signal.SIGTERM, signal.SIGINT} & numbers) if main else None
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._ends is not None:
            self._ends()
            self._ends = None

    def _note(self, number: int, _) -> None:
        if number == signal.SIGHUP:
            self._leave_terminals()
        if not self._wished:
            self._wished, self._since, self._number = True, time.monotonic(), number
        elif time.monotonic() - self._since > _SAME_WISH_SECONDS:
            self.__exit__()
            os.kill(os.getpid(), number)

    def _leave_terminals(self) -> None:
        """Redirects output for the terminal to os.devnull: the terminal is gone, and each write would fail."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for terminal in self._terminals:
            os.dup2(nowhere, terminal)
        os.close(nowhere)

    def pass_on(self) -> None:
        """Delivers the signal, if there was one, to the handler that was there before: call it once the
        training has ended, as a signal in its last step is meant for what comes after it. With several processes
        the signal is not delivered: the processes without a signal would wait for this one for ever.
        """
        if self._wished and _wishes_are_passed_on():
            os.kill(os.getpid(), self._number)

    def now(self) -> bool:
        """Returns whether to stop after this step, the same on all processes. Call it once a step."""
        if jax.process_count() == 1:
            return self._wished
        mine = np.full(jax.local_device_count(), self._wished)
        self._pending.append(self._any(to_global(self._mesh, mine)))
        return len(self._pending) > _STEPS_LATE and bool(self._pending.popleft())


def _tell_of(numbers: Container[int]) -> Callable[[], None]:
    """Starts a thread that says of the first of these signals what comes of it; returns what ends it. A handler in Python
    waits for the main thread, which may be compiling for a minute.
    """
    told, arriving = os.pipe()
    os.set_blocking(arriving, False)
    before = signal.set_wakeup_fd(arriving, warn_on_full_buffer=False)

    def tell() -> None:
        said = False
        with os.fdopen(told, "rb", buffering=0) as signals:
            while number := signals.read(1):  # b"" at the end
                if number[0] in numbers and not said:
                    said = True
                    say(_STOPPING)

    def end() -> None:
        signal.set_wakeup_fd(before)
        os.close(arriving)

    threading.Thread(target=tell, daemon=True, name="stopping").start()
    return end


def _wishes_are_passed_on() -> bool:
    return jax.process_count() == 1
