"""One asynchronous LISTEN connection for a whole worker, its descriptor on the IOLoop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_WRITE, STATUS_READY
from tornado.ioloop import IOLoop

from ...errors import BrokerError, BrokerRefused, BrokerUnavailable
from ..subscriptions import Subscriptions
from . import dsn, envelope

log = logging.getLogger(__name__)

# A LISTEN for each of 1,000 channels in one round trip: one by one, 10,000 take minutes.
BATCH = 1000
CONNECT_TIMEOUT = 5.0
"""Seconds for one address."""
ANSWER_TIMEOUT = 10.0
"""Seconds for one batch."""

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

    @staticmethod
    def check(url: str) -> None:
        """Raise SettingsError if libpq cannot read ``url``."""
        dsn.complete(url, "")

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
        try:
            await self._connect()
            await self._send_all()
            on_up()
            await self._serve()
        except asyncio.TimeoutError as exc:
            raise BrokerUnavailable("no answer in time") from exc
        except (psycopg2.Error, OSError) as exc:
            raise _broker_error(exc) from exc
        finally:
            self._disconnect()

    async def _connect(self) -> None:
        """Connect to the first address that lets us; raise why the last did not."""
        errors: list[BrokerError] = []
        for address in await asyncio.get_running_loop().run_in_executor(None, dsn.addresses, self._dsn):
            try:
                self._error = None
                self._connection = psycopg2.connect(address, async_=True)
                await asyncio.wait_for(self._finish_command(), CONNECT_TIMEOUT)
            except asyncio.TimeoutError:
                errors.append(BrokerUnavailable(f"no answer in {CONNECT_TIMEOUT:.0f} s"))
            except psycopg2.Error as exc:
                errors.append(_broker_error(exc))
            else:
                return
            self._disconnect()
        # Of several servers one may refuse and another be away: then trying again can help.
        raise next((error for error in errors if isinstance(error, BrokerUnavailable)), errors[-1])

    def _disconnect(self) -> None:
        self._unwatch()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

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
            await self._execute("UNLISTEN", drop)
            try:
                await self._execute("LISTEN", add)
            except psycopg2.DataError:
                # A name that the database's encoding has no form for. It must fail alone.
                for name in add:
                    try:
                        await self._execute("LISTEN", [name])
                    except psycopg2.DataError as exc:
                        self.subscriptions.refuse(name, _broker_error(exc))
                    else:
                        self.subscriptions.confirm([name])
            else:
                self.subscriptions.confirm(add)

    async def _execute(self, command: str, names: list[str]) -> None:
        """Run ``command`` for each of ``names``, all in one round trip."""
        if names:
            quoted = ['"' + name.replace('"', '""') + '"' for name in names]
            cursor = self._connection.cursor()
            cursor.execute(";".join(f"{command} {name}" for name in quoted))
            await asyncio.wait_for(self._finish_command(), ANSWER_TIMEOUT)
            cursor.close()

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
        except psycopg2.Error as exc:
            self._fail(exc)
            return
        if self._connection.notifies:
            self._deliver(self._connection.notifies)
        self._watch(IOLoop.WRITE if state == POLL_WRITE else IOLoop.READ)
        if state == POLL_OK and self._command and not self._command.done():
            self._command.set_result(None)

    def _fail(self, error: psycopg2.Error) -> None:
        if self._connection.closed or self._command is None:
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
        # While it connects, libpq may close its socket and open another with the same number.
        if events != self._watching or self._connection.status != STATUS_READY:
            self._unwatch()
            self._fileno, self._watching = self._connection.fileno(), events
            self._loop.add_handler(self._fileno, lambda _fd, _events: self._advance(), events)

    def _unwatch(self) -> None:
        if self._fileno >= 0:
            self._loop.remove_handler(self._fileno)
            self._fileno, self._watching = -1, 0


def _broker_error(error: Exception) -> BrokerError:
    text = " ".join(str(error).split()) or type(error).__name__
    refused = "FATAL:" in text and not any(word in text for word in _PASSING)
    return (BrokerRefused if refused else BrokerUnavailable)(text)
