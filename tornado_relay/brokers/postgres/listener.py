"""One asynchronous LISTEN connection for a whole worker, its descriptor on the IOLoop."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import psycopg2
from psycopg2.extensions import POLL_OK, POLL_WRITE, STATUS_READY
from tornado.ioloop import IOLoop

from ...errors import BrokerError, BrokerRefused, BrokerUnavailable
from ...history.postgres import PostgresHistory
from ..message import Message
from ..subscriptions import Subscriptions
from . import dsn, envelope
from .large_payloads import LargePayloads
from .publisher import notify_once

log = logging.getLogger(__name__)

# A LISTEN for each of 1,000 channels in one round trip: one by one, 10,000 take minutes.
BATCH = 1000
CONNECT_TIMEOUT = 5.0
"""Seconds for one address."""
ANSWER_TIMEOUT = 10.0
"""Seconds for one batch."""
PROBE_SECONDS = 10.0
"""A connection on which nothing came for this long is sent a NOTIFY of its own, and given as long as below."""
PROBE_TIMEOUT = 5.0

# A page of the history is read in the order of an index, and no more of it than is asked for; compiling such a query took
# a hundred times as long as running it. A probe, a deletion or a span that a crash takes is made again, so none waits for
# a synchronous standby: where that is away, each would keep its session for as long, even one that we have given up.
_SET_UP = "SET jit = off; SET enable_bitmapscan = off; SET synchronous_commit = off"

_HAS_HISTORY = "SELECT to_regnamespace('sse_relay') IS NOT NULL"

# A server that is starting, stopping or full will be another in a moment; every other FATAL at connect
# (password, database, pg_hba.conf) needs a person. libpq gives no SQLSTATE here, only this text.
_PASSING = re.compile(
    "starting up|shutting down|not yet accepting|system is not accepting|too many|remaining connection slots|recovery"
    "|terminating|cancel|timeout|out of memory|no more connections|has been failing|could not fork|try again"
)


class PostgresListener:
    """A `reader.Listener`; ``on_messages`` gets lists of messages in the order of arrival."""

    name = "PostgreSQL"

    def __init__(self, url: str, on_messages: Callable[[list[Message], float], None]) -> None:
        self.subscriptions = Subscriptions()
        self._dsn = dsn.complete(url, "sse-relay-server")
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
        # Statements that wait for their turn, each with its arguments and who wants the rows.
        self._queries: deque[tuple[str, Any, asyncio.Future[list[tuple[Any, ...]]]]] = deque()
        # Messages that come before all channels are listened to; None from then on. Streams are told of the gap first.
        self._early: list[Message] | None = None
        self._large = LargePayloads(self.query, on_messages)
        self._reads_history = False
        # The channel of the NOTIFYs to ourselves, and who waits for one.
        self._probe_channel = f"sse_relay_probe_{secrets.token_hex(8)}"
        self._probed: asyncio.Future[None] | None = None
        self._heard_at = 0.0

        self.latency: float | None = None
        """Seconds that the last NOTIFY to ourselves took."""

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

    def history(self, keep: int, seconds: float) -> PostgresHistory:
        """Return the history of this broker, which is read on this connection."""
        self._reads_history = True
        return PostgresHistory(self.query, keep, seconds)

    def flush(self) -> None:
        """Send soon what is to be listened to and what no more."""
        self._work.set()

    async def query(self, statement: str, arguments: Any) -> list[tuple[Any, ...]]:
        """
        Run a statement when its turn comes, and return its rows.

        Raises:
            BrokerRefused: If PostgreSQL refuses it.
            BrokerUnavailable: If the connection is lost before the answer.

        """
        if self._connection is None:
            raise BrokerUnavailable("not connected")
        future: asyncio.Future[list[tuple[Any, ...]]] = asyncio.get_running_loop().create_future()
        self._queries.append((statement, arguments, future))
        self._work.set()
        return await future

    async def session(self, on_up: Callable[[], None]) -> None:
        """Connect, and read until the connection is lost, which raises."""
        self._early = []
        try:
            address = await self._connect()
            await self._check_pooler(address)
            await self._run(_SET_UP)
            if not self._reads_history and (await self._run(_HAS_HISTORY))[0][0]:
                log.warning(
                    "the database keeps a history of events, but RELAY_HISTORY is 0: no stream resumes, and nobody "
                    "deletes what is old; set RELAY_HISTORY, such as RELAY_HISTORY=1000"
                )
            while await self._send_batch():
                pass
            on_up()
            early, self._early = self._early, None
            self._large.pass_on(early, self._heard_at)
            await self._serve()
        except asyncio.TimeoutError as exc:
            raise BrokerUnavailable("no answer in time") from exc
        except (psycopg2.Error, OSError) as exc:
            raise _broker_error(exc) from exc
        finally:
            self._disconnect()

    async def _connect(self) -> str:
        """Connect to the first address that lets us LISTEN, and return it; raise why none does."""
        errors: list[BrokerError] = []
        addresses = await asyncio.get_running_loop().run_in_executor(None, dsn.addresses, self._dsn)
        for address in addresses:
            try:
                self._error = None
                self._connection = psycopg2.connect(address, async_=True)
                await asyncio.wait_for(self._finish_command(), CONNECT_TIMEOUT)
                # A standby may let us in, and fails here.
                await self._execute("LISTEN", [self._probe_channel])
            except asyncio.TimeoutError:
                errors.append(BrokerUnavailable(f"no answer from {dsn.shown(address)} in time"))
            except psycopg2.Error as exc:
                errors.append(_broker_error(exc))
            else:
                if len(addresses) > 1:
                    log.info("connected to %s", dsn.shown(address))
                return address
            self._disconnect()
        # Of several servers one may refuse and another be away: then trying again can help.
        kind = next((type(error) for error in errors if isinstance(error, BrokerUnavailable)), BrokerRefused)
        raise kind("; ".join(dict.fromkeys(map(str, errors))))

    def _disconnect(self) -> None:
        self._unwatch()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._large.clear()
        while self._queries:
            _, _, future = self._queries.popleft()
            if not future.done():
                future.set_exception(BrokerUnavailable("the connection was lost"))

    async def _serve(self) -> None:
        self._heard_at = time.monotonic()
        while True:
            quiet_for = time.monotonic() - self._heard_at
            try:
                await asyncio.wait_for(self._work.wait(), max(0.0, PROBE_SECONDS - quiet_for))
            except asyncio.TimeoutError:
                if time.monotonic() - self._heard_at >= PROBE_SECONDS:
                    await self._probe()
                continue
            self._work.clear()
            if self._error:
                raise self._error
            # By turns, so that neither waits for all of the other.
            while await self._send_batch() or self._queries:
                if self._queries:
                    await self._answer(*self._queries.popleft())

    async def _answer(self, statement: str, arguments: Any, future: asyncio.Future[list[tuple[Any, ...]]]) -> None:
        try:
            rows = await self._run(statement, arguments)
        except (psycopg2.Error, asyncio.TimeoutError, asyncio.CancelledError) as exc:
            ends = not isinstance(exc, psycopg2.Error) or self._connection.closed
            if not future.done():
                text = " ".join(str(exc).split()) or "no answer in time"
                future.set_exception(BrokerUnavailable(text) if ends else BrokerRefused(text))
            if ends:
                raise
        else:
            if not future.done():
                future.set_result(rows)

    async def _probe(self) -> None:
        """Send a NOTIFY to ourselves, and fail if it does not come."""
        self._probed = asyncio.get_running_loop().create_future()
        begin = time.monotonic()
        try:
            await self._run("SELECT pg_notify(%s, '')", (self._probe_channel,), PROBE_TIMEOUT)
        except asyncio.TimeoutError as exc:
            raise BrokerUnavailable(f"no answer in {PROBE_TIMEOUT:.0f} s; the connection is dead") from exc
        await self._await_probe(self._probed)
        self.latency = time.monotonic() - begin
        log.debug("a NOTIFY to ourselves took %.1f ms", self.latency * 1000)

    async def _await_probe(self, probed: asyncio.Future[None]) -> None:
        try:
            await asyncio.wait_for(probed, PROBE_TIMEOUT)
        except asyncio.TimeoutError as exc:
            raise BrokerUnavailable(
                "a NOTIFY did not come back to LISTEN, as through a pooler in transaction mode; "
                "set RELAY_LISTEN_DATABASE_URL to the server itself"
            ) from exc

    async def _check_pooler(self, address: str) -> None:
        """
        Fail if a pooler gives our LISTEN to whatever session is free.

        A pooler invents the process id that it tells its clients, so it can be told by that. Whether it
        keeps a session for us is seen by a NOTIFY of another one: in transaction mode, what comes for a
        session outside of a transaction reaches nobody.
        """
        ((pid,),) = await self._run("SELECT pg_backend_pid()")
        if pid == self._connection.info.backend_pid:
            return
        self._probed = asyncio.get_running_loop().create_future()
        notifying = asyncio.get_running_loop().run_in_executor(None, notify_once, address, self._probe_channel)
        try:
            await asyncio.wait_for(notifying, ANSWER_TIMEOUT)
        except asyncio.TimeoutError as exc:
            raise BrokerUnavailable(
                "the pooler has no free session for a NOTIFY; make its pool larger, "
                "or set RELAY_LISTEN_DATABASE_URL to the server itself"
            ) from exc
        try:
            await self._await_probe(self._probed)
        except BrokerUnavailable as exc:
            raise BrokerRefused(str(exc)) from exc

    async def _send_batch(self) -> bool:
        """Drop and add channels, some of those that are due; return whether there were any."""
        add, drop = self.subscriptions.take(BATCH)
        await self._execute("UNLISTEN", drop)
        await self._listen(add)
        return bool(add or drop)

    async def _listen(self, names: list[str]) -> None:
        try:
            await self._execute("LISTEN", names)
        except psycopg2.DataError as exc:
            # A name that the database's encoding has no form for must fail alone, so each half is tried.
            if len(names) == 1:
                self.subscriptions.refuse(names[0], _broker_error(exc))
            else:
                await self._listen(names[: len(names) // 2])
                await self._listen(names[len(names) // 2 :])
        else:
            self.subscriptions.confirm(names, time.monotonic())

    async def _execute(self, command: str, names: list[str]) -> None:
        """Run ``command`` for each of ``names``, all in one round trip."""
        if names:
            quoted = ['"' + name.replace('"', '""') + '"' for name in names]
            await self._run(";".join(f"{command} {name}" for name in quoted))

    async def _run(
        self, statement: str, arguments: Any = None, timeout: float = ANSWER_TIMEOUT
    ) -> list[tuple[Any, ...]]:
        cursor = self._connection.cursor()
        try:
            cursor.execute(statement, arguments)
            await asyncio.wait_for(self._finish_command(), timeout)
            return cursor.fetchall() if cursor.description else []
        finally:
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
            if state == POLL_OK and self._command:
                # Notifications that came in one piece with the answer wait in libpq, and its socket has no more to read.
                self._connection.poll()
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
        self._heard_at = time.monotonic()
        messages = []
        for notify in notifies:
            if notify.channel == self._probe_channel:
                if self._probed and not self._probed.done():
                    self._probed.set_result(None)
                continue
            message = envelope.unwrap(notify.channel, notify.payload)
            if message is None:
                log.warning("dropped a notification on %s that is no envelope", envelope.SHARED_CHANNEL)
            else:
                messages.append(message)
        notifies.clear()
        if self._early is not None:
            self._early += messages
        else:
            self._large.pass_on(messages, self._heard_at)

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
    refused = "FATAL:" in text and not _PASSING.search(text)
    return (BrokerRefused if refused else BrokerUnavailable)(text)
