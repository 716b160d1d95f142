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
    "client_encoding": "UTF8",
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
    return str(make_dsn(**{"application_name": application_name, **_DEFAULTS, **_options(url)}))


def resolved(dsn: str) -> str:
    """
    Return ``dsn`` with its host names looked up. Blocks; run it in a thread.

    libpq looks names up inside its "asynchronous" connect, where a slow name server would hold the
    whole loop (libpq, PQconnectStartParams).

    Raises:
        OSError: If a name has no address.

    """
    options = _options(dsn)
    hosts = str(options.get("host", ""))
    if not hosts or "hostaddr" in options:
        return dsn
    addresses = [_address(host) for host in hosts.split(",")]
    return str(make_dsn(dsn, hostaddr=",".join(addresses))) if all(addresses) else dsn


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
            "the PostgreSQL URL cannot be read; give postgresql://user:password@host:5432/database, "
            "with special characters of the password percent-encoded"
        )
    return options


def _address(host: str) -> str:
    if not host or host.startswith(("/", "@")):  # a Unix socket's folder, or an abstract one
        return ""
    return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
