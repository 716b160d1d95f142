"""What a service of Type=notify tells systemd (sd_notify(3)), silent where there is none; and whether it reads our log."""

from __future__ import annotations

import os
import socket
import time


def reads_stderr(environ: dict[str, str]) -> bool:
    """Return whether standard error goes to the journal, by ``JOURNAL_STREAM`` (systemd.exec(5))."""
    status = os.fstat(2)
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


class Notifier:
    """
    Sends states to the socket in ``NOTIFY_SOCKET``.

    Args:
        environ: What systemd put into the environment.

    """

    def __init__(self, environ: dict[str, str]) -> None:
        address = environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        mine = environ.get("WATCHDOG_PID") in (None, str(os.getpid()))
        microseconds = int(environ.get("WATCHDOG_USEC", "0")) if mine else 0
        # Half of the limit, as sd_watchdog_enabled(3) advises.
        self._every = microseconds / 2_000_000
        self._next = 0.0

    def ready(self, status: str) -> None:
        """The service is up; ``status`` is for people."""
        self._send(f"READY=1\nSTATUS={status}")

    def reloading(self) -> None:
        """A reload has begun; `ready` ends it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The service is on its way down."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """Feed the watchdog when it is due."""
        now = time.monotonic()
        if self._every and now >= self._next:
            self._next = now + self._every
            self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if self._address:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                try:
                    notify.sendto(state.encode(), self._address)
                except OSError:
                    pass  # systemd is gone; that is no reason to go as well
