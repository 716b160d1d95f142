"""The listening sockets: one per worker, bound before the fork and kept by the parent.

With SO_REUSEPORT the kernel spreads new connections evenly over the sockets (socket(7)). Since the parent
holds them open, those that reach the socket of a worker that died wait in its backlog for the next one.
A Unix socket, and what systemd gives, is shared by the workers.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import SettingsError
from .settings import FIELDS, Settings

log = logging.getLogger(__name__)

BACKLOG = 4096
# The folder of the admin listener, and the socket of a worker in it: its place and its process id.
_PREFIX, _SOCKET_NAME = "sse-relay-", re.compile("([0-9]+)-([0-9]+)")


@dataclass(frozen=True)
class Listening:
    """What a relay listens on."""

    groups: list[list[socket.socket]]
    """The sockets of each worker."""
    admin: list[socket.socket]
    """Those of the admin listener, which all workers share."""
    socket_file: tuple[int, int] | None
    """What tells the Unix socket's file, to be removed at the end, from another one of its path."""


def listen(settings: Settings, public: list[socket.socket], admin: list[socket.socket]) -> Listening:
    """
    Listen where ``settings`` say, or on what systemd has given: ``public`` sockets, and those for the admin listener.

    Raises:
        SettingsError: If that cannot be.

    """
    count, socket_file = settings.worker_count, None
    if public:
        _say_unused(settings, "host", "port", "unix_socket")
        groups = share(public, count)
    elif settings.unix_socket:
        groups = bind_unix(settings.unix_socket, count)
        socket_file = identity(settings.unix_socket)
    else:
        groups = bind(settings.host, settings.port, count)
    if admin:
        _say_unused(settings, "admin_host", "admin_port")
        (admin,) = share(admin, 1)
    elif settings.admin_port:
        try:
            (admin,) = bind(settings.admin_host, settings.admin_port, 1, "--admin-host, --admin-port")
        except SettingsError:
            _close(groups)
            raise
    return Listening(groups, admin, socket_file)


def bind(host: str, port: int, count: int, flags: str = "--host, --port") -> list[list[socket.socket]]:
    """
    Bind ``count`` groups of sockets, one socket in each for every address of ``host`` that this machine has.

    Port 0 takes a free port, the same for all. ``flags`` are those that errors name.

    Raises:
        SettingsError: If the address does not exist or is taken.

    """
    groups: list[list[socket.socket]] = []
    try:
        addresses = _usable(host, port)
        for _ in range(count):
            group: list[socket.socket] = []
            groups.append(group)
            for family, address in addresses:
                group.append(listener := _reuse(family))
                listener.bind((address[0], port, *address[2:]))
                port = port or listener.getsockname()[1]
                listener.listen(BACKLOG)
        return groups
    except (OSError, UnicodeError) as exc:  # UnicodeError: a name that IDNA does not allow
        _close(groups)
        why = getattr(exc, "strerror", None) or exc
        place = f"[{host}]" if ":" in host else host
        raise SettingsError(f"cannot listen on {place}:{port} ({flags}): {why}") from exc


def is_everywhere(host: str) -> bool:
    """Return whether ``host`` stands for all addresses of IPv4 and IPv6: ``*``, or ``::`` however it is written."""
    try:
        return host == "*" or ipaddress.IPv6Address(host).is_unspecified
    except ValueError:
        return False


