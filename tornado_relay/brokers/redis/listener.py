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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import redis
from tornado.ioloop import IOLoop

from ...errors import BrokerRefused, BrokerUnavailable
from ...history.redis import RedisHistory
from .. import message
from ..message import Message
from ..subscriptions import Subscriptions
from . import sentinel
from . import url as urls

log = logging.getLogger(__name__)

# At most this many commands sent at a time, and this much handed to the loop in one call.
BATCH = 1000
BATCH_BYTES = 1 << 19
# So many of which may wait for the loop; then Redis has to keep what comes, and throws out a reader that is too slow.
INBOX = 4
# A connection that is quiet for this many seconds is sent a PING, and given as long again to answer.
QUIET = 5.0

_REFUSED = "refused"


class RedisListener:
    """A `reader.Listener`; ``on_messages`` gets lists of messages in the order of arrival."""

    name = "Redis"

    def __init__(self, url: str, on_messages: Callable[[list[Message], float], None]) -> None:
        self.subscriptions = Subscriptions()
        self._url = url
        self._on_messages = on_messages
        self._loop = IOLoop.current()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="redis-listener")

        # Which server of a group the connection is to, as `url.server_of` has it.
        self._server = ""
        self._watch = sentinel.Watch(url) if sentinel.is_sentinel(url) else None

        # What the thread is to send, each a command and its channels; the counter (eventfd(2)) wakes it. None ends it, and
        # an error is raised there.
        self._commands: deque[tuple[str, list[str]] | Exception | None] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Whether the connection takes commands, and whether a flush is due in this turn of the loop.
        self._connected = False
        self._flush_due = False
        # What the thread has read and the loop has not looked at, and how many batches that is; one a turn, so that
        # sockets that can be written to come in between, and no reader counts as slow for want of a chance.
        self._inbox: deque[tuple[list[Any], float]] = deque()
        self._arrived = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        self._loop.add_handler(self._arrived, self._turn, IOLoop.READ)
        self._room = threading.Semaphore(INBOX)
        # To be called once all that is held has been confirmed.
        self._on_up: Callable[[], None] | None = None

        self.latency: float | None = None
        """Seconds that the last PING took."""

    @staticmethod
    def check(url: str) -> None:
        """Raise SettingsError if redis-py cannot read ``url``."""
        urls.connection(url, "")

    def audible(self, channels: Iterable[str]) -> tuple[str, ...]:
        """Return ``channels``, each once: on Redis nothing folds their names."""
        return tuple(dict.fromkeys(channels))

    def target(self, channel: str) -> str:
        """Return ``channel``: Redis takes any name."""
        return channel

    def history(self, keep: int, seconds: float) -> RedisHistory:
        """Return the history of this broker."""
        return RedisHistory(self._url, keep, seconds, lambda: self._server)

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
        watching = asyncio.create_task(self._watch.run(lambda: self._server, self._send)) if self._watch else None
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
        finally:
            if watching:
                watching.cancel()
            self._connected = False
            # A confirmation of this connection must not count for the next; messages are read again, or missed.
            self._inbox.clear()
            self._room = threading.Semaphore(INBOX)

    def _flush(self) -> None:
        self._flush_due = False
        # After a loss all that is held is taken anew, and must not be taken for the connection that was lost.
        while self._connected:
            add, drop = self.subscriptions.take(BATCH)
            if not add and not drop:
                return
            for command, names in (("UNSUBSCRIBE", drop), ("SUBSCRIBE", add)):
                if names:
                    self._send((command, names))

    def _send(self, command: tuple[str, list[str]] | Exception | None) -> None:
        self._commands.append(command)
        os.eventfd_write(self._wake, 1)

    def _began(self) -> None:
        self._connected = True
        self._flush()
        self._check_up()

    def _turn(self, *_: object) -> None:
        os.eventfd_read(self._arrived)
        if self._inbox:  # it is cleared when the connection is lost
            replies, arrived = self._inbox.popleft()
            self._room.release()
            self._received(replies, arrived)

    def _received(self, replies: list[Any], arrived: float) -> None:
        messages, confirmed = [], []
        for kind, name, what in replies:
            if kind == b"message":
                messages.append(message.read(name.decode(errors="replace"), what.decode(errors="replace")))
            elif kind == b"subscribe":
                confirmed.append(name.decode())
            elif kind == _REFUSED:
                log.error("Redis refused SUBSCRIBE %s: %s", name, what)
                self.subscriptions.refuse(name, BrokerUnavailable(what))
        self.subscriptions.confirm(confirmed)
        self._check_up()
        if messages:
            self._on_messages(messages, arrived)

    def _check_up(self) -> None:
        if self._on_up and not self.subscriptions.waiting:
            on_up, self._on_up = self._on_up, None
            on_up()

    # What runs on the thread.

    def _run(self) -> None:
        """Connect and read until the connection is lost, which raises, or until told to end."""
        connection = urls.connection(self._url, "sse-relay-server")
        try:
            connection.connect()
            # A server that wants a password lets us connect without one, and refuses the first command.
            connection.send_command("PING", check_health=False)
            connection.read_response()
            self._server = urls.server_of(self._url, connection)
            self._loop.add_callback(self._began)
            self._read(connection)
        finally:
            connection.disconnect()

    def _read(self, connection: Any) -> None:
        poller = select.poll()
        # redis-py has no public way to wait for its socket and something else.
        poller.register(connection._sock, select.POLLIN)  # noqa: SLF001
        poller.register(self._wake, select.POLLIN)
        # The channels of each command that have no reply yet; Redis answers in order, and messages come in between.
        sent: deque[list[str]] = deque()
        pinged, pinged_at = False, 0.0
        while True:
            ready = poller.poll(QUIET * 1000)
            if not ready:
                if pinged:
                    raise redis.ConnectionError(f"no answer to PING in {QUIET:.0f} s")
                _send(connection, sent, [("PING", [])])
                pinged = True
                pinged_at = time.monotonic()
            if any(fd == self._wake for fd, _ in ready):
                os.eventfd_read(self._wake)
                commands = [self._commands.popleft() for _ in range(len(self._commands))]
                if None in commands:
                    return
                for command in commands:
                    if isinstance(command, Exception):
                        raise command
                _send(connection, sent, commands)  # type: ignore[arg-type]
            # That it can be read is known from the poll; asking redis-py takes another system call.
            more = any(fd != self._wake for fd, _ in ready)
            while more:
                if pinged:
                    self.latency = time.monotonic() - pinged_at
                pinged = False
                self._room.acquire()
                replies, more = _batch(connection, sent)
                self._hand_over(replies)

    def _hand_over(self, replies: list[Any]) -> None:
        self._inbox.append((replies, time.monotonic()))
        os.eventfd_write(self._arrived, 1)


def _send(connection: Any, sent: deque[list[str]], commands: list[tuple[str, list[str]]]) -> None:
    packed = connection.pack_commands([(command, *names) for command, names in commands])
    connection.send_packed_command(packed, check_health=False)
    sent.extend(names for _, names in commands)


def _batch(connection: Any, sent: deque[list[str]]) -> tuple[list[Any], bool]:
    """Return what can be read at once, up to the limits of a batch, and whether there is more; there must be something."""
    replies: list[Any] = []
    size = 0
    while True:
        try:
            reply = connection.read_response(disable_decoding=True)
        except redis.ResponseError as exc:
            names = sent.popleft()
            if len(names) > 1:
                # Because of one of them; that must fail alone.
                _send(connection, sent, [("SUBSCRIBE", [name]) for name in names])
            else:
                replies += [(_REFUSED, name, str(exc)) for name in names]
        else:
            if reply[0] == b"message":
                size += len(reply[2])
                replies.append(reply)
            elif not sent[0]:  # a PING
                sent.popleft()
            else:
                replies.append(reply)
                if reply[1].decode() == sent[0][-1]:
                    sent.popleft()
        if not connection.can_read():
            return replies, False
        if len(replies) >= BATCH or size >= BATCH_BYTES:
            return replies, True
