"""One forked worker, from its fork to its exit status, and its place among the others."""

from __future__ import annotations

import dataclasses
import fcntl
import logging
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import NoReturn

from .brokers.backoff import Backoff

try:
    import ctypes

    _prctl: Callable[[int, ctypes.c_ulong], int] | None = ctypes.CDLL(None).prctl
except (ImportError, OSError, AttributeError):  # then a worker finds out by itself, a second later
    _prctl = None

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1

# Signals that end a process by default and mean nothing to a relay: it ignores them. SIGPIPE and SIGXFSZ are ignored by
# Python. Those of a fault (SIGSEGV) or of a limit that somebody has set (SIGXCPU) do what they always do.
STRAY = (
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGIO, signal.SIGPWR),
    *filter(None, [getattr(signal, "SIGSTKFLT", None)]),  # Python 3.10 does not name it
    *range(signal.SIGRTMIN, signal.SIGRTMAX + 1),
)
# What the supervisor handles by itself; a worker starts with the defaults, but ignores the stray ones as well.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD, *STRAY)

# A loop that has not turned for this long is stuck.
STUCK_SECONDS = 15.0
START_SECONDS = 60.0
# What a worker gets beyond its drain before it is killed.
GRACE_SECONDS = 5.0

# The most of a report that a parent reads. A report of this version is one atomic write, another version may do otherwise.
MAX_REPORT = 65_536
_CUT = " [...] "


class Report:
    """
    Says once how a start went: an empty text is that the worker serves, another one is why it cannot.

    Args:
        pipe: Where its parent reads.

    """

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def __call__(self, trouble: str) -> None:
        """Say it; of a text that is too long for one atomic write (pipe(7)) the beginning and the end."""
        data = (trouble or "ready").encode(errors="backslashreplace")
        if len(data) > select.PIPE_BUF:
            half = (select.PIPE_BUF - len(_CUT)) // 2
            # A letter that the cut goes through is left out.
            parts = (part.decode(errors="ignore") for part in (data[:half], data[-half:]))
            data = _CUT.join(parts).encode()
        os.write(self.pipe, data)
        os.close(self.pipe)


Run = Callable[[Callable[[], None], Report], int]
"""What a worker does: called with ``beat``, by which its loop shows that it turns; returns the exit status."""


class Process:
    """
    A worker, as its parent sees it; `fork` makes one.

    Args:
        pulse: A memfd (memfd_create(2)) that is shared with it: when its loop last turned.
        pipe: Here it says, once, that it serves, or why it cannot; -1 after that.
        drain_seconds: How long it may take to end.
        row: Where it counts its streams, see `limits.Tally`.
        pid: Its process id, if it has been there before this parent was.

    """

    def __init__(self, pulse: int, pipe: int, drain_seconds: float, row: int, pid: int = 0) -> None:
        self.pid = pid
        self.pulse = pulse
        self.pipe = pipe
        self.drain_seconds = drain_seconds
        self.row = row
        self.started = time.monotonic()
        self.ready = pid > 0 and pipe < 0
        # Whether it is killed for a loop that does not turn.
        self.stuck = False
        # Why it cannot serve, in its own words.
        self.trouble = ""
        # When it was told to end.
        self.leaving_since: float | None = None
        self._memory = mmap.mmap(pulse, 8)
        self._told = b""
        if pipe >= 0:
            # Another process may hold the other end, so even the end of a report must not be waited for.
            os.set_blocking(pipe, False)

    def beat(self) -> None:
        """Note that the loop turns."""
        struct.pack_into("d", self._memory, 0, time.monotonic())

    def read_report(self, *, ended: bool = False) -> None:
        """
        Take in what it has reported so far. The report is complete at the end of file, or if the process has ``ended``.

        The bytes are the child's: any are allowed. No word at all is left to its exit status.
        """
        try:
            piece = os.read(self.pipe, MAX_REPORT)
        except BlockingIOError:
            piece = None
        except OSError:
            piece = b""
        self._told += piece or b""
        if piece == b"" or ended or len(self._told) > MAX_REPORT:
            os.close(self.pipe)
            self.pipe = -1
            self.ready = self._told == b"ready"
            self.trouble = "" if self.ready else self._told.decode(errors="replace")

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
        silent = now - max(struct.unpack_from("d", self._memory)[0], steady_since)
        if silent > (STUCK_SECONDS if self.ready else START_SECONDS):
            return f"is stuck for {silent:.0f} s"
        return None

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        try:
            os.kill(self.pid, number)
        except OSError:
            pass  # it ended by itself, and its parent will hear of it; or it runs as somebody else, and nothing helps

    def close(self) -> None:
        """Let go of what was shared with it."""
        self._memory.close()
        os.close(self.pulse)
        if self.pipe >= 0:
            os.close(self.pipe)
            self.pipe = -1


@dataclasses.dataclass(eq=False)
class Slot:
    """The place of one worker: its listening sockets, and who accepts on them."""

    number: int
    sockets: list[socket.socket]
    current: Process | None = None
    """The worker that serves; during a reload it goes on until `replacement` serves."""
    replacement: Process | None = None
    backoff: Backoff = dataclasses.field(default_factory=lambda: Backoff(0.1, 30.0))
    due: float | None = 0.0
    """When to start the next worker, while there is none."""


def fork(run: Run, close: Iterable[Callable[[], None]], drain_seconds: float, row: int = -1) -> Process:
    """
    Return a new worker.

    Args:
        run: What it does.
        close: What it must not keep open: the listening sockets of others, their pipes.
        drain_seconds: How long it may take to end.
        row: Where it counts its streams.

    Raises:
        OSError: If there can be no more processes.

    """
    with ExitStack() as undo:
        pulse = os.memfd_create("pulse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        undo.callback(os.close, pulse)
        os.ftruncate(pulse, 8)
        fcntl.fcntl(pulse, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        pipe, write = os.pipe()
        undo.callback(os.close, pipe)
        undo.callback(os.close, write)
        process = Process(pulse, pipe, drain_seconds, row)
        undo.pop_all()
    process.beat()
    # A signal for the child must not be written to the parent's wakeup pipe, which it has until then.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = os.getpid()
    try:
        process.pid = os.fork()
        if process.pid == 0:
            end_with(parent, signal.SIGKILL)
            _become_worker(process, run, write, close)
    except OSError:
        process.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(write)
    return process


def _become_worker(process: Process, run: Run, write: int, close: Iterable[Callable[[], None]]) -> NoReturn:
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if number in STRAY else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(process.pipe)
        for each in close:
            each()
        status = run(process.beat, Report(write))
    except BaseException:
        log.critical("a worker failed", exc_info=True)
    finally:
        logging.shutdown()
        os._exit(status)


def end_with(parent: int, number: signal.Signals) -> None:
    """
    Have the kernel send this process ``number`` when ``parent``, which has forked it, ends, however it does (prctl(2)).

    It holds over execve(2), unless that changes who the process runs as.
    """
    if _prctl:
        _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number))
    if os.getppid() != parent:  # it has ended before that
        os.kill(os.getpid(), number)


def ignore_strays() -> None:
    """Ignore the stray signals by a handler, which a program that this process starts does not inherit."""
    for number in STRAY:
        signal.signal(number, lambda *_: None)


def name_of(number: int) -> str:
    """Return the name of a signal; most real-time signals have none."""
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


def died(status: int) -> str:
    """Return how a process ended, by its exit status as `os.waitstatus_to_exitcode` gives it."""
    return f"was ended by {name_of(-status)}" if status < 0 else f"ended with status {status}"
