"""``notify()``: from the application to every page on a channel.

Loads a driver at the first call only, and never Tornado.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import Any, Protocol

from . import channels, events, project, settings
from .errors import SettingsError


class Publisher(Protocol):
    """A broker as ``notify()`` uses it."""

    def publish(self, channel: str, payload: str, own_id: str | None = None) -> None:
        """Send one event; see the brokers' publishers for what they raise."""

    def check(self, channel: str, payload: str) -> None:
        """Raise now what `publish` would of an event's size."""

    def newest(self) -> str:
        """Return the id of the newest event of the history, or nothing where there is none."""

    def close(self) -> None:
        """End the connection; the next `publish` opens another."""


_publishers: dict[tuple[str, str], Publisher] = {}
_lock = threading.Lock()


def _new_lock() -> None:
    global _lock  # noqa: PLW0603  (another thread of the parent may hold it for ever)
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock)


def notify(channel: str, sse_payload: Mapping[str, Any], *, using: str | None = None) -> None:
    """
    Send an event to every page that is on ``channel``.

    With PostgreSQL inside Django it runs on Django's own connection: the event of a transaction that is
    rolled back is never seen, that of one that commits always is. With Redis inside Django it is sent
    when the transaction has committed. Outside Django it is sent at once, on a connection that the
    process keeps. Threads and forked processes may call it.

    The broker is what `REDIS_URL`, `DATABASE_URL` and `RELAY_USE_PG` say, in Django's ``SSE_RELAY``, the
    environment or the working directory's ``.env``; where they say nothing, Django's database.

    Args:
        channel: 1 to 200 characters without control characters; case matters.
        sse_payload: ``event`` (text), ``id`` (text or whole number), ``data`` (text, or anything JSON
            can hold, which the page gets as JSON), ``retry`` (milliseconds), ``comment`` (text), ``sep``
            (line ending); at least one.
        using: Django's alias of the database, or of the transaction that Redis waits for; by default
            what ``SSE_RELAY["DATABASE"]`` says, or else ``default``.

    Raises:
        ChannelError: If ``channel`` cannot be one.
        EventError: If a field cannot be sent exactly as given; `PayloadTooLarge` if PostgreSQL's 7,999
            bytes are not enough for the event.
        SettingsError: If it is not clear where to send to.
        BrokerError: If the broker cannot be reached or refuses. On Django's own connection errors are
            Django's (`django.db.Error`), so that ``atomic()`` sees them.

    """
    channels.check(channel)
    payload = events.serialize(sse_payload)
    send(channel, payload, events.own_id(sse_payload), using)


def send(channel: str, payload: str, own_id: str | None, using: str | None) -> None:
    """Send an event that has been checked, as `notify` does."""
    broker, connection = target(using)
    if connection is None:
        _publisher(*broker).publish(channel, payload, own_id)
    elif broker is None:
        from .brokers.postgres import publisher  # noqa: PLC0415

        with connection.cursor() as cursor:
            publisher.execute(cursor, _database(connection), channel, payload, own_id)
    else:
        _publisher(*broker).check(channel, payload)
        from django.db import transaction  # noqa: PLC0415

        transaction.on_commit(lambda: _publisher(*broker).publish(channel, payload, own_id), using=connection.alias)


def current_event_id(*, using: str | None = None) -> str:
    """
    Return the id of the newest event, for a page that is rendered first and connects later.

    Ask for it before the page's data is read, and let the page connect with ``?last_event_id=`` and it:
    then the page gets what was published in between. In a transaction of ``REPEATABLE READ`` on
    PostgreSQL it is the newest that the transaction sees.

    Args:
        using: As for `notify`.

    Returns:
        The id, or an empty text where the broker keeps no history; a page with that begins at its connect.

    Raises:
        SettingsError: If it is not clear what to ask.
        BrokerError: If the broker cannot be reached or refuses.

    """
    broker, connection = target(using)
    if broker is None:
        from .brokers.postgres import publisher  # noqa: PLC0415

        with connection.cursor() as cursor:
            return publisher.newest(cursor, _database(connection))
    return _publisher(*broker).newest()


def target(using: str | None = None) -> tuple[Any, Any]:
    """
    Return broker and Django's connection as `notify` takes them.

    Without the connection this is outside of Django; without the broker, it is Django's database.

    Raises:
        SettingsError: If there is neither.

    """
    broker = settings.current_broker()
    connection = django_connection(using)
    if connection is None and broker is None:
        raise SettingsError("notify() has no broker; set REDIS_URL, or DATABASE_URL (postgresql://...)")
    if connection is not None and connection.vendor == "postgresql" and (broker is None or broker[0] == "postgres"):
        return None, connection
    if connection is not None and broker is None:
        raise SettingsError(
            f"notify() has no broker: Django's database {connection.alias!r} is {connection.vendor}, not PostgreSQL; "
            "set REDIS_URL, or DATABASE_URL (postgresql://...)"
        )
    return broker, connection


def _database(connection: Any) -> tuple[Any, ...]:
    return tuple(connection.settings_dict.get(key) for key in ("NAME", "HOST", "PORT", "USER"))


def _publisher(kind: str, url: str) -> Publisher:
    with _lock:
        publisher = _publishers.get((kind, url))
        if publisher is None:
            publisher = _publishers[kind, url] = open_publisher(kind, url)
        return publisher


def open_publisher(kind: str, url: str) -> Publisher:
    """
    Return a publisher of its own for the broker at ``url``; ``kind`` is ``postgres`` or ``redis``.

    Raises:
        SettingsError: If the broker's driver is not installed.

    """
    try:
        if kind == "redis":
            from .brokers.redis.publisher import RedisPublisher  # noqa: PLC0415

            return RedisPublisher(url)
        from .brokers.postgres.publisher import PostgresPublisher  # noqa: PLC0415

        return PostgresPublisher(url)
    except ModuleNotFoundError as exc:
        raise SettingsError(f"{exc.name} is not installed; install sse-relay-server[{kind}]") from exc


def django_connection(using: str | None) -> Any:
    """
    Return Django's connection that `notify` is to follow, or None outside Django, or where Django has no such database.

    Raises:
        SettingsError: If ``using`` is no alias.

    """
    if project.conf() is None:
        if using is not None:
            raise SettingsError(f"using={using!r} names a database of Django, but Django is not set up in this process")
        return None
    from django.db import connections  # noqa: PLC0415

    alias = using or project.alias()
    if alias not in connections:
        named = f"using={using!r}" if using else f"SSE_RELAY['DATABASE'], {alias!r},"
        raise SettingsError(f"{named} is not in DATABASES; known are {', '.join(connections)}")
    connection = connections[alias]
    # Django puts a dummy in the place of databases that a project does not have.
    return connection if connection.vendor != "unknown" else None
