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
from ..backoff import Backoff
from ..subscriptions import Subscriptions
from . import url as urls

log = logging.getLogger(__name__)

# At most this many names in one SUBSCRIBE, and this many replies handed to the loop in one call.
BATCH = 1000
CONFIRM_TIMEOUT = 5.0
# A connection that is quiet for this many seconds is sent a PING, and given as long again to answer.
QUIET = 10.0


class RedisReader:
    """
    Gives a worker the messages of the channels that its streams are on.

    ``on_messages`` gets a list of (channel, payload) in the order of arrival; ``on_gap`` is called when
    the connection is back after a loss, once all channels are subscribed to again.
    """

    name = "Redis"

    def __init__(
        self, url: str, on_messages: Callable[[list[tuple[str, str]]], None], on_gap: Callable[[], None]
    ) -> None:
        self._pool = urls.pool(url, "sse-relay-server")
        self._on_messages = on_messages
        self._on_gap = on_gap
        self._loop = IOLoop.current()
        self._subscriptions = Subscriptions()
        self._backoff = Backoff()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="redis-reader")

        # Why streams cannot be served now, or None while the connection is up.
        self.trouble: str | None = "not connected yet"

        # What the thread is to send, each (command, names); a byte in the pipe wakes it. None ends it.
        self._commands: deque[tuple[str, list[str]] | None] = deque()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        # Whether a flush is due in this turn of the loop: streams that open together share a command.
        self._flush_due = False
        # Called once the connection is up and all that streams hold is confirmed.
        self._when_ready: Callable[[], None] | None = None

    def audible(self, channels: Iterable[str]) -> tuple[str, ...]:
        """Return the channels whose events a stream on ``channels`` hears."""
        return tuple(dict.fromkeys(channels))

    async def subscribe(self, channels: Iterable[str]) -> None:
        """
        Return once Redis has confirmed SUBSCRIBE for ``channels``; pair it with `release`.

        Raises:
            BrokerUnavailable: If there is no connection, or no answer in time. Nothing is held then.

        """
        if self.trouble:
            raise BrokerUnavailable(self.trouble)
        names = list(channels)
        waiters = self._subscriptions.acquire(names)
        if not waiters:
            return
        self._flush_soon()
        done, pending = await asyncio.wait(waiters, timeout=CONFIRM_TIMEOUT)
        failed = next((waiter.exception() for waiter in done if waiter.exception()), None)
        if pending or failed:
            self._subscriptions.release(names, self._loop.time())
            raise BrokerUnavailable(f"Redis did not confirm SUBSCRIBE: {failed or 'no answer in time'}")

    def release(self, channels: Iterable[str]) -> None:
        """End a stream's subscription; UNSUBSCRIBE follows some seconds after a channel's last stream."""
        self._subscriptions.release(channels, self._loop.time())

    def sweep(self) -> None:
        """Drop what has been idle for long enough; called every second or so."""
        if self._subscriptions.sweep(self._loop.time()) and not self.trouble:
            self._flush_soon()

    async def run(self, on_first: Callable[[BrokerRefused | None], None]) -> None:
        """
        Stay connected, for ever. Cancel it to end.

        ``on_first`` is called once, after the first try to connect: with an error if Redis refused in a
        way that trying again cannot mend.
        """
        connected_before, first = False, True

        def ready() -> None:
            nonlocal connected_before, first
            self.trouble = None
            self._backoff.reset()
            log.info("Redis connected, subscribed to %d channels", len(self._subscriptions))
            if connected_before:
                self._on_gap()
            connected_before = True
            if first:
                first = False
                on_first(None)

        try:
            while True:
                refused = None
                self._when_ready = ready
                try:
                    await asyncio.get_running_loop().run_in_executor(self._executor, self._session)
                    return
                except (redis.AuthenticationError, redis.ResponseError) as exc:
                    self.trouble = str(exc)
                    refused = BrokerRefused(f"Redis refused the connection: {exc}")
                except (redis.RedisError, OSError) as exc:
                    self.trouble = str(exc) or type(exc).__name__
                self._subscriptions.lost(BrokerUnavailable(self.trouble))
                if first:
                    first = False
                    on_first(refused)
                delay = self._backoff.next()
                log.warning("Redis is not reachable, next try in %.1f s: %s", delay, self.trouble)
                await asyncio.sleep(delay)
        finally:
            self._send(None)
            self._executor.shutdown(wait=False)

    # What runs on the loop.

    def _flush_soon(self) -> None:
        if not self._flush_due:
            self._flush_due = True
            self._loop.add_callback(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        while True:
            add, drop = self._subscriptions.take(BATCH)
            if drop:
                self._send(("UNSUBSCRIBE", drop))
            if add:
                self._send(("SUBSCRIBE", add))
            if not add and not drop:
                return

    def _send(self, command: tuple[str, list[str]] | None) -> None:
        self._commands.append(command)
        os.write(self._wake_write, b"w")

    def _connected(self) -> None:
        self._flush()
        self._check_ready()

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
            self._subscriptions.confirm(confirmed)
            self._check_ready()
        if messages:
            self._on_messages(messages)

    def _check_ready(self) -> None:
        if self._when_ready and not self._subscriptions.waiting:
            ready, self._when_ready = self._when_ready, None
            ready()

    # What runs on the thread.

    def _session(self) -> None:
        """Connect and read until the connection is lost, which raises, or until told to end."""
        if None in self._commands:
            return
        self._commands.clear()  # meant for the connection before this one
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