def _usable(host: str, port: int) -> list[tuple[int, Any]]:
    """
    Return the families and addresses of ``host`` that can be bound. Some may be missing in this kernel, such as IPv6.

    Raises:
        OSError: If there is none, or one of them is taken.

    """
    found = socket.getaddrinfo(
        None if is_everywhere(host) else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    usable, missing = list[tuple[int, Any]](), list[tuple[Any, OSError]]()
    for family, address in dict.fromkeys((info[0], info[4]) for info in found):
        try:
            _refuse_taken(family, address)
            usable.append((family, address))
        except OSError as exc:
            if exc.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            missing.append((address[0], exc))
    if not usable:
        raise missing[0][1]
    for name, error in missing:
        log.info("not listening on %s, which this machine does not have: %s", name, error.strerror)
    return usable


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
    except OSError as exc:
        listener.close()
        raise SettingsError(f"--unix-socket: cannot listen on {path}: {exc.strerror or exc}") from exc
    except SettingsError:
        listener.close()
        raise
    return share([listener], count)


def share(listeners: list[socket.socket], count: int) -> list[list[socket.socket]]:
    """
    Return ``count`` groups of these listening sockets, which are closed.

    Each address is in every group. Those of one address (ReusePort= of systemd.socket(5)) are dealt out.
    """
    of_address: dict[object, list[socket.socket]] = {}
    for listener in listeners:
        of_address.setdefault((listener.family, listener.getsockname()), []).append(listener)
    groups: list[list[socket.socket]] = [[] for _ in range(count)]
    for same in of_address.values():
        for number in range(max(count, len(same))):
            groups[number % count].append(same[number % len(same)].dup())
    for group in groups:
        for listener in group:
            _prepare(listener)
    for listener in listeners:
        listener.close()
    return groups


def _close(groups: list[list[socket.socket]]) -> None:
    for group in groups:
        for listener in group:
            listener.close()


def identity(path: str) -> tuple[int, int] | None:
    """Return what tells the file of a Unix socket from another of the same path."""
    try:
        status = Path(path).stat()
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if path else None


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
    required: bool = True
    """Whether a worker may only start if it has its socket: at the start of the relay."""

    def path(self, number: int, pid: int) -> Path:
        """Return where the worker at this place, with this process id, has its socket."""
        return self.folder / f"{number}-{pid}"

    def make_folder(self) -> None:
        """
        Make the folder again if somebody has cleaned it up, as systemd-tmpfiles does.

        Raises:
            OSError: If that cannot be, or something else is in its place.

        """
        if not _is_private(self.folder):
            self.folder.mkdir(0o700)

    def present(self) -> list[tuple[int, int]]:
        """Return place and process id of those who have one; a place may have two, one of which is ending."""
        paths = self.folder.glob("*") if _is_private(self.folder) else ()
        found = (_SOCKET_NAME.fullmatch(path.name) for path in paths)
        return [(int(match[1]), int(match[2])) for match in found if match]


@contextmanager
def admin(listeners: list[socket.socket], workers: int, before: tuple[str, float] | None) -> Iterator[Admin | None]:
    """
    Keep the folder for the admin listener meanwhile; yield None if that has no ``listeners``.

    ``before`` are the folder and the start of the relay, if a parent before this one had them.

    Raises:
        SettingsError: If there can be no folder.

    """
    if not listeners:
        yield None
        return
    if not before:
        _remove_abandoned()
    try:
        folder, since = before or (tempfile.mkdtemp(prefix=_PREFIX), time.monotonic())
    except OSError as exc:
        raise SettingsError(f"--admin-port: there can be no folder for the workers' sockets: {exc}") from exc
    try:
        yield Admin(listeners, Path(folder), workers, since)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_private(folder: Path) -> bool:
    """Return whether it is a folder that only this user can enter, not a link and not another user's."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _remove_abandoned() -> None:
    """Remove the folders of relays that were killed: those of this user in which nobody answers any more."""
    for folder in Path(tempfile.gettempdir()).glob(_PREFIX + "*"):
        try:
            paths = list(folder.iterdir()) if _is_private(folder) else []
            if paths and all(_SOCKET_NAME.fullmatch(path.name) and _is_dead(path) for path in paths):
                shutil.rmtree(folder)
        except OSError as exc:
            log.debug("%s cannot be removed: %s", folder, exc)


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return path.is_socket() and probe.connect_ex(str(path)) == errno.ECONNREFUSED


def shown(listener: socket.socket) -> str:
    """Return the address of ``listener`` as a person would type it."""
    name = listener.getsockname()
    if listener.family == socket.AF_UNIX:
        return f"unix:{os.fsdecode(name).replace(chr(0), '@')}"  # an abstract one begins with a NUL
    host = f"[{name[0]}]" if listener.family == socket.AF_INET6 else name[0]
    return f"http://{host}:{name[1]}"


def _say_unused(settings: Settings, *names: str) -> None:
    for field in FIELDS:
        if field.name in names and getattr(settings, field.name) != field.default:
            log.warning("%s is not used: systemd gives the socket, see its .socket unit", field.metadata["variable"])


def _refuse_taken(family: int, address: tuple[object, ...]) -> None:
    # With SO_REUSEPORT a second relay of the same user would bind as well and take half of the streams.
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        probe.bind(address)


def _reuse(family: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    _prepare(listener)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    return listener


def _prepare(listener: socket.socket) -> None:
    listener.setblocking(False)
    if listener.family != socket.AF_UNIX:
        # Accepted sockets inherit it: a frame must not wait for the acknowledgement of the one before.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
