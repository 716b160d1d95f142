"""One pub/sub connection for a whole worker, read by a thread of its own.

Only that thread touches the connection (redis-py: "it is not safe to pass PubSub or Pipeline objects
between threads"). It takes commands from a queue and gives what it read to the loop, all that waited in
one call. redis-py's own PubSub is not used: it reconnects by itself, and so hides that messages were
missed.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis
from tornado.ioloop import IOLoop

from ...errors import BrokerRefused, BrokerUnavailable
from ..subscriptions import Subscriptions
from . import url as urls

log = logging.getLogger(__name__)

# At most this many names in one SUBSCRIBE, and this many replies handed to the loop in one call.
BATCH = 1000
# A connection that is quiet for this many seconds is sent a PING, and given as long again to answer.
QUIET = 10.0


class RedisListener:
    """A `reader.Listener`; ``on_messages`` gets lists of (channel, payload) in the order of arrival."""

    name = "Redis"

    def __init__(self, url: str, on_messages: Callable[[list[tuple[str, str]]], None]) -> None:
        self.subscriptions = Subscriptions()
        self._pool = urls.pool(url, "sse-relay-server")
        self._on_messages = on_messages
        self._loop = IOLoop.current()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="redis-listener")

        # What the thread is to send, each (command, names); a byte in the pipe wakes it. None ends it.
        self._commands: deque[tuple[str, list[str]] | None] = deque()
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        # Whether a flush is due in this turn of the loop: streams that open together share a command.
        self._flush_due = False
        # To be called once all that is held has been confirmed.
        self._on_up: Callable[[], None] | None = None

    def audible(self, channels: Iterable[str]) -> tuple[str, ...]:
        """Return ``channels``, each once: on Redis nothing folds their names."""
        return tuple(dict.fromkeys(channels))

    def target(self, channel: str) -> str:
        """Return ``channel``: Redis takes any name."""
        return channel

    # What runs on the loop.

    def flush(self) -> None:
        """Send soon what is to be subscribed to and what no more."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.add_callback(self._flush)

    async def session(self, on_up: Callable[[], None]) -> None:
        """Connect, and read until the connection is lost, which raises."""
        self._on_up = on_up
        self._commands.clear()  # meant for the connection before this one
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._run)
        except (redis.AuthenticationError, redis.ResponseError) as exc:
            raise BrokerRefused(str(exc)) from exc
        except (redis.RedisError, OSError) as exc:
            raise BrokerUnavailable(str(exc) or type(exc).__name__) from exc
        except asyncio.CancelledError:
            self._send(None)
            self._executor.shutdown(wait=False)
            raise

    def _flush(self) -> None:
        self._flush_due = False
        while True:
            add, drop = self.subscriptions.take(BATCH)
            if not add and not drop:
                return
            for command, names in (("UNSUBSCRIBE", drop), ("SUBSCRIBE", add)):
                if names:
                    self._send((command, names))

    def _send(self, command: tuple[str, list[str]] | None) -> None:
        self._commands.append(command)
        try:
            os.write(self._wake_write, b"w")
        except BlockingIOError:
            pass  # full of bytes that have yet to wake the thread

    def _connected(self) -> None:
        self._flush()
        self._check_up()

    def _received(self, replies: list[Any]) -> None:
        messages = []
        confirmed = []
        for reply in replies:
            kind = reply[0]
            if kind == b"message":
                messages.append((reply[1].decode(errors="replace"), reply[2].decode(errors="replace")))
            elif kind == b"subscribe":
                confirmed.append(reply[1].decode())
            elif kind == b"error":
                log.error("Redis refused a command: %s", reply[1])
        if confirmed:
            self.subscriptions.confirm(confirmed)
            self._check_up()
        if messages:
            self._on_messages(messages)

    def _check_up(self) -> None:
        if self._on_up and not self.subscriptions.waiting:
            on_up, self._on_up = self._on_up, None
            on_up()

    # What runs on the thread.

    def _run(self) -> None:
        """Connect and read until the connection is lost, which raises, or until told to end."""
        connection = self._pool.connection_class(**self._pool.connection_kwargs)
        try:
            connection.connect()
            # A server that wants a password lets us connect without one, and refuses the first command.
            connection.send_command("PING", check_health=False)
            connection.read_response()
            self._loop.add_callback(self._connected)
            self._read(connection)
        finally:
            connection.disconnect()

    def _read(self, connection: Any) -> None:
        poller = select.poll()
        # redis-py has no public way to wait for its socket and something else.
        poller.register(connection._sock, select.POLLIN)  # noqa: SLF001
        poller.register(self._wake_read, select.POLLIN)
        pinged = False
        while True:
            ready = poller.poll(QUIET * 1000)
            if not ready:
                if pinged:
                    raise redis.ConnectionError(f"no answer to PING in {QUIET:.0f} s")
                connection.send_command("PING", check_health=False)
                pinged = True
            if any(fd == self._wake_read for fd, _ in ready):
                os.read(self._wake_read, 65536)
                while self._commands:
                    command = self._commands.popleft()
                    if command is None:
                        return
                    connection.send_command(command[0], *command[1], check_health=False)
            while connection.can_read():
                pinged = False
                replies = [_reply(connection)]
                while len(replies) < BATCH and connection.can_read():
                    replies.append(_reply(connection))
                self._loop.add_callback(self._received, replies)


def _reply(connection: Any) -> Any:
    try:
        return connection.read_response(disable_decoding=True)
    except redis.ResponseError as exc:  # one channel's ACL must not end the connection of all
        return [b"error", str(exc)]
