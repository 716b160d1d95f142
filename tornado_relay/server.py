"""The HTTP server of one worker: it takes connections in, and none of them can wait in the way of others."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import HTTPMessageDelegate
from tornado.ioloop import IOLoop
from tornado.iostream import IOStream

from .access import UNIX
from .entry import MAX_HEAD, Entry
from .logs import Throttle
from .poller import Poller
from .waiting import Waiting

log = logging.getLogger(__name__)

# Connections taken in one turn of the loop: events must not wait for a crowd.
BATCH = 16
# A request that has come in one piece is served within a few turns of the loop.
AT_ONCE_SECONDS = 0.1
# For so long a worker with more streams than its share leaves what comes by a shared socket to the others.
YIELD_SECONDS = 0.005
# What it takes then all the same, since the others may be stuck.
YIELD_BATCH = 4
# What is tried again when there is no room for a connection.
PAUSE_SECONDS = 0.5


class Arrival:
    """A connection on which nothing has come yet; a `poller.Watcher`."""

    __slots__ = ("_arrived", "_poller", "_waiting", "address", "connection")

    def __init__(
        self,
        connection: socket.socket,
        address: Any,
        poller: Poller,
        waiting: Waiting,
        arrived: Callable[[socket.socket, Any], None],
    ) -> None:
        self.connection = connection
        self.address = address
        self._poller = poller
        self._waiting = waiting
        self._arrived = arrived
        poller.watch(connection.fileno(), self)
        waiting.add(self, time.monotonic(), self.close)

    def readable(self) -> None:
        """See `poller.Watcher`."""
        self._waiting.discard(self)
        self._poller.forget(self.connection.fileno())
        self._arrived(self.connection, self.address)

    def writable(self) -> None:
        """Nobody asks for it."""

    def close(self) -> None:
        """Give it up."""
        self._poller.forget(self.connection.fileno())
        self.connection.close()


class Server(HTTPServer):
    """
    Tornado's server, on sockets of which it accepts by itself.

    Tornado's own accepting raises, turn after turn, when the process has no descriptor left.

    Args:
        waiting: Where connections wait for their request.
        poller: What watches those of which nothing has come.
        entry: Takes what it can; the rest is for the application, as all is without one.

    """

    def initialize(  # type: ignore[override]
        self, application: Any, waiting: Waiting, poller: Poller, entry: Entry | None, **options: Any
    ) -> None:
        """See `tornado.httpserver.HTTPServer`, whose constructor this is (`tornado.util.Configurable`)."""
        super().initialize(application, **options)
        self._waiting = waiting
        self._poller = poller
        self._entry = entry
        self._listeners: list[socket.socket] = []
        self._no_room_log = Throttle(log)
        self._ahead: Callable[[], bool] = lambda: False

    def listen_on(self, listeners: list[socket.socket], ahead: Callable[[], bool] = lambda: False) -> None:
        """
        Accept connections on these bound sockets.

        The kernel spreads them over sockets with SO_REUSEPORT; of one without, which other workers accept on as well,
        a worker that is ``ahead`` lets them take the next. They have been woken up with it.
        """
        self._listeners = listeners
        self._ahead = ahead
        self._accept_from_now()

    def stop(self) -> None:
        """Accept no more; those that have been accepted go on."""
        self._pause()
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    def start_request(self, server_conn: Any, request_conn: Any) -> HTTPMessageDelegate:
        """See `tornado.httputil.HTTPServerConnectionDelegate`."""
        if not server_conn.stream.closed():  # Tornado looks for the next request of a closed one too
            self._waiting.add(server_conn, time.monotonic(), server_conn.stream.close)
        return super().start_request(server_conn, request_conn)

    def on_close(self, server_conn: object) -> None:
        """See `tornado.httputil.HTTPServerConnectionDelegate`."""
        self._waiting.discard(server_conn)
        super().on_close(server_conn)

    def expire(self, before: float) -> None:
        """Give up those who have waited since ``before``."""
        while self._waiting.close_oldest(before):
            pass

    def _accept_from_now(self) -> None:
        for listener in self._listeners:
            shared = not listener.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)
            asyncio.get_running_loop().add_reader(listener, self._accept_or_yield if shared else self._accept, listener)

    def _pause(self) -> None:
        for listener in self._listeners:
            asyncio.get_running_loop().remove_reader(listener)

    def _accept_or_yield(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        if self._ahead():
            loop.remove_reader(listener)
            loop.call_later(YIELD_SECONDS, self._accept_after_all, listener)
        else:
            self._accept(listener, 1)

    def _accept_after_all(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept_or_yield, listener)
            self._accept(listener, YIELD_BATCH)

    def _accept(self, listener: socket.socket, batch: int = BATCH) -> None:
        for _ in range(batch):
            try:
                connection, address = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as exc:
                self._no_room(exc)
                return
            self._arrived(connection, address)

    def _arrived(self, connection: socket.socket, address: Any) -> None:
        """Serve the request that has come, or begun to."""
        try:
            data = connection.recv(MAX_HEAD, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            Arrival(connection, address, self._poller, self._waiting, self._arrived)
            return
        except OSError:
            data = b""
        peer = address[0] if isinstance(address, tuple) else UNIX
        if not data:
            connection.close()
        elif not (self._entry and self._entry.take(connection, data, peer)):
            self.handle_stream(IOStream(connection, max_buffer_size=self.max_buffer_size), address)

    def _no_room(self, error: OSError) -> None:
        """Make room at the cost of those who wait, or else leave new connections in the kernel's backlog for a while."""
        self._no_room_log.write(logging.ERROR, "a connection cannot be accepted: %s", error)
        if not self._waiting.close_oldest(time.monotonic() - AT_ONCE_SECONDS):
            self._pause()
            IOLoop.current().call_later(PAUSE_SECONDS, self._accept_from_now)
