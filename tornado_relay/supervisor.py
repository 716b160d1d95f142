"""The parent process: it forks the workers, forwards signals, and replaces what dies or hangs.

It runs no event loop and connects to no broker, so a fork copies nothing that lives. A signal handler only
queues its number; everything happens in `Supervisor.run`.
"""

from __future__ import annotations

import dataclasses
import logging
import mmap
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

from .brokers.backoff import Backoff
from .errors import SettingsError
from .settings import Settings
from .sockets import shown
from .systemd import Notifier

log = logging.getLogger(__name__)

# A loop that has not turned for this long is stuck and its worker is killed.
STUCK_SECONDS = 15.0
START_SECONDS = 60.0
# What a worker gets beyond `drain_seconds` before it is killed.
GRACE_SECONDS = 5.0
# A worker that lived this long was healthy: the next restart starts from the shortest delay.
HEALTHY_SECONDS = 10.0

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD)
_FIXED = ("host", "port", "unix_socket", "workers", "embedded", "embedded_dir")

RunWorker = Callable[[Settings, list[socket.socket], Callable[[], None], Callable[[str], None]], int]


@dataclasses.dataclass(eq=False)
class Process:
    """One forked worker, as the parent sees it."""

    pid: int
    slot: Slot
    pipe: int
    """Here it says, once, that it serves, or why it cannot."""
    pulse: mmap.mmap
    """Shared with it: the monotonic time at which its loop last turned."""
    started: float
    ready: bool = False
    told: str = ""
    drain_seconds: float = 0.0
    """Of the settings that it was started with."""
    leaving_since: float | None = None


@dataclasses.dataclass(eq=False)
class Slot:
    """The place of one worker: its listening sockets, and who accepts on them."""

    number: int
    sockets: list[socket.socket]
    current: Process | None = None
    """The worker that serves; during a reload it goes on until `replacement` serves."""
    replacement: Process | None = None
    backoff: Backoff = dataclasses.field(default_factory=lambda: Backoff(0.1, 30.0))
    due: float | None = None
    """When to start the next worker, while there is none."""


