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
from ..backoff import Backoff
from ..subscriptions import Subscriptions
from . import dsn, envelope

log = logging.getLogger(__name__)

# A LISTEN for each of 1,000 channels in one round trip: one by one, 10,000 take minutes.
BATCH = 1000
CONNECT_TIMEOUT = 10.0
CONFIRM_TIMEOUT = 5.0

# A server that is starting, stopping or full will be another in a moment; every other FATAL at connect
# (password, database, pg_hba.conf) needs a person. libpq gives no SQLSTATE here, only this text.
_PASSING = ("starting up", "shutting down", "not yet accepting", "too many", "remaining connection slots", "recovery")


class PostgresReader:
    """
    Gives a worker the notifications of the channels that its streams are on.

    ``on_messages`` gets a list of (channel, payload) in the order of arrival; ``on_gap`` is called when
    the connection is back after a loss, once all channels are listened to again.
    """

    name = "PostgreSQL"

    def __init__(
        self, url: str, on_messages: Callable[[list[tuple[str, str]]], None], on_gap: Callable[[], None]
    ) -> None:
        self._dsn = dsn.complete(url, "sse-relay-server")
        self._on_messages = on_messages
        self._on_gap = on_gap
        self._loop = IOLoop.current()
        self._subscriptions = Subscriptions()
        self._backoff = Backoff()

        # Why streams cannot be served now, or None while the connection is up.
        self.trouble: str | None = "not connected yet"

        self._connection: Any = None
        self._fileno = -1
        self._watching = 0
        # Set while a command is under way: connecting, or one batch of LISTEN and UNLISTEN.
        self._command: asyncio.Future[None] | None = None
        # What ended the connection, seen by `_serve` when it next looks.
        self._error: Exception | None = None
        # Set when `_serve` has something to look at.
        self._work = asyncio.Event()

    def audible(self, channels: Iterable[str]) -> tuple[str, ...]:
        """Return the channels whose events a stream on ``channels`` hears."""
        return envelope.audible(channels)

    async def subscribe(self, channels: Iterable[str]) -> None:
        """
        Return once PostgreSQL has confirmed LISTEN on ``channels``; pair it with `release`.

        Raises:
            BrokerUnavailable: If there is no connection, or no answer in time. Nothing is held then.

        """
        if self.trouble:
            raise BrokerUnavailable(self.trouble)
        targets = [envelope.physical(channel) for channel in channels]
        waiters = self._subscriptions.acquire(targets)
        if not waiters:
            return
        self._work.set()
        done, pending = await asyncio.wait(waiters, timeout=CONFIRM_TIMEOUT)
        failed = next((waiter.exception() for waiter in done if waiter.exception()), None)
        if pending or failed:
            self._subscriptions.release(targets, self._loop.time())
            raise BrokerUnavailable(f"PostgreSQL did not confirm LISTEN: {failed or 'no answer in time'}")

    def release(self, channels: Iterable[str]) -> None:
        """End a stream's subscription; UNLISTEN follows some seconds after a channel's last stream."""
        self._subscriptions.release([envelope.physical(channel) for channel in channels], self._loop.time())

    def sweep(self) -> None:
        """Drop what has been idle for long enough; called every second or so."""
        if self._subscriptions.sweep(self._loop.time()) and not self.trouble:
            self._work.set()

    async def run(self, on_first: Callable[[BrokerRefused | None], None]) -> None:
        """
        Stay connected, for ever. Cancel it to end.

        ``on_first`` is called once, after the first try to connect: with an error if PostgreSQL refused
        in a way that trying again cannot mend.
        """
        connected_before, first = False, True
        try:
            while True:
                refused = None
                try:
                    await self._connect()
                    self._backoff.reset()
                    await self._send_all()
                    self.trouble = None
                    log.info("PostgreSQL connected, listening on %d channels", len(self._subscriptions))
                    if connected_before:
                        self._on_gap()
                    connected_before = True
                    if first:
                        first = False
                        on_first(None)
                    await self._serve()
                except (psycopg2.Error, OSError, asyncio.TimeoutError) as exc:
                    self.trouble = _one_line(exc)
                    refused = _refused(self.trouble)
                self._disconnect()
                if first:
                    first = False
                    on_first(refused)
                delay = self._backoff.next()
                log.warning("PostgreSQL is not reachable, next try in %.1f s: %s", delay, self.trouble)
                await asyncio.sleep(delay)
        finally:
            self._disconnect()

    async def _connect(self) -> None:
        self._error = None
        address = await asyncio.wait_for(
            asyncio.get_running_loop().run_in_executor(None, dsn.resolved, self._dsn), CONNECT_TIMEOUT
        )
        self._connection = psycopg2.connect(address, async_=True)
        await asyncio.wait_for(self._finish_command(), CONNECT_TIMEOUT)

    async def _serve(self) -> None:
        while True:
            await self._work.wait()
            self._work.clear()
            if self._error:
                raise self._error
            await self._send_all()

    async def _send_all(self) -> None:
        while True:
            add, drop = self._subscriptions.take(BATCH)
            if not add and not drop:
                return
            commands = [f"UNLISTEN {_quoted(name)}" for name in drop] + [f"LISTEN {_quoted(name)}" for name in add]
            cursor = self._connection.cursor()
            cursor.execute(";".join(commands))
            await self._finish_command()
            cursor.close()
            self._subscriptions.confirm(add)

    async def _finish_command(self) -> None:
        self._command = asyncio.get_running_loop().create_future()
        self._advance()
        try:
            await self._command
        finally:
            self._command = None

    def _on_ready(self, fd: int, events: int) -> None:
        self._advance()

    def _advance(self) -> None:
        connection = self._connection
        try:
            state = connection.poll()
        except (psycopg2.Error, UnicodeError) as exc:
            self._fail(exc if isinstance(exc, psycopg2.Error) else psycopg2.DataError(str(exc)))
            return
        if connection.notifies:
            self._deliver(connection.notifies)
        self._watch(IOLoop.WRITE if state == POLL_WRITE else IOLoop.READ)
        if state == POLL_OK and self._command and not self._command.done():
            self._command.set_result(None)

    def _watch(self, events: int) -> None:
        # libpq may open another socket for another address of the host while it connects.
        fileno = self._connection.fileno()
        if fileno == self._fileno and events == self._watching:
            return
        self._unwatch()
        self._fileno, self._watching = fileno, events
        self._loop.add_handler(fileno, self._on_ready, events)

    def _unwatch(self) -> None:
        if self._fileno >= 0:
            self._loop.remove_handler(self._fileno)
            self._fileno = -1

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

    def _fail(self, error: psycopg2.Error) -> None:
        self._unwatch()
        self._error = error
        self._work.set()
        if self._command and not self._command.done():
            self._command.set_exception(error)

    def _disconnect(self) -> None:
        self.trouble = self.trouble or "connection closed"
        self._unwatch()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._subscriptions.lost(BrokerUnavailable(self.trouble))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _refused(trouble: str) -> BrokerRefused | None:
    if "FATAL:" in trouble and not any(word in trouble for word in _PASSING):
        return BrokerRefused(f"PostgreSQL refused the connection: {trouble}")
    return None
