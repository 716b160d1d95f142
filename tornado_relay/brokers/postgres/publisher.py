"""NOTIFY from the application: on a connection of its own, or on a cursor that the caller has."""

from __future__ import annotations

import os
import select
import threading
from typing import Any

import psycopg2

from ...errors import BrokerError, BrokerUnavailable
from . import dsn, envelope

_STATEMENT = "SELECT pg_notify(%s, %s)"


def execute(cursor: Any, channel: str, payload: str) -> None:
    """
    Notify on a cursor of psycopg2, psycopg or Django, inside whatever transaction it is in.

    Raises:
        PayloadTooLarge: If the event is over NOTIFY's limit; nothing was executed then.

    """
    cursor.execute(_STATEMENT, envelope.wrap(channel, payload))


class PostgresPublisher:
    """
    One autocommit connection per process, opened by the first `publish`.

    Threads take turns on it. A forked child opens its own. A connection that died since the last call,
    as in a server restart, is replaced before anything is sent on it.
    """

    def __init__(self, url: str) -> None:
        self._dsn = dsn.complete(url, "sse-relay-notify")
        self._connection: Any = None
        self._lock = threading.Lock()
        os.register_at_fork(after_in_child=self._forget)

    def publish(self, channel: str, payload: str) -> None:
        """
        Send one event.

        Raises:
            PayloadTooLarge: If the event is over NOTIFY's limit.
            BrokerUnavailable: If PostgreSQL cannot be reached; the event was not sent.
            BrokerError: If the connection broke under way, so that the event may have been sent or not,
                or if PostgreSQL refused it.

        """
        arguments = envelope.wrap(channel, payload)
        with self._lock:
            if self._connection is None or not _alive(self._connection):
                self._connect()
            try:
                with self._connection.cursor() as cursor:
                    cursor.execute(_STATEMENT, arguments)
            except psycopg2.Error as exc:
                if self._connection.closed:
                    raise BrokerError(f"PostgreSQL went away while an event was sent, it may be lost: {exc}") from exc
                raise BrokerError(f"PostgreSQL did not take the event: {exc}") from exc

    def close(self) -> None:
        """Close the connection; the next `publish` opens another."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

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