class Supervisor:
    """
    Runs one worker per group of sockets until it is told to stop.

    SIGTERM drains and stops, a second one or SIGINT stops at once. SIGHUP reads the settings again and
    replaces the workers one at a time.
    """

    def __init__(
        self,
        settings: Settings,
        sockets: list[list[socket.socket]],
        run_worker: RunWorker,
        reload: Callable[[], Settings],
        notifier: Notifier,
    ) -> None:
        self.settings = settings
        self.run_worker = run_worker
        self.reload = reload
        self.notifier = notifier
        self.slots = [Slot(number, group) for number, group in enumerate(sockets)]
        self.address = ", ".join(shown(listener) for listener in sockets[0])
        self.processes: dict[int, Process] = {}

        # True once every worker has served: from then on a worker that cannot start is tried again.
        self._up = False
        self._stopping = False
        self._exit_status = 0
        # The slots that a reload has yet to go through, the first one being under way.
        self._reloading: list[Slot] = []
        # What to go back to if it fails, and whether another was asked for meanwhile.
        self._settings_before = settings
        self._reload_again = False
        # The Unix socket's file as we bound it: at the end it may be another relay's.
        self._socket_file = _identity(settings.unix_socket)
        # The parent's own pauses (a suspended machine) must not look like stuck workers.
        self._last_turn = self._steady_since = time.monotonic()

    def run(self) -> int:
        """Return the exit status of the command, once all workers have gone."""
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for queued in _SIGNALS:
            signal.signal(queued, lambda *_: None)
        try:
            for slot in self.slots:
                slot.current = self._fork(slot)
            while self.processes or not self._stopping:
                for number in self._wait():
                    self._handle(number)
                self._reap()
                self._check_pulses()
                self._restart_due()
                if not self._stopping:
                    self.notifier.alive()
            return self._exit_status
        finally:
            if self._socket_file and _identity(self.settings.unix_socket) == self._socket_file:
                Path(self.settings.unix_socket).unlink()

    def _wait(self) -> list[int]:
        """Sleep until a signal, a report or the next thing that is due; return the signals."""
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        for process in self.processes.values():
            if process.pipe >= 0:
                poller.register(process.pipe, select.POLLIN)
        now = time.monotonic()
        due = min((slot.due - now for slot in self.slots if slot.due is not None), default=1.0)
        ready = {fd for fd, _ in poller.poll(max(0.0, min(due, 1.0)) * 1000)}
        for process in list(self.processes.values()):
            if process.pipe in ready:
                self._read_report(process)
        return list(os.read(self._wake_read, 4096)) if self._wake_read in ready else []

    def _handle(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._start_reload()
        elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            at_once = number != signal.SIGTERM or self._stopping
            log.info("%s: stopping%s", signal.Signals(number).name, " at once" if at_once else "")
            self._stop(signal.SIGINT if at_once else signal.SIGTERM)

    def _stop(self, number: signal.Signals) -> None:
        if not self._stopping:
            self.notifier.stopping()
        self._stopping = True
        self._reloading.clear()
        for slot in self.slots:
            slot.due = None
            for listener in slot.sockets:
                listener.close()
        for process in self.processes.values():
            self._dismiss(process, number)

    def _dismiss(self, process: Process, number: signal.Signals) -> None:
        if process.leaving_since is None or number == signal.SIGINT:
            process.leaving_since = process.leaving_since or time.monotonic()
            _kill(process.pid, number)

    # Workers' lives.

    def _fork(self, slot: Slot) -> Process:
        read, write = os.pipe()
        pulse = mmap.mmap(-1, 8)
        now = time.monotonic()
        struct.pack_into("d", pulse, 0, now)
        # A signal for the child must not be written to the parent's wakeup pipe, which it has until then.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            pid = os.fork()
            if pid == 0:
                os.close(read)
                self._become_worker(slot, write, pulse)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        os.close(write)
        process = self.processes[pid] = Process(pid, slot, read, pulse, now, drain_seconds=self.settings.drain_seconds)
        log.debug("worker %d forked as %d", slot.number, pid)
        return process

    def _become_worker(self, slot: Slot, pipe: int, pulse: mmap.mmap) -> None:
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
            os.close(self._wake_read)
            os.close(self._wake_write)
            for process in self.processes.values():
                process.pulse.close()
                if process.pipe >= 0:
                    os.close(process.pipe)
            for other in self.slots:
                if other is not slot:
                    for listener in other.sockets:
                        listener.close()

            def beat() -> None:
                struct.pack_into("d", pulse, 0, time.monotonic())

            def report(trouble: str) -> None:
                os.write(pipe, (trouble or "ready").encode()[:4096])
                os.close(pipe)

            status = self.run_worker(self.settings, slot.sockets, beat, report)
        except BaseException:
            log.critical("worker %d failed", slot.number, exc_info=True)
        finally:
            logging.shutdown()
            os._exit(status)

    def _read_report(self, process: Process) -> None:
        told = os.read(process.pipe, 4096).decode()
        os.close(process.pipe)
        process.pipe = -1
        if told != "ready":
            process.told = told
            return
        process.ready = True
        if process is process.slot.replacement:
            old, process.slot.current, process.slot.replacement = process.slot.current, process, None
            if old:
                self._dismiss(old, signal.SIGTERM)
            elif self._reloading:
                self._next_reload()
        if not self._up and all(slot.current and slot.current.ready for slot in self.slots):
            self._up = True
            log.info("listening on %s with %d workers", self.address, len(self.slots))
            self.notifier.ready(f"{len(self.slots)} workers on {self.address}")

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            # As PID 1 of a container the parent inherits other processes' orphans: reaped, not counted.
            if process := self.processes.pop(pid, None):
                self._gone(process, os.waitstatus_to_exitcode(status))

    def _gone(self, process: Process, status: int) -> None:
        if process.pipe >= 0:
            self._read_report(process)
        process.pulse.close()
        slot = process.slot
        if process is slot.replacement:
            slot.replacement = None
            if not self._stopping:
                self._reload_failed(process.told or f"a new worker {_died(status)}")
        elif process is slot.current:
            slot.current = None
            if process.leaving_since is None and not self._stopping:
                self._died_by_itself(process, status)
        elif self._reloading and self._reloading[0] is slot and slot.replacement is None:
            self._next_reload()

    def _died_by_itself(self, process: Process, status: int) -> None:
        slot = process.slot
        if not self._up:
            log.critical("cannot start: %s", process.told or f"a worker {_died(status)} while it started")
            self._exit_status = 1
            self._stop(signal.SIGTERM)
            return
        if slot.replacement:  # the reload under way fills the place
            return
        now = time.monotonic()
        if process.ready and now - process.started >= HEALTHY_SECONDS:
            slot.backoff.reset()
        delay = slot.backoff.next()
        slot.due = now + delay
        log.error(
            "worker %d (%d) %s, the next starts in %.1f s",
            slot.number,
            process.pid,
            process.told or _died(status),
            delay,
        )

    def _restart_due(self) -> None:
        now = time.monotonic()
        for slot in self.slots:
            if slot.due is not None and now >= slot.due:
                slot.due = None
                try:
                    slot.current = self._fork(slot)
                except OSError as exc:
                    delay = slot.backoff.next()
                    slot.due = now + delay
                    log.error("worker %d cannot be forked, next try in %.1f s: %s", slot.number, delay, exc)

    def _check_pulses(self) -> None:
        now = time.monotonic()
        if now - self._last_turn > 5.0:
            self._steady_since = now
        self._last_turn = now
        for process in self.processes.values():
            since = process.leaving_since
            if since is not None and now - max(since, self._steady_since) > process.drain_seconds + GRACE_SECONDS:
                log.error("worker %d (%d) does not end, killing it", process.slot.number, process.pid)
                _kill(process.pid, signal.SIGKILL)
                continue
            limit = STUCK_SECONDS if process.ready else START_SECONDS
            last = max(struct.unpack_from("d", process.pulse)[0], self._steady_since)
            if now - last > limit:
                log.error(
                    "worker %d (%d) is stuck for %.0f s, killing it", process.slot.number, process.pid, now - last
                )
                _kill(process.pid, signal.SIGKILL)

    # Reload.

    def _start_reload(self) -> None:
        if self._stopping or not self._up:
            log.warning("SIGHUP ignored: the relay is starting or stopping")
            return
        if self._reloading:
            self._reload_again = True
            return
        try:
            fresh = self.reload()
        except SettingsError as exc:
            log.error("reload refused, the old settings stay: %s", exc)
            return
        kept = {name: getattr(self.settings, name) for name in _FIXED}
        for name, value in kept.items():
            if getattr(fresh, name) != value:
                log.warning("%s changed: that takes a restart, a reload keeps the old one", name)
        log.info("reloading: replacing %d workers, one at a time", len(self.slots))
        self._settings_before, self.settings = self.settings, dataclasses.replace(fresh, **kept)
        self.notifier.reloading()
        self._reloading = list(self.slots)
        self._replace()

    def _replace(self) -> None:
        slot = self._reloading[0]
        slot.due = None
        try:
            slot.replacement = self._fork(slot)
        except OSError as exc:
            self._reload_failed(f"a worker cannot be forked: {exc}")

    def _next_reload(self) -> None:
        self._reloading.pop(0)
        if self._reloading:
            self._replace()
        else:
            log.info("reloaded")
            self._end_reload()

    def _reload_failed(self, why: str) -> None:
        log.error("reload stopped, the old workers and settings stay: %s", why)
        self.settings = self._settings_before
        self._end_reload()

    def _end_reload(self) -> None:
        self._reloading.clear()
        self.notifier.ready(f"{len(self.slots)} workers on {self.address}")
        for slot in self.slots:
            if slot.current is None and slot.replacement is None and not self._stopping:
                slot.due = time.monotonic()
        if self._reload_again:
            self._reload_again = False
            self._start_reload()


def _identity(path: str) -> tuple[int, int] | None:
    """Return what tells a file from another of the same path."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if path else None


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # it ended by itself; `_reap` hears of it


def _died(status: int) -> str:
    if status < 0:
        known = {number.value: number.name for number in signal.Signals}
        return f"was ended by {known.get(-status, f'signal {-status}')}"
    return f"ended with status {status}"
