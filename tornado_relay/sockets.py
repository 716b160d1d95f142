"""The listening sockets: one per worker, bound before the fork and kept by the parent.

With SO_REUSEPORT the kernel spreads new connections evenly over the sockets (socket(7)). Since the parent
holds them open, those that reach the socket of a worker that died wait in its backlog for the next one.
"""

from __future__ import annotations

import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .errors import SettingsError

BACKLOG = 4096


def bind(host: str, port: int, count: int, flags: str = "--host, --port") -> list[list[socket.socket]]:
    """
    Bind ``count`` groups of sockets, one socket in each for every address of ``host``.

    Port 0 takes a free port, the same for all. ``flags`` are those that errors name.

    Raises:
        SettingsError: If the address does not exist or is taken.

    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        addresses = list(dict.fromkeys((info[0], info[4]) for info in found))
        for family, address in addresses:
            if port:
                _refuse_taken(family, address)
        groups = []
        for _ in range(count):
            group = []
            for family, address in addresses:
                listener = _reuse(family)
                listener.bind((address[0], port, *address[2:]))
                port = port or listener.getsockname()[1]
                listener.listen(BACKLOG)
                group.append(listener)
            groups.append(group)
        return groups
    except (OSError, UnicodeError) as exc:  # UnicodeError: a name that IDNA does not allow
        why = getattr(exc, "strerror", None) or exc
        raise SettingsError(f"cannot listen on {host}:{port} ({flags}): {why}") from exc


def bind_unix(path: str, count: int) -> list[list[socket.socket]]:
    """
    Bind one Unix socket that ``count`` workers share, readable and writable for all.

    Raises:
        SettingsError: If ``path`` cannot be one, or another process listens there.

    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).exists():
            if not Path(path).is_socket():
                raise SettingsError(f"--unix-socket: {path} exists and is no socket")
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise SettingsError(f"--unix-socket: another process listens on {path}")
            Path(path).unlink()  # left behind by a relay that was killed
        listener.bind(path)
        # The web server in front is another user; the folder decides who comes near.
        Path(path).chmod(0o666)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as exc:
        raise SettingsError(f"--unix-socket: cannot listen on {path}: {exc.strerror or exc}") from exc
    with listener:
        return [[listener.dup()] for _ in range(count)]


@dataclass(frozen=True)
class Admin:
    """What the workers share to show how the relay is, and which of them this one is."""

    listeners: list[socket.socket]
    """The bound sockets of the admin listener, on which all of them accept: whoever is free answers."""
    folder: Path
    """Where each has a Unix socket, on which it tells of itself; for this relay alone."""
    workers: int
    """How many there should be."""
    since: float
    """`time.monotonic` at the start of the relay."""
    number: int = 0
    """The place of this worker among them."""

    def path(self, number: int, pid: int) -> Path:
        """Return where the worker at this place, with this process id, has its socket."""
        return self.folder / f"{number}-{pid}"

    def present(self) -> list[tuple[int, int]]:
        """Return place and process id of those who have one; a place may have two, one of which is ending."""
        found = (re.fullmatch("([0-9]+)-([0-9]+)", path.name) for path in self.folder.glob("*"))
        return [(int(match[1]), int(match[2])) for match in found if match]


@contextmanager
def admin(host: str, port: int, workers: int) -> Iterator[Admin | None]:
    """
    Bind the admin listener, and keep the folder meanwhile; yield None if ``port`` is 0.

    Raises:
        SettingsError: If the address does not exist or is taken, or there can be no folder.

    """
    if not port:
        yield None
        return
    (listeners,) = bind(host, port, 1, "--admin-host, --admin-port")
    try:
        folder = tempfile.TemporaryDirectory(prefix="sse-relay-")
    except OSError as exc:
        raise SettingsError(f"--admin-port: there can be no folder for the workers' sockets: {exc}") from exc
    with folder as path:
        yield Admin(listeners, Path(path), workers, time.monotonic())


def shown(listener: socket.socket) -> str:
    """Return the address of ``listener`` as a person would type it."""
    name = listener.getsockname()
    if isinstance(name, str):
        return f"unix:{name}"
    host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
    return f"http://{host}:{name[1]}"


def _refuse_taken(family: int, address: tuple[object, ...]) -> None:
    # With SO_REUSEPORT a second relay of the same user would bind as well and take half of the streams.
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)


def _reuse(family: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    # Accepted sockets inherit it: a frame must not wait for the acknowledgement of the one before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return listener
