"""The parent process: it forks the workers, forwards signals, and replaces what dies or hangs.

It runs no event loop and connects to no broker, so a fork copies nothing that lives. A signal handler only
queues its number; everything happens in `Supervisor.run`.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from . import limits, tokens
from .counts import LAYOUT, PID, RELOADS, RESTARTS, Counts, Ledger
from .handover import FIXED, Handover, Heir
from .process import SIGNALS, STRAY, Process, Slot, died, fork, name_of
from .settings import Settings
from .sockets import Admin, Listening, identity, shown
from .systemd import Notifier

log = logging.getLogger(__name__)

# A worker that lived this long was healthy: the next restart starts from the shortest delay.
HEALTHY_SECONDS = 10.0

RunWorker = Callable[..., int]
"""`worker.run`."""


class Supervisor:
    """
    Runs one worker per group of sockets until it is told to stop.

    SIGTERM drains and stops, a second one or SIGINT stops at once. SIGHUP tries the code that is installed by then, with
    the settings as they are by then: if a worker serves with them, this process becomes the supervisor of that code,
    which replaces the workers one at a time.

    Args:
        settings: What to serve.
        listening: The bound sockets.
        run_worker: `worker.run`.
        notifier: What tells systemd.
        admin: What there is for the admin listener.
        embedded: Whether the embedded PostgreSQL is ours to stop.
        inherited: What the supervisor before this one has left.

    """

    def __init__(
        self,
        settings: Settings,
        listening: Listening,
        run_worker: RunWorker,
        notifier: Notifier,
        *,
        admin: Admin | None,
        embedded: bool,
        inherited: Handover | None,
    ) -> None:
        self.settings = settings
        self.admin = admin
        self.run_worker = run_worker
        self.notifier = notifier
        self.slots = [Slot(number, group) for number, group in enumerate(listening.groups)]
        self.address = ", ".join(shown(listener) for listener in self.slots[0].sockets)
        # Each with the slot that it was started for.
        self.processes: dict[int, tuple[Process, Slot]] = {}

        # True once every worker has served: from then on a worker that cannot start is tried again.
        self._up = inherited is not None
        self._stopping = False
        self._exit_status = 0
        # The process that finds out whether a reload can be, in no slot.
        self._trial: Process | None = None
        self._memory = inherited.memory if inherited else os.memfd_create("settings")
        # The slots that a reload has yet to go through, the first one being under way.
        self._reloading: list[Slot] = []
        # Whether another was asked for meanwhile.
        self._reload_again = False
        self._socket_file = listening.socket_file
        self._embedded = embedded
        rows = limits.ROWS * len(self.slots)
        if inherited:
            heirs = [heir for heir in inherited.workers if heir]
            self.tally = limits.Tally(rows, inherited.tally[0], [heir.row for heir in heirs])
            self.ledger = Ledger(rows + 1, *inherited.ledger)
            for slot, heir in zip(self.slots, inherited.workers, strict=True):
                if heir:
                    slot.current = Process(heir.pulse, heir.pipe, heir.drain_seconds, heir.row, heir.pid)
                    self.processes[heir.pid] = slot.current, slot
                    slot.due = None
            self._reloading = list(self.slots)
            self._reload_again = inherited.again
        else:
            self.tally = limits.Tally(rows)
            self.ledger = Ledger(rows + 1)
        # What this process counts, behind the rows of the others.
        self.counts = Counts(self.ledger, rows)
        # The parent's own pauses (a suspended machine) must not look like stuck workers.
        self._last_turn = self._steady_since = time.monotonic()

    def run(self) -> int:
        """Return the exit status of the command, once all workers have gone."""
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        for queued in SIGNALS:
            signal.signal(queued, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # those that a handover has kept waiting
        try:
            if self._reloading:
                self._replace()
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
            # By now it may be another relay's.
            if self._socket_file and identity(self.settings.unix_socket) == self._socket_file:
                with suppress(OSError):
                    Path(self.settings.unix_socket).unlink()

    def _wait(self) -> list[int]:
        """Sleep until a signal, a report or the next thing that is due; return the signals."""
        poller = select.poll()
        poller.register(self._wake_read, select.POLLIN)
        for process, _ in self.processes.values():
            if process.pipe >= 0:
                poller.register(process.pipe, select.POLLIN)
        now = time.monotonic()
        due = min((slot.due - now for slot in self.slots if slot.due is not None), default=1.0)
        ready = {descriptor for descriptor, _ in poller.poll(max(0.0, min(due, 1.0)) * 1000)}
        for process, slot in list(self.processes.values()):
            if process.pipe in ready:
                process.read_report()
                if process.ready:
                    self._serves(process, slot)
        return self._signals()

    def _signals(self) -> list[int]:
        try:
            return list(os.read(self._wake_read, 4096))
        except BlockingIOError:
            return []

    def _handle(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._start_reload()
        elif number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
            at_once = number != signal.SIGTERM or self._stopping
            log.info("%s: stopping%s", name_of(number), " at once" if at_once else "")
            self._stop(signal.SIGINT if at_once else signal.SIGTERM)
        elif number in STRAY:
            log.info("%s is ignored", name_of(number))

    def _stop(self, number: signal.Signals) -> None:
        if not self._stopping:
            self.notifier.stopping()
        self._stopping = True
        self._reloading.clear()
        for slot in self.slots:
            slot.due = None
            for listener in slot.sockets:
                listener.close()
        for listener in self.admin.listeners if self.admin else ():
            listener.close()
        for process, _ in self.processes.values():
            process.dismiss(number)

    # Workers' lives.

    def _fork(self, slot: Slot) -> Process:
        close = [process.close for process, _ in self.processes.values()]
        close += [listener.close for other in self.slots if other is not slot for listener in other.sockets]
        close += [partial(os.close, each) for each in (self._wake_read, self._wake_write, self._memory)]
        row = self.tally.take_row()
        current, (here, _) = self.settings, limits.shares(limits.descriptor_limit())
        seats = limits.Seats(self.tally, row, current.max_connections, current.max_connections_per_ip, here)
        counts = Counts(self.ledger, row)
        counts.begin(slot.number)
        admin = self.admin and dataclasses.replace(self.admin, number=slot.number, required=not self._up)
        run = partial(self.run_worker, self.settings, slot.sockets, seats, counts=counts, admin=admin)
        try:
            process = fork(run, close, self.settings.drain_seconds, row)
        except OSError:
            self._free(row)
            raise
        counts.set(PID, process.pid)
        self.processes[process.pid] = process, slot
        log.debug("worker %d forked as %d", slot.number, process.pid)
        return process

    def _free(self, row: int) -> None:
        Counts(self.ledger, row).end()
        self.tally.free_row(row)

    def _serves(self, process: Process, slot: Slot) -> None:
        if process is slot.replacement:
            old, slot.current, slot.replacement = slot.current, process, None
            if old:
                old.dismiss(signal.SIGTERM)
            elif self._reloading:
                self._next_reload()
        if not self._up and all(slot.current and slot.current.ready for slot in self.slots):
            self._up = True
            if self.admin:
                log.info("admin listener at %s", ", ".join(shown(listener) for listener in self.admin.listeners))
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
            if pid in self.processes:
                self._gone(*self.processes.pop(pid), os.waitstatus_to_exitcode(status))

    def _gone(self, process: Process, slot: Slot, status: int) -> None:
        if process.pipe >= 0:
            process.read_report(ended=True)
        process.close()
        if process is self._trial:
            self._tried("" if process.ready else process.trouble or died(status))
            return
        self._free(process.row)
        if self.admin:
            with suppress(OSError):  # whatever there is now in its place
                self.admin.path(slot.number, process.pid).unlink()
        if process is slot.replacement:
            slot.replacement = None
            if not self._stopping:
                self._reload_failed(process.trouble or f"a new worker {died(status)}")
        elif process is slot.current:
            slot.current = None
            if process.leaving_since is None and not self._stopping:
                self._died_by_itself(process, slot, process.trouble or died(status))
        elif self._reloading and self._reloading[0] is slot and slot.replacement is None:
            self._next_reload()

    def _died_by_itself(self, process: Process, slot: Slot, how: str) -> None:
        if not self._up:
            # What it says itself stays so until somebody changes a setting or the broker.
            status = os.EX_CONFIG if process.trouble else 1
            self._cannot_start(process.trouble or f"a worker {how} while it started", status)
            return
        if slot.replacement:  # the reload under way fills the place
            return
        self.counts.add(RESTARTS, "stuck" if process.stuck else "died" if process.ready else "failed")
        now = time.monotonic()
        if process.ready and now - process.started >= HEALTHY_SECONDS:
            slot.backoff.reset()
        delay = slot.backoff.next()
        slot.due = now + delay
        log.error("worker %d (%d) %s, the next starts in %.1f s", slot.number, process.pid, how, delay)

    def _cannot_start(self, why: str, status: int) -> None:
        log.critical("cannot start: %s", why)
        self._exit_status = status
        self._stop(signal.SIGTERM)

    def _restart_due(self) -> None:
        now = time.monotonic()
        for slot in self.slots:
            if slot.due is not None and now >= slot.due:
                slot.due = None
                try:
                    slot.current = self._fork(slot)
                except OSError as exc:
                    if not self._up:
                        self._cannot_start(f"a worker cannot be forked: {exc}", 1)
                        return
                    delay = slot.backoff.next()
                    slot.due = now + delay
                    log.error("worker %d cannot be forked, next try in %.1f s: %s", slot.number, delay, exc)

    def _check_pulses(self) -> None:
        now = time.monotonic()
        if now - self._last_turn > 5.0:
            self._steady_since = now
        self._last_turn = now
        for process, slot in self.processes.values():
            why = None if process.stuck else process.overdue(now, self._steady_since)
            if why:
                name = "the worker on trial" if process is self._trial else f"worker {slot.number}"
                log.error("%s (%d) %s, killing it", name, process.pid, why)
                process.stuck = True
                process.send(signal.SIGKILL)

    # Reload.

    def _start_reload(self) -> None:
        if self._stopping or not self._up:
            log.warning("SIGHUP ignored: the relay is starting or stopping")
            return
        if self._reloading or self._trial:
            self._reload_again = True
            return
        log.info("reloading: replacing %d workers, one at a time", len(self.slots))
        self.notifier.reloading()
        try:
            self._trial = fork(self._handover().on_trial, [], 0)
        except OSError as exc:
            self._refuse_reload(f"a worker cannot be forked: {exc}")
            return
        self.processes[self._trial.pid] = self._trial, Slot(-1, [])

    def _handover(self) -> Handover:
        admin, heirs = self.admin, [slot.current for slot in self.slots]
        return Handover(
            [[listener.fileno() for listener in slot.sockets] for slot in self.slots],
            [Heir(heir.pid, heir.pulse, heir.pipe, heir.row, heir.drain_seconds) if heir else None for heir in heirs],
            (self.tally.descriptor, limits.LAYOUT),
            (self.ledger.descriptor, LAYOUT),
            ([listener.fileno() for listener in admin.listeners], str(admin.folder), admin.since) if admin else None,
            self._socket_file,
            self._embedded,
            {name: getattr(self.settings, name) for name in FIXED},
            self._memory,
            not self.settings.debug and tokens.authenticates(self.settings),
            self._reload_again,
        )

    def _tried(self, trouble: str) -> None:
        if not self._stopping and not trouble:
            # From here to the handlers of the next supervisor signals wait in the kernel.
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            for number in self._signals():
                self._handle(number)
        self._trial = None
        if not self._stopping and not trouble:
            try:
                self._handover().execute()
            except (OSError, ValueError) as exc:
                trouble = f"the new code cannot be run: {exc}"
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if trouble and not self._stopping:
            self._refuse_reload(trouble)

    def _refuse_reload(self, why: str) -> None:
        self.counts.add(RELOADS, "failed")
        log.error("reload refused, the old workers and settings stay: %s", why)
        self._end_reload()

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
            self.counts.add(RELOADS, "done")
            log.info("reloaded")
            self._end_reload()

    def _reload_failed(self, why: str) -> None:
        self.counts.add(RELOADS, "failed")
        log.error("reload stopped, the old workers that are left stay: %s", why)
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
