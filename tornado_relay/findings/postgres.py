"""What there is to know of PostgreSQL."""

from __future__ import annotations

import secrets
import select
import time
from collections.abc import Iterator
from typing import Any

from ..errors import RelayError
from ..schema import installed, versions
from ..settings import Settings
from .finding import FAILURE, OK, TIMEOUT, WARNING, Finding, of_clock, of_room

# A queue of notifications that is this full does not empty: something keeps it.
FULL_QUEUE = 0.01
# Beyond their time by this factor, events are not deleted as they should be; and some minutes, for a new relay.
LATE = 1.25
LATE_SECONDS = 300

_ROOM = """
SELECT least(
    current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
        - coalesce(current_setting('reserved_connections', true)::int, 0)
        - (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
    (SELECT d.datconnlimit - (SELECT count(*) FROM pg_stat_activity a WHERE a.datname = d.datname)
        FROM pg_database d WHERE d.datname = current_database() AND d.datconnlimit >= 0),
    (SELECT r.rolconnlimit - (SELECT count(*) FROM pg_stat_activity a WHERE a.usename = r.rolname)
        FROM pg_roles r WHERE r.rolname = current_user AND r.rolconnlimit >= 0)
), current_setting('max_connections')
"""
_OURS = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'sse-relay-server'"
_HISTORY = """
SELECT pg_size_pretty(pg_total_relation_size('sse_relay.event')),
    (SELECT reltuples::bigint FROM pg_class WHERE oid = 'sse_relay.event'::regclass),
    (SELECT extract(epoch FROM clock_timestamp() - at) FROM sse_relay.event ORDER BY id LIMIT 1),
    (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relid = 'sse_relay.event'::regclass)
"""


def of_postgres(settings: Settings, *, used: bool) -> Iterator[Finding]:
    """
    Send an event through PostgreSQL, and if the relay uses it, look at what limits it there.

    Raises:
        RelayError: If it does not come.

    """
    import psycopg2  # noqa: PLC0415

    from ..brokers.postgres import dsn  # noqa: PLC0415

    try:
        connection = psycopg2.connect(dsn.complete(settings.listen_url, "sse-relay-check"))
    except psycopg2.Error as exc:
        raise RelayError(f"cannot be reached: {exc}") from exc
    try:
        connection.autocommit = True
        with connection.cursor() as cursor:
            yield Finding(OK, "postgres", _event(settings, connection, cursor))
            if used:
                yield from _limits(settings, cursor)
                yield from _history(settings, cursor)
    except psycopg2.Error as exc:
        raise RelayError(str(exc)) from exc
    finally:
        connection.close()


def _event(settings: Settings, connection: Any, cursor: Any) -> str:
    from ..brokers.postgres import dsn  # noqa: PLC0415
    from ..brokers.postgres.publisher import PostgresPublisher  # noqa: PLC0415

    channel = f"sse_relay_check_{secrets.token_hex(8)}"
    publisher = PostgresPublisher(settings.database_url)
    try:
        cursor.execute("SHOW server_version")
        (version,) = cursor.fetchone() or ("?",)
        cursor.execute(f'LISTEN "{channel}"')
        started = time.monotonic()
        publisher.publish(channel, "{}")
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        # A pooler in transaction mode may have handed us the notifications of another.
        while not any(notify.channel == channel for notify in connection.notifies):
            if not poller.poll(max(0.0, started + TIMEOUT - time.monotonic()) * 1000):
                raise RelayError(
                    "a NOTIFY did not come back to LISTEN; is a pooler in transaction mode in between? "
                    "Set RELAY_LISTEN_DATABASE_URL to the server itself"
                )
            connection.poll()
        taken = time.monotonic() - started
        place = dsn.shown(settings.listen_url)
        if "," in place:
            place += f", of which {connection.info.host}:{connection.info.port} takes writes"
        way = f" through the pooler at {dsn.shown(settings.database_url)}" if publisher.pooled() else ""
        return f"{place}, version {version}: an event took {taken * 1000:.1f} ms{way}"
    finally:
        publisher.close()


def _limits(settings: Settings, cursor: Any) -> Iterator[Finding]:
    (room, limit), (ours,) = _row(cursor, _ROOM), _row(cursor, _OURS)
    needed = 2 * settings.worker_count * (2 if settings.publish_token else 1)
    yield from of_room(
        "postgres",
        f"max_connections = {limit} (or a limit of the role or the database)",
        room + ours,
        needed,
        "raise max_connections, have the application use a pooler, or start fewer workers",
    )
    (encoding,) = _row(cursor, "SHOW server_encoding")
    if encoding != "UTF8":
        yield Finding(
            WARNING,
            "postgres.encoding",
            f"the database's encoding is {encoding}: what it has no characters for cannot be an event",
            "use a database that was created with ENCODING 'UTF8'",
        )
    (queue,) = _row(cursor, "SELECT pg_notification_queue_usage()")
    text = f"{queue:.1%} of the queue of notifications is taken"
    if queue < FULL_QUEUE:
        yield Finding(OK, "postgres.queue", text)
    else:
        yield Finding(
            WARNING,
            "postgres.queue",
            f"{text}: a session that listens has had a transaction open for long; when it is full, NOTIFY fails",
            "SELECT pid, xact_start, query FROM pg_stat_activity WHERE state LIKE 'idle in%', and end the oldest",
        )
    before = time.time()
    (clock,) = _row(cursor, "SELECT extract(epoch FROM clock_timestamp())")
    yield from of_clock("postgres", float(clock) - (before + time.time()) / 2)


def _history(settings: Settings, cursor: Any) -> Iterator[Finding]:
    found, newest = installed(cursor), versions()[-1][0]
    name = "postgres.history"
    if not found:
        if settings.history:
            text = f"RELAY_HISTORY is {settings.history}, but the database keeps no history: nothing resumes"
            yield Finding(FAILURE, name, text, "sse-relay-server init-db")
        return
    if not settings.history:
        text = "the database keeps a history, but RELAY_HISTORY is 0: nothing resumes, and nobody deletes what is old"
        yield Finding(WARNING, name, text, "set RELAY_HISTORY, such as RELAY_HISTORY=1000")
    elif found < newest:
        text = f"the database has version {found} of the history, {newest} is the newest"
        yield Finding(WARNING, name, text, "sse-relay-server init-db")
    size, events, oldest, dead = _row(cursor, _HISTORY)
    text = f"the history takes {size}, {'some' if events < 0 else events} events, {dead} deleted ones not yet vacuumed"
    late = oldest is not None and float(oldest) > LATE * settings.history_seconds + LATE_SECONDS
    if settings.history and late:
        yield Finding(
            WARNING,
            "postgres.pruning",
            f"{text}; the oldest is {float(oldest):.0f} s old, RELAY_HISTORY_SECONDS is {settings.history_seconds:.0f}",
            "see that a relay runs with RELAY_HISTORY set, and what its log says of looking after the history",
        )
    elif dead > max(100_000, 2 * events):
        yield Finding(
            WARNING,
            "postgres.pruning",
            f"{text}: autovacuum does not keep up, and reading takes longer and longer",
            "look for transactions that stay open (pg_stat_activity), and at autovacuum's settings",
        )
    else:
        yield Finding(OK, "postgres.pruning", text)


def _row(cursor: Any, statement: str) -> tuple[Any, ...]:
    cursor.execute(statement)
    row: tuple[Any, ...] = cursor.fetchone()
    return row
