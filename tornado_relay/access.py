"""Who may open a stream. No I/O."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Sequence

# What a preflight may ask for: EventSource sends the first, clients built on fetch() send the others too.
ALLOWED_HEADERS = "Last-Event-ID, Cache-Control, Authorization"
ALLOWED_METHODS = "GET, HEAD, OPTIONS"
PREFLIGHT_SECONDS = 7200  # Chromium keeps an answer no longer


class Origins:
    """
    The web pages that may connect.

    Args:
        allowed: Origins such as ``https://shop.example``; with ``*`` in it, or empty, any page may, but
            without its cookies: a browser takes no wildcard together with credentials (Fetch standard,
            "CORS protocol and credentials").

    """

    def __init__(self, allowed: Collection[str]) -> None:
        self.any = not allowed or "*" in allowed
        self._allowed = frozenset(allowed)

    def admits(self, origin: str | None) -> bool:
        """Whether a request with this ``Origin`` header (None: without one, so from no other page) may go on."""
        # Sandboxed frames, files and redirects of other sites are "null", all alike.
        return origin is None or (origin != "null" and (self.any or origin in self._allowed))

    def headers(self, origin: str | None) -> dict[str, str]:
        """Return the CORS headers of the answer to a request that `admits` let in."""
        if self.any:
            return {"Access-Control-Allow-Origin": "*"}
        if origin is None:
            return {"Vary": "Origin"}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Credentials": "true",
            "Vary": "Origin",
        }


def preflight() -> dict[str, str]:
    """Return the headers that a preflight's answer has beside those of `Origins.headers`."""
    return {
        "Access-Control-Allow-Methods": ALLOWED_METHODS,
        "Access-Control-Allow-Headers": ALLOWED_HEADERS,
        "Access-Control-Max-Age": str(PREFLIGHT_SECONDS),
    }


class Grant:
    """
    The channels that somebody may listen to, and until when.

    Args:
        patterns: Names of channels; one that ends in ``*`` stands for all that begin with the rest of it.
        expires_at: Unix time at which the grant ends; None if it does not.

    """

    def __init__(self, patterns: Iterable[str], expires_at: float | None = None) -> None:
        self.expires_at = expires_at
        self.patterns = frozenset(patterns)
        self._prefixes = tuple(pattern[:-1] for pattern in self.patterns if pattern.endswith("*"))

    def allows(self, channel: str) -> bool:
        """Whether it covers ``channel``, which is a name: a ``*`` in it stands for itself."""
        return channel in self.patterns or channel.startswith(self._prefixes)


def joined(grants: Sequence[Grant]) -> Grant:
    """Return what all of ``grants`` give together, as long as none has ended."""
    ends = [grant.expires_at for grant in grants if grant.expires_at is not None]
    return Grant([pattern for grant in grants for pattern in grant.patterns], min(ends, default=None))


EVERYBODY = Grant(["*"])
"""The grant of a relay that is open to all."""

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

UNIX = "unix"
"""The address of who comes by the Unix socket."""


class Proxies:
    """
    The proxies whose ``X-Forwarded-For`` is believed.

    Args:
        trusted: Their networks; ``unix`` among them stands for all that come by the Unix socket.

    """

    def __init__(self, trusted: Collection[Network | str]) -> None:
        self._unix = UNIX in trusted
        self._networks = [network for network in trusted if not isinstance(network, str)]

    def client(self, peer: str, forwarded_for: Iterable[str]) -> str:
        """
        Return the address of the client.

        Args:
            peer: The address that the connection is from, or `UNIX`.
            forwarded_for: The values of the ``X-Forwarded-For`` headers. Each proxy adds whom it got the request
                from at the end, so they are read from there, as far as those who wrote them are trusted.

        """
        client = address(peer) or peer
        hops = [hop.strip() for value in forwarded_for for hop in value.split(",")]
        while hops and self._trusts(client):
            before = address(hops.pop())
            if before is None:  # nonsense, which its proxy took from further out
                break
            client = before
        return client

    def _trusts(self, client: str) -> bool:
        if client == UNIX:
            return self._unix
        return any(ipaddress.ip_address(client) in network for network in self._networks)


def address(text: str) -> str | None:
    """Return an IP address in its usual form, an IPv4 one inside IPv6 as IPv4; None if ``text`` is none."""
    try:
        found = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
    return str(getattr(found, "ipv4_mapped", None) or found)
