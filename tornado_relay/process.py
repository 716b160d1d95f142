"""One forked worker, from its fork to its exit status."""

from __future__ import annotations

import logging
import mmap
import os
import signal
import struct
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

log = logging.getLogger(__name__)

# What the supervisor handles by itself; a worker starts with the defaults.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD)

# A loop that has not turned for this long is stuck.
STUCK_SECONDS = 15.0
START_SECONDS = 60.0
# What a worker gets beyond its drain before it is killed.
GRACE_SECONDS = 5.0

Run = Callable[[Callable[[], None], Callable[[str], None]], int]


class Process:
    """
    A worker, as its parent sees it.

    Args:
        run: Called in the child with ``beat``, by which the loop shows that it turns, and ``report``, which
            takes an empty text once it serves or else the reason why not; returns the exit status.
        close: What the child must not keep open: the listening sockets of others, their pipes.
        drain_seconds: How long it may take to end.

    Raises:
        OSError: If there can be no more processes.

    """

    def __init__(self, run: Run, close: Iterable[Callable[[], None]], drain_seconds: float) -> None:
        self.drain_seconds = drain_seconds
        self.started = time.monotonic()
        self.ready = False
        # Whether it is killed for a loop that does not turn.
        self.stuck = False
        # Where it counts its streams, see `limits.Tally`.
        self.row = -1
        # Why it cannot serve, in its own words.
        self.trouble = ""
        # When it was told to end.
        self.leaving_since: float | None = None
        # Shared with it: when its loop last turned.
        self._pulse = mmap.mmap(-1, 8)
        struct.pack_into("d", self._pulse, 0, self.started)
        # Here it says, once, that it serves, or why it cannot; -1 after that.
        self.pipe, write = os.pipe()
        # A signal for the child must not be written to the parent's wakeup pipe, which it has until then.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            self.pid = os.fork()
            if self.pid == 0:
                self._become_worker(run, write, close)
        except OSError:
            self.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.close(write)

    def read_report(self) -> None:
        """Take in what it has reported; an end of file without a word is left to its exit status."""
        told = os.read(self.pipe, 4096).decode()
        os.close(self.pipe)
        self.pipe = -1
        self.ready = told == "ready"
        self.trouble = "" if self.ready else told

    def dismiss(self, number: signal.Signals) -> None:
        """Tell it to end: by SIGTERM once, by SIGINT also when it is ending already."""
        if self.leaving_since is None or number == signal.SIGINT:
            self.leaving_since = self.leaving_since or time.monotonic()
            self.send(number)

    def overdue(self, now: float, steady_since: float) -> str | None:
        """
        Return why it should be killed, if it should.

        Before ``steady_since`` the parent itself stood still, so nothing of that time counts.
        """
        if (
            self.leaving_since is not None
            and now - max(self.leaving_since, steady_since) > self.drain_seconds + GRACE_SECONDS
        ):
            return "does not end"
        silent = now - max(struct.unpack_from("d", self._pulse)[0], steady_since)
        if silent > (STUCK_SECONDS if self.ready else START_SECONDS):
            return f"is stuck for {silent:.0f} s"
        return None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        try:
            os.kill(self.pid, number)
        except ProcessLookupError:
            pass  # it ended by itself; its parent will hear of it

    def close(self) -> None:
        """Let go of what was shared with it."""
        self._pulse.close()
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1

    def _become_worker(self, run: Run, pipe: int, close: Iterable[Callable[[], None]]) -> NoReturn:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            os.close(self.pipe)
            for each in close:
                each()

            def beat() -> None:
                struct.pack_into("d", self._pulse, 0, time.monotonic())

            def report(trouble: str) -> None:
                os.write(pipe, (trouble or "ready").encode()[:4096])
                os.close(pipe)

            status = run(beat, report)
        except BaseException:
            log.critical("a worker failed", exc_info=True)
        finally:
            logging.shutdown()
            os._exit(status)


def died(status: int) -> str:
    """Return how a process ended, by its exit status as `os.waitstatus_to_exitcode` gives it."""
    if status < 0:
        known = {number.value: number.name for number in signal.Signals}
        return f"was ended by {known.get(-status, f'signal {-status}')}"
    return f"ended with status {status}"
