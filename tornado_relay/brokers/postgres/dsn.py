"""The connection string as this package uses it."""

from __future__ import annotations

import re
import socket
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from ...errors import SettingsError

# A peer that vanished without a packet is noticed after idle + interval * count seconds, and unanswered
# data after tcp_user_timeout milliseconds, not after the kernel's two hours and a quarter of one.
_DEFAULTS = {
    "connect_timeout": "5",
    "keepalives_idle": "15",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "20000",
}
_SCHEME = re.compile("^postg(?:res|resql|is)://")


def complete(url: str, application_name: str) -> str:
    """
    Return ``url`` as a libpq connection string, with our defaults where it says nothing.

    Of several servers the one is meant that takes writes: on a standby neither NOTIFY nor LISTEN works.

    Raises:
        SettingsError: If ``url`` is not one that libpq understands.

    """
    given = _options(url)
    options = {"application_name": application_name, **_DEFAULTS, **given}
    if len(_servers(given)) > 1:
        options.setdefault("target_session_attrs", "read-write")
    return str(make_dsn(**{**options, "client_encoding": "UTF8"}))


def addresses(dsn: str) -> list[str]:
    """
    Return a DSN for each address of each host of ``dsn``, in order. Blocks; run it in a thread.

    libpq looks names up inside its "asynchronous" connect, where a slow name server would hold the
    whole loop, and lets a host that is silent use up all of the time (libpq, PQconnectStartParams).

    Raises:
        OSError: If no name has an address.

    """
    found, failed = [], OSError("no host")
    for server in _servers(_options(dsn)):
        host = server.get("host", "")
        # No name to look up: an address, a Unix socket's folder, or an abstract one.
        if server.get("hostaddr") or not host or host.startswith(("/", "@")):
            found.append(str(make_dsn(dsn, **server)))
            continue
        try:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as exc:
            failed = OSError(f"{host}: {exc.strerror}")
            continue
        found += [str(make_dsn(dsn, **{**server, "hostaddr": info[4][0]})) for info in infos]
    if not found:
        raise failed
    return found


def shown(url: str) -> str:
    """Return where ``url`` leads, without its password: ``user@host:port/database``, or ``user@host:port,host:port/database``."""
    options = _options(url)
    places = [
        f"{server.get('host') or server.get('hostaddr') or 'localhost'}:{server.get('port') or 5432}"
        for server in _servers(options)
    ]
    return f"{options.get('user', '')}@{','.join(places)}/{options.get('dbname', '')}"


def _options(url: str) -> dict[str, Any]:
    try:
        options = parse_dsn(_SCHEME.sub("postgresql://", url))
    except (psycopg2.Error, ValueError):  # ValueError: a NUL, or bytes of the environment that are not UTF-8
        options = {"port": "unreadable"}
    # Where a password holds a "/" or ":", libpq takes a piece of it for the port, and would show it.
    # Of several servers each may leave its port out.
    ports = str(options.get("port", 0)).split(",")
    if not all(port.isdigit() or (not port and len(ports) > 1) for port in ports):
        raise SettingsError(
            "DATABASE_URL (or RELAY_LISTEN_DATABASE_URL) cannot be read; give postgresql://user:password@host:5432/database, "
            "with special characters of the password percent-encoded"
        )
    return options


def _servers(options: dict[str, Any]) -> list[dict[str, str]]:
    """Return what ``options`` say of each server: host, hostaddr, port (libpq, "Specifying Multiple Hosts")."""
    lists = {key: str(options[key]).split(",") for key in ("host", "hostaddr", "port") if options.get(key)}
    count = len(lists.get("hostaddr") or lists.get("host") or [""])
    if len(lists.get("port", ())) == 1:
        lists["port"] *= count
    if any(len(values) != count for values in lists.values()):
        raise SettingsError(
            "DATABASE_URL (or RELAY_LISTEN_DATABASE_URL) does not name as many ports or addresses as hosts; "
            "give one port for all, or postgresql://user:password@host1:5432,host2:5433/database"
        )
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)] or [{}]
