"""``sse-relay-server init-db``: the history's tables and functions in PostgreSQL, version by version."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import BrokerError, BrokerRefused, BrokerUnavailable

_FOLDER = Path(__file__).parent / "sql"
_RECORD = "INSERT INTO sse_relay.version (version) VALUES (%s)"
# Two that run at the same time must not both find nothing there.
_LOCK = 8319104477


def versions() -> list[tuple[int, str]]:
    """Return number and SQL of each version, in the order in which they build on each other."""
    return [(int(path.name.partition("_")[0]), path.read_text()) for path in sorted(_FOLDER.glob("[0-9]*_*.sql"))]


def grants() -> str:
    """Return the GRANTs that roles other than the owner need, for ``application_role`` and ``relay_role``."""
    return (_FOLDER / "grants.sql").read_text()


def script() -> str:
    """Return all of it as one text for psql, for a database that has none of it."""
    parts = [f"{text}\n{_RECORD.replace('%s', str(number))};\n" for number, text in versions()]
    remarks = "".join(f"-- {line}\n" for line in grants().splitlines())
    return "BEGIN;\nSET LOCAL standard_conforming_strings = on;\n\n" + "\n".join(parts) + "\nCOMMIT;\n\n" + remarks


def install(url: str) -> Iterator[str]:
    """
    Bring the database at ``url`` up to the newest version, and yield a line for what is done.

    All of it is one transaction; a database that is up to date is left as it is.

    Raises:
        BrokerError: If PostgreSQL cannot be reached or refuses; nothing has changed then.

    """
    import psycopg2  # noqa: PLC0415

    from .brokers.postgres import dsn  # noqa: PLC0415

    try:
        connection = psycopg2.connect(dsn.complete(url, "sse-relay-init-db"))
    except psycopg2.Error as exc:
        raise BrokerUnavailable(f"PostgreSQL cannot be reached: {' '.join(str(exc).split())}") from exc
    # A snapshot from before the lock would not show what another run has just made.
    connection.set_session(isolation_level="READ COMMITTED")
    try:
        with connection, connection.cursor() as cursor:
            done = [f"version {number}: creating" for number in upgrade(cursor)]
            yield from done
            yield f"{dsn.shown(url)} has version {versions()[-1][0]} of the history" + ("" if done else ", as before")
    except psycopg2.errors.InsufficientPrivilege as exc:
        raise BrokerRefused(
            f"{_first_line(exc)}; run it as the database's owner, or give psql what --print-sql prints"
        ) from exc
    except psycopg2.Error as exc:
        raise BrokerError(f"PostgreSQL did not take it, nothing has changed: {_first_line(exc)}") from exc
    finally:
        connection.close()


def upgrade(cursor: Any, target: int | None = None) -> Iterator[int]:
    """
    Bring the database of an open transaction up to version ``target``, the newest by default, and yield what is created.

    What has it already, or a newer one that this program knows, is left as it is.

    Raises:
        BrokerError: If the database cannot have a history, or has one that this program does not know.

    """
    cursor.execute("SET LOCAL standard_conforming_strings = on")
    cursor.execute("SHOW server_encoding")
    if cursor.fetchone()[0] == "SQL_ASCII":
        raise BrokerError(
            "the database's encoding is SQL_ASCII, which lets in text that no one can read back; "
            "use one that was created with ENCODING 'UTF8'"
        )
    cursor.execute("SELECT pg_advisory_xact_lock(%s)", (_LOCK,))
    found, newest = installed(cursor), versions()[-1][0]
    if found > newest:
        raise BrokerError(f"the database has version {found} of the history, this program knows {newest} only")
    for number, text in versions():
        if found < number <= (target or newest):
            cursor.execute(text)
            cursor.execute(_RECORD, (number,))
            yield number


def remove(cursor: Any) -> None:
    """Drop the history and all that belongs to it, and leave no trace."""
    cursor.execute("DROP FUNCTION IF EXISTS relay_notify(text, jsonb)")
    cursor.execute("DROP SCHEMA IF EXISTS sse_relay CASCADE")


def installed(cursor: Any) -> int:
    """Return the version of the history that the cursor's database has, 0 where there is none."""
    cursor.execute("SELECT count(*) FROM pg_catalog.pg_tables WHERE schemaname = 'sse_relay' AND tablename = 'version'")
    if not cursor.fetchone()[0]:
        return 0
    cursor.execute("SELECT max(version) FROM sse_relay.version")
    return int(cursor.fetchone()[0] or 0)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
