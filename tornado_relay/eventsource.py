"""A client for streams: the HTML standard's parser, and a connection that comes back by itself.

It serves ``sse-relay-server listen`` and the tests; browsers have their own.
"""

from __future__ import annotations

import codecs
import http.client
import re
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from urllib.parse import quote, urlsplit

from . import events
from .errors import BrokerUnavailable, RelayError

# Milliseconds. More digits are ignored: neither int() nor sleep() takes a number of any size.
_RETRY = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class Received:
    """One event as a page gets it: type, data, and the last event id at that time."""

    event: str
    data: str
    id: str


class Parser:
    """
    The standard's "interpreting an event stream", as plain text in and events out.

    ``retry`` is the reconnection time in milliseconds, or None while the stream has not set it.
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry: int | None = None
        self._pending = ""
        self._after_cr = False
        self._at_start = True
        self._data: list[str] = []
        self._event = ""
        self._id = ""

    def feed(self, text: str) -> Iterator[Received]:
        """Yield the events that ``text`` completes."""
        if text and self._at_start:
            self._at_start = False
            text = text.removeprefix("\ufeff")
        if text and self._after_cr:
            self._after_cr = False
            text = text.removeprefix("\n")
        self._after_cr = self._after_cr or text.endswith("\r")
        *lines, self._pending = (self._pending + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in lines:
            received = self._line(line)
            if received is not None:
                yield received

    def _line(self, line: str) -> Received | None:
        if not line:
            return self._dispatch()
        name, colon, value = line.partition(":")
        if not name and colon:
            return None
        value = value.removeprefix(" ")
        if name == "event":
            self._event = value
        elif name == "data":
            self._data.append(value)
        elif name == "id" and "\0" not in value:
            self._id = value
        elif name == "retry" and _RETRY.fullmatch(value):
            self.retry = int(value)
        return None

    def _dispatch(self) -> Received | None:
        self.last_event_id = self._id
        data, self._data = self._data, []
        event, self._event = self._event, ""
        return Received(event or "message", "\n".join(data), self.last_event_id) if data else None


class Connection:
    """
    One connection to a stream: it yields all events but those that tell the stream's position.

    Args:
        url: ``http://host:port/channel=NAME``.
        unix_socket: Path of the Unix socket to use in place of the URL's host.
        last_event_id: Where to continue, if anywhere.
        timeout: Seconds of silence after which the connection counts as dead; None waits for ever.

    Raises:
        BrokerUnavailable: If the relay is not there, or cannot serve now.
        RelayError: If the relay refuses the request for good.

    """

    def __init__(self, url: str, *, unix_socket: str = "", last_event_id: str = "", timeout: float | None = 60) -> None:
        self.parser = Parser()
        try:
            parts = urlsplit(url)
            if not parts.hostname and not unix_socket:
                raise ValueError("it has no host")
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            self._http = kind(parts.hostname or "", parts.port, timeout=timeout)
            target = quote(f"{parts.path or '/'}?{parts.query}".rstrip("?"), safe="/?&=%:@+,;~!$'()*")
        except (ValueError, http.client.InvalidURL) as exc:
            raise RelayError(f"{url!r} is not the address of a stream: {exc}") from exc
        headers = {"Accept": "text/event-stream"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        try:
            if unix_socket:
                self._http.sock = socket.socket(socket.AF_UNIX)
                self._http.sock.settimeout(timeout)
                self._http.sock.connect(unix_socket)
            self._http.request("GET", target, headers=headers)
            self.response = self._http.getresponse()
        except (OSError, http.client.HTTPException, UnicodeError) as exc:
            self._http.close()
            raise BrokerUnavailable(f"no relay at {unix_socket or parts.netloc}: {exc}") from exc
        if self.response.status != 200:
            told = self.response.read(1000).decode(errors="replace").strip()
            self.close()
            error = BrokerUnavailable if self.response.status >= 500 else RelayError
            raise error(f"the relay answered {self.response.status}: {told}")

        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
        self._waiting: deque[Received] = deque()
        # Whether the other side has ended it.
        self.ended = False

    def __iter__(self) -> Iterator[Received]:
        """Yield events until the stream ends."""
        while self._waiting or self._read():
            while self._waiting:
                yield self._waiting.popleft()

    def begin(self, seconds: float) -> bool:
        """Wait for the first bytes, and return whether they came in this time."""
        end = time.monotonic() + seconds
        while self.parser.retry is None and time.monotonic() < end and self._read():
            pass
        return self.parser.retry is not None

    def next(self, seconds: float) -> Received | None:
        """
        Return the next event, or None if the stream ends first, or ``seconds`` have passed.

        Heartbeats do not count; the connection's own time-out may be waited for once more.
        """
        end = time.monotonic() + seconds
        while not self._waiting and time.monotonic() < end and self._read():
            pass
        return self._waiting.popleft() if self._waiting else None

    def _read(self) -> bool:
        """Take in what comes next, and return False if nothing more does."""
        try:
            chunk = self.response.read1(65536)
        except (OSError, http.client.HTTPException):
            return False
        self.ended = not chunk
        received = self.parser.feed(self._decode(chunk))
        self._waiting += (each for each in received if each.event not in events.OF_THE_STREAM)
        return bool(chunk)

    def close(self) -> None:
        """End the stream from this side."""
        self.response.close()  # has the socket for itself when the other side will close the connection
        self._http.close()


def listen(url: str, on_trouble: Callable[[str], None], *, unix_socket: str = "") -> Iterator[Received]:
    """
    Yield the events of a stream, reconnecting as a browser does, for ever.

    ``on_trouble`` is told, before each new try, why there is one.

    Raises:
        RelayError: If the relay refuses the request for good.

    """
    last_event_id, retry = "", 3000
    while True:
        try:
            connection = Connection(url, unix_socket=unix_socket, last_event_id=last_event_id)
            with closing(connection):
                yield from connection
            # Not that of the last event: also heartbeats move it.
            last_event_id = connection.parser.last_event_id or last_event_id
            retry = connection.parser.retry or retry
            on_trouble("the stream ended")
        except BrokerUnavailable as exc:
            on_trouble(str(exc))
        time.sleep(retry / 1000)
