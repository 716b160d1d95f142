"""What a browser would find at the public address: whatever is in between, events must pass at once."""

from __future__ import annotations

import secrets
import socket
import ssl
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

from ..errors import BrokerUnavailable, RelayError
from ..eventsource import Connection
from ..publish import open_publisher
from ..settings import Settings
from ..tokens import subscribe_token
from .finding import OK, TIMEOUT, WARNING, Finding

TABS = 6
"""Connections of a browser to one host by HTTP/1.1, for all its tabs."""

_KEPT_BACK = "what is in between keeps it back; have it pass answers on unbuffered there (docs/proxies.md)"


def of_public(settings: Settings, url: str) -> Iterator[Finding]:
    """
    Open a stream at the relay's public ``url``, and send it an event through the broker.

    Raises:
        RelayError: If there is no stream, or no event comes by it.

    """
    channel = f"sse_relay_check_{secrets.token_hex(8)}"
    address = f"{url.rstrip('/')}/channel={channel}"
    if settings.jwt_secret:
        address += f"?token={subscribe_token(channel, 60, key=settings.jwt_secret)}"
    try:
        connection = Connection(address, timeout=TIMEOUT)
    except BrokerUnavailable as exc:
        if isinstance(exc.__cause__, TimeoutError):
            raise RelayError(f"{url} took the request, and did not answer in {TIMEOUT:.0f} s: {_KEPT_BACK}") from exc
        raise
    try:
        content_type = connection.response.headers.get_content_type()
        if content_type != "text/event-stream":
            raise RelayError(f"{url} answers with {content_type}, and not with a stream: it does not lead to the relay")
        yield from _heads(connection)
        started = time.monotonic()
        _publish(settings, channel)
        event = connection.next(TIMEOUT)
        if connection.ended:
            raise RelayError(
                "the stream was closed at once: the relay, or what is in between, tells it to come back later"
            )
        if event is None:
            raise RelayError(
                f"the stream is open, but no event came in {TIMEOUT:.0f} s: it leads to a relay on another broker, or "
                f"{_KEPT_BACK}"
            )
        taken = time.monotonic() - started
        yield Finding(OK, "public", f"{url}: an event took {taken * 1000:.1f} ms from the broker to here")
    finally:
        connection.close()
    yield _protocol(url)


def _heads(connection: Connection) -> Iterator[Finding]:
    if not connection.begin(TIMEOUT):
        raise RelayError(f"the stream was opened, but its first bytes did not come in {TIMEOUT:.0f} s: {_KEPT_BACK}")
    caching = connection.response.headers.get("Cache-Control", "")
    if "no-transform" not in caching:
        text = (
            f"the answer's Cache-Control is {caching or 'missing'}: what is in between may compress or keep the stream"
        )
        yield Finding(WARNING, "public.headers", text, "have it pass the relay's headers on as they are")


def _publish(settings: Settings, channel: str) -> None:
    if settings.broker is None:
        raise RelayError("no broker is set to send the event to")
    publisher = open_publisher(*settings.broker)
    try:
        publisher.publish(channel, "{}")
    finally:
        publisher.close()


def _protocol(url: str) -> Finding:
    parts = urlsplit(url)
    name, chosen = "public.protocol", None
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.set_alpn_protocols(["h2", "http/1.1"])
        host = parts.hostname or ""
        try:
            with (
                socket.create_connection((host, parts.port or 443), TIMEOUT) as plain,
                context.wrap_socket(plain, server_hostname=host) as wrapped,
            ):
                chosen = wrapped.selected_alpn_protocol()
        except OSError as exc:
            raise RelayError(f"{url} is not reached a second time: {exc}") from exc
    if chosen == "h2":
        return Finding(OK, name, "it speaks HTTP/2: all streams of a browser share a connection")
    return Finding(
        WARNING,
        name,
        f"it speaks HTTP/1.1 only: a browser opens {TABS} connections to a host, so the seventh tab waits",
        "offer HTTP/2 there, which takes https, or use relay.js, with one connection for all tabs",
    )
