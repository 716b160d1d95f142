"""One asynchronous LISTEN connection for a whole worker, its descriptor on the IOLoop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_WRITE
from tornado.ioloop import IOLoop

from ...errors import BrokerRefused, BrokerUnavailable
from ..subscriptions import Subscriptions
from . import dsn, envelope

log = logging.getLogger(__name__)

# A LISTEN for each of 1,000 channels in one round trip: one by one, 10,000 take minutes.
BATCH = 1000
CONNECT_TIMEOUT = 10.0

# A server that is starting, stopping or full will be another in a moment; every other FATAL at connect
# (password, database, pg_hba.conf) needs a person. libpq gives no SQLSTATE here, only this text.
_PASSING = ("starting up", "shutting down", "not yet accepting", "too many", "remaining connection slots", "recovery")


class PostgresListener:
    """A `reader.Listener`; ``on_messages`` gets lists of (channel, payload) in the order of arrival."""

    name = "PostgreSQL"

    def __init__(self, url: str, on_messages: Callable[[list[tuple[str, str]]], None]) -> None:
        self.subscriptions = Subscriptions()
        self._dsn = dsn.complete(url, "sse-relay-server")
        self._on_messages = on_messages
        self._loop = IOLoop.current()

        self._connection: Any = None
        # The descriptor that is on the loop, and for which events.
        self._fileno = -1
        self._watching = 0
        # Set while a command is under way: connecting, or one batch of LISTEN and UNLISTEN.
        self._command: asyncio.Future[None] | None = None
        # What ended the connection, seen by `_serve` when it next looks.
        self._error: psycopg2.Error | None = None
        # Set when `_serve` has something to look at.
        self._work = asyncio.Event()

    def audible(self, channels: Iterable[str]) -> tuple[str, ...]:
        """Return ``channels`` and their lower-case twins."""
        return envelope.audible(channels)

    def target(self, channel: str) -> str:
        """Return the channel of NOTIFY on which events of ``channel`` travel."""
        return envelope.physical(channel)

    def flush(self) -> None:
        """Send soon what is to be listened to and what no more."""
        self._work.set()

    async def session(self, on_up: Callable[[], None]) -> None:
        """Connect, and read until the connection is lost, which raises."""
        self._error = None
        try:
            await asyncio.wait_for(self._connect(), CONNECT_TIMEOUT)
            await self._send_all()
            on_up()
            await self._serve()
        except asyncio.TimeoutError as exc:
            raise BrokerUnavailable(f"no answer in {CONNECT_TIMEOUT:.0f} s") from exc
        except (psycopg2.Error, OSError) as exc:
            text = " ".join(str(exc).split()) or type(exc).__name__
            refused = "FATAL:" in text and not any(word in text for word in _PASSING)
            raise (BrokerRefused if refused else BrokerUnavailable)(text) from exc
        finally:
            self._unwatch()
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    async def _connect(self) -> None:
        address = await asyncio.get_running_loop().run_in_executor(None, dsn.resolved, self._dsn)
        self._connection = psycopg2.connect(address, async_=True)
        await self._finish_command()

    async def _serve(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            if self._error:
                raise self._error
            await self._send_all()

    async def _send_all(self) -> None:
        while True:
            add, drop = self.subscriptions.take(BATCH)
            if not add and not drop:
                return
            commands = [f"UNLISTEN {_quoted(name)}" for name in drop] + [f"LISTEN {_quoted(name)}" for name in add]
            cursor = self._connection.cursor()
            cursor.execute(";".join(commands))
            await self._finish_command()
            cursor.close()
            self.subscriptions.confirm(add)

    async def _finish_command(self) -> None:
        self._command = asyncio.get_running_loop().create_future()
        self._advance()
        try:
            await self._command
        finally:
            self._command = None

    def _advance(self) -> None:
        try:
            state = self._connection.poll()
        except (psycopg2.Error, UnicodeError) as exc:
            self._fail(exc if isinstance(exc, psycopg2.Error) else psycopg2.DataError(str(exc)))
            return
        if self._connection.notifies:
            self._deliver(self._connection.notifies)
        self._watch(IOLoop.WRITE if state == POLL_WRITE else IOLoop.READ)
        if state == POLL_OK and self._command and not self._command.done():
            self._command.set_result(None)

    def _fail(self, error: psycopg2.Error) -> None:
        self._unwatch()
        self._error = error
        self._work.set()
        if self._command and not self._command.done():
            self._command.set_exception(error)

    def _deliver(self, notifies: list[Any]) -> None:
        messages = []
        for notify in notifies:
            message = envelope.unwrap(notify.channel, notify.payload)
            if message is None:
                log.warning("dropped a notification on %s that is no envelope", envelope.SHARED_CHANNEL)
            else:
                messages.append(message)
        notifies.clear()
        self._on_messages(messages)

    def _watch(self, events: int) -> None:
        # libpq may open another socket for another address of the host while it connects.
        fileno = self._connection.fileno()
        if fileno != self._fileno or events != self._watching:
            self._unwatch()
            self._fileno, self._watching = fileno, events
            self._loop.add_handler(fileno, lambda _fd, _events: self._advance(), events)

    def _unwatch(self) -> None:
        if self._fileno >= 0:
            self._loop.remove_handler(self._fileno)
            self._fileno = -1


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
