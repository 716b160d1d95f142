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

    Raises:
        SettingsError: If ``url`` is not one that libpq understands.

    """
    options = {"application_name": application_name, **_DEFAULTS, **_options(url)}
    return str(make_dsn(**{**options, "client_encoding": "UTF8"}))


def addresses(dsn: str) -> list[str]:
    """
    Return a DSN for each address of each host of ``dsn``, in order. Blocks; run it in a thread.

    libpq looks names up inside its "asynchronous" connect, where a slow name server would hold the
    whole loop, and lets a host that is silent use up all of the time (libpq, PQconnectStartParams).

    Raises:
        OSError: If no name has an address.

    """
    options = _options(dsn)
    hosts = str(options.get("host", "")).split(",")
    if hosts == [""] or "hostaddr" in options:
        return [dsn]
    ports = str(options.get("port", 5432)).split(",")
    ports = ports * len(hosts) if len(ports) == 1 else ports
    found, failed = [], OSError("no host")
    for host, port in zip(hosts, ports, strict=False):
        if not host or host.startswith(("/", "@")):  # a Unix socket's folder, or an abstract one
            found.append(str(make_dsn(dsn, host=host, port=port)))
            continue
        try:
            infos = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except OSError as exc:
            failed = OSError(f"{host}: {exc.strerror}")
            continue
        found += [str(make_dsn(dsn, host=host, hostaddr=info[4][0], port=port)) for info in infos]
    if not found:
        raise failed
    return found


def shown(url: str) -> str:
    """Return where ``url`` leads, without its password: ``user@host:port/database``."""
    options = _options(url)
    host = options.get("host") or options.get("hostaddr") or "localhost"
    return f"{options.get('user', '')}@{host}:{options.get('port', 5432)}/{options.get('dbname', '')}"


def _options(url: str) -> dict[str, Any]:
    try:
        options = parse_dsn(_SCHEME.sub("postgresql://", url))
    except psycopg2.Error:
        options = {"port": "unreadable"}
    # Where a password holds a "/" or ":", libpq takes a piece of it for the port, and would show it.
    if not all(port.isdigit() for port in str(options.get("port", 0)).split(",")):
        raise SettingsError(
            "DATABASE_URL (or RELAY_LISTEN_DATABASE_URL) cannot be read; give postgresql://user:password@host:5432/database, "
            "with special characters of the password percent-encoded"
        )
    return options
