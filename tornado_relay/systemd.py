"""What systemd gives a service, sockets (sd_listen_fds(3)), and what it is told (sd_notify(3)); whether it reads our log.

Without systemd there are no sockets, and nothing is told.
"""

from __future__ import annotations

import os
import re
import socket
import time

from .errors import SettingsError

_FIRST = 3
ADMIN = "admin"


def given(environ: dict[str, str]) -> tuple[list[socket.socket], list[socket.socket]]:
    """
    Return the listening sockets that systemd gives this process, and those of them that are for the admin listener.

    The latter have the name "admin" (FileDescriptorName=).

    Args:
        environ: What systemd put into the environment.

    Raises:
        SettingsError: If one is no listening stream socket, or if the variables cannot be read.

    """
    if environ.get("LISTEN_PID", "") != str(os.getpid()):
        return [], []  # for nobody, or for a parent of ours
    count = environ.get("LISTEN_FDS", "")
    if not re.fullmatch("[0-9]{1,4}", count):
        raise SettingsError(f"LISTEN_FDS: {count!r} is no number of sockets, as systemd gives it")
    names = environ["LISTEN_FDNAMES"].split(":") if "LISTEN_FDNAMES" in environ else [""] * int(count)
    if int(count) and len(names) != int(count):
        raise SettingsError(f"LISTEN_FDNAMES has {len(names)} names for {count} sockets (LISTEN_FDS)")
    public, admin = list[socket.socket](), list[socket.socket]()
    try:
        for descriptor, name in enumerate(names[: int(count)], _FIRST):
            (admin if name == ADMIN else public).append(_listener(descriptor))
    except SettingsError:
        for listener in (*public, *admin):
            listener.close()
        raise
    return public, admin


def _listener(descriptor: int) -> socket.socket:
    right = "LISTEN_FDS must be of sockets as ListenStream= and Accept=no make them"
    try:
        listener = socket.socket(fileno=descriptor)
    except OSError as exc:
        raise SettingsError(f"{right}; descriptor {descriptor} is none: {exc.strerror}") from exc
    if listener.family not in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX):
        wrong = "is of another family than TCP and Unix sockets"
    elif listener.type != socket.SOCK_STREAM or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        wrong = "does not listen for connections"
    else:
        return listener
    listener.close()
    raise SettingsError(f"{right}; descriptor {descriptor} {wrong}")


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
        given = environ.get("WATCHDOG_USEC", "")
        microseconds = int(given) if mine and re.fullmatch("[0-9]{1,18}", given) else 0
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
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                    notify.settimeout(1.0)
                    # The path of a Unix socket may have bytes that are not UTF-8.
                    notify.sendto(state.encode(errors="replace"), self._address)
            except OSError:
                pass  # systemd is gone; that is no reason to go as well
