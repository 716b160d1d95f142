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
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import redis
from tornado.ioloop import IOLoop

from ...errors import BrokerRefused, BrokerUnavailable
from ...history.redis import RedisHistory
from .. import message
from ..message import Message
from ..subscriptions import Subscriptions
from . import cluster, sentinel
from . import url as urls
from .link import BATCH, REFUSED, Link, Links
from .watch import Watch

log = logging.getLogger(__name__)

# So many batches may wait for the loop; then Redis has to keep what comes, and throws out a reader that is too slow.
INBOX = 4
_NAME = "sse-relay-server"


class RedisListener:
    """A `reader.Listener`; ``on_messages`` gets lists of messages in the order of arrival."""

    name = "Redis"

    def __init__(self, url: str, on_messages: Callable[[list[Message], float], None]) -> None:
        self.subscriptions = Subscriptions()
        self._url = url
        self._on_messages = on_messages
        self._loop = IOLoop.current()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="redis-listener")

        # The thread's connections, while there are any.
        self._links: Links | cluster.ClusterLinks | None = None
        self._watch = self._watched()

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
        # To be called once all that is held has been confirmed, and what has come before that: a stream is told of the gap
        # first.
        self._on_up: Callable[[], None] | None = None
        self._early: list[tuple[list[Message], float]] = []

    @property
    def latency(self) -> float | None:
        """Seconds that the last PING took, with several servers that of the slowest; None before the first."""
        links = self._links
        return links.latency if links else None

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
        return RedisHistory(self._url, keep, seconds, lambda: (self._servers() or [""])[0], self._agrees)

    # What runs on the loop.

    def flush(self) -> None:
        """Send soon what is to be subscribed to and what no more."""
        if not self._flush_due:
            self._flush_due = True
            self._loop.add_callback(self._flush)

    async def session(self, on_up: Callable[[], None]) -> None:
        """Connect, and read until the connection is lost, which raises."""
        self._on_up, self._early = on_up, []
        self._commands.clear()  # meant for the connection before this one
        watching = asyncio.create_task(self._watch.run(self._send)) if self._watch else None
        try:
            await asyncio.get_running_loop().run_in_executor(self._executor, self._run)
        except cluster.CHANGING as exc:
            raise BrokerUnavailable(str(exc)) from exc  # a Cluster that is being changed
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
        messages, confirmed, refused = [], [], False
        for kind, name, what in replies:
            if kind == b"message":
                messages.append(message.read(name.decode(errors="replace"), what.decode(errors="replace")))
            elif kind == b"subscribe":
                confirmed.append(name.decode())
            elif kind == cluster.GAP:
                messages.append(Message(name.decode(errors="replace"), None, reason="broker-reconnect"))
            elif kind == REFUSED:
                refused = True
                self.subscriptions.refuse(name, BrokerUnavailable(what))
        self.subscriptions.confirm(confirmed, time.monotonic())
        if confirmed or refused:
            self._flush()  # what waited for these answers
        if self._on_up:
            if messages:
                self._early.append((messages, arrived))
            self._check_up()
        elif messages:
            self._on_messages(messages, arrived)

    def _check_up(self) -> None:
        if self._on_up and not self.subscriptions.waiting:
            on_up, self._on_up = self._on_up, None
            on_up()
            early, self._early = self._early, []
            for messages, arrived in early:
                self._on_messages(messages, arrived)

    # What runs on the thread.

    def _run(self) -> None:
        """Connect and read until the connection is lost, which raises, or until told to end."""
        self._links = links = links_to(self._url, _NAME)
        try:
            self._loop.add_callback(self._began)
            while True:
                woken, ready = links.wait(self._wake)
                if woken:
                    os.eventfd_read(self._wake)
                    commands = [self._commands.popleft() for _ in range(len(self._commands))]
                    if None in commands:
                        return
                    for command in commands:
                        if isinstance(command, Exception):
                            raise command
                    links.send(commands)  # type: ignore[arg-type]
                for link in ready:
                    self._read(links, link)
        finally:
            self._links = None
            links.close()

    def _read(self, links: Links | cluster.ClusterLinks, link: Link) -> None:
        # That it can be read is known from the poll; asking redis-py takes another system call.
        more = True
        while more:
            self._room.acquire()
            replies, more = link.batch()
            self._hand_over(links.checked(replies))

    def _hand_over(self, replies: list[Any]) -> None:
        self._inbox.append((replies, time.monotonic()))
        os.eventfd_write(self._arrived, 1)

    def _servers(self) -> list[str]:
        links = self._links
        return links.servers if links else []

    def _agrees(self, process: str) -> bool:
        """Return whether events come from this server process as well; leave the server if not, as it was replaced."""
        links = self._links
        if links is None or "" in (process, links.process) or process == links.process:
            return True
        self._send(redis.ConnectionError("the address leads to another server now"))
        return False

    def _watched(self) -> Watch | None:
        if sentinel.is_sentinel(self._url):
            sentinels = sentinel.Sentinels(self._url)
            return Watch(lambda: sentinels.left(self._servers()))
        if cluster.is_cluster(self._url):
            topology = cluster.Topology(self._url, partial(urls.pool, self._url, "sse-relay-watch"))
            return Watch(lambda: topology.left(self._servers()))
        return None


def links_to(url: str, client_name: str) -> Links | cluster.ClusterLinks:
    """Connect to the servers of ``url``."""
    if not cluster.is_cluster(url):
        return Links(urls.connection(url, client_name), partial(urls.server_of, url))
    return cluster.ClusterLinks(url, partial(urls.pool, url, client_name), partial(urls.connection, url, client_name))
