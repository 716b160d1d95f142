"""NOTIFY from the application: on a connection of its own, or on a cursor that the caller has."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
from psycopg2.errors import ReadOnlySqlTransaction

from ... import events
from ...errors import BrokerError, BrokerRefused, BrokerUnavailable, PayloadTooLarge
from ...history.spans import Cursor
from . import dsn, envelope

# Seconds for which it is remembered whether a database keeps a history.
REMEMBER_SECONDS = 10.0

_NOTIFY = "SELECT pg_notify(%s, %s)"
_PUBLISH = "SELECT sse_relay.publish(%s, %s, %s)"
_HEAD = "SELECT token, id FROM sse_relay.head()"
# Reads the catalogue only: where there is no history, or none for this role, nothing must fail, because an error
# would end the caller's transaction.
_KEEPS = """
SELECT pg_catalog.has_schema_privilege(n.oid, 'USAGE') AND pg_catalog.has_function_privilege(p.oid, 'EXECUTE')
FROM pg_catalog.pg_namespace n JOIN pg_catalog.pg_proc p ON p.pronamespace = n.oid
WHERE n.nspname = 'sse_relay' AND p.proname = 'publish'
"""

_known: dict[Hashable, tuple[bool, float]] = {}


def execute(cursor: Any, database: Hashable, channel: str, payload: str, own_id: str | None) -> None:
    """
    Publish on a cursor of psycopg2, psycopg or Django, inside whatever transaction it is in.

    Goes into the history where the ``database``, which is known by that key, has been set up for it.

    Raises:
        PayloadTooLarge: If the event is over the limit; nothing was executed then.
        BrokerRefused: If there is a history that the role may not use.

    """
    if _keeps_history(cursor, database):
        events.check_kept_size(payload)
        cursor.execute(_PUBLISH, (channel, payload, own_id))
    else:
        cursor.execute(_NOTIFY, envelope.wrap(channel, payload))


def newest(cursor: Any, database: Hashable) -> str:
    """Return the id of the newest event that the cursor's transaction sees; empty where there is no history."""
    if not _keeps_history(cursor, database):
        return ""
    cursor.execute(_HEAD)
    return str(Cursor(*cursor.fetchone()))


def _keeps_history(cursor: Any, database: Hashable) -> bool:
    keeps, until = _known.get(database, (False, 0.0))
    if time.monotonic() >= until:
        cursor.execute(_KEEPS)
        found = cursor.fetchone()
        if found and not found[0]:
            raise BrokerRefused(
                "the database keeps a history of events, but this role may not add to it; "
                "run the GRANTs for the application that sse-relay-server init-db prints"
            )
        keeps = bool(found)
        _known[database] = keeps, time.monotonic() + REMEMBER_SECONDS
    return keeps


class PostgresPublisher:
    """
    One autocommit connection per process, opened by the first `publish`.

    Threads take turns on it. A forked child opens its own. A connection that died since the last call,
    as in a server restart, is replaced before anything is sent on it, and so is one whose server has become
    a standby behind a pooler. An event that may have been sent is not sent again.
    """

    def __init__(self, url: str) -> None:
        self._dsn = dsn.complete(url, "sse-relay-notify")
        self._connection: Any = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def publish(self, channel: str, payload: str, own_id: str | None = None) -> None:
        """
        Send one event; ``own_id`` is the id that its publisher gave it.

        Raises:
            PayloadTooLarge: If the event is over NOTIFY's limit, or a history's.
            BrokerUnavailable: If PostgreSQL cannot be reached; the event was not sent.
            BrokerError: If the connection broke under way, so that the event may have been sent or not,
                or if PostgreSQL refused it.

        """
        try:
            with self._cursor() as cursor:
                execute(cursor, self._dsn, channel, payload, own_id)
        except BrokerError as exc:
            if not isinstance(exc.__cause__, ReadOnlySqlTransaction):
                raise
            with self._cursor() as cursor:  # of another connection: a standby has taken nothing
                execute(cursor, self._dsn, channel, payload, own_id)

    def check(self, channel: str, payload: str) -> None:
        """Raise now what `publish` would of an event's size: PayloadTooLarge."""
        try:
            envelope.wrap(channel, payload)
        except PayloadTooLarge:
            with self._cursor() as cursor:
                if not _keeps_history(cursor, self._dsn):
                    raise
            events.check_kept_size(payload)

    def newest(self) -> str:
        """
        Return the id of the newest event of the history, or nothing where there is none.

        Raises:
            BrokerUnavailable: If PostgreSQL cannot be reached.

        """
        with self._cursor() as cursor:
            return newest(cursor, self._dsn)

    def pooled(self) -> bool:
        """Return whether a pooler is in between: it invents the process id that it tells its clients."""
        with self._cursor() as cursor:
            cursor.execute("SELECT pg_backend_pid()")
            return bool(cursor.fetchone()[0] != self._connection.info.backend_pid)

    @contextmanager
    def _cursor(self) -> Iterator[Any]:
        with self._lock:
            if self._connection is None or not self._answers():
                self._connect()
            try:
                with self._connection.cursor() as cursor:
                    yield cursor
            except psycopg2.Error as exc:
                _known.pop(self._dsn, None)
                if isinstance(exc, ReadOnlySqlTransaction):
                    self._connection.close()
                elif self._connection.closed:
                    raise BrokerError(f"PostgreSQL went away while an event was sent, it may be lost: {exc}") from exc
                raise BrokerError(f"PostgreSQL did not take the event: {exc}") from exc

    def close(self) -> None:
        """Close the connection; the next `publish` opens another."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _answers(self) -> bool:
        """Whether the connection is alive; what `execute` would ask first is asked here, before there is anything to lose."""
        if not _alive(self._connection):
            return False
        try:
            with self._connection.cursor() as cursor:
                _keeps_history(cursor, self._dsn)
        except psycopg2.Error:
            return False
        return True

    def _connect(self) -> None:
        self._connection = None
        try:
            connection = psycopg2.connect(self._dsn)
        except psycopg2.Error as exc:
            raise BrokerUnavailable(f"PostgreSQL cannot be reached: {' '.join(str(exc).split())}") from exc
        connection.autocommit = True
        self._connection = connection

    def _forget(self) -> None:
        # The session is the parent's. psycopg2 closes no connection that another process opened, so
        # dropping it here sends nothing; the lock may be held by a thread that this process lacks.
        self._connection = None
        self._lock = threading.Lock()


def _alive(connection: Any) -> bool:
    """Whether an idle connection still is one: the server's goodbye, or an end of file, makes it readable."""
    if connection.closed:
        return False
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    try:
        while poller.poll(0):  # first the reason, then the end of file
            connection.poll()
    except psycopg2.Error:
        return False
    return True


def notify_once(address: str, channel: str) -> None:
    """Send an empty NOTIFY from a session of its own, which does not wait for a synchronous standby."""
    connection = psycopg2.connect(address)
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            # For this transaction alone: a pooler lends the session for no longer.
            cursor.execute("SELECT set_config('synchronous_commit', 'off', true), pg_notify(%s, '')", (channel,))
    finally:
        connection.close()
