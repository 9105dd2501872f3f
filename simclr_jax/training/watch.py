"""A training that makes no progress is ended, with what every process was doing.

A process that dies is noticed by its heartbeats; one that is stuck (a data source that never answers, a
deadlock, a process that was stopped) keeps sending them, and all others wait for it for ever.
"""

import contextlib
import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

import jax
from etils import epath

from simclr_jax.errors import LOST
from simclr_jax.training.log import STEPS_AHEAD

# The limit is this many times longer where storage may be slow: while a checkpoint is written, while the first images
# are read, and in the steps after a save or an evaluation, with which other processes may still be busy.
_SLOW = 10
# Seconds that a process which gives up waits for what the others have to say.
_LISTENING = 5.0
# Seconds that writing and listening may take in all.
_WRITING = 30.0

_UNTIL_DONE = "evaluating", "compiling"  # may take any time


class Watch:
    """Ends the process if no step comes for some seconds; a context manager that begins when the first step has a result.

    Seconds count only while this process itself runs: one that is stopped and goes on later is not late.
    Before the end each process writes WORKDIR/hung/process_I.json and the Python stacks of its threads,
    process_I.txt.
    """

    def __init__(self, workdir: str, seconds: float, end: Callable[[], None] | None = None):
        """Watches nothing yet.

        Args:
          workdir: where to write.
          seconds: the process is ended after this many seconds without a step; 0: never.
          end: ends the process; None: with exit status `errors.LOST`, at once, as an orderly exit would wait
            for what is stuck.
        """
        self._folder = epath.Path(workdir) / "hung"
        self._seconds, self._end = seconds, end or (lambda: os._exit(LOST))
        self._step, self._doing, self._waited = 0, "compiling", 0.0
        self._beats, self._eased = 0, 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True, name="watch")

    def __enter__(self) -> Self:
        if self._seconds:
            with contextlib.suppress(OSError):  # of an earlier time
                self._file("json").unlink(missing_ok=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def beat(self, step: int) -> None:
        """Says that the loop has come past `step`."""
        self._beats += 1
        self._eased = max(0, self._eased - 1)
        self._step, self._waited = step, 0.0
        if self._beats > STEPS_AHEAD:
            self._doing = "between steps"

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Names what the loop does in the block: "input", "computing", "saving" or "evaluating"."""
        before = self._doing
        if before == "compiling" and what != "input":  # the first step compiles
            yield
            return
        if what in ("saving", "evaluating") or not self._beats:
            self._eased = STEPS_AHEAD + 1
        self._waited, self._doing = 0.0, what
        yield
        self._waited, self._doing = 0.0, before

    def _look(self) -> None:
        pause = min(5.0, self._seconds / 10)
        while not self._over.wait(pause):
            self._waited += pause
            slow = self._doing == "saving" or self._eased
            limit = self._seconds * (_SLOW if slow else 1)
            if self._doing not in _UNTIL_DONE and self._waited > limit:
                self._give_up()
                return

    def _give_up(self) -> None:
        me, count = jax.process_index(), jax.process_count()
        said = {"process": me, "step": self._step, "doing": self._doing}
        late: list[str] = []

        def write_and_ask() -> None:
            with contextlib.suppress(Exception):
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file("txt").write_text(_stacks())
                self._file("json").write_text(json.dumps(said))
            late.append(self._who_is_late(count))

        # In its own thread: a stuck storage may be the reason, and must not keep the process from ending.
        asking = threading.Thread(target=write_and_ask, daemon=True)
        asking.start()
        asking.join(timeout=_WRITING)
        about = late[0] if late else f"; {self._folder} cannot be written"
        print(
            f"error: process {me} of {count}: no progress for {self._waited:.0f} s ({self._doing}, after step "
            f"{self._step}; train.hang_seconds={self._seconds:g}){about}. Stacks: "
            f"{self._folder}. The same command resumes from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        self._end()

    def _file(self, kind: str) -> epath.Path:
        return self._folder / f"process_{jax.process_index()}.{kind}"

    def _who_is_late(self, count: int) -> str:
        """Returns which of several processes the others wait for, as far as can be told."""
        if count == 1:
            return ""
        time.sleep(min(_LISTENING, self._seconds))
        heard = {}
        for process in range(count):
            with contextlib.suppress(Exception):
                heard[process] = json.loads((self._folder / f"process_{process}.json").read_text())
        return late_of(heard, count)


def late_of(heard: dict[int, dict], count: int) -> str:
    """Says which processes keep the others waiting, "; process 1 says nothing".

    Args:
      heard: process -> {"step", "doing"} of those that could say it.
      count: how many processes there are.
    """
    silent = [str(process) for process in range(count) if process not in heard]
    if silent:
        return (
            f"; process {', '.join(silent)} says nothing: it is stopped, stuck or cannot write here"
        )
    # A process in the step waits for the devices of the others, so a process that is elsewhere is the late one.
    late = [p for p, said in heard.items() if said["doing"] != "computing"]
    if not late:
        first = min(said["step"] for said in heard.values())
        late = [p for p, said in heard.items() if said["step"] == first]
    if len(late) == count:
        return "; all processes are at one place"
    where = [f"process {p} ({heard[p]['doing']} after step {heard[p]['step']})" for p in late]
    return f"; the others wait for {', '.join(where)}"


def _stacks() -> str:
    """Returns the Python stacks of all threads."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
