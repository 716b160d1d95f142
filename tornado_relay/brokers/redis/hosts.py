"""URLs that name several hosts: ``scheme://user:password@host1:port,host2:port/path?options``."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit


class Hosts(NamedTuple):
    """The parts of such a URL."""

    tls: bool
    userinfo: str
    """As it is in the URL, with its ``@``."""
    addresses: list[tuple[str, int]]
    path: str
    options: list[tuple[str, str]]

    def url(self, database: str, options: list[tuple[str, str]]) -> str:
        """Return the URL that a single server would have; its host is none."""
        query = f"?{urlencode(options)}" if options else ""
        return f"redis{'s' * self.tls}://{self.userinfo}localhost/{database}{query}"

    def __str__(self) -> str:
        return ",".join(f"{host}:{port}" for host, port in self.addresses)


def split(url: str, port: int) -> Hosts:
    """Return the parts of ``url``; ``port`` is for hosts without one."""
    scheme, _, rest = url.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    userinfo, at, hosts = authority.rpartition("@")
    addresses = []
    for host in filter(None, hosts.split(",")):
        parts = urlsplit(f"//{host}")
        addresses.append((parts.hostname or "localhost", parts.port or port))
    return Hosts(scheme.startswith("rediss"), userinfo + at, addresses, path, parse_qsl(query))
