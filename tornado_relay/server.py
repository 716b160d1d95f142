"""The HTTP server of one worker: it takes connections in, and none of them can wait in the way of others."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream

log = logging.getLogger(__name__)

# Connections taken in one turn of the loop: events must not wait for a crowd.
BATCH = 16
# A request that has come in one piece is served within a few turns of the loop.
AT_ONCE_SECONDS = 0.1
# What is tried again, and said again, when there is no room for a connection.
PAUSE_SECONDS = 0.5
QUIET_SECONDS = 60.0


class Waiting:
    """
    The connections that have not sent the whole of a request, oldest first.

    Whoever opens connections and sends half a request takes the places of others who do: a request that comes in one
    piece is served at once, and is not among them.

    Args:
        limit: How many there may be.

    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Since when each waits.
        self._connections: dict[Any, float] = {}

    def add(self, connection: Any, now: float) -> None:
        """Let ``connection`` wait, and close the oldest if that is one too many."""
        self.discard(connection)
        self._connections[connection] = now
        if len(self._connections) > self._limit:
            self.close_oldest(now)

    def discard(self, connection: Any) -> None:
        """Forget a connection that has a request, or has ended."""
        self._connections.pop(connection, None)

    def close_oldest(self, before: float) -> bool:
        """Close the one that has waited for longest, and return True, if it has since ``before`` or earlier."""
        oldest = next(iter(self._connections), None)
        if oldest is None or self._connections[oldest] > before:
            return False
        del self._connections[oldest]
        oldest.stream.close()
        return True


class Server(HTTPServer):
    """
    Tornado's server, on sockets of which it accepts by itself.

    Tornado's own accepting raises, turn after turn, when the process has no descriptor left.

    Args:
        waiting: Where connections wait for their request.

    """

    def initialize(self, application: Any, waiting: Waiting, **options: Any) -> None:  # type: ignore[override]
        """See `tornado.httpserver.HTTPServer`, whose constructor this is (`tornado.util.Configurable`)."""
        super().initialize(application, **options)
        self._waiting = waiting
        self._listeners: list[socket.socket] = []
        self._quiet_until = 0.0

    def listen_on(self, listeners: list[socket.socket]) -> None:
        """Accept connections on these bound sockets."""
        self._listeners = listeners
        self._accept_from_now()

    def stop(self) -> None:
        """Accept no more; those that have been accepted go on."""
        self._pause()
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    def start_request(self, server_conn: object, request_conn: Any) -> HTTPMessageDelegate:
        """See `tornado.httputil.HTTPServerConnectionDelegate`."""
        self._waiting.add(server_conn, IOLoop.current().time())
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: object) -> None:
        """See `tornado.httputil.HTTPServerConnectionDelegate`."""
        self._waiting.discard(server_conn)
        super().on_close(server_conn)

    def _accept_from_now(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _pause(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(BATCH):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as exc:
                self._no_room(exc)
                return
            self.handle_stream(IOStream(connection, max_buffer_size=self.max_buffer_size), address)

    def _no_room(self, error: OSError) -> None:
        """Make room at the cost of those who wait, or else leave new connections in the kernel's backlog for a while."""
        now = IOLoop.current().time()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET_SECONDS
            log.error("a connection cannot be accepted: %s", error)
        if not self._waiting.close_oldest(now - AT_ONCE_SECONDS):
            self._pause()
            IOLoop.current().call_later(PAUSE_SECONDS, self._accept_from_now)
